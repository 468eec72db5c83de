"""Linear map, norms, embedding, rotary positions, and the gated feed-forward of a dense layer."""

import functools
import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

import kernels
from kernels import Fp8, Quantized
from kernels.compat import accumulator, varying_axes
from vishwamai_eqx.mesh import index, sum_over, vary
from vishwamai_eqx.parameters import normal, parameter

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The type that sums over numbers of `dtype` are taken in: f32, or f64 of f64."""
    return jnp.promote_types(dtype, jnp.float32)


PRODUCT_INPUT = "product_input"
"""The name under which a remat policy finds what goes into the products with weights."""


def operand(x: Float[Array, "*batch k"], weight: Array | Fp8 | Quantized, block_size: int) -> Array | Fp8:
    """x as all products of it with such weights take it, and as it is kept for the backward pass by `PRODUCT_INPUT`:
    rounded to fp8 once if they are."""
    if not isinstance(weight, Fp8):
        return checkpoint_name(x, PRODUCT_INPUT)
    rounded = kernels.fp8_activations(x, block_size, weight.meters)
    values, scales = checkpoint_name(jax.lax.stop_gradient(rounded[:2]), PRODUCT_INPUT)
    return Fp8(values, scales, rounded.gradient)


def narrow_product(
    x: Float[Array, "*batch k"], weight: Quantized, transposed: bool, dtype: jnp.dtype
) -> Float[Array, "*batch n"]:
    """x W with W held in 8 bits, in `dtype`."""
    # Of f16, which the kernels have not, f32 holds every number.
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).astype(wide(x.dtype) if x.dtype == jnp.float16 else x.dtype)
    y = kernels.scaled_matmul(flat, weight.values, None, weight.scales, transposed=transposed, dtype=dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class TPUGEMMLinear(eqx.Module):
    """y = x W + b, with W cast to the type of x and sums in f32.

    `use_fp8` permits FP8 for the product where the run's precision asks for it, and `mesh.gather` then gives W in fp8;
    `block_size` is the side of the blocks that share a scale. `gain` multiplies the initial standard deviation,
    1 / sqrt(in_features).

    W is stored with its narrower side first, transposed where it makes fewer features than it takes: that is the side
    whose gradient XLA's CPU library computes at full speed.

    `split` is the side that the mesh's `model` divides, and the parts, such as heads, that have to stay whole. With
    "features" x has to vary over `model`, and each device has its part of y; with "in_features" each has its part of x,
    and y is summed over them.
    """

    in_features: int = eqx.field(static=True)
    features: int = eqx.field(static=True)
    use_fp8: bool = eqx.field(static=True)
    block_size: int = eqx.field(static=True)
    split: tuple[Literal["features", "in_features"], int] | None = eqx.field(static=True)
    weight: Float[Array, "narrow wide"] = parameter(decay=True, split=lambda linear: linear.split_axis, fp8=True)
    bias: Float[Array, "features"] | None = parameter(decay=False)

    def __init__(
        self,
        in_features: int,
        features: int,
        use_bias: bool = True,
        use_fp8: bool = True,
        block_size: int = 128,
        *,
        gain: float = 1.0,
        split: tuple[Literal["features", "in_features"], int] | None = None,
        key: PRNGKeyArray,
    ):
        if use_bias and split is not None:
            raise ValueError(f"use_bias=True has no place on a mesh with split={split}; pass use_bias=False.")
        self.weight = normal(key, tuple(sorted((in_features, features))), gain / math.sqrt(in_features))
        self.bias = jnp.zeros(features) if use_bias else None
        self.in_features, self.features = in_features, features
        self.use_fp8, self.block_size, self.split = use_fp8, block_size, split

    @property
    def transposed(self) -> bool:
        """Whether W is stored [features, in_features]."""
        return self.features < self.in_features

    @property
    def split_axis(self) -> tuple[int, int] | None:
        """The axis of the stored W that the mesh's `model` divides, and into how many parts it can."""
        return self.split and (int((self.split[0] == "features") != self.transposed), self.split[1])

    @property
    def here(self) -> tuple[int, int]:
        """What this device's part of W takes and makes."""
        rows, columns = self.weight.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def operand(self, x: Float[Array, "*batch {self.here[0]}"]) -> Array | Fp8:
        """x as this and other linear maps of it take it: see `operand`."""
        return operand(x, self.weight, self.block_size)

    def __call__(self, x: Float[Array, "*batch {self.here[0]}"] | Fp8) -> Float[Array, "*batch {self.here[1]}"]:
        if isinstance(self.weight, Fp8):
            y = kernels.fp8_gemm(x, self.weight, transposed=self.transposed, block_size=self.block_size)
        elif isinstance(self.weight, Quantized):
            y = narrow_product(x, self.weight, self.transposed, x.dtype)
        else:
            y = kernels.gemm(x, self.weight, transposed=self.transposed)
        if self.split is not None and self.split[0] == "in_features":
            return sum_over(y, "model")
        return y if self.bias is None else y + self.bias.astype(y.dtype)


