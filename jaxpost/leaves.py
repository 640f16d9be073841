"""The leaves of a parameter tree by name: dotted paths, path patterns, and which layer each row of a leaf belongs to.

A path is the dotted name of a leaf, role included: "policy.blocks.0.attn.q". Names alone say what a leaf is (they are
for ever, see models/spec.py), never its number of dimensions: layers are stacked under "blocks".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxpost.errors import ConfigError
from jaxpost.types import Tree


def dotted(path: tuple) -> str:
    """A jax key path as "policy.blocks.0.attn.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaf_paths(tree: Tree) -> list[str]:
    """Dotted path of every leaf, in flattening order."""
    return [dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def check_pattern(key: str, pattern: str) -> None:
    """ValueError, naming the key, for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from None


def matching(patterns: Sequence[str], params: Tree, key: str, must_match: bool = True) -> list[bool]:
    """Of each leaf, in flattening order: does any pattern match its path?

    must_match: ConfigError, naming optim.<key> and the nearest paths, for a pattern that matches none.
    """
    paths = leaf_paths(params)
    for pattern in patterns if must_match else ():
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ConfigError(f"optim.{key}: {pattern!r} matches no parameter; the nearest are {', '.join(near)}")
    return [any(re.search(pattern, path) for pattern in patterns) for path in paths]


def is_stacked(path: str) -> bool:
    """Whether a leaf's first dimension is the layers that it holds: ROLE.blocks.PLACE. ..."""
    return path.split(".")[1:2] == ["blocks"]


def is_layer_matrix(path: str, ndim: int) -> bool:
    """Whether a leaf is a matrix of a layer: inside prefix, blocks or tail, [in, out] beside the stacking."""
    inside = path.split(".")[1:2] in (["prefix"], ["blocks"], ["tail"])
    return inside and ndim - is_stacked(path) >= 2


def layer_numbers(params: Mapping[str, Tree]) -> tuple[list[np.ndarray | None], list[int]]:
    """Of each leaf, in flattening order: the layers that it holds, and how many layers its role has.

    i32[R] for a stacked leaf, i32[] for one of prefix or tail, None outside the layers. The numbers are those of
    DecoderSpec.locate: prefix, then the repeats of the pattern, then tail.
    """
    numbers: list[np.ndarray | None] = []
    counts: list[int] = []
    for role in sorted(params):  # as jax flattens a dict
        tree = params[role] if isinstance(params[role], Mapping) else {}
        blocks, prefix, tail = tree.get("blocks", {}), tree.get("prefix", []), tree.get("tail", [])
        stacks = jax.tree.leaves(blocks)
        first_tail = len(prefix) + (stacks[0].shape[0] * len(blocks) if stacks else 0)
        for path in leaf_paths(params[role]):
            part, place = (*path.split("."), "")[:2]
            if part == "prefix":
                numbers.append(np.array(int(place)))
            elif part == "blocks":
                numbers.append(len(prefix) + int(place) + len(blocks) * np.arange(stacks[0].shape[0]))
            else:
                numbers.append(np.array(first_tail + int(place)) if part == "tail" else None)
            counts.append(first_tail + len(tail))
    return numbers, counts
