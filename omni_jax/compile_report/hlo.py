"""Counts from the text of a compiled program: bytes of HBM and of ICI traffic, and trips of loops.

XLA's own `cost_analysis` counts a loop's body once, whatever its trip count, and bytes as if there were no on-chip
memory. Here:

- A loop's body counts as often as it runs.
- An array counts with the padding of its tiles; one that the compiler has put into VMEM (`S(1)` in its layout) does
  not count.
- A slice, gather or update in place counts the bytes that it reads and writes, not the whole array.
- Of the two branches of a conditional, the cheaper counts: the model branches to skip work, as greedy decoding skips
  sorting. Of several, the caller says which.
- A collective that overlaps with other work appears in several fusions (start, update, done). It counts once, in the
  first.
- A collective that a SparseCore runs, as a call with a start and an end, overlaps as far as the work between the two
  takes by the compiler's estimate, which other such collectives may use up.

Format of the text: https://openxla.org/xla/operation_semantics, layouts: https://openxla.org/xla/tiled_layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16,
    "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
"""Bits of an element, by XLA's name of the type."""
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "domain", "get-dimension-size",
}  # fmt: skip
"""Opcodes that move nothing."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = {"dynamic-slice", "gather", "slice", "slice-start"}
"""Opcodes that read only part of their first operand."""
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcodes that write part of their first operand in place, and which operand is the update."""

_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_TRIP_COUNT = re.compile(r'"?known_trip_count"?\s*:\s*\{\s*"?n"?\s*:\s*"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Shape:
    """One array."""

    bytes: int
    """Its size in memory, with the padding of its tiles."""
    hbm: bool
    """Whether it is in HBM, not in on-chip memory."""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Shape of the result; several if it is a tuple."""
    operands: tuple[str, ...]
    attributes: str
    """What follows the operands; of parameters and constants, their number or value in parentheses."""
    root: bool
    """Whether its result is that of the computation."""

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute such as `calls` or `body` lists."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(match[1]) if match else []


@dataclass
class Cost:
    """Traffic of one run of a computation, in bytes on each chip."""

    hbm: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)
    """ICI bytes by kind of collective: the larger of what a chip puts in and what it gets out."""
    overlapped: float = 0.0
    """Bytes of `collectives` that are sent while other work runs."""

    def add(self, other: Cost, times: float = 1.0) -> None:
        """Add `times` runs of something else."""
        self.hbm += other.hbm * times
        self.overlapped += other.overlapped * times
        for kind, amount in other.collectives.items():
            self.add_collective(kind, amount * times)

    def add_collective(self, kind: str, amount: float, *, overlapped: bool = False) -> None:
        """Add a collective of `amount` bytes."""
        self.collectives[kind] = self.collectives.get(kind, 0.0) + amount
        self.overlapped += amount * overlapped


@dataclass
class Module:
    """A compiled program."""

    computations: dict[str, list[Instruction]]
    entry: str
    """Name of the computation that the program runs."""
    unknown_trips: int = 1
    """Assumed trip count of loops whose trip count the compiler does not know."""
    branch: int = -1
    """Which branch counts of conditionals that have more than two."""
    bytes_per_cycle: float = 0.0
    """What a chip can send while its cores work for a cycle."""
    _costs: dict[str, Cost] = field(default_factory=dict)

    @cached_property
    def cost(self) -> Cost:
        """Traffic of the whole program."""
        return self._cost_of(self.entry)

    @cached_property
    def shapes(self) -> dict[tuple[str, str], tuple[Shape, ...]]:
        """Shapes of every instruction's result, by computation and instruction name."""
        return {(name, line.name): line.shapes for name, lines in self.computations.items() for line in lines}

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` runs; None if the text does not show it.

        It shows in an annotation of the compiler, or in a condition `counter < constant`. The counter is assumed to
        start at 0, as those of `jax.lax.scan` do.
        """
        if known := _TRIP_COUNT.search(loop.attributes):
            return int(known[1])
        lines = {line.name: line for line in self.computations[loop.called("condition")[0]]}
        test = _root(lines.values())
        if test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        bound = lines.get(test.operands[1])
        literal = re.match(r"\((\d+)\)", bound.attributes) if bound and bound.opcode == "constant" else None
        return int(literal[1]) if literal else None

    def _cost_of(self, computation: str) -> Cost:
        if computation not in self._costs:
            total = Cost()
            # Bytes that are still to be sent, of collectives that have started.
            sending: dict[str, float] = {}
            for line in self.computations[computation]:
                if line.opcode == "call-start":
                    call = self._cost_of(line.called("to_apply")[0])
                    total.add(call)
                    sending[line.name] = sum(call.collectives.values())
                    total.overlapped += sending[line.name]
                elif line.opcode == "call-done":
                    # What is left has to be waited for.
                    total.overlapped -= sending.pop(line.operands[0], 0.0)
                else:
                    self._add_instruction(computation, line, total)
                    self._send(line, sending)
            self._costs[computation] = total
        return self._costs[computation]

    def _send(self, line: Instruction, sending: dict[str, float]) -> None:
        """Reduce what is still to be sent by what is sent during an instruction."""
        cycles = _CYCLES.search(line.attributes)
        room = self.bytes_per_cycle * int(cycles[1]) if cycles else 0.0
        for name, left in sending.items():
            sending[name] -= min(left, room)
            room -= min(left, room)

    def _add_instruction(self, computation: str, line: Instruction, total: Cost) -> None:
        opcode = line.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return
        if opcode == "while":
            times = self.trip_count(line)
            times = self.unknown_trips if times is None else times
            for name in (*line.called("body"), *line.called("condition")):
                total.add(self._cost_of(name), times)
            return
        if opcode == "conditional":
            branches = [self._cost_of(name) for name in line.called("branch_computations")]
            branches += [self._cost_of(name) for key in ("true", "false") for name in line.called(f"{key}_computation")]
            total.add(branches[self.branch] if len(branches) > 2 else min(branches, key=lambda cost: cost.hbm))
            return
        if opcode in ("call", "async-start"):
            for name in (*line.called("to_apply"), *line.called("calls")):
                total.add(self._cost_of(name))
            return
        if opcode == "fusion":
            self._add_fused_collectives(line.called("calls")[0], total)
        self._add_collective(computation, line, opcode, total, overlapped=opcode.endswith("-start"))
        total.hbm += self._hbm_traffic(computation, line)

    def _is_async_collective(self, fused: str) -> bool:
        """Whether a fused computation starts, continues or completes a collective that overlaps with other work."""
        return fused.startswith("async_collective_fusion") or any(
            "AsyncCollective" in line.attributes for line in self.computations[fused]
        )

    def _started_collectives(self, fused: str) -> set[str]:
        """Names of the overlapping collectives that a fused computation starts."""
        starts = (line for line in self.computations[fused] if '"AsyncCollectiveStart"' in line.attributes)
        return {name for line in starts for name in line.operands}

    def _add_fused_collectives(self, fused: str, total: Cost) -> None:
        """Add the collectives that a fused computation runs or starts."""
        is_async, started = self._is_async_collective(fused), self._started_collectives(fused)
        for line in self.computations[fused]:
            if line.opcode == "fusion":
                self._add_fused_collectives(line.called("calls")[0], total)
            elif not is_async or line.name in started:
                # An all-reduce whose result is sliced at once sends each chip only its slice.
                scatters = line.opcode == "all-reduce" and fused.startswith("all-reduce-scatter")
                opcode = "reduce-scatter" if scatters else line.opcode
                self._add_collective(fused, line, opcode, total, overlapped=line.name in started)

    def _add_collective(
        self, computation: str, line: Instruction, opcode: str, total: Cost, *, overlapped: bool
    ) -> None:
        """Add an instruction's ICI traffic, if `opcode`, its own or what it amounts to, is a collective."""
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # The result of a start is a tuple of operands and results. The larger of the two is what is sent.
            sizes = [sum(s.bytes for s in self.shapes.get((computation, name), ())) for name in line.operands]
            results = line.shapes if not line.opcode.endswith("-start") else line.shapes[len(line.shapes) // 2 :]
            total.add_collective(kind, max(sum(sizes), sum(s.bytes for s in results)), overlapped=overlapped)

    def _hbm_traffic(self, computation: str, line: Instruction) -> float:
        """Bytes of HBM that an instruction reads and writes."""
        operands = [self.shapes.get((computation, name), ()) for name in line.operands]
        if line.opcode == "copy-start":
            # The result is (copy, original, context).
            return _hbm_bytes(operands[0]) + _hbm_bytes(line.shapes[:1])
        if line.opcode in SLICES:
            # The result of an asynchronous slice is (original, slice, context).
            result = line.shapes[1:2] if line.opcode == "slice-start" else line.shapes
            return _slice_bytes(operands[0], result) + _hbm_bytes(result)
        if line.opcode in UPDATES:
            return 2 * _slice_bytes(line.shapes, operands[UPDATES[line.opcode]])
        if line.opcode == "fusion":
            return self._fusion_traffic(line, operands)
        return sum(map(_hbm_bytes, operands)) + _hbm_bytes(line.shapes)

    def _fusion_traffic(self, line: Instruction, operands: Sequence[tuple[Shape, ...]]) -> float:
        """Bytes of HBM that a fusion reads and writes."""
        fused = line.called("calls")[0]
        aliases: dict[int, int] = {}
        if self._is_async_collective(fused):
            # Buffers of an overlapping collective pass from its start to its end; they count at the start.
            if any('"AsyncCollectiveDone"' in instruction.attributes for instruction in self.computations[fused]):
                return 0.0
            found = re.findall(r"\{(\d*)\}: \((\d+)", line.attributes.partition("output_to_operand_aliasing=")[2])
            aliases = {int(output or 0): int(operand) for output, operand in found}
        skipped = set() if self._started_collectives(fused) else set(aliases.values())
        read = sum(
            self._parameter_bytes(fused, number, _hbm_bytes(shapes))
            for number, shapes in enumerate(operands)
            if number not in skipped and _hbm_bytes(shapes)
        )
        return read + self._bytes_written(line, fused, set(aliases))

    def _bytes_written(self, line: Instruction, fused: str, skipped: set[int]) -> float:
        """Bytes of HBM that a fusion writes, without the outputs of these numbers."""
        by_name = {instruction.name: instruction for instruction in self.computations[fused]}
        root = _root(by_name.values())
        outputs = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(line.shapes)
        total = 0.0
        for number, (shape, output) in enumerate(zip(line.shapes, outputs, strict=False)):
            if number in skipped:
                continue
            source = _skip_bitcasts(output, by_name)
            if shape.hbm and source.opcode in UPDATES:
                total += sum(s.bytes for s in by_name[source.operands[UPDATES[source.opcode]]].shapes)
            else:
                total += _hbm_bytes((shape,))
        return total

    def _parameter_bytes(self, fused: str, number: int, size: float) -> float:
        """Bytes that a fused computation reads of its parameter `number`, which has `size` bytes."""
        body = self.computations[fused]
        names = [line.name for line in body if line.opcode == "parameter" and line.attributes == f"({number})"]
        total = 0.0
        # The list grows while it is read: a bitcast is the same array under another name.
        for name in names:
            for user, position in _uses(name, body):
                if user.opcode == "bitcast" or self._is_bitcast_fusion(user, position):
                    names.append(user.name)
                else:
                    total += self._operand_bytes(user, position, size)
        return min(total, size)

    def _operand_bytes(self, user: Instruction, position: int, size: float) -> float:
        """Bytes that an instruction within a fusion reads of its operand at `position`, which has `size` bytes."""
        if user.opcode == "fusion":
            return self._parameter_bytes(user.called("calls")[0], position, size)
        if position == 0 and user.opcode in SLICES:
            return float(sum(shape.bytes for shape in user.shapes))
        return 0.0 if position == 0 and user.opcode in UPDATES else size

    def _is_bitcast_fusion(self, line: Instruction, position: int) -> bool:
        """Whether a fusion only gives its operand at `position` another shape."""
        if line.opcode != "fusion":
            return False
        by_name = {instruction.name: instruction for instruction in self.computations[line.called("calls")[0]]}
        source = _skip_bitcasts(_root(by_name.values()), by_name)
        return source.opcode == "parameter" and source.attributes == f"({position})"


def _root(lines: Iterable[Instruction]) -> Instruction:
    return next(line for line in lines if line.root)


def _uses(name: str, lines: Iterable[Instruction]) -> Iterator[tuple[Instruction, int]]:
    """The instructions that have `name` as an operand, and at which position."""
    for line in lines:
        for position, operand in enumerate(line.operands):
            if operand == name:
                yield line, position


def _hbm_bytes(shapes: tuple[Shape, ...]) -> float:
    return float(sum(shape.bytes for shape in shapes if shape.hbm))


def _skip_bitcasts(line: Instruction, by_name: Mapping[str, Instruction]) -> Instruction:
    """The instruction that computes an array, behind any bitcasts."""
    while line.opcode == "bitcast":
        line = by_name[line.operands[0]]
    return line


def _slice_bytes(whole: tuple[Shape, ...], part: tuple[Shape, ...]) -> float:
    """Bytes that are moved to read or write `part` of an array: none if the array is on the chip."""
    return float(sum(shape.bytes for shape in part)) if any(shape.hbm for shape in whole) else 0.0


def parse(text: str, *, unknown_trips: int = 1, branch: int = -1, bytes_per_cycle: float = 0.0) -> Module:
    """Read the text that `jax.stages.Compiled.as_text()` returns.

    Args:
        text: of one module.
        unknown_trips: assumed trip count of loops whose trip count the compiler does not know.
        branch: which branch counts of conditionals that have more than two.
        bytes_per_cycle: what a chip can send while its cores work for a cycle.

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
            # Attributes of a kernel take further lines, which hold nothing that counts.
            current.append(_parse_instruction(line.strip()))
    if not entry:
        raise ValueError("expected a compiled module with an entry computation, found none")
    return Module(computations, entry, unknown_trips, branch, bytes_per_cycle)


def _parse_instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing_parenthesis(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = parse_shapes(rest[:end]), rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing_parenthesis(rest, len(opcode))
    operands = rest[len(opcode) + 1 : close]
    attributes = f"({operands})" if opcode in ("parameter", "constant") else rest[close + 1 :]
    return Instruction(name.lstrip("%"), opcode.strip(), shapes, tuple(_NAME.findall(operands)), attributes, root)


def _closing_parenthesis(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"expected matching parentheses, found {text[:80]!r}")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type: `bf16[8,896]{1,0:T(8,128)(2,1)S(1)}`, or a tuple of such."""
    return tuple(_parse_shape(*match.groups()) for match in _SHAPE.finditer(text) if match[1] in BITS)


def _parse_shape(dtype: str, dimensions: str, layout: str | None) -> Shape:
    sizes = [int(size.lstrip("<=")) for size in dimensions.split(",") if size]
    order, _, rest = (layout or "").partition(":")
    minor_to_major = [int(axis) for axis in order.split(",") if axis]
    tile = _TILE.search(rest)
    if tile and minor_to_major:
        tile_sizes = [int(size) for size in tile[1].split(",")]
        for axis, size in zip(minor_to_major, reversed(tile_sizes), strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
    memory_space = _MEMORY_SPACE.search(rest)
    return Shape(math.prod(sizes) * BITS[dtype] // 8, memory_space is None or memory_space[1] == "0")
