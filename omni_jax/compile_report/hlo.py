"""Reads a compiled program's text and counts what it moves: bytes of HBM, bytes over the links, trips of its loops.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count, and bytes as if there were no
on-chip memory. Here a loop's body counts as often as it runs, an array that the compiler has put into VMEM (`S(1)`
in its layout) counts nothing, arrays are as large as their tiles make them, and what is sliced, gathered or updated in
place counts as much as is touched. Of branches the cheapest counts: ours are there to leave work out, as greedy
decoding leaves out sorting. A collective that runs beside other work stands in several fusions, which start it, go on
with it and end it: it counts where it starts.

What the text looks like: https://openxla.org/xla/operation_semantics, layouts: https://openxla.org/xla/tiled_layout.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16,
    "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain", "get-dimension-size",
}  # fmt: skip
"""Instructions that move nothing."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = {"dynamic-slice", "gather", "slice", "slice-start"}
"""Instructions that read only part of their first operand."""
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write part of their first operand, in place; where their update stands among the operands."""

_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY = re.compile(r"S\((\d+)\)")
_TRIPS = re.compile(r'"?known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)')
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array."""

    bytes: int
    """In memory, tiles included."""
    hbm: bool
    """Whether it lies in HBM; otherwise on the chip."""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; several if it is a tuple."""
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, attribute: str) -> list[str]:
        """Computations named by an attribute."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(match[1]) if match else []


