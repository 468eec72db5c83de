"""Gemma-7B into preset base through the TPU compiler: `python -m tests.studies.distillation_dry_runs [CASE ...]`.

The whole distilling step with a sharded bf16 teacher, no weight of which is needed; a process at a time.
"""

import sys
from pathlib import Path

from tests.studies.cases import study
from tests.studies.topologies import measure

# Topology and rows of 2,048 tokens, one for each device.
ROWS = {"v3:2x2": 8, "v5e:4x4": 16, "v6e:2x4": 8}
CASES = {place: (place, f"--preset base --teacher gemma-7b --optim.batch-size {rows}") for place, rows in ROWS.items()}

if __name__ == "__main__":
    sys.exit(study(CASES, measure, Path(__file__).with_suffix(".json"), sys.argv[1:]))
