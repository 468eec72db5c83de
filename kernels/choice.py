"""Which implementation of an operation runs."""

import difflib
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jax.typing import DTypeLike

from kernels.tpu import DTYPES, current_generation

logger = logging.getLogger("kernels")


def choose(operation: str, implementation: str | None, available: Collection[str], automatic: str) -> str:
    """The implementation's name: the one asked for, or the automatic one, which is logged once.

    **Raises** ValueError for a name that the operation does not have.
    """
    if implementation is None:
        _log_once(operation, automatic)
        return automatic
    if implementation not in available:
        names = ", ".join(repr(name) for name in sorted(available))
        nearest = difflib.get_close_matches(implementation, available, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{operation}: implementation={implementation!r} is not one of {names}; "
            f"use {nearest!r}, or None for the automatic choice"
        )
    return implementation


def choose_kernel(
    operation: str,
    implementation: str | None,
    available: Mapping[str, Callable[..., Any]],
    argument: str,
    dtype: DTypeLike,
    interpret: Any,
    dtypes: Collection[DTypeLike] = DTYPES,
) -> Callable[..., Any]:
    """The implementation of an operation that has a Pallas kernel, which on a TPU is the automatic one.

    `argument` names the array whose type, `dtype`, decides whether there is a kernel for it: those of `dtypes`.

    **Raises** ValueError where there is none, and where what is no Pallas kernel is to be interpreted.
    """
    automatic = "xla" if current_generation() is None or dtype not in dtypes else "pallas_tpu"
    name = choose(operation, implementation, available, automatic)
    if name == "pallas_tpu":
        if dtype not in dtypes:
            raise ValueError(
                f"{operation}: {argument}.dtype={dtype} is not {' or '.join(map(str, dtypes))}, which implementation "
                f"'pallas_tpu' takes; cast {argument}, or pass implementation='xla'"
            )
        return functools.partial(available[name], interpret=interpret)
    if interpret:
        raise ValueError(
            f"{operation}: interpret={interpret!r} has no meaning for implementation {name!r}; "
            "leave it out: only Pallas kernels can be interpreted"
        )
    return available[name]


@functools.cache
def warn_once(sentence: str) -> None:
    """Say something of how a program is computed, the first time that it is."""
    logger.warning("%s", sentence)


@functools.cache
def _log_once(operation: str, name: str) -> None:
    logger.info("%s: implementation %r, chosen automatically", operation, name)
