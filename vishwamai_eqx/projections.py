"""Maps from a student's layers to its teacher's: trained and saved with a run, and no part of what it exports."""

import math

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from vishwamai_eqx.config import DistillConfig
from vishwamai_eqx.parameters import normal, parameter

# Layers that are held beside the teacher's where nothing is said: the ends of so many equal parts.
PARTS = 4


class Projections(eqx.Module):
    """A linear map for each pair of layers, from the student's width to the teacher's."""

    weight: Float[Array, "maps d_model teacher_d_model"] = parameter(decay=True)

    def __init__(self, maps: int, d_model: int, teacher_d_model: int, *, key: PRNGKeyArray):
        self.weight = normal(key, (maps, d_model, teacher_d_model), 1 / math.sqrt(d_model))


def layer_pairs(distill: DistillConfig, layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """The student's and the teacher's layers that are held beside each other, from 1; none without a weight."""
    if not any(distill.hidden + distill.attention):
        return []
    if distill.student_layers or distill.teacher_layers:
        return list(zip(distill.student_layers, distill.teacher_layers, strict=True))
    parts = min(PARTS, layers, teacher_layers)
    return [(round(layers * part / parts), round(teacher_layers * part / parts)) for part in range(1, parts + 1)]
