"""What a compiled program says of itself: what moves between devices, how many bytes, and which buffers it reuses.

Read from the text of the optimised HLO, as XLA writes it for CPUs, GPUs and TPUs.
"""

from __future__ import annotations

import dataclasses
import math
import re

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(-start)?\(")
LOOP = re.compile(r" while\(.*body=%([\w.\-]+)")
RING = re.compile(r"windowed_dot_general_body_(ag|rs)")  # XLA's name for a product fused with a ring of permutes
BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"pred": 1, "s8": 1, "u8": 1}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One movement of data between more than one device."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, shape) of each array that it yields on a device
    within: tuple[str, ...]  # names (HLO's op_name) of the while loops around it, outermost first
    line: str
    ring: bool = False  # done hop by hop, each overlapped with a part of the product that uses it

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each array."""
        return tuple(BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)

    @property
    def bytes(self) -> int:
        """Of all arrays, for one pass of the loops around it."""
        return sum(self.sizes)

    @property
    def loops(self) -> int:
        """How many while loops it is inside of."""
        return len(self.within)


def computations(text: str) -> dict[str, list[str]]:
    """HLO text -> {computation: its lines}."""
    found, name = {}, None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def donated(text: str) -> set[int]:
    """Numbers of the program's arguments whose buffers hold results after it."""
    return {int(number) for number in re.findall(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}", text.split("\n", 1)[0])}


def loops(text: str) -> list[str]:
    """Names (op_name) of all while loops."""
    return [_op_name(line) for lines in computations(text).values() for line in lines if LOOP.search(line)]


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program whose groups hold more than one device.

    Two things that TPU compilers write in pieces count once: an asynchronous gather that is spread over later
    instructions (its pieces share a channel), and a gather or scatter that goes round a ring inside a product.
    """
    found = computations(text)
    within = _loops(found)
    rings = {name: _rings(lines, found) for name, lines in found.items()}
    out: dict[object, Collective] = {}
    for name, lines in found.items():
        for ring in rings[name]:
            out[ring.line] = dataclasses.replace(ring, within=within[name])
        if RING.search(name):
            lines = [line for line in lines if "collective-permute" not in line]
        first_hops = {_op_name(ring.line) for ring in rings[name]}
        for line in lines:
            if not (match := COLLECTIVE.search(line)) or _group_size(line) < 2:
                continue
            if match[2] == "collective-permute" and _op_name(line) in first_hops:
                continue
            one = Collective(match[2], _yields(match), within[name], line.strip())
            key = re.search(r"channel_id=\d+", line)[0] if "chain_id=" in line else (name, line)
            if key not in out or one.loops < out[key].loops:
                out[key] = one
    return list(out.values())


def _yields(match: re.Match) -> tuple:
    """What an instruction gives; the -start of an asynchronous one lists its operands before and a context behind."""
    arrays = [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _arrays(match[1])]
    if match[3] and match[2] != "all-reduce":
        arrays = [array for array in arrays if array != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _arrays(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\w+)\[([\d,]*)\]", text)


def _rings(lines: list[str], found: dict[str, list[str]]) -> list[Collective]:
    """The rings that a computation runs: a gather yields every hop's array, a scatter keeps one."""
    rings = []
    for line in lines:
        if not (loop := LOOP.search(line)) or not (kind := RING.search(loop[1])):
            continue
        hops = [(hop, COLLECTIVE.search(hop)) for hop in found[loop[1]] if "collective-permute" in hop]
        hops = [(hop, match) for hop, match in hops if match]
        if not hops:
            continue
        dtype, shape = _yields(hops[0][1])[0]
        parts = max(_ring_size(hop) for hop, _ in hops)
        gathers = kind[1] == "ag"
        arrays = ((dtype, (parts, *shape) if gathers else shape),)
        rings.append(Collective("all-gather" if gathers else "reduce-scatter", arrays, (), line.strip(), ring=True))
    return rings


def _ring_size(line: str) -> int:
    """Length of the cycle that the first device of a permute is in."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line)
    to = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])} if pairs else {}
    start = at = min(to, default=0)
    size = 1
    while to.get(at, start) != start:
        at, size = to[at], size + 1
    return size


def _op_name(line: str) -> str:
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else ""


def _loops(found: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Computation -> names of the while loops around it; of several ways in, the deepest counts."""
    within: dict[str, tuple[str, ...]] = {name: () for name in found}
    for _ in range(len(found)):
        before = dict(within)
        for name, lines in found.items():
            for line in lines:
                for word, callee in re.findall(r"([\w_]+)=\{?%([\w.\-]+)", line):
                    around = (*within[name], _op_name(line)) if word == "body" else within[name]
                    if callee in within and len(around) > len(within[callee]):
                        within[callee] = around
        if within == before:
            return within
    raise AssertionError("computations call each other in a circle")


def _group_size(line: str) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):  # sizes of axes, then those meant
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        meant = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in meant)
    return 2  # all devices, or pairs


PRODUCT = re.compile(r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.\-]+), .*lhs_contracting_dims=\{([\d,]*)\}")


def product_flops(text: str) -> int:
    """FLOPs of all matrix products that a compiled program does; loops count as often as they turn."""
    found = computations(text)
    turns = {name: 0 for name in found}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]

    def visit(name: str, times: int) -> None:
        turns[name] += times
        for line in found[name]:
            for word, callee in re.findall(r"([\w_]+)=\{?%([\w.\-]+)", line):
                if callee in found and word in ("body", "calls", "to_apply"):
                    count = re.search(r'known_trip_count":\{"n":"(\d+)"', line) if word == "body" else None
                    visit(callee, times * (int(count[1]) if count else 1))

    visit(entry, 1)
    total = 0
    for name, lines in found.items():
        shapes = {m[1]: m[2] for line in lines if (m := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line))}
        for match in filter(None, map(PRODUCT.search, lines)):
            left = [int(n) for n in shapes[match[2]].split(",") if n]
            inner = math.prod(left[int(dim)] for dim in match[3].split(",") if dim)
            total += 2 * inner * math.prod(int(n) for n in match[1].split(",") if n) * turns[name]
    return total
