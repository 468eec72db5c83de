"""Settings of a run that fit its devices, found by the hand estimates alone.

Microbatches, the remat policy and the mesh are tried; the batch, and with it what is trained, stays.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from kernels import topology
from kernels.tpu import Generation
from vishwamai_eqx import flops, memory, roofline
from vishwamai_eqx.config import AUTO_MESH, BATCH_AXES, Config, Remat, parse_mesh
from vishwamai_eqx.factors import divisors
from vishwamai_eqx.validation import problems

# The estimate is within 15% of the compiler's figure; what a search chooses should fit all the same.
MARGIN = 0.87


class Plan(NamedTuple):
    """The best of a search."""

    config: Config
    searched: int
    """Settings that were weighed."""


def settled(config: Config, devices: int, hbm: int | None) -> Config:
    """The configuration with the mesh that `auto` stands for on so many devices of `hbm` bytes; None: not known.

    All of them on `data`; if a step does not fit so, as few as possible on `expert`, and failing that on `model`.
    """
    if config.mesh != AUTO_MESH or hbm is None:
        return config
    for spec in meshes(config, devices):
        placed = dataclasses.replace(config, mesh=spec)
        if not problems(placed, devices) and memory.estimate(placed, parse_mesh(spec, devices)).peak <= MARGIN * hbm:
            return placed
    return config


def meshes(config: Config, devices: int) -> Iterator[str]:
    """Every division of the devices among `data`, `expert` and `model`, in the order in which it is worth a try."""
    experts = [n for n in divisors(devices) if config.model.num_experts % n == 0]
    for model, expert in itertools.product(divisors(devices), experts):
        if devices % (model * expert) == 0:
            sizes = {"data": devices // (model * expert), "expert": expert, "model": model}
            yield ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) if model * expert > 1 else AUTO_MESH


def search(config: Config) -> Plan:
    """The settings whose step is bounded by the least time, of those that fit by the estimate.

    Where none does, those that need the least memory. A mesh that was asked for stays.
    """
    assert config.topology is not None
    generation, shape = topology.parse(config.topology)
    specs = [config.mesh] if config.mesh != AUTO_MESH else [*meshes(config, topology.count(config.topology))]
    weighed = [(it, _peak(it)) for it in candidates(config, specs)]
    fitting = [it for it, peak in weighed if peak <= MARGIN * generation.hbm]
    if not fitting:
        return Plan(min(weighed, key=lambda pair: pair[1])[0], len(weighed))
    return Plan(min(fitting, key=lambda it: seconds(it, generation, shape)), len(weighed))


def nearest(config: Config, scale: float) -> list[dict[str, object]]:
    """For each setting the least change of it that makes the step fit; where none does alone, the best of all together.

    `scale` is by how much the compiler's figure was above the estimate where it did not fit, the state left out.
    """
    assert config.topology is not None
    generation, shape = topology.parse(config.topology)
    specs = dict.fromkeys([config.mesh, *meshes(config, topology.count(config.topology))])
    here = settings(config)
    every = [it for it in candidates(config, [*specs]) if _peak(it, scale) <= generation.hbm]
    found = []
    for name in here:
        alone = [it for it in every if [n for n in here if settings(it)[n] != here[n]] == [name]]
        if alone:
            found.append(settings(min(alone, key=lambda it: seconds(it, generation, shape))))
    return found or [settings(it) for it in sorted(every, key=lambda it: seconds(it, generation, shape))[:1]]


def settings(config: Config) -> dict[str, object]:
    """What is tried, as flags call it."""
    return {
        "optim.microbatches": config.optim.microbatches,
        "model.remat": config.model.remat,
        "mesh": config.mesh,
    }


def candidates(config: Config, specs: Sequence[str]) -> Iterator[Config]:
    """Every possible way to run the batch of a configuration on its topology, with one of those meshes."""
    assert config.topology is not None
    devices = topology.count(config.topology)
    for spec, parts, remat in itertools.product(specs, divisors(config.optim.batch_size), get_args(Remat)):
        changed = dataclasses.replace(
            config,
            mesh=spec,
            optim=dataclasses.replace(config.optim, microbatches=parts),
            model=dataclasses.replace(config.model, remat=remat),
        )
        if not problems(changed, devices):
            yield changed


def seconds(config: Config, generation: Generation, shape: tuple[int, ...]) -> float:
    """The least time of a step by hand, exchanges not overlapped with products: small ones are not."""
    devices = math.prod(shape) * generation.devices
    tokens = config.optim.batch_size * config.model.max_seq_len
    sizes = _sizes(config)
    held, parts = memory.shards(config, sizes), config.optim.microbatches
    # Weights are gathered forward and, with remat, again; gradients are sent once.
    gathers = 1 if config.model.remat == "none" else 2
    wire = 2 * parts * held.gathered * (gathers + roofline.hops(shape)) + _of_tokens(config, sizes, shape)
    moved = roofline.hbm_bytes(config, 4 * (held.parameters + held.optimizer), 2 * held.gathered)
    per_device = tokens / devices
    bound = roofline.roofline(
        generation, roofline.executed(config) * per_device, flops.per_token(config) * per_device, moved, wire
    )
    return max(bound.compute, bound.hbm) + bound.ici


def _of_tokens(config: Config, sizes: dict[str, int], shape: tuple[int, ...]) -> float:
    """Bytes that a device sends in a step for its tokens: to their experts and back, and in sums over `model`."""
    model = config.model
    tokens = config.optim.batch_size * model.max_seq_len / math.prod(sizes[axis] for axis in BATCH_AXES)
    stream = 2 * tokens * model.hidden_size
    # Two exchanges and two sums forward, as many for the gradients; with remat both exchanges again and one sum.
    again = model.remat != "none"
    exchanged = (4 + 2 * again) * stream * min(model.experts_per_token, model.num_experts) * roofline.hops(shape)
    summed = (4 + again) * stream * 2
    others = [(n - 1) / n for n in (sizes["expert"], sizes["model"])]
    return model.num_layers * (exchanged * others[0] + summed * others[1])


def _peak(config: Config, scale: float = 1.0) -> float:
    found = memory.estimate(config, _sizes(config))
    state = found.parameters + found.optimizer
    return state + scale * (found.peak - state)


def _sizes(config: Config) -> dict[str, int]:
    assert config.topology is not None
    return parse_mesh(config.mesh, topology.count(config.topology))
