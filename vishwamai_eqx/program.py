"""What a compiled program does, read from its text: matrix products and collectives, each as often as it runs.

The compiler's own cost analysis counts the body of a loop once and the kernels not at all. Here a loop's trips are
those of its condition, a kernel's products are counted by its name, and what backward computes again is told apart.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
BYTES |= {"s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Under this name jax computes again what checkpointed code did not keep.
REMAT = "rematted_computation"

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_NAMES = re.compile(r"%([\w.\-]+)")


class Shape(NamedTuple):
    """Of one array."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class Collective:
    """One exchange between devices."""

    kind: str
    dtype: str
    bytes: int
    """Of the whole array on one device: what a gather makes, and what the others take."""
    group: int
    """Devices that take part."""
    times: int
    """How often a step does it."""
    scope: str
    """Where in the traced program it comes from."""

    @property
    def wire_bytes(self) -> float:
        """What a device sends each time, on a ring: an all-reduce scatters and gathers."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.group - 1) / self.group


@dataclass(frozen=True)
class Product:
    """One matrix product or kernel."""

    flops: float
    again: float
    """Of those, the ones that compute again what forward had."""
    times: int
    scope: str


@dataclass(frozen=True)
class Program:
    """What one device does in one step."""

    collectives: tuple[Collective, ...]
    products: tuple[Product, ...]
    gathered: int
    """Bytes of gathered arrays that can be there at once."""

    @property
    def flops(self) -> float:
        """Of the matrix products, those that are done again included."""
        return sum((it.flops * it.times for it in self.products), 0.0)

    @property
    def flops_again(self) -> float:
        return sum((it.again * it.times for it in self.products), 0.0)

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of each kind of collective in a step."""
        found: dict[str, int] = {}
        for it in self.collectives:
            found[it.kind] = found.get(it.kind, 0) + it.bytes * it.times
        return found


Kernel = Callable[[str, list[Shape], list[Shape]], tuple[float, float]]
"""From a kernel's name, the shapes it reads and those it writes to its FLOPs, and those of them that are done again."""


class _Instruction(NamedTuple):
    name: str
    shapes: list[Shape]
    opcode: str
    rest: str
    """Operands and attributes."""

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


def read(text: str, devices: int, kernel: Kernel) -> Program:
    """The program of a compiled step's `as_text()` on so many devices.

    **Raises** ValueError where a loop does not say how often it runs.
    """
    computations, entry = _parse(text)
    collectives, products, seen = [], [], set()
    gathered: dict[str, list[Shape]] = {}
    carried: dict[str, list[Shape]] = {}
    for body, times, loop in _runs(computations, entry):
        arrays = {it.name: it.shapes for it in computations[body]}
        for it in computations[body]:
            if it.opcode == "while":
                carried[_CALLED.findall(it.rest)[0]] = it.shapes
            kind = it.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # One that runs beside others is cut in pieces, which all say the whole; they share a chain.
                chain = re.search(r'channel_id=(\d+).*chain_id="(\d+)"', it.rest)
                if chain is None or chain.groups() not in seen:
                    seen |= {chain.groups()} if chain else set()
                    collectives.append(_collective(kind, it, arrays, devices, times))
                    if kind == "all-gather":
                        gathered.setdefault(loop, []).append(it.shapes[-1])
            elif it.opcode in ("convolution", "dot"):
                flops = _product(it, arrays)
                products.append(Product(flops, flops * (REMAT in it.scope), times, it.scope))
            elif it.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in it.rest:
                name = it.scope.rpartition("/pallas_call")[0].rpartition("/")[2]
                flops, again = kernel(name, _operands(it, arrays), it.shapes)
                products.append(Product(flops, flops if REMAT in it.scope else again, times, it.scope))
    # A turn of a loop has what it gathers, what of that it is handed from the turn before, and what there is outside.
    outside = sum(shape.bytes for shape in gathered.pop(entry, ()))
    inside = [
        sum(shape.bytes for shape in [*made, *(it for it in carried[loop] if it in made)])
        for loop, made in gathered.items()
    ]
    return Program(tuple(collectives), tuple(products), outside + max(inside, default=0))


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found[1], _shapes(found[2]), found[3], found[4]))
    return computations, entry


