"""Compile every kernel for every TPU generation and read its static schedule, beside JAX's own kernels.

    python -m kernels.report [--generations v3,v5e] [--operations grouped_matmul] [--dtype float32]
                             [--shape rows=8192,k=768] [--json FILE]

No TPU is needed: `libtpu` compiles for all of them on any x86-64 Linux machine.

What the figures are:

- cycles a step: issue cycles of the body of the kernel's busiest loop, without branches that are taken rarely; of
  several forms of a step the first that is taken
- kernel cycles: those of each form times the number of its steps
- useful: multiplications that the operation needs, over what the MXUs could do in the kernel's cycles, in one pass of
  16 bits each (so f32 at several passes a product has a share of one over the passes at most)
- MXU: the share of a step's cycles that the MXUs are busy, with padding and masked blocks
- a tile: kernel cycles over the unmasked 128x128 blocks of scores (attention)
- visited: cycles of a step over the 128x128 blocks of scores that it computes, masked or not
- MB: what the compiler counts that the program reads and writes; that of a backward pass includes the forward's

A product (`gemm`) in 8 bits is held beside XLA's own in the report's type: where its cycles are no fewer it saves bytes
only. Its useful share may exceed one where the MXUs take 8 bits faster than 16.

Attention is causal and saves its statistics. With segments every block is taken to be cut by one, as in JAX's kernels,
which compare the segments of every block.

What they leave out: a schedule knows no waiting. Copies between HBM and vector memory, the first and last step's most
of all, loading a long program's next instructions, semaphores, branch history and the clock are not in it; hold the
cycles beside the bytes over the bandwidth.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import kernels.topology as topology  # sets the compiler's environment before libtpu is loaded
from kernels import schedule
from kernels.report_cases import SHAPE, Case, cases
from kernels.tpu import GENERATIONS, Generation

_CHILD = "KERNELS_REPORT_REQUEST"


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write its rows as JSON if asked to; 0 if everything asked for was tried."""
    options = _parse(arguments)
    rows = []
    for generation in options.generations:
        print(f"\n{generation}, {options.dtype}\n{_HEADER}", flush=True)
        of_generation = []
        for row in _best(_of_generation(generation, options)):
            print(_line(row), flush=True)
            of_generation.append(row)
        print("".join(f"{line}\n" for line in _savings(of_generation, options.dtype)), end="")
        rows += of_generation
    print("\n" + (__doc__ or "").split("\n\n", 3)[3])
    if options.json:
        Path(options.json).write_text(
            json.dumps({"shape": options.shape, "dtype": options.dtype, "rows": rows}, indent=1)
        )
    return 0


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m kernels.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    parser.add_argument("--generations", default=",".join(GENERATIONS), help="of " + ", ".join(GENERATIONS))
    parser.add_argument("--operations", default="", help="only operations whose name begins with this")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="type of the arrays")
    parser.add_argument(
        "--shape", default="", help="name=value,...; of " + ", ".join(f"{k}={v}" for k, v in SHAPE.items())
    )
    options = parser.parse_args(arguments)
    options.generations = options.generations.split(",")
    unknown = [name for name in options.generations if name not in GENERATIONS]
    if unknown:
        parser.error(f"--generations {','.join(unknown)}: not one of {', '.join(GENERATIONS)}; name some of those")
    given = dict(part.partition("=")[::2] for part in options.shape.split(",") if part)
    wrong = [
        f"{name}={value}" for name, value in given.items() if name not in SHAPE or not value.isdigit() or value == "0"
    ]
    if wrong:
        parser.error(f"--shape {','.join(wrong)}: expected positive numbers for names of {', '.join(SHAPE)}")
    options.shape = {**SHAPE, **{name: int(value) for name, value in given.items()}}
    return options


def _of_generation(generation, options) -> Iterator[dict[str, Any]]:
    """A child compiles case after case; where the compiler takes it down, the next goes on after that case."""
    done = 0
    while True:
        request = {"generation": generation, "shape": options.shape, "dtype": options.dtype}
        request |= {"operations": options.operations, "skip": done}
        with tempfile.TemporaryDirectory() as folder:
            flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {schedule.dump_flags(Path(folder))}"
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
            environment[_CHILD] = json.dumps({**request, "folder": folder})
            command = [sys.executable, "-m", "kernels.report"]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout is not None
                started = None
                for line in child.stdout:
                    row = json.loads(line)
                    if "compiled" in row:
                        started = None
                        done += 1
                        yield row
                    else:
                        started = row
            if child.returncode == 0:
                return
            if started is None:
                raise RuntimeError(f"kernels.report: the child for {generation} ended with {child.returncode}")
            done += 1
            yield {**started, "compiled": False, "error": f"the compiler ended its process with {child.returncode}"}


def _child(request: dict[str, Any]) -> int:
    generation, folder = GENERATIONS[request["generation"]], Path(request["folder"])
    every = cases(request["shape"], jnp.dtype(request["dtype"]), generation)
    chosen = [it for it in every if it.operation.startswith(request["operations"])]
    programs = _Programs(generation, folder)
    for case in chosen[request["skip"] :]:
        head = {"generation": generation.name, "operation": case.operation}
        head |= {"implementation": case.implementation, "blocks": case.blocks}
        print(json.dumps(head), flush=True)
        print(json.dumps(head | _measure(case, generation, programs)), flush=True)
    return 0


