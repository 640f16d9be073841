"""Collectives of a compiled program: what moves between devices, how often, how many bytes."""

import dataclasses
import math
import re

KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction between more than one device."""

    kind: str
    sizes: tuple[int, ...]  # bytes of each array that it yields on a device
    loops: int  # how many while loops it is inside of
    line: str

    @property
    def bytes(self) -> int:
        return sum(self.sizes)


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


def _loops(found: dict[str, list[str]]) -> dict[str, int]:
    """Computation -> depth of while loops around it."""
    depth = {name: 0 for name in found}
    for _ in range(len(found)):
        before = dict(depth)
        for name, lines in found.items():
            for line in lines:
                for word, callee in re.findall(r"([\w_]+)=\{?%([\w.\-]+)", line):
                    if callee in depth:
                        depth[callee] = max(depth[callee], depth[name] + (word == "body"))
        if depth == before:
            return depth
    raise AssertionError("computations call each other in a circle")


def _group_size(line: str) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    return 2  # all devices, or pairs


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program whose groups hold more than one device."""
    found = computations(text)
    depth, out = _loops(found), []
    for name, lines in found.items():
        for line in lines:
            if (match := COLLECTIVE.search(line)) and _group_size(line) > 1:
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                sizes = tuple(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays)
                out.append(Collective(match[2], sizes, depth[name], line.strip()))
    return out


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
