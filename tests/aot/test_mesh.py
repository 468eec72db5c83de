"""What a mixture layer on a mixed mesh sends over the wires of a TPU, counted in the compiled program."""

import math
import re
from collections import defaultdict

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels import topology
from tests.small import MIXED
from vishwamai_eqx.config import AXES, BATCH_AXES
from vishwamai_eqx.mesh import gather, on_mesh, place, sum_over
from vishwamai_eqx.moe import MoE

WIDTH, FFN, EXPERTS, ROWS, SEQ = 256, 512, 8, 16, 64
BYTES = {"bf16": 2, "f32": 4, "s32": 4}
COLLECTIVE = re.compile(
    r"= (\w+)\[([\d,]*)\]\S* "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)(?:-start)?\("
)


def collectives(program: str) -> dict[tuple[str, str], list[int]]:
    """Bytes of the result of each collective of a program without loops, by kind and type."""
    found = defaultdict(list)
    for kind, shape, operation in COLLECTIVE.findall(program):
        found[operation, kind].append(math.prod(map(int, shape.split(","))) * BYTES[kind] if shape else BYTES[kind])
    return found


@pytest.mark.parametrize("generation", ["v3", "v6e"])
def test_bytes_of_a_mixture_layer_with_remat(generation):
    on = topology.mesh(generation, tuple(MIXED.get(axis, 1) for axis in AXES), AXES)
    layer = jax.eval_shape(lambda: MoE(WIDTH, FFN, EXPERTS, 2, key=jax.random.key(0)))
    specs, rows = place(layer, dict(on.shape)), on_mesh(P(BATCH_AXES), on)
    shapes = jax.ShapeDtypeStruct((ROWS, SEQ, WIDTH), jnp.bfloat16), jax.ShapeDtypeStruct((ROWS, SEQ), jnp.float32)

    def loss(layer, x, real):
        y, _ = jax.checkpoint(lambda layer, x: gather(layer, specs, jnp.bfloat16)(x, real))(layer, x)
        return sum_over(jnp.sum(jnp.square(y.astype(jnp.float32))), *BATCH_AXES)

    step = jax.shard_map(
        jax.grad(loss, (0, 1)), mesh=on, in_specs=(specs, rows, rows), out_specs=(specs, rows), check_vma=True
    )
    placed = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, spec)),
        (layer, *shapes),
        (specs, rows, rows),
    )
    found = collectives(topology.lower_for(generation, step, *placed, on=on).compile().as_text())

    # Gate, up and down as a device computes with them: all of its width, its part of the experts and of the ffn.
    own = [EXPERTS // 2 * WIDTH * FFN // 2 * 2] * 3
    assert found["all-gather", "bf16"] == own * 2  # forward, and again for backward
    # Their gradients go once, in bf16; XLA makes no all-reduce of twice as much of them.
    assert found["all-to-all", "bf16"] == own
    # Rows of tokens go to the experts and back, in the forward pass, once more for remat, and as gradients.
    assert len(found["ragged-all-to-all", "bf16"]) == 6
    # The sums over `model`, of the layer's result and of the gradient of its input.
    assert found["all-reduce", "bf16"] == [ROWS * SEQ // 4 * WIDTH * 2] * 2
    kinds = {"all-gather", "all-to-all", "ragged-all-to-all", "all-reduce"}
    assert {kind for kind, _ in found} == kinds
    # What is left is the router and the counts.
    assert sum(sum(sizes) for (_, dtype), sizes in found.items() if dtype != "bf16") < 0.02 * sum(own)