class _Programs:
    """Compiled programs with the schedules of their kernels; cases that share a function share its compilation."""

    def __init__(self, generation: Generation, folder: Path):
        self._generation, self._folder = generation, folder
        self._known: dict[Any, tuple[float | None, dict[str, Path]]] = {}

    def of(self, case: Case) -> tuple[float | None, dict[str, Path]]:
        """The bytes that the program moves, and its kernels' schedules by name."""
        key = case.fn, case.avals
        if key not in self._known:
            compiled = topology.lower_for(self._generation.name, case.fn, *case.avals).compile()
            kept = self._folder / str(len(self._known))
            kept.mkdir()
            kernels = {name: path.rename(kept / path.name) for name, path in schedule.kernels_in(self._folder).items()}
            # The other hundreds of files are every pass of the compiler.
            for path in self._folder.glob("*.*"):
                path.unlink()
            self._known[key] = (compiled.cost_analysis() or {}).get("bytes accessed"), kernels
        return self._known[key]


def _measure(case: Case, generation: Generation, programs: _Programs) -> dict[str, Any]:
    try:
        moved, found = programs.of(case)
    except Exception as error:  # whatever the compiler says of a program is the result
        return {"compiled": False, "error": _sentence(error)}
    usual, total = [], 0.0
    for kernel in case.kernels or ("",):
        paths = [path for name, path in found.items() if kernel in name]
        if not paths:
            return {"compiled": True, "error": f"no schedule of a kernel {kernel!r} was written"}
        path = max(paths, key=lambda path: _weight(schedule.read(path, generation)))
        forms = schedule.branches(path, generation) if len(case.visits) > 1 else [schedule.read(path, generation)]
        visits = case.visits or (case.useful_macs / max(forms[0].macs, 1),)
        if len(forms) != len(visits):
            return {"compiled": True, "error": f"{len(forms)} forms of a step in the schedule, {len(visits)} expected"}
        total += sum(count * form.cycles for count, form in zip(visits, forms, strict=True))
        usual.append(next((form for count, form in zip(visits, forms, strict=True) if count), forms[0]))
    peak = generation.mxus * generation.mxu_size**2 * generation.rows_per_cycle
    row = {"compiled": True, "schedule": max(usual, key=_weight).as_dict(), "visits": case.visits, "bytes": moved}
    if total:
        row["kernel_cycles"] = total
    if total and case.useful_macs:
        row["useful_share"] = case.useful_macs / peak / total
    if total and case.unmasked_tiles:
        row["cycles_per_unmasked_tile"] = total / case.unmasked_tiles
        row["cycles_per_visited_tile"] = sum(form.cycles for form in usual) / case.step_tiles
    return row


def _weight(step: schedule.Schedule) -> tuple[float, int]:
    return step.matmul_cycles, step.cycles


def _sentence(error: Exception) -> str:
    """The compiler's own: without the stack of the program that asked."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _best(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of an implementation's block sizes the fastest; where none compiles, the first."""
    for _, same in itertools.groupby(rows, key=lambda row: (row["operation"], row["implementation"])):
        yield max(same, key=lambda row: row.get("useful_share", 0))


def _savings(rows: list[dict[str, Any]], dtype: str) -> Iterator[str]:
    """What each product in 8 bits takes of the cycles and the bytes of the one in the report's type."""
    products = {row["implementation"]: row for row in rows if row["operation"] == "gemm" and row.get("kernel_cycles")}
    plain = products.pop(dtype, None)
    if plain is None:
        return
    for name, row in products.items():
        cycles, moved = (row[figure] / plain[figure] for figure in ("kernel_cycles", "bytes"))
        verdict = "saves cycles and bytes" if cycles < 0.95 else "saves bytes only"
        verdict += " and costs cycles" if cycles > 1.05 else ""
        yield f"gemm {name}: {cycles:.2f} of the cycles and {moved:.2f} of the bytes of {dtype}: {verdict}"


_HEADER = (
    f"{'operation':28} {'implementation':15} {'blocks':14} {'cycles a step':>13} {'kernel cycles':>13} {'useful':>6} "
    f"{'MXU':>5} {'a tile':>7} {'visited':>7} {'spills':>6} {'MB':>6}"
)


def _line(row: dict[str, Any]) -> str:
    start = f"{row['operation']:28} {row['implementation']:15} {row['blocks']:14} "
    if "schedule" not in row:
        return start + ("compiled; " if row["compiled"] else "refused: ") + row["error"]
    it = row["schedule"]

    def show(value, form):
        return "-" if value is None else format(value, form)

    return start + " ".join(
        (
            f"{it['cycles']:13d}",
            f"{show(row.get('kernel_cycles'), '.0f'):>13}",
            f"{show(row.get('useful_share'), '.3f'):>6}",
            f"{it['mxu_occupancy']:5.3f}",
            f"{show(row.get('cycles_per_unmasked_tile'), '.1f'):>7}",
            f"{show(row.get('cycles_per_visited_tile'), '.1f'):>7}",
            f"{it['spills']:6d}",
            f"{show(row['bytes'] and row['bytes'] / 1e6, '.1f'):>6}",
        )
    )


if __name__ == "__main__":
    sys.exit(_child(json.loads(os.environ[_CHILD])) if _CHILD in os.environ else main())
