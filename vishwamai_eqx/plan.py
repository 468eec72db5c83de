"""Settings of a run that fit a topology, found by the hand estimates alone.

Microbatches and the remat policy are tried; the mesh and the batch, and with it what is trained, stay.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, get_args

from kernels import topology
from kernels.tpu import Generation
from vishwamai_eqx import flops, memory, roofline
from vishwamai_eqx.config import Config, Remat, parse_mesh
from vishwamai_eqx.factors import divisors
from vishwamai_eqx.validation import problems

# The estimate is within 15% of the compiler's figure; what a search chooses should fit all the same.
MARGIN = 0.87


class Plan(NamedTuple):
    """The best of a search."""

    config: Config
    searched: int
    """Settings that were weighed."""


def search(config: Config) -> Plan:
    """The settings whose step is bounded by the least time, of those that fit by the estimate.

    Where none does, those that need the least memory.
    """
    assert config.topology is not None
    generation, shape = topology.parse(config.topology)
    weighed = [(it, _peak(it, generation)) for it in candidates(config)]
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
    here, every = settings(config), [it for it in candidates(config) if _peak(it, generation, scale) <= generation.hbm]
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


def candidates(config: Config) -> Iterator[Config]:
    """Every possible way to run the batch of a configuration on its topology."""
    assert config.topology is not None
    devices = topology.count(config.topology)
    # The mesh stays as it was asked for: what tokens sent to experts and sums over `model` cost is not estimated here.
    for parts, remat in itertools.product(divisors(config.optim.batch_size), get_args(Remat)):
        changed = dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, microbatches=parts),
            model=dataclasses.replace(config.model, remat=remat),
        )
        if not problems(changed, devices):
            yield changed


def seconds(config: Config, generation: Generation, shape: tuple[int, ...]) -> float:
    """The least time of a step by hand, exchanges not overlapped with products: small ones are not."""
    devices = math.prod(shape) * generation.devices
    tokens = config.optim.batch_size * config.model.max_seq_len
    held, parts = memory.shards(config, _sizes(config)), config.optim.microbatches
    # Weights are gathered forward and, with remat, again; gradients are sent once.
    gathers = 1 if config.model.remat == "none" else 2
    wire = 2 * parts * held.gathered * (gathers + roofline.hops(shape))
    moved = roofline.hbm_bytes(config, 4 * (held.parameters + held.optimizer), 2 * held.gathered)
    per_device = tokens / devices
    bound = roofline.roofline(
        generation, roofline.executed(config) * per_device, flops.per_token(config) * per_device, moved, wire
    )
    return max(bound.compute, bound.hbm) + bound.ici


def _peak(config: Config, generation: Generation, scale: float = 1.0) -> float:
    found = memory.estimate(config, _sizes(config), generation)
    state = found.parameters + found.optimizer
    return state + scale * (found.peak - state)


def _sizes(config: Config) -> dict[str, int]:
    assert config.topology is not None
    return parse_mesh(config.mesh, topology.count(config.topology))
