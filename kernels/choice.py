"""Which implementation of an operation runs."""

import difflib
import functools
import logging
from collections.abc import Collection
from typing import Any

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


def refuse_interpret(operation: str, name: str, interpret: Any) -> None:
    """**Raises** ValueError where an implementation that is no Pallas kernel is to be interpreted."""
    if interpret:
        raise ValueError(
            f"{operation}: interpret={interpret!r} has no meaning for implementation {name!r}; "
            "leave it out: only Pallas kernels can be interpreted"
        )


@functools.cache
def _log_once(operation: str, name: str) -> None:
    logger.info("%s: implementation %r, chosen automatically", operation, name)
