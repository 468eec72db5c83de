"""The presets through the TPU compiler on many topologies: `python tests/studies/topologies.py [NAME ...]`.

One dry run each, a process at a time; every result is added to topologies.json when it is there, with commit and date.
"""

import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_suffix(".json")
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
    "two microbatches": ("v3:2x2", "--preset base --optim.batch-size 64 --optim.microbatches 2"),
}


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"{unknown[0]!r} is no case: they are {', '.join(CASES)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for name in names or CASES:
        topology, settings = CASES[name]
        command = [sys.executable, "train.py", "--dry-run", "--json", "--topology", topology, *settings.split()]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode not in (0, 3):
            print(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}", file=sys.stderr)
            return 1
        found = json.loads(done.stdout)
        ratio = found["hbm_by_hand"]["peak"] / found["hbm"]["peak"]
        results[name] = found | {
            "command": " ".join(["python", *command[1:]]),
            "hand_over_compiler": round(ratio, 3),
            "compile_seconds": round(time.perf_counter() - began),
            "commit": commit.stdout.strip(),
            "date": datetime.date.today().isoformat(),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: fits {found['fits']}, peak {found['hbm']['peak'] / 2**30:.2f} GiB, hand / compiler {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
