"""The presets through the TPU compiler on many topologies: `python -m tests.studies.topologies [CASE ...]`.

One dry run each, a process at a time.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.studies.cases import study

ROOT = Path(__file__).resolve().parents[2]
# Topology and settings; a batch of so many rows of 2,048 tokens for each device.
CASES = {
    "base on v2": ("v2:2x2", "--preset base --optim.batch-size 8"),
    "base on v3": ("v3:2x2", "--preset base --optim.batch-size 32"),
    "base on v4": ("v4:2x2x2", "--preset base --optim.batch-size 32"),
    "base on v5e": ("v5e:2x4", "--preset base --optim.batch-size 32"),
    "base on v5p": ("v5p:2x2x2", "--preset base --optim.batch-size 32"),
    "base on v6e": ("v6e:2x4", "--preset base --optim.batch-size 32"),
    "base on 7x": ("tpu7x:2x2x1", "--preset base --optim.batch-size 32"),
    "base on 2,048 cores of v3": ("v3:32x32", "--preset base --optim.batch-size 2048"),
    "large on v5p": ("v5p:4x8x8", "--preset large --optim.batch-size 256"),
    "large on v3": ("v3:16x16", "--preset large --optim.batch-size 512"),
    "no remat": ("v3:2x2", "--preset base --optim.batch-size 8 --model.num-layers 8 --model.remat none"),
    "dense, of equal active FLOPs": (
        "v3:2x2",
        "--preset base --optim.batch-size 32 --model.num-experts 1 --model.experts-per-token 1 --model.ffn-dim 6144",
    ),
    "experts placed": ("v3:2x2", "--preset base --optim.batch-size 32 --mesh data=4,expert=2"),
    "heads and vocabulary divided": ("v3:2x2", "--preset base --optim.batch-size 32 --mesh data=4,model=2"),
    "2x2x2": ("v3:2x2", "--preset base --optim.batch-size 32 --mesh data=2,expert=2,model=2"),
    "two microbatches": ("v3:2x2", "--preset base --optim.batch-size 64 --optim.microbatches 2"),
}


def measure(case: tuple[str, str]) -> dict[str, Any]:
    """What a dry run says of a case, and how near the peak by hand is to it."""
    topology, settings = case
    command = [sys.executable, "train.py", "--dry-run", "--json", "--topology", topology, *settings.split()]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return found | {
        "command": " ".join(["python", *command[1:]]),
        "hand_over_compiler": round(found["hbm_by_hand"]["peak"] / found["hbm"]["peak"], 3),
        "compile_seconds": round(time.perf_counter() - began),
    }


if __name__ == "__main__":
    sys.exit(study(CASES, measure, Path(__file__).with_suffix(".json"), sys.argv[1:]))
