"""Mixture of experts: the router, its losses, and the experts that its choices lead to. No token is dropped."""

import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import kernels
from vishwamai_eqx.exchange import route
from vishwamai_eqx.layers import Activation, gated, operand, wide
from vishwamai_eqx.mesh import sum_over, vary
from vishwamai_eqx.parameters import normal, parameter


class RouterMetrics(eqx.Module):
    """Sums over rows, to be divided by the row count of the whole step: so neither microbatches nor meshes matter."""

    balance: Float[Array, "*layers"]
    """Per row, experts * sum over experts of (share of choices) * (mean probability): 1 where both are even."""
    z: Float[Array, "*layers"]
    """Per row, the mean squared log-partition of the router (2202.08906)."""
    load: Float[Array, "*layers experts"]
    """Choices that went to each expert."""


class Router(eqx.Module):
    """Softmax over the experts in f32, and the best `choices` of them with weights that sum to one (2401.04088)."""

    experts_per_token: int = eqx.field(static=True)
    # Small numbers decide here between experts, so it stays f32 and outside weight decay.
    weight: Float[Array, "d_model experts"] = parameter(decay=False, cast=False)

    def __init__(self, hidden_size: int, num_experts: int, experts_per_token: int, *, key: PRNGKeyArray):
        # A tenth of the fan-in deviation: at first every expert gets its share, whatever the token.
        self.weight = normal(key, (hidden_size, num_experts), 0.1 / math.sqrt(hidden_size))
        self.experts_per_token = experts_per_token

    def __call__(
        self, x: Float[Array, "batch seq d_model"], real: Float[Array, "batch seq"]
    ) -> tuple[Int[Array, "batch seq choices"], Float[Array, "batch seq choices"], RouterMetrics]:
        """Each token's experts, their weights, and the metrics over tokens that are `real` (1) and not padding (0)."""
        x = x.astype(wide(x.dtype))
        logits = jnp.einsum("bsd,de->bse", x, self.weight.astype(x.dtype), precision="highest")
        experts = logits.shape[-1]
        best, index = top_k(logits, self.experts_per_token)
        weights = jax.nn.softmax(best, axis=-1)

        chosen = jax.nn.one_hot(index, experts, dtype=x.dtype).sum(axis=2) * real[..., None]
        probabilities = jax.nn.softmax(logits, axis=-1) * real[..., None]
        tokens = jnp.maximum(real.sum(axis=1), 1)[:, None]
        share = chosen.sum(axis=1) / (tokens * self.experts_per_token)
        log_partition = jax.nn.logsumexp(logits, axis=-1)
        metrics = RouterMetrics(
            balance=experts * jnp.sum(share * probabilities.sum(axis=1) / tokens),
            z=jnp.sum(jnp.square(log_partition) * real / tokens),
            load=chosen.sum(axis=(0, 1)),
        )
        return index, weights, metrics


def top_k(
    logits: Float[Array, "batch seq experts"], k: int
) -> tuple[Float[Array, "batch seq choices"], Int[Array, "batch seq choices"]]:
    """The k largest and where they are, k different ones whatever they are; among equals the first, as `lax.top_k`."""
    values, indices = [], []
    # What was taken is below all that is left: a token never takes an expert twice, for which there may be no room.
    rest = jnp.maximum(logits, jnp.finfo(logits.dtype).min)
    # k passes over a handful of experts; lax.top_k sorts every token's on CPU, ten times slower.
    for _ in range(k):
        index = jnp.argmax(rest, axis=-1)
        chosen = jax.nn.one_hot(index, logits.shape[-1], dtype=bool)
        values.append(jnp.sum(jnp.where(chosen, logits, 0), axis=-1))
        indices.append(index.astype(jnp.int32))
        rest = jnp.where(chosen, -jnp.inf, rest)
    return jnp.stack(values, axis=-1), jnp.stack(indices, axis=-1)


class MoE(eqx.Module):
    """sum over a token's experts e of weight_e * down_e(activation(gate_e(x)) * up_e(x)) (1701.06538, 2101.03961)."""

    router: Router
    activation: Activation = eqx.field(static=True)
    use_fp8: bool = eqx.field(static=True)
    block_size: int = eqx.field(static=True)
    implementation: str | None = eqx.field(static=True)
    gate: Float[Array, "experts d_model d_ff"] = parameter(decay=True, split="d_ff", fp8=True)
    up: Float[Array, "experts d_model d_ff"] = parameter(decay=True, split="d_ff", fp8=True)
    down: Float[Array, "experts d_model d_ff"] = parameter(decay=True, split="d_ff", fp8=True)

    def __init__(
        self,
        hidden_size: int,
        ffn_dim: int,
        num_experts: int,
        experts_per_token: int,
        activation: Activation = "silu",
        use_fp8: bool = True,
        block_size: int = 128,
        *,
        implementation: str | None = None,
        residual_gain: float = 1.0,
        key: PRNGKeyArray,
    ):
        router_key, gate_key, up_key, down_key = jax.random.split(key, 4)
        self.router = Router(hidden_size, num_experts, experts_per_token, key=router_key)
        self.gate = normal(gate_key, (num_experts, hidden_size, ffn_dim), 1 / math.sqrt(hidden_size))
        self.up = normal(up_key, (num_experts, hidden_size, ffn_dim), 1 / math.sqrt(hidden_size))
        self.down = normal(down_key, (num_experts, hidden_size, ffn_dim), residual_gain / math.sqrt(ffn_dim))
        self.activation, self.implementation = activation, implementation
        self.use_fp8, self.block_size = use_fp8, block_size

    def __call__(
        self, x: Float[Array, "batch seq d_model"], real: Float[Array, "batch seq"]
    ) -> tuple[Float[Array, "batch seq d_model"], RouterMetrics]:
        batch, seq, d_model = x.shape
        with jax.named_scope("router"):
            index, weights, metrics = self.router(x, real)
        with jax.named_scope("dispatch"):
            flat = (batch * seq, -1)
            # One copy for each device along `model` here, before there are several rows of each token to sum.
            tokens = vary(x, "model").reshape(flat)
            rows, plan = kernels.moe_dispatch(
                tokens, index.reshape(flat), self.router.weight.shape[1], implementation=self.implementation
            )
        with jax.named_scope("exchange"):
            way = route(plan)
            rows = way.deliver(rows)
        with jax.named_scope("experts"):

            def grouped(rows: Any, weight: Any, transposed: bool = False) -> Array:
                product = kernels.grouped_matmul
                if isinstance(weight, kernels.Fp8):
                    product = functools.partial(kernels.fp8_grouped_matmul, block_size=self.block_size)
                elif isinstance(weight, kernels.Quantized):
                    weight = (weight.values.astype(jnp.float32) * weight.scales).astype(rows.dtype)
                return product(
                    rows,
                    weight,
                    transposed=transposed,
                    group_sizes=way.group_sizes,
                    row_alignment=way.row_alignment,
                    implementation=self.implementation,
                )

            rows = operand(rows, self.gate, self.block_size)
            inner = gated(self.activation, grouped(rows, self.gate), grouped(rows, self.up))
            rows = grouped(operand(inner, self.down, self.block_size), self.down, transposed=True)
        with jax.named_scope("exchange"):
            rows = way.collect(rows)
        with jax.named_scope("combine"):
            y = kernels.moe_combine(rows, plan, weights.reshape(flat), implementation=self.implementation)
            y = sum_over(y, "model")
        return y.reshape(batch, seq, d_model), metrics