class TPULayerNorm(eqx.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias over the last axis, computed in f32 (1607.06450)."""

    dim: int = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    scale: Float[Array, "dim"] | None = parameter(decay=False, cast=False)
    bias: Float[Array, "dim"] | None = parameter(decay=False, cast=False)

    def __init__(self, dim: int, epsilon: float = 1e-6, use_bias: bool = True, use_scale: bool = True):
        self.scale = jnp.ones(dim) if use_scale else None
        self.bias = jnp.zeros(dim) if use_bias else None
        self.dim, self.epsilon = dim, epsilon

    def __call__(self, x: Float[Array, "*batch {self.dim}"]) -> Float[Array, "*batch {self.dim}"]:
        y = x.astype(wide(x.dtype))
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        y = y if self.scale is None else y * self.scale
        y = y if self.bias is None else y + self.bias
        return y.astype(x.dtype)


class RMSNorm(eqx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * (1 + weight) over the last axis, in f32 and cast down last (1910.07467)."""

    dim: int = eqx.field(static=True)
    epsilon: float = eqx.field(static=True)
    weight: Float[Array, "dim"] = parameter(decay=False, cast=False)

    def __init__(self, dim: int, epsilon: float = 1e-6):
        self.weight = jnp.zeros(dim)
        self.dim, self.epsilon = dim, epsilon

    def __call__(self, x: Float[Array, "*batch {self.dim}"]) -> Float[Array, "*batch {self.dim}"]:
        y = x.astype(wide(x.dtype))
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.epsilon)
        return (y * (1 + self.weight)).astype(x.dtype)


class Embedding(eqx.Module):
    """A row for each piece; as a head, its transpose. Each device along the mesh's `model` has its part of the rows."""

    weight: Float[Array, "vocab d_model"] = parameter(decay=True, split="vocab")

    def __init__(self, vocab_size: int, hidden_size: int, *, std: float, key: PRNGKeyArray):
        self.weight = normal(key, (vocab_size, hidden_size), std)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        if isinstance(self.weight, Quantized):
            return self.weight.values[tokens].astype(jnp.float32) * self.weight.scales[tokens]
        return sum_over(take_rows(self.weight, tokens - self.first_row), "model")

    @property
    def first_row(self) -> Int[Array, ""] | int:
        """The piece that the first of this device's rows is of."""
        return index("model") * self.weight.shape[0]

    def logits(self, hidden: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab"]:
        if isinstance(self.weight, Quantized):
            return narrow_product(hidden, self.weight, True, wide(hidden.dtype))
        weight = self.weight.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=wide(hidden.dtype))


def take_rows(table: Float[Array, "rows width"], index: Int[Array, "*batch"]) -> Float[Array, "*batch width"]:
    """table[index], and zeros where there is no such row, whose gradient goes nowhere.

    The gradient of a row that is taken often is summed in f32: in bf16 a sum of ones ends at 256.
    """
    return taken(table, index, table.shape[0], table.dtype, varying_axes(table))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def taken(table: Array, index: Array, rows: int, dtype: jnp.dtype, axes: frozenset[str]) -> Array:
    return table.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def taken_fwd(table: Array, index: Array, rows: int, dtype: jnp.dtype, axes: frozenset[str]) -> tuple[Array, Array]:
    return taken(table, index, rows, dtype, axes), index


