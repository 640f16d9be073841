"""Seeded damage to files: bytes (flips, cuts, repeats, length fields) and JSON trees (types swapped, keys lost)."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "a", "0", "\0", "\ud800", "x" * 3000, "<s>", "../../etc/passwd", "{{ 1 }}", [], [[]], [0], ["a", "b"], {}),
    *({"": ""}, {"type": "BPE"}, [[["a"]]], {"a": {"b": {"c": []}}}),
)


def damage(rng: random.Random, data: bytes) -> bytes:
    """1 to 4 changes of bytes; most near the start, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        span = len(out) if rng.random() < 0.5 else min(len(out), 400)
        at = rng.randrange(span) if span else 0
        size = min(rng.choice((1, 2, 8, 30, 300)), len(out) - at)
        kind = rng.randrange(8)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice((0, 1, 0x22, 0x5C, 0x7F, 0x80, 0xC0, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del out[rng.choice((at, len(out) - min(len(out), 1 + at // 50))) :]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            del out[at : at + size]
        elif kind == 5:
            form = rng.choice(("<I", "<Q", "<Q", ">Q"))
            number = rng.choice(NUMBERS) & (2 ** (8 * struct.calcsize(form)) - 1)
            out[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 6:
            other = rng.randrange(span) if span else 0
            out[at : at + size], out[other : other + size] = out[other : other + size], out[at : at + size]
        else:
            out[at:at] = rng.randbytes(size)
    return bytes(out)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every node below the root."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            found.append((node, key))
            todo.append(child)
    return found


def swap(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with 1 to 3 nodes given another type, value or place, or lost."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = places(tree)
        if not found or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(VALUES))
        # A level first, then a node of it: a vocabulary of thousands does not hide the rest.
        containers = list({id(node): node for node, _ in found}.values())
        node = rng.choice(containers)
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, name = rng.choice(found)
            node[key] = json.loads(json.dumps(other[name])) if _holds(other, name) else None
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(("", "type", "\udc00", "extra", "x" * 300))] = node.pop(key)
        elif kind == 3 and isinstance(node[key], int) and not isinstance(node[key], bool):
            node[key] = rng.choice((-node[key] - 1, node[key] + 1, *NUMBERS))
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _holds(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def dump(tree: Any) -> bytes:
    """JSON text, NaN and lone surrogates included as careless writers write them."""
    return json.dumps(tree).encode()


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with its tree changed, its bytes, or both."""
    if rng.random() < 0.7:
        data = dump(swap(rng, json.loads(data)))
        if rng.random() < 0.8:
            return data
    return damage(rng, data)
