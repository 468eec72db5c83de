"""What precision costs: preset `tiny` on the same batches, `python -m tests.studies.precision RUNS [CASE ...]`.

RUNS is the folder that the runs are left in, for those that stop to go on from; `--steps` makes them shorter than the
preset's. Held-out bits per byte of each go to `precision.json`, with how far fp8's are from bf16's and these from
f32's.
"""

import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.studies.cases import study
from vishwamai_eqx import logbook

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_suffix(".json")
SEEDS = range(3)
# Settings of each kind of run, and the kind that it is held beside.
KINDS: dict[str, tuple[str, str | None]] = {
    "f32": ("--precision f32", None),
    "bf16": ("--precision bf16", "f32"),
    "fp8": ("--precision fp8", "bf16"),
}


class Case(NamedTuple):
    """One run."""

    kind: str
    seed: int


CASES = {f"{kind}, seed {seed}": Case(kind, seed) for seed in SEEDS for kind in KINDS}


def measure(case: Case, runs: Path, steps: int) -> dict[str, Any]:
    """Train, and read the logbook."""
    run_dir = runs / f"{case.kind}-{case.seed}-{steps}"
    settings = f"{KINDS[case.kind][0]} --seed {case.seed} --steps {steps} --eval.sample-tokens 16"
    command = [sys.executable, "train.py", "--preset", "tiny", "--run-dir", str(run_dir), *settings.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[-2000:]}")
    with logbook.connect(run_dir) as book:
        (bits,) = book.execute("SELECT bits_per_byte FROM evals WHERE step = ?", [steps]).fetchone() or (None,)
        (seen,) = book.execute("SELECT md5(string_agg(batch_hash, '' ORDER BY step)) FROM steps").fetchone() or (None,)
    return {"kind": case.kind, "seed": case.seed, "steps": steps, "bits_per_byte": bits, "batches": seen}


def beside(known: dict[str, Any]) -> dict[str, Any]:
    """By how much each run's bits per byte are above those of the run that it is held beside.

    **Raises** ValueError where their batches are not the same.
    """
    found = {}
    for name, one in known.items():
        other = known.get(f"{KINDS[one['kind']][1]}, seed {one['seed']}") if "kind" in one else None
        if other is not None and one["steps"] == other["steps"]:
            if one["batches"] != other["batches"]:
                raise ValueError(f"{name}: its batches are not those of {other['kind']}")
            found[f"{name}, beside {other['kind']}"] = round(one["bits_per_byte"] / other["bits_per_byte"] - 1, 5)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=500)
    chosen = parser.parse_intermixed_args()
    one = functools.partial(measure, runs=chosen.runs.resolve(), steps=chosen.steps)
    code = study(CASES, one, RESULTS, chosen.cases)
    if code == 0:
        known = json.loads(RESULTS.read_text())
        known["above"] = beside(known)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps(known["above"], indent=1))
    sys.exit(code)
