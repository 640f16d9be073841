"""The stacked layers as one scan, or as two where adapters begin further up.

Adapters that sit on the upper layers only (lora.layers) leave nothing to differentiate below them: where the lower rows
are scanned by themselves, as plain frozen weights, JAX finds that no trained value flows through and builds no backward
pass for them. Nothing is cut by hand, so nothing can be cut wrongly: a gradient that someone asks for below (an
embedding, a soft token) still flows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpost.ops.proj import Lora


class Stack(NamedTuple):
    """One scan over rows of the stacked layers."""

    rows: range  # of the stack, from the bottom
    scanned: Any  # what the scan slices
    layers: Callable[[jax.Array, Any], dict]  # (row, its slice of `scanned`) -> that row's layers
    policy: Callable | None  # what the backward pass may keep, None: anything


def stacks(blocks: dict, repeats: int) -> list[Stack]:
    """The scans that `blocks` (leaves [repeats, ..]) take, from the bottom to the top."""
    leaves = jax.tree.leaves(blocks, is_leaf=_is_lora)
    first = min((leaf.first for leaf in leaves if _is_lora(leaf)), default=0)
    if first == 0:
        return [Stack(range(repeats), blocks, lambda row, layers: layers, None)]

    # A scan over a part of the frozen weights would have to copy that part: they stay whole, and a row is taken inside.
    frozen = jax.tree.map(lambda leaf: leaf.base if _is_lora(leaf) else leaf, blocks, is_leaf=_is_lora)
    trained = jax.tree.map(lambda leaf: leaf.replace(base=None) if _is_lora(leaf) else None, blocks, is_leaf=_is_lora)

    def layers(row: jax.Array, adapters: Any) -> dict:
        def one(weight: jax.Array, adapter: Lora | None) -> Any:
            own = jax.lax.dynamic_index_in_dim(weight, row, keepdims=False)
            return own if adapter is None else adapter.replace(base=own)

        return jax.tree.map(one, frozen, adapters)

    nothing = jax.tree.map(lambda _: None, frozen)
    upper = jax.tree.map(lambda x: x[first:], trained)
    found = [(range(first), nothing), (range(first, repeats), upper)]
    return [Stack(rows, scanned, layers, _all_but_rows) for rows, scanned in found if rows]


def _is_lora(leaf: Any) -> bool:
    return isinstance(leaf, Lora)


def _all_but_rows(primitive: Any, *_: Any, **__: Any) -> bool:
    """A checkpoint policy: keep everything but rows taken out of the stack, which would be a second copy of it."""
    return primitive.name not in ("dynamic_slice", "squeeze", "reshape")
