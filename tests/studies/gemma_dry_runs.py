"""Gemma-7B through the TPU compiler, no weight of it needed: `python -m tests.studies.gemma_dry_runs [CASE ...]`.

A forward pass over held-out rows with bf16 weights, and a step of `train.py --init` with its f32 state.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

import train
from kernels import topology
from tests.studies.cases import study
from vishwamai_eqx import aot, command_line, dry_run, evaluation, flops, gemma_config
from vishwamai_eqx.config import parse_mesh
from vishwamai_eqx.data import Batch
from vishwamai_eqx.gemma_config import GemmaConfig
from vishwamai_eqx.mesh import make_mesh

GEMMA_7B = GemmaConfig("gemma", 256_000, 3072, 24_576, 28, 16, 16, 256)
# Topology, mesh, and rows of 2,048 tokens of the whole batch.
FORWARD = {
    "forward on v3:2x2": ("v3:2x2", "data=8", 8),
    "forward on v5e:4x4": ("v5e:4x4", "data=16", 16),
    "forward on v6e:2x4": ("v6e:2x4", "data=8", 8),
}
STEP = {
    "step on v3:2x2": ("v3:2x2", "data=4,model=2", 4),
    "step on v5e:4x4": ("v5e:4x4", "data=8,model=2", 8),
    "step on v6e:2x4": ("v6e:2x4", "data=4,model=2", 8),
}


def forward(config: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """What the compiler says of a pass over held-out rows, with weights in bf16."""
    generation, _ = topology.parse(config.topology)
    on = make_mesh(sizes, topology.devices(config.topology))
    _, (abstract, batch) = train.abstract_step(config, on, "bfloat16")
    model = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=leaf.sharding), abstract.model
    )
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, model)
    rows = jax.ShapeDtypeStruct(batch.tokens.shape[1:], "int32", sharding=NamedSharding(on, evaluation.ROWS))
    compiled = aot.compile_step(
        evaluation.make_evaluate(train.token_loss, on, specs), (model, Batch(*[rows] * len(Batch._fields))), on, config
    )
    program, tokens = compiled.program, config.optim.batch_size * config.model.max_seq_len
    return {
        "fits": compiled.fits,
        "hbm": {"capacity": generation.hbm, "peak": compiled.peak},
        "flops_per_token": {
            "hand": flops.per_token(config) / 3,
            "compiler": None if program is None else program.flops / (tokens / on.size),
        },
        "collective_bytes": {} if program is None else program.bytes_by_kind,
        "compile_seconds": round(compiled.seconds),
    }


def measure(case: tuple[str, str, int]) -> dict[str, Any]:
    """What the compiler says of a case."""
    place, mesh, rows = case
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(gemma_config.describe(GEMMA_7B, "bfloat16")))
        arguments = f"--init {folder} --dry-run --topology {place} --mesh {mesh} --optim.batch-size {rows}"
        config = command_line.parse([*arguments.split(), "--model.max-seq-len", "2048"])
    sizes = parse_mesh(mesh, topology.count(place))
    found = forward(config, sizes) if case in FORWARD.values() else dry_run.examine(config, sizes, train.abstract_step)
    return found | {"mesh": mesh, "rows": rows}


if __name__ == "__main__":
    sys.exit(study(FORWARD | STEP, measure, Path(__file__).with_suffix(".json"), sys.argv[1:]))