@dataclass
class Cost:
    """What running something once moves, in bytes on each chip."""

    hbm: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)
    """By kind, what each sends or receives."""
    beside: float = 0.0
    """Of that, what is sent beside other work."""

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Count `other` as well, so many times."""
        self.hbm += other.hbm * times
        self.beside += other.beside * times
        for kind, amount in other.collectives.items():
            self.transfer(kind, amount * times)

    def transfer(self, kind: str, amount: float, *, beside: bool = False) -> None:
        """Count what a collective moves."""
        self.collectives[kind] = self.collectives.get(kind, 0.0) + amount
        self.beside += amount * beside


@dataclass
class Module:
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str
    unknown_trips: int = 1
    """How often a loop runs whose trip count the compiler does not know."""
    _costs: dict[str, Cost] = field(default_factory=dict)

    @cached_property
    def cost(self) -> Cost:
        """Of the whole program."""
        return self._of(self.entry)

    @cached_property
    def shapes(self) -> dict[tuple[str, str], tuple[Shape, ...]]:
        """Of every instruction, by computation and name."""
        return {(name, i.name): i.shapes for name, lines in self.computations.items() for i in lines}

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop runs, None if that can't be seen.

        The compiler says so, or the condition is that a counter is below a constant; it is taken to start at 0, as
        those of `jax.lax.scan` do.
        """
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        lines = {line.name: line for line in self.computations[loop.called("condition")[0]]}
        test = next(line for line in lines.values() if line.root)
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        bound = lines.get(test.operands[1])
        literal = re.match(r"\((\d+)\)", bound.attributes) if bound and bound.opcode == "constant" else None
        return int(literal[1]) if literal else None

    def loops(self) -> list[int | None]:
        """`trips` of all loops."""
        return [self.trips(i) for lines in self.computations.values() for i in lines if i.opcode == "while"]

    def _of(self, computation: str) -> Cost:
        if computation not in self._costs:
            total = Cost()
            for instruction in self.computations[computation]:
                self._count(computation, instruction, total)
            self._costs[computation] = total
        return self._costs[computation]

    def _count(self, computation: str, line: Instruction, total: Cost) -> None:
        opcode = line.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return
        if opcode == "while":
            times = self.trips(line)
            times = self.unknown_trips if times is None else times
            for name in (*line.called("body"), *line.called("condition")):
                total.add(self._of(name), times)
            return
        if opcode == "conditional":
            branches = [self._of(name) for name in line.called("branch_computations")]
            branches += [self._of(name) for key in ("true", "false") for name in line.called(f"{key}_computation")]
            total.add(min(branches, key=lambda cost: cost.hbm))
            return
        if opcode in ("call", "async-start"):
            for name in (*line.called("to_apply"), *line.called("calls")):
                total.add(self._of(name))
            return
        if opcode == "fusion":
            self._send(line.called("calls")[0], total)
        self._transfer(computation, line, total, opcode, beside=opcode.endswith("-start"))
        total.hbm += self._moved(computation, line)

    def _asynchronous(self, fused: str) -> bool:
        """Whether a fused computation starts, goes on with or ends a collective that runs beside other work."""
        return fused.startswith("async_collective_fusion") or any(
            "AsyncCollective" in line.attributes for line in self.computations[fused]
        )

    def _started(self, fused: str) -> set[str]:
        """The collectives that a fused computation starts."""
        starts = (line for line in self.computations[fused] if '"AsyncCollectiveStart"' in line.attributes)
        return {name for line in starts for name in line.operands}

    def _send(self, fused: str, total: Cost) -> None:
        """Count the collectives that a fused computation runs or starts."""
        asynchronous, started = self._asynchronous(fused), self._started(fused)
        for line in self.computations[fused]:
            if line.opcode == "fusion":
                self._send(line.called("calls")[0], total)
            elif not asynchronous or line.name in started:
                # Of a sum that all have, and that is then cut, only what each chip keeps goes to it.
                scatters = line.opcode == "all-reduce" and fused.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if scatters else line.opcode
                self._transfer(fused, line, total, kind, beside=line.name in started)

    def _transfer(self, computation: str, line: Instruction, total: Cost, opcode: str, *, beside: bool) -> None:
        """Count what an instruction sends, if `opcode`, its own or what it amounts to, is one of a collective."""
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # A start gives operands and results as one tuple; the larger is what goes through.
            sizes = [sum(s.bytes for s in self.shapes.get((computation, name), ())) for name in line.operands]
            results = line.shapes if not line.opcode.endswith("-start") else line.shapes[len(line.shapes) // 2 :]
            total.transfer(kind, max(sum(sizes), sum(s.bytes for s in results)), beside=beside)

    def _moved(self, computation: str, line: Instruction) -> float:
        """Bytes of HBM that an instruction reads and writes."""
        operands = [self.shapes.get((computation, name), ()) for name in line.operands]
        if line.opcode == "copy-start":
            # The result is (copy, original, context).
            return _hbm(operands[0]) + _hbm(line.shapes[:1])
        if line.opcode in SLICES:
            # In the background the result is (original, slice, context).
            part = line.shapes[1:2] if line.opcode == "slice-start" else line.shapes
            return _touched(operands[0], part) + _hbm(part)
        if line.opcode in UPDATES:
            return 2 * _touched(line.shapes, operands[UPDATES[line.opcode]])
        if line.opcode == "fusion":
            return self._fused(line, operands)
        return sum(map(_hbm, operands)) + _hbm(line.shapes)

    def _fused(self, line: Instruction, operands: list[tuple[Shape, ...]]) -> float:
        name = line.called("calls")[0]
        body = self.computations[name]
        by_name = {instruction.name: instruction for instruction in body}
        passed: dict[int, int] = {}
        if self._asynchronous(name):
            # What a collective reads and writes is handed on from its start to its end; it counts at the start.
            if any('"AsyncCollectiveDone"' in instruction.attributes for instruction in body):
                return 0.0
            found = re.findall(r"\{(\d*)\}: \((\d+)", line.attributes.partition("output_to_operand_aliasing=")[2])
            passed = {int(output or 0): int(operand) for output, operand in found}
        kept = set(passed.values()) if not self._started(name) else set()
        total = sum(
            self._read(name, number, _hbm(shapes))
            for number, shapes in enumerate(operands)
            if number not in kept and _hbm(shapes)
        )
        roots = [instruction for instruction in body if instruction.root]
        if roots[0].opcode == "tuple":
            outputs = [by_name[name] for name in roots[0].operands]
        else:
            outputs = roots * len(line.shapes)
        for number, (shape, output) in enumerate(zip(line.shapes, outputs, strict=False)):
            if number in passed:
                continue
            output = _behind(output, by_name)
            if shape.hbm and output.opcode in UPDATES:
                total += sum(s.bytes for s in by_name[output.operands[UPDATES[output.opcode]]].shapes)
            else:
                total += _hbm((shape,))
        return total

    def _read(self, computation: str, number: int, whole: float) -> float:
        """Bytes that a fused computation reads of its parameter of that number, at most `whole`."""
        body = self.computations[computation]
        wanted = f"({number})"
        names = [line.name for line in body if line.opcode == "parameter" and line.attributes == wanted]
        part = 0.0
        for name in names:
            for user in body:
                for place, operand in enumerate(user.operands):
                    if operand != name:
                        continue
                    if user.opcode == "bitcast" or self._passes(user, place):
                        # The same array under another name.
                        names.append(user.name)
                    elif user.opcode == "fusion":
                        part += self._read(user.called("calls")[0], place, whole)
                    elif place == 0 and user.opcode in SLICES:
                        part += sum(shape.bytes for shape in user.shapes)
                    elif not (place == 0 and user.opcode in UPDATES):
                        return whole
        return min(part, whole)

    def _passes(self, line: Instruction, place: int) -> bool:
        """Whether a fusion does nothing but to give its operand of that number another shape."""
        if line.opcode != "fusion":
            return False
        body = self.computations[line.called("calls")[0]]
        found = _behind(next(i for i in body if i.root), {i.name: i for i in body})
        return found.opcode == "parameter" and found.attributes == f"({place})"


def _hbm(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.hbm))


