"""A run directory as a whole: what `vishwamai_eqx.load` reads back."""

from pathlib import Path
from typing import NamedTuple

import jax

from vishwamai_eqx import checkpoint
from vishwamai_eqx.command_line import read_config
from vishwamai_eqx.config import Config
from vishwamai_eqx.mesh import gather
from vishwamai_eqx.model import VishwamAI, build
from vishwamai_eqx.precision import compute_dtype
from vishwamai_eqx.tokenizer import VishwamAITokenizer


class Loaded(NamedTuple):
    """What a run directory holds."""

    model: VishwamAI
    tokenizer: VishwamAITokenizer
    config: Config


def load(run_dir: str | Path, *, step: int | None = None, cast: bool = True) -> Loaded:
    """Model, tokenizer and configuration of a run, its newest good checkpoint or the one of `step`.

    `cast` stores matrices in the compute type, for generation; without it they are f32, as trained. Raises ValueError
    if the directory is not a run's, or has no good checkpoint.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    if config is None:
        raise ValueError(f"run_dir={str(run_dir)!r} must be a run's: it has no config.json; train one with train.py.")
    tokenizer = VishwamAITokenizer(run_dir / "tokenizer")
    dtype = compute_dtype(config.precision)
    abstract = jax.eval_shape(lambda: build(config.model, dtype, jax.random.key(0)))
    model = checkpoint.read(run_dir / "checkpoints", {"model": abstract}, step=step)["model"]
    return Loaded(gather(model, None, dtype) if cast else model, tokenizer, config)
