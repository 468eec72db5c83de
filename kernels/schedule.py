"""The static schedule of a TPU kernel: what the compiler issues in each cycle.

`libtpu` writes the instruction words of each kernel when it is loaded with the flags that `dump_flags` gives. After
register allocation a line is one issue cycle, empty ones included. A schedule knows nothing of what happens at run
time: waiting for memory (compare the cycles with the bytes over the bandwidth), and how often a branch is taken.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.tpu import Generation

_LINE = re.compile(r"^\s*(?P<address>0x[0-9a-f]+|\d+)\s+[A-Z]*\s*:[\s>]*\{(?P<body>.*)$")
_BRANCH = re.compile(r"sbr\.rel\s.*?target bundleno = (\d+)")
_MATMUL = re.compile(r"\bvmatmul((?:\.\w+)+)")
_SPILL = re.compile(r"_spill\]")
# A branch takes effect some cycles after its own.
_DELAY = {"v2": 3, "v3": 3, "v4": 4, "v5e": 4, "v5p": 4, "v6e": 6, "7x": 6}


def dump_flags(folder: Path) -> str:
    """What LIBTPU_INIT_ARGS must hold when libtpu is loaded, for it to write schedules to a folder."""
    # Of the compiler's dozens of passes the one after register allocation: all of them take longer than to compile.
    only = "--xla_jf_dump_llo_pass_label_regex=.*packed-bundles-post-ra.*"
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true {only}"


@dataclass(frozen=True)
class Schedule:
    """One kernel's loop with most matrix work, and the step that it repeats.

    A step leaves out what a branch skips and what multiplies nothing (the beginning and the end of an accumulation),
    and of branches with the same matrix work, of which one is taken, all but the shortest. Of a kernel that multiplies
    nothing it leaves out nothing.
    """

    kernel: str
    cycles: int
    """Of one step."""
    loop_cycles: int
    """Of the loop's body with every branch in it."""
    kernel_cycles: int
    """Of the whole program, each loop once."""
    matmul_cycles: float
    """Cycles of a step that an MXU is busy, averaged over the MXUs."""
    macs: int
    """Multiplications of a step, padding included, in passes of 8 to 16 bits."""
    spills: int
    """Registers of a step that are stored for want of registers, or loaded again."""

    @property
    def occupancy(self) -> float:
        """The share of a step's cycles that the MXUs are busy."""
        return self.matmul_cycles / self.cycles

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "mxu_occupancy": self.occupancy}


@dataclass(frozen=True)
class _Cycle:
    address: int
    target: int | None
    busy: float
    macs: int
    spills: int


def kernels_in(folder: Path) -> dict[str, Path]:
    """The newest schedule of each kernel in a dump, by the kernel's name in the compiled program."""
    found = {}
    for path in sorted(folder.glob("*-packed-bundles-post-ra.txt")):
        match = re.fullmatch(r"\d+-(.+?)-\d+-packed-bundles-post-ra\.txt", path.name)
        if match and not match[1].startswith("schedule-analysis"):
            found[match[1]] = path
    return found


def read(path: Path, generation: Generation) -> Schedule:
    """The schedule of one kernel.

    **Raises** ValueError where nothing in the file is a cycle of the schedule.
    """
    cycles, loop, skips = _busiest_loop_of(path, generation)
    busy = _leaves(skips, cycles)
    # Branches side by side with the same work: one of them is taken. Those with less work are taken as well.
    alternatives = [skip for skip in busy if _macs(skip, cycles) == max(_macs(it, cycles) for it in busy)]
    taken = min(alternatives, key=len, default=None)
    left_out = [skip for skip in alternatives if skip is not taken]
    return _step(path, generation, cycles, loop, _idle(skips, loop, cycles) + left_out)


