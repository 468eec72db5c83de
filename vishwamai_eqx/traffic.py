"""The bytes that a compiled program moves between HBM and the cores, read from its text, loops times their trips.

Each instruction reads its operands and writes its result; of what it only slices or updates in place, the slice. What
lies in vector memory moves nothing. Of branches the one that moves the least is counted.
"""

import math
import re
from typing import NamedTuple

from vishwamai_eqx.program import BYTES, trips_of

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
# What moves nothing, or what its start has counted.
_STILL = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "iota"}
_STILL |= {"opt-barrier", "optimization-barrier", "replica-id"}
_VECTOR_MEMORY = "S("
_WIDTHS = BYTES | {"f8e4m3fn": 1, "f8e5m2": 1, "s4": 1, "u4": 1}


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAMES.findall(self.rest.partition("), ")[0])

    @property
    def called(self) -> list[str]:
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return _CALLED.findall(self.rest) + (_NAMES.findall(branches[1]) if branches else [])


def moved(text: str) -> float:
    """Bytes that a device moves in one run of a program, given its `as_text()`.

    **Raises** ValueError where a loop does not say how often it runs.
    """
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(found[2], found[3], found[4], found[5], bool(found[1])))
    return _moved(computations, entry)


def _moved(computations: dict[str, list[_Instruction]], name: str) -> float:
    shapes = {it.name: it.shape for it in computations[name]}
    total = 0.0
    for it in computations[name]:
        called = [other for other in it.called if other in computations]
        if it.opcode == "while":
            condition = re.search(r"condition=%?([\w.\-]+)", it.rest)
            assert condition is not None
            said = [(each.name, each.opcode, each.rest) for each in computations[condition[1]]]
            total += trips_of(said, it.name) * sum(_moved(computations, other) for other in called)
        elif it.opcode == "conditional":
            total += min(_moved(computations, other) for other in called)
        elif it.opcode in ("call", "async-start"):
            total += sum(_moved(computations, other) for other in called)
        elif it.opcode == "fusion":
            total += _of_fusion(computations, it, shapes)
        elif it.opcode not in _STILL and not it.opcode.endswith("-done"):
            total += _of_one(it, shapes)
    return total


def _of_one(it: _Instruction, shapes: dict[str, str]) -> float:
    """Of an instruction that is not fused."""
    operands = [_bytes(shapes.get(name, "")) for name in it.operands]
    if it.opcode in ("dynamic-slice", "slice", "gather"):
        return _bytes(it.shape) * 2
    if it.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(operands[1:], 0.0)
    if it.opcode.endswith("-start"):
        # The result names the source first, and of a slice what is read next.
        arrays = [found[0] for found in _ARRAY.finditer(it.shape)]
        made = arrays[1] if len(arrays) > 1 else ""
        read = _size(made) if "slice" in it.opcode else operands[0] if operands else 0.0
        return read + _bytes(made)
    return sum(operands, 0.0) + _bytes(it.shape)


def _of_fusion(computations: dict[str, list[_Instruction]], it: _Instruction, shapes: dict[str, str]) -> float:
    (body,) = (computations[name] for name in it.called)
    order = [each for each in body if each.opcode == "parameter"]
    order.sort(key=lambda each: int(each.rest.partition(")")[0]))
    total = 0.0
    aliased = 0.0
    for parameter, operand in zip(order, it.operands, strict=False):
        whole = _bytes(shapes.get(operand, ""))
        if whole:
            read, updated = _read(computations, body, parameter.name)
            total += whole if read is None else min(read, whole)
            aliased += whole if updated else 0.0
    return total + max(0.0, _bytes(it.shape) - aliased)


def _read(
    computations: dict[str, list[_Instruction]], body: list[_Instruction], name: str
) -> tuple[float | None, bool]:
    """Bytes that are touched of a value, None for all, and whether it is updated where it is."""
    total, updated = 0.0, False
    shapes = {each.name: each.shape for each in body}
    for it in body:
        if name not in it.operands:
            continue
        first = it.operands[0] == name
        if it.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += _size(it.shape)
        elif it.opcode in ("dynamic-update-slice", "scatter") and first:
            total += 2 * _size(shapes.get(it.operands[-1 if it.opcode == "scatter" else 1], ""))
            updated = True
        elif it.opcode in ("bitcast", "reshape", "copy") and not it.root:
            read, inner = _read(computations, body, it.name)
            if read is None:
                return None, False
            total, updated = total + read, updated or inner
        elif it.opcode == "fusion":
            (inside,) = (computations[other] for other in it.called)
            for at, operand in enumerate(it.operands):
                if operand == name:
                    parameter = next(
                        each for each in inside if each.opcode == "parameter" and each.rest.startswith(f"{at})")
                    )
                    read, inner = _read(computations, inside, parameter.name)
                    if read is None:
                        return None, False
                    total, updated = total + read, updated or inner
        else:
            return None, False
    return total, updated


def _bytes(shape: str) -> float:
    """Of the arrays of a shape that lie in HBM."""
    return sum((_array(*each[:2]) for each in _ARRAY.findall(shape) if _VECTOR_MEMORY not in each[2]), 0.0)


def _size(shape: str) -> float:
    return sum((_array(*each[:2]) for each in _ARRAY.findall(shape)), 0.0)


def _array(dtype: str, sizes: str) -> float:
    return float(math.prod(int(n) for n in sizes.split(",") if n) * _WIDTHS.get(dtype, 4))
