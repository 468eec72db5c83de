"""What generation would be on TPUs that are not there: memory, bytes a token, and the time that they bound.

The two programs of `decode` are compiled as they would run; what a step moves is read from the compiled text.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels import topology
from vishwamai_eqx import aot, decode, teacher, traffic
from vishwamai_eqx.config import PRESETS, Config
from vishwamai_eqx.decode import STRIDE, Orders, Rows, Where
from vishwamai_eqx.mesh import make_mesh, place
from vishwamai_eqx.sampling import Sampling, settings_of

BATCHES = 1, 64


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of some rows, on one device."""

    rows: int
    peak: int
    """Bytes of HBM."""
    weights: int
    """Bytes of the model."""
    cache: int
    """Bytes of what the rows have read, and of their logits."""
    moved: float | None
    """Bytes to and from HBM; None where the program is too big to be made."""
    seconds: float
    """At least, by the bytes of weights and cache."""
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.seconds


def examine(model: str, name: str, length: int, batches: tuple[int, ...] = BATCHES) -> dict[str, Any]:
    """The report of a model (a preset, a run, a Gemma folder or a Gemma's name) whose rows are `length` tokens.

    **Raises** ValueError for a model or a topology that there is not.
    """
    config = _configuration(model)
    generation, _ = topology.parse(name)
    devices = topology.devices(name)
    abstract = teacher.abstract(config, "bfloat16")
    sizes = _sizes(abstract, len(devices))
    mesh = make_mesh(sizes, devices)
    steps = [_step(abstract, mesh, sizes, batch, length, generation.hbm_bandwidth) for batch in batches]
    return {
        "model": model,
        "topology": name,
        "device": generation.device_kind,
        "devices": mesh.size,
        "mesh": sizes,
        "length": length,
        "capacity": generation.hbm,
        "fits": all(step.moved is not None for step in steps),
        "steps": [
            dataclasses.asdict(step)
            | {
                "tokens_per_second": step.tokens_per_second,
                "bytes_a_token": None if step.moved is None else step.moved * mesh.size / step.rows,
                "ratio": None if step.moved is None else step.moved / (step.weights + step.cache),
            }
            for step in steps
        ],
    }


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    lines = [
        f"{report['model']} on {report['topology']}: {report['devices']} devices ({report['device']}), mesh {mesh}, "
        f"bf16, rows of {report['length']} tokens",
        f"{'a device, GiB':16}{'peak':>8}{'of':>8}{'weights':>9}{'cache':>8}{'moved a step':>14}{'ratio':>7}"
        f"{'tokens/s':>12}",
    ]
    for step in report["steps"]:
        moved = "-" if step["moved"] is None else f"{step['moved'] / 2**30:.3f}"
        ratio = "-" if step["ratio"] is None else f"{step['ratio']:.2f}"
        lines.append(
            f"{step['rows']:>4} rows       {step['peak'] / 2**30:>8.2f}{report['capacity'] / 2**30:>8.2f}"
            f"{step['weights'] / 2**30:>9.3f}{step['cache'] / 2**30:>8.3f}{moved:>14}{ratio:>7}"
            f"{step['tokens_per_second']:>12,.0f}"
        )
    lines.append("tokens/s at most: the bytes of weights and cache over the HBM's bandwidth")
    lines.append("it fits" if report["fits"] else "it does not fit")
    return "\n".join(lines)


def _configuration(model: str) -> Config:
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model]
    return teacher.configuration(Path(model))


def _sizes(abstract: Any, devices: int) -> dict[str, int]:
    """As many devices as can along `model`, where each reads its own part of the weights; whole copies of that."""
    for model in range(devices, 0, -1):
        if devices % model == 0:
            sizes = {"replica": devices // model, "model": model}
            try:
                place(abstract, sizes)
            except ValueError:
                continue
            return sizes
    raise AssertionError


def _step(abstract: Any, mesh: Mesh, sizes: dict[str, int], batch: int, length: int, bandwidth: float) -> Step:
    specs = place(abstract, sizes)
    at = Where(mesh, tuple(jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))))
    count = max(batch, at.shards)

    def laid(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    model = jax.tree.map(laid, abstract, specs)
    started = time.perf_counter()
    # Kernels ask the ambient mesh which TPU they are traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rows = jax.eval_shape(lambda: decode.new_rows(model, at=at, rows=count, length=length, slack=STRIDE))
        rows = jax.tree.map(laid, rows, decode.specs_of(rows, at))
        orders = Orders(
            settings_of([Sampling(0.0)] * count, [0] * count),
            np.zeros(count, np.int32),
            np.zeros((count, STRIDE), np.int32),
            np.int32(0),
            np.int32(0),
        )
        orders = jax.tree.map(lambda leaf: laid(jnp.asarray(leaf), PartitionSpec()), orders)
        lowered = decode.write.trace(model, rows, None, None, orders, at=at).lower(lowering_platforms=("tpu",))
    weights, cache = _bytes(model), _bytes(rows)
    bound = (weights + cache) / bandwidth
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = aot.exhausted(str(error))
        if needed is None:
            raise
        return Step(batch, needed, weights, cache, None, bound, time.perf_counter() - started)
    memory = compiled.memory_analysis()
    assert memory is not None
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes
    moved = traffic.moved(compiled.as_text() or "") / STRIDE
    return Step(batch, peak, weights, cache, moved, bound, time.perf_counter() - started)


def _bytes(tree: Rows | Any) -> int:
    """On one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
