"""Weights held in 8 bits for generation, half of bf16's bytes, which is what a token at a time waits for.

Each column of a weight, all that one of its results is a sum of, has one scale: results are scaled, not weights
(LLM.int8(), arXiv 2208.07339). Activations stay as they are, and so do norms and routers.
"""

from typing import Any, Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

import kernels
from vishwamai_eqx.layers import Embedding, TPUGEMMLinear
from vishwamai_eqx.moe import MoE

Weights = Literal["int8", "fp8"]
Model = TypeVar("Model")
DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_NARROWED = TPUGEMMLinear, MoE, Embedding


def quantize(model: Model, weights: Weights | None) -> Model:
    """The model with the weights of its products, embedding and head included, in 8 bits; it generates, and no more.
    With None the model as it is.

    **Raises** ValueError if the model lies on several devices.
    """
    if weights is None:
        return model
    if (devices := len(jax.tree.leaves(model)[0].devices())) > 1:
        raise ValueError(f"weights={weights} is for one device, and the model lies on {devices}; leave it out there.")

    def narrow(weight: Array, contracted: int) -> kernels.Quantized:
        block = (weight.shape[-2], 1) if contracted == -2 else (1, weight.shape[-1])

        def one(matrix: Array) -> kernels.Quantized:
            return kernels.quantize(matrix, DTYPES[weights], block)

        for _ in weight.shape[2:]:
            one = jax.vmap(one)
        return one(weight)

    def of(module: Any) -> Any:
        if isinstance(module, TPUGEMMLinear):
            return _with(module, weight=narrow(module.weight, -1 if module.transposed else -2))
        if isinstance(module, Embedding):
            return _with(module, weight=narrow(module.weight, -1))
        if isinstance(module, MoE):
            gate, up, down = narrow(module.gate, -2), narrow(module.up, -2), narrow(module.down, -1)
            return _with(module, gate=gate, up=up, down=down)
        return module

    return eqx.filter_jit(lambda model: jax.tree.map(of, model, is_leaf=lambda node: isinstance(node, _NARROWED)))(
        model
    )


def size(model: Any) -> int:
    """Bytes that the arrays of a model take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def _with(module: Any, **weights: kernels.Quantized) -> Any:
    return eqx.tree_at(lambda it: tuple(getattr(it, name) for name in weights), module, tuple(weights.values()))