def branches(path: Path, generation: Generation) -> list[Schedule]:
    """A schedule for each branch with matrix work, as if no step took another, in the program's order.

    For kernels that say themselves which of several forms of a step each one is. Without branches, the whole loop's.

    **Raises** ValueError where nothing in the file is a cycle of the schedule.
    """
    cycles, loop, skips = _busiest_loop_of(path, generation)
    busy = _leaves(skips, cycles)
    idle = _idle(skips, loop, cycles)
    return [
        _step(path, generation, cycles, loop, idle + [skip for skip in busy if skip is not taken])
        for taken in busy or [loop]
    ]


def _busiest_loop_of(path, generation):
    """All cycles of a kernel, its busiest loop, and what branches in it skip."""
    cycles = [_cycle(match, generation) for match in map(_LINE.match, path.read_text().splitlines()) if match]
    if not cycles:
        raise ValueError(f"schedule: path={path} has no line of a schedule; dump with the flags of dump_flags()")
    at = {cycle.address: index for index, cycle in enumerate(cycles)}
    delay = _DELAY[generation.name]
    loops, skips = [], []
    for index, cycle in enumerate(cycles):
        if cycle.target is None or cycle.target not in at:
            continue
        target, after = at[cycle.target], min(index + 1 + delay, len(cycles))
        if target <= index:
            loops.append(range(target, after))
        elif target > after:
            skips.append(range(after, target))
    loop = _busiest_loop(loops, cycles) if loops else range(len(cycles))
    return cycles, loop, [skip for skip in skips if _within(skip, loop)]


def _step(path, generation, cycles, loop, left_out):
    step = [cycles[index] for index in loop if not any(index in skip for skip in left_out)]
    return Schedule(
        kernel=path.name,
        cycles=len(step),
        loop_cycles=len(loop),
        kernel_cycles=len(cycles),
        matmul_cycles=sum(cycle.busy for cycle in step) / generation.mxus,
        macs=sum(cycle.macs for cycle in step),
        spills=sum(cycle.spills for cycle in step),
    )


def _cycle(match: re.Match[str], generation: Generation) -> _Cycle:
    body = match["body"]
    branch = _BRANCH.search(body)
    matmuls = [_matmul(suffix, generation) for suffix in _MATMUL.findall(body)]
    return _Cycle(
        address=int(match["address"], 0),
        target=int(branch[1]) if branch else None,
        busy=sum((rows / rate for rows, rate in matmuls), start=0.0),
        macs=sum(rows for rows, _ in matmuls) * generation.mxu_size**2,
        spills=len(_SPILL.findall(body)),
    )


def _matmul(suffix: str, generation: Generation) -> tuple[int, int]:
    """Rows that a matrix instruction feeds, and how many of them an MXU takes in a cycle."""
    rate = generation.rows_per_cycle
    if re.search(r"\.[su]8\b", suffix):
        return 32, rate * (generation.int8 or 1)
    if "f8" in suffix:
        return 32, rate * (generation.fp8 or 1)
    return (16 if ".bf16" in suffix else 8), rate


def _busiest_loop(loops: Sequence[range], cycles: Sequence[_Cycle]) -> range:
    """The innermost loop with most matrix work; the whole nest where no innermost loop has any."""

    def work(span):
        return sum(cycles[index].busy for index in span), len(span)

    innermost = [loop for loop in loops if not any(other != loop and _within(other, loop) for other in loops)]
    best = max(innermost, key=work)
    return best if work(best)[0] else max(loops, key=work)


def _macs(span: range, cycles: Sequence[_Cycle]) -> int:
    return sum(cycles[index].macs for index in span)


def _idle(skips: Sequence[range], loop: range, cycles: Sequence[_Cycle]) -> list[range]:
    """What is skipped and multiplies nothing, unless the whole loop does not: then it is the work."""
    return [skip for skip in skips if not _macs(skip, cycles)] if _macs(loop, cycles) else []


def _leaves(skips: Sequence[range], cycles: Sequence[_Cycle]) -> list[range]:
    """Branches with matrix work that hold no other such branch."""
    busy = [skip for skip in skips if _macs(skip, cycles)]
    return [skip for skip in busy if not any(other != skip and _within(other, skip) for other in busy)]


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop
