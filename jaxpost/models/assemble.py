"""From named matrices in files to the parameter tree: which tensors make up which leaf, read slice by slice."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.models.spec import DecoderSpec, abstract_layer, abstract_params, is_info


class Leaf(NamedTuple):
    """One leaf of the tree and the tensors it is made of, one a layer where it is stacked."""

    path: tuple[str | int, ...]  # into the parameter tree
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transposed: bool  # the file holds [out, in]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the file."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def leaves(spec: DecoderSpec, tensor_name: Callable[[str, int | None], str]) -> list[Leaf]:
    """Every leaf of the model; tensor_name(dotted path, layer or None) is the family's or the format's name table."""
    out = [
        Leaf((key,), info.shape, (tensor_name(key, None),), False, False)
        for key, info in abstract_params(spec).items()
        if is_info(info)
    ]
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract_layer(spec), is_leaf=is_info)
    inner = [(tuple(key.key for key in path), info) for path, info in flat]
    places = [(spec.locate(i), i) for i in range(spec.num_layers)]
    for (part, key), group in itertools.groupby(sorted(places, key=_place), key=lambda item: item[0][:2]):
        slots = list(group)
        stacked = slots[0][0].repeat is not None
        for path, info in inner:
            names = tuple(tensor_name(".".join(path), layer) for _, layer in slots)
            shape = (len(slots), *info.shape) if stacked else info.shape
            out.append(Leaf((part, key, *path), shape, names, stacked, len(info.shape) == 2))
    return out


def _place(item: tuple) -> tuple:
    (part, key, _), layer = item
    return part, str(key), layer


def build(
    plan: list[Leaf], read: Callable[[str], np.ndarray], spec: DecoderSpec, dtype: Any, shardings: Any = None
) -> dict:
    """The parameter tree, leaf by leaf; read(name) gives a tensor in the file's orientation, best as a lazy view.

    With shardings (a tree of jax.sharding.Sharding) each process reads only the slices that its devices hold. Beside
    the finished leaves, host memory holds one leaf at a time.
    """
    tree = jax.tree.map(lambda info: None, abstract_params(spec), is_leaf=is_info)
    for leaf in plan:
        sharding = None if shardings is None else follow(shardings, leaf.path)
        follow(tree, leaf.path[:-1])[leaf.path[-1]] = _leaf(leaf, read, np.dtype(dtype), sharding)
    return tree


def follow(tree: Any, path: tuple) -> Any:
    """tree[path[0]][path[1]].."""
    for key in path:
        tree = tree[key]
    return tree


def _leaf(leaf: Leaf, read: Callable[[str], np.ndarray], dtype: np.dtype, sharding: Any) -> jax.Array:
    parts: dict[tuple, np.ndarray] = {}  # several devices may hold the same slice

    def fetch(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(s.indices(n) for s, n in zip(index, leaf.shape, strict=True))
        if key not in parts:
            parts[key] = _read_slice(leaf, read, dtype, index)
        return parts[key]

    # jnp.array always copies; device_put may alias an aligned host buffer, which could then not be donated.
    if sharding is None:
        value = jnp.array(fetch(tuple(slice(None) for _ in leaf.shape)))
    else:
        places = sharding.addressable_devices_indices_map(leaf.shape)
        pieces = [jnp.array(fetch(index), device=device) for device, index in places.items()]
        value = jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)
    # The next leaf waits for this one's transfer: host memory holds one at a time.
    value.block_until_ready()
    parts.clear()
    gc.collect(0)  # jax lets go of host buffers when the collector runs
    return value


def _read_slice(leaf: Leaf, read: Callable, dtype: np.dtype, index: tuple[slice, ...]) -> np.ndarray:
    inner = index[1:] if leaf.stacked else index

    def part(name: str) -> np.ndarray:
        view = np.asarray(read(name))
        return (view.T if leaf.transposed else view)[inner]

    if not leaf.stacked:
        return part(leaf.names[0]).astype(dtype)
    names = leaf.names[index[0]]
    first = part(names[0])
    out = np.empty((len(names), *first.shape), dtype)
    out[0] = first
    for row, name in enumerate(names[1:], 1):
        out[row] = part(name)
    return out


def in_layer_order(plan: list[Leaf]) -> list[tuple[Leaf, int]]:
    """(leaf, row) of every tensor, the unstacked and the first layers' first: the order of an exported file."""
    return sorted(((leaf, row) for leaf in plan for row in range(len(leaf.names))), key=lambda item: item[1])


def tensor(params: dict, leaf: Leaf, row: int) -> Any:
    """One tensor of the tree in our orientation: a row of a stacked leaf, or the leaf."""
    value = follow(params, leaf.path)
    if not leaf.stacked:
        return value
    # A dynamic index makes one small program for all rows.
    return value[row] if isinstance(value, np.ndarray) else jax.lax.dynamic_index_in_dim(value, row, 0, False)