def taken_bwd(rows: int, dtype: jnp.dtype, axes: frozenset[str], index: Array, g: Array) -> tuple[Array, None]:
    index, g = vary(index.reshape(-1), *axes), vary(g.reshape(-1, g.shape[-1]), *axes)
    if accumulator(dtype) != dtype:
        # Summed over the places of each token first, at the first of them: a wide table would be 1.5 GiB for half of
        # Gemma's vocabulary.
        own = jnp.arange(len(index))
        first = vary(jnp.full(rows, len(own)), *axes)
        first = first.at[index].min(own, mode="drop", wrap_negative_indices=False)
        first = first.at[index].get(mode="fill", fill_value=len(own), wrap_negative_indices=False)
        sums = jnp.zeros_like(g, accumulator(dtype)).at[first].add(g.astype(accumulator(dtype)), mode="drop")
        index, g = jnp.where(first == own, index, rows), sums.astype(dtype)
    table = vary(jnp.zeros((rows, g.shape[-1]), dtype), *axes)
    return table.at[index].add(g.astype(dtype), mode="drop", wrap_negative_indices=False), None


taken.defvjp(taken_fwd, taken_bwd)


def rotary_angles(
    positions: Int[Array, "batch seq"], head_dim: int, theta: float, dtype: jnp.dtype, factor: float = 1.0
) -> tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]]:
    """Cosine and sine of position / factor * theta^(-2i/head_dim) for pairs i of a head (2104.09864), in `dtype`."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=dtype) / half) / factor
    angles = positions[:, :, None, None] * frequencies
    # Kept whole: XLA would rather compute them again in every layer, for every head, forward and backward.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    angles: tuple[Float[Array, "batch seq 1 half"], Float[Array, "batch seq 1 half"]],
) -> Float[Array, "batch seq heads head_dim"]:
    """Turn dimension i of a head with i + head_dim / 2 by the angles of `rotary_angles`."""
    cos, sin = angles
    a, b = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class GatedMLP(eqx.Module):
    """down(activation(gate(x)) * up(x)) (2002.05202): the feed-forward of a layer with one expert."""

    gate: TPUGEMMLinear
    up: TPUGEMMLinear
    down: TPUGEMMLinear
    activation: Activation = eqx.field(static=True)

    def __init__(
        self,
        hidden_size: int,
        ffn_dim: int,
        activation: Activation = "silu",
        use_fp8: bool = True,
        *,
        residual_gain: float = 1.0,
        key: PRNGKeyArray,
    ):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        inner, outer = ("features", ffn_dim), ("in_features", ffn_dim)
        self.gate = TPUGEMMLinear(hidden_size, ffn_dim, False, use_fp8, split=inner, key=gate_key)
        self.up = TPUGEMMLinear(hidden_size, ffn_dim, False, use_fp8, split=inner, key=up_key)
        self.down = TPUGEMMLinear(ffn_dim, hidden_size, False, use_fp8, gain=residual_gain, split=outer, key=down_key)
        self.activation = activation

    def __call__(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        shared = self.gate.operand(vary(x, "model"))
        inner = gated(self.activation, self.gate(shared), self.up(shared))
        return self.down(self.down.operand(inner))


def gated(
    activation: Activation, gate: Float[Array, "*batch d_ff"], up: Float[Array, "*batch d_ff"]
) -> Float[Array, "*batch d_ff"]:
    """activation(gate) * up, in f32 inside: CPUs have no bf16 exponential, and the rounding in between cost more."""
    dtype = wide(gate.dtype)
    return (ACTIVATIONS[activation](gate.astype(dtype)) * up.astype(dtype)).astype(gate.dtype)
