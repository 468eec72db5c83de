"""Which model a run trains: VishwamAI, or the Gemma that it fine-tunes."""

import jax
from jaxtyping import PRNGKeyArray

from vishwamai_eqx import gemma
from vishwamai_eqx.config import Config
from vishwamai_eqx.model import VishwamAI

Model = VishwamAI | gemma.Decoder


def build(config: Config, compute_dtype: str, key: PRNGKeyArray) -> Model:
    """The model of a configuration, untrained."""
    shape, fp8 = config.model, config.scaling if config.precision == "fp8" else None
    if config.gemma is not None:
        return gemma.Decoder(config.gemma, compute_dtype, shape.remat, attention=shape.attention, fp8=fp8, key=key)
    arguments = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    return VishwamAI(**arguments, compute_dtype=compute_dtype, fp8=fp8, key=key)


def abstract(config: Config, compute_dtype: str) -> Model:
    """The model's shapes and types, nothing allocated."""
    return jax.eval_shape(lambda: build(config, compute_dtype, jax.random.key(0)))
