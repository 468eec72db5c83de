"""A mixture-of-experts language model for TPUs, in Equinox.

Axis names, the same everywhere. Inside `shard_map` a name is the size on one device.

    batch      rows of a batch                 experts   feed-forward experts of a layer
    seq        tokens of a row                 choices   experts that a token goes to
    d_model    width of the residual stream    d_ff      width of an expert
    heads      query heads                     layers    blocks, stacked on the first axis
    kv_heads   key and value heads             vocab     pieces of the tokenizer
    head_dim   width of a head                 length    slots of a KV cache
"""

# Before jax is imported.
from vishwamai_eqx import environment as environment  # isort: skip

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vishwamai_eqx.version import __version__ as __version__

if TYPE_CHECKING:
    from vishwamai_eqx.model import VishwamAI as VishwamAI
    from vishwamai_eqx.run import load as load

# By its folder: asked for `kernels.flash_attention`, an editable install's finder answers whatever `kernels` is.
if not any(
    Path(folder, "moe_dispatch", "plan.py").is_file()
    for folder in getattr(importlib.util.find_spec("kernels"), "submodule_search_locations", None) or ()
):
    raise ImportError(
        "`kernels` is another distribution's package of that name, not VishwamAI's: uninstall it "
        "(`pip uninstall kernels`) and install vishwamai-eqx again, or use an environment of its own."
    )

_HOMES = {"VishwamAI": "vishwamai_eqx.model", "load": "vishwamai_eqx.run"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: a module of this package that is run as a command must not have been imported before.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
