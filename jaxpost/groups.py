"""Learning rates of their own: for groups of parameters, from layer to layer, and for the b of adapters."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pydantic

from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, NonNegFloat, Str, layer_slice
from jaxpost.leaves import check_pattern, layer_numbers, leaf_paths, matching
from jaxpost.types import Tree


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class GroupConfig:
    """Some parameters, by path and layer, with a learning rate and a weight decay of their own."""

    match: Str  # path regex
    layers: Str | None = None  # "15:" or "0:10", as Python slices the layers; null: whatever matches
    lr_multiplier: NonNegFloat = 1.0  # times the scheduled learning rate; 0: stays as it is
    weight_decay: NonNegFloat | None = None  # in place of optim.weight_decay; optim.no_decay still spares its own

    @pydantic.model_validator(mode="after")
    def _check(self):
        check_pattern("match", self.match)
        if self.layers is not None:
            try:
                layer_slice(self.layers)
            except ValueError as error:
                raise ValueError(f"layers: {error}") from None
        return self


def lr_factors(
    groups: Sequence[GroupConfig],
    params: Tree,
    decayed: Tree,
    *,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    lora_plus_ratio: float | None = None,
) -> tuple[Tree, Tree]:
    """(what multiplies the learning rate, weight decay) of each leaf: floats, or f32[R,1,..] for R stacked layers.

    The factor is the product of

        lr_multiplier         of the first group that holds the leaf and the layer
        layer_decay^above     above: 0 behind the layers, 1 for the last layer, .., layers + 1 for the embedding
                              (2106.08254)
        lora_plus_ratio       for an adapter's b (2402.12354)

    params: role -> tree; decayed: tree of bool, where weight decay applies. ConfigError, naming optim's key, for a
    group that holds nothing, layer_decay without layers, and lora_plus_ratio without adapters.
    """
    paths, (layers, counts) = leaf_paths(params), layer_numbers(params)
    factors, decays = _first_match(groups, params, layers, counts, weight_decay)
    decays = [decay * applies for decay, applies in zip(decays, jax.tree.leaves(decayed), strict=True)]
    if layer_decay is not None:
        if all(held is None for held in layers):
            raise ConfigError("optim.lr_layer_decay: the parameters have no layers")
        above = map(_above, paths, layers, counts)
        factors = [factor * layer_decay**height for factor, height in zip(factors, above, strict=True)]
    if lora_plus_ratio is not None:
        known = set(paths)
        in_adapter = [path.endswith(".b") and f"{path[:-1]}a" in known for path in paths]
        if not any(in_adapter):
            raise ConfigError("optim.lora_plus_ratio: there are no adapters; give a lora section or leave it out")
        factors = [factor * lora_plus_ratio if b else factor for factor, b in zip(factors, in_adapter, strict=True)]
    return _spread(factors, params), _spread(decays, params)


def _first_match(
    groups: Sequence[GroupConfig], params: Tree, layers: list, counts: list[int], weight_decay: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """lr_multiplier and weight decay of each leaf, f64[R] or f64[]."""
    factors = [np.ones(np.shape(held)) for held in layers]  # np.shape(None) is ()
    decays = [np.full(np.shape(held), weight_decay) for held in layers]
    free = [np.full(np.shape(held), True) for held in layers]
    for i, group in enumerate(groups):
        hits = matching((group.match,), params, f"groups.{i}.match")
        held = [hit & _within(group.layers, *place) for hit, *place in zip(hits, layers, counts, strict=True)]
        if not any(rows.any() for rows in held):
            raise ConfigError(f"optim.groups.{i}.layers: {group.layers!r} holds no layer that {group.match!r} matches")
        for n, rows in enumerate(held):
            rows = rows & free[n]
            factors[n] = np.where(rows, group.lr_multiplier, factors[n])
            decays[n] = decays[n] if group.weight_decay is None else np.where(rows, group.weight_decay, decays[n])
            free[n] = free[n] & ~rows
    return factors, decays


def _within(text: str | None, held: np.ndarray | None, count: int) -> np.ndarray:
    """bool[R] or bool[]: which of the layers that a leaf holds are in a range such as "15:"."""
    if text is None or held is None:
        return np.full(np.shape(held), text is None)
    return np.isin(held, range(count)[layer_slice(text)])


def _above(path: str, held: np.ndarray | None, count: int) -> np.ndarray:
    """How many steps of layer decay a leaf's layers take."""
    if held is not None:
        return count - held
    return np.array(count + 1 if path.split(".")[1:2] == ["embed"] else 0)


def _spread(values: list[np.ndarray], params: Tree) -> Tree:
    """One float a leaf, or an array that broadcasts over the dims behind the stacking where its layers differ."""
    leaves, treedef = jax.tree.flatten(params)
    ready = [
        float(value.flat[0]) if (value == value.flat[0]).all()
        else value.astype(np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))
        for value, leaf in zip(values, leaves, strict=True)
    ]  # fmt: skip
    return jax.tree.unflatten(treedef, ready)
