"""The least time that a step can take, from what a chip does at its best.

    seconds = max(FLOPs / peak, HBM bytes / HBM bandwidth, wire bytes / ICI bandwidth)
    MFU    <= the model's own FLOPs / (seconds * peak)

FLOPs are all that a device multiplies, with what remat computes again. HBM bytes are the least there can be: the
state read and written once, and each microbatch's weights as often as a pass needs them. Wire bytes are what a device
sends to its neighbours: those of a gather and a reduction on rings, those of an all-to-all times the links between.
"""

from dataclasses import dataclass

from kernels.tpu import Generation
from vishwamai_eqx import flops
from vishwamai_eqx.config import Config
from vishwamai_eqx.program import Program

# Passes over a layer that need its weights: forward, backward twice (its input and its own gradient come of one
# reading each), and with remat forward again.
_PASSES = {"none": 3, "dots": 4, "inputs": 4, "full": 4}


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on each of the three, and what they bound."""

    compute: float
    hbm: float
    ici: float
    mfu: float
    """Share of the peak that the model's own FLOPs can be."""

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.ici)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "hbm", "ici"), key=lambda name: getattr(self, name))


def roofline(
    generation: Generation, flops_a_step: float, model_flops: float, hbm_bytes: float, wire_bytes: float
) -> Roofline:
    """Of one device's share of a step."""
    times = (
        flops_a_step / generation.peak_flops,
        hbm_bytes / generation.hbm_bandwidth,
        wire_bytes / generation.ici_bandwidth,
    )
    return Roofline(*times, model_flops / (max(times) * generation.peak_flops))


def executed(config: Config) -> float:
    """FLOPs of a token with what remat computes again, by hand."""
    model = config.model
    _, active = flops.parameters(config)
    outside = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    scores = flops.attended(config)
    # The backward kernel makes the scores again; full remat a forward pass of the layers but for their last product,
    # whose result no gradient needs, and from the products' inputs all products again. Dots keep those but of kernels.
    again = scores
    chosen = min(model.experts_per_token, model.num_experts)
    experts_product = 2 * model.num_layers * chosen * model.hidden_size * model.ffn_dim
    if model.remat in ("inputs", "full"):
        again += 2 * (active - outside) - experts_product + 2 * scores
    elif model.remat == "dots":
        again += 2 * experts_product + 2 * scores
    return flops.per_token(config) + again


def hbm_bytes(config: Config, state_bytes: int, gathered_bytes: int) -> float:
    """The least that a step moves, given a device's bytes of the state and all gathered weights in the compute type."""
    # Of parameter and two moments in, out, and the gradient besides.
    weights = config.optim.microbatches * _PASSES[config.model.remat] * gathered_bytes
    return 2 * state_bytes + state_bytes / 3 * 2 + weights


def wire_bytes(program: Program, shape: tuple[int, ...]) -> float:
    """What a device sends in a step, times the links that it crosses, on a torus of that shape."""
    crossed = {it.kind: hops(shape) if "all-to-all" in it.kind else 1.0 for it in program.collectives}
    return sum((it.wire_bytes * it.times * crossed[it.kind] for it in program.collectives), 0.0)


def hops(shape: tuple[int, ...]) -> float:
    """Links between two chips on average; from four on an axis is closed to a ring."""
    return max(1.0, sum(n / 4 if n >= 4 else (n * n - 1) / (3 * n) for n in shape))