def _shapes(text: str) -> list[Shape]:
    return [Shape(kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _ARRAY.findall(text)]


def _runs(computations: dict[str, list[_Instruction]], entry: str) -> Iterator[tuple[str, int, str]]:
    """Every computation that is called, how often, and the body of the loop that it is in, or the entry.

    One that is called from two places comes twice.
    """
    waiting = [(entry, 1, entry)]
    while waiting:
        name, times, loop = waiting.pop()
        yield name, times, loop
        for it in computations[name]:
            trips = times
            if it.opcode == "while":
                condition = re.search(r"condition=%?([\w.\-]+)", it.rest)
                assert condition is not None
                trips *= trips_of([(each.name, each.opcode, each.rest) for each in computations[condition[1]]], it.name)
            branches = re.search(r"branch_computations=\{([^}]*)\}", it.rest)
            called = _CALLED.findall(it.rest) + (_NAMES.findall(branches[1]) if branches else [])
            # What a reduction applies has no products, and is not called so often.
            if it.opcode in ("while", "fusion", "call", "conditional", "async-start"):
                waiting += [
                    (other, trips, other if it.opcode == "while" else loop) for other in called if other in computations
                ]


def trips_of(condition: list[tuple[str, str, str]], name: str) -> int:
    """How often a loop runs that counts from zero up to a constant, given its condition's names, opcodes and operands.

    **Raises** ValueError where the loop does not say so.
    """
    constants = {name: rest for name, opcode, rest in condition if opcode == "constant"}
    for _, opcode, rest in condition:
        if opcode == "compare" and "direction=LT" in rest:
            for operand in _NAMES.findall(rest.partition(")")[0]):
                if operand in constants:
                    return int(constants[operand].partition(")")[0])
    raise ValueError(f"the loop {name} of the compiled program does not say how often it runs")


def _operands(it: _Instruction, arrays: dict[str, list[Shape]]) -> list[Shape]:
    return [shape for name in _NAMES.findall(it.rest.partition(")")[0]) for shape in arrays.get(name, [])]


def _collective(kind: str, it: _Instruction, arrays: dict[str, list[Shape]], devices: int, times: int) -> Collective:
    operands = _operands(it, arrays)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", it.rest)
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", it.rest)
    group = listed[1].count(",") + 1 if listed else int(tiled[1]) if tiled else devices
    if kind == "ragged-all-to-all":
        # Of the array that rows are sent from and the one that they come to, one has room for any load.
        operands = [min(operands[:2], key=lambda shape: shape.bytes)]
    size = sum(shape.bytes for shape in operands) * (group if kind == "all-gather" else 1)
    return Collective(kind, operands[0].dtype if operands else "", size, group, times, it.scope)


def _product(it: _Instruction, arrays: dict[str, list[Shape]]) -> float:
    """Two for each multiplication: the numbers that come out times those that each is a sum over."""
    lhs, rhs = _operands(it, arrays)[:2]
    out = math.prod(it.shapes[0].sizes)
    if it.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", it.rest)
        return 2.0 * out * math.prod(lhs.sizes[int(n)] for n in (contracted[1] if contracted else "").split(",") if n)
    # The kernel's input features, at each place where its window lies on what there is and not on padding.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", it.rest)
    assert labels is not None
    made, each = it.shapes[0].sizes, 2.0 * rhs.sizes[labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", it.rest)
    settings = {name: values.split("x") for name, values in re.findall(r"(\w+)=(\S+)", window[1] if window else "")}
    for dimension in range(len(settings.get("size", []))):
        held, steps = lhs.sizes[labels[1].index(str(dimension))], made[labels[3].index(str(dimension))]
        out //= steps
        each *= _met(held, steps, {name: values[dimension] for name, values in settings.items()})
    return each * out


def _met(held: int, steps: int, window: dict[str, str]) -> int:
    """How often a window meets one of the places that are held, on its way in so many steps."""
    stride, apart, spread = (int(window.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    places = (step * stride + tap * apart - before for step in range(steps) for tap in range(int(window["size"])))
    return sum(place % spread == 0 and 0 <= place // spread < held for place in places)