def _behind(line: Instruction, by_name: dict[str, Instruction]) -> Instruction:
    """What an array is before bitcasts give it other shapes."""
    while line.opcode == "bitcast":
        line = by_name[line.operands[0]]
    return line


def _touched(whole: tuple[Shape, ...], update: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in update)) if any(shape.hbm for shape in whole) else 0.0


def parse(text: str, *, unknown_trips: int = 1) -> Module:
    """Read what `Compiled.as_text()` gives.

    Args:
        text: of one module.
        unknown_trips: how often a loop is taken to run whose trip count the compiler does not know.

    Raises:
        ValueError: there is no entry computation.
    """
    text = re.sub(r"/\*.*?\*/", "", text)
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            match = _NAME.search(line)
            assert match
            current = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and line.startswith(("  %", "  ROOT ")):
            # A kernel's attributes go on over further lines, which say nothing that is counted.
            current.append(_instruction(line.strip()))
    if not entry:
        raise ValueError("expected a compiled module with an entry computation, found none")
    return Module(computations, entry, unknown_trips)


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = shapes_of(rest[:end]), rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : close]
    attributes = rest[close + 1 :]
    if opcode in ("parameter", "constant"):
        attributes = f"({inside})"
    return Instruction(name.lstrip("%"), opcode.strip(), shapes, tuple(_NAME.findall(inside)), attributes, root)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"expected parentheses in pairs, found {text[:80]!r}")


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a type: `bf16[8,896]{1,0:T(8,128)(2,1)S(1)}`, or a tuple of such."""
    return tuple(_shape(*match.groups()) for match in _SHAPE.finditer(text) if match[1] in BITS)


def _shape(kind: str, dimensions: str, layout: str | None) -> Shape:
    sizes = [int(size.lstrip("<=")) for size in dimensions.split(",") if size]
    order, _, rest = (layout or "").partition(":")
    minor = [int(axis) for axis in order.split(",") if axis]
    tile = _TILE.search(rest)
    if tile and minor:
        padded = [int(size) for size in tile[1].split(",")]
        for axis, size in zip(minor, reversed(padded), strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
    memory = _MEMORY.search(rest)
    return Shape(math.prod(sizes) * BITS[kind] // 8, memory is None or memory[1] == "0")
