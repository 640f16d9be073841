"""Low-rank adapters (2106.09685) as a second tree beside a frozen base.

The adapter tree mirrors the parameter tree and holds only the projections that carry an adapter, stacked as they are:

    {"prefix": [{..}], "blocks": {"0": {"attn": {"q": {"a": f32[R,in,r], "b": f32[R,r,out]}}}}, "tail": [{..}]}

With DoRA (2402.09353) a pair has a third part, "magnitude" f32[R,out]. A parameter that is trained in full beside the
adapters (lora.also_train) stands in the tree at its own place, as an fp32 array, and replaces the base's when joined.
``join`` zips it with the base into Lora leaves, which the layer scan slices together; the trained tree, its optimizer
state and its checkpoint are the adapters alone. Rank 0 is the empty tree: joined, it is the base itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic

from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, Bool, Fraction, NonEmptyStr, NonNegInt, PosFloat, Str, layer_slice
from jaxpost.models.spec import DecoderSpec, ParamInfo, abstract_params, init_params, is_info
from jaxpost.ops.proj import Lora, column_lengths, merged
from jaxpost.types import Array, Tree

# Where a target lives in a layer. Names are those of the parameter tree.
TARGETS = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}
PARTS = ("a", "b", "magnitude")  # of an adapter; the last with DoRA only


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class LoraConfig:
    """Which projections get an adapter, and how strong it is."""

    rank: NonNegInt = 16  # 0: no adapters, the base exactly
    alpha: PosFloat = 32.0  # the update is scaled by alpha / rank
    rslora: Bool = False  # scale by alpha / sqrt(rank) instead (2312.03732)
    dora: Bool = False  # learn the length of each column apart from its direction (2402.09353)
    dropout: Fraction = 0.0  # on the adapter's input, in training only
    targets: tuple[Str, ...] = tuple(TARGETS)  # projections, the same in every layer
    layers: Str | None = None  # "15:" or "0:10", as Python slices the layers; None: all of them
    also_train: tuple[Str, ...] = ()  # trained in full beside the adapters: embed, head, norm (all), or a tree name
    source: NonEmptyStr | None = None  # folder of a PEFT adapter to start from: all but source and dropout are then its

    @pydantic.model_validator(mode="after")
    def _check(self) -> LoraConfig:
        for name in self.targets:
            if name not in TARGETS:
                raise ValueError(f"lora.targets: no projection {name!r}, did you mean {_nearest(name)!r}?")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets: {list(self.targets)} must name at least one projection, each once")
        if self.dora and not self.rank:
            raise ValueError("lora.dora: needs adapters, and lora.rank is 0; set a rank, or lora.dora to false")
        if len(set(self.also_train)) < len(self.also_train):
            raise ValueError(f"lora.also_train: {list(self.also_train)} must name each parameter once")
        if both := [name for name in self.also_train if self.rank and name in self.targets]:
            raise ValueError(
                f"lora.also_train: {both[0]} carries an adapter; take it out of lora.targets or out of here"
            )
        if self.dropout == 1:
            raise ValueError("lora.dropout: 1 would drop every input; use a value below 1")
        if self.layers is not None:
            try:
                layer_slice(self.layers)
            except ValueError as error:
                raise ValueError(f"lora.layers: {error}") from None
        return self

    @property
    def scale(self) -> float:
        """What multiplies a @ b."""
        if not self.rank:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def adapted_layers(config: LoraConfig, spec: DecoderSpec) -> range:
    """Indices of the layers that carry adapters; ConfigError where the range is empty."""
    if config.layers is None:
        return range(spec.num_layers)
    found = range(spec.num_layers)[layer_slice(config.layers)]
    if not found:
        raise ConfigError(f"lora.layers: {config.layers!r} holds none of the model's {spec.num_layers} layers")
    return found


def first_trained_layer(config: LoraConfig, spec: DecoderSpec) -> int:
    """The lowest layer that a gradient is needed for, counting all of them where more than adapters is trained."""
    if full_names(config, spec) - {"final_norm", "head"}:  # those lie above the layers
        return 0
    return adapted_layers(config, spec).start if config.rank else spec.num_layers


def adopt(
    config: LoraConfig, found: LoraConfig, spec: DecoderSpec, written: Collection[str] | None = None
) -> LoraConfig:
    """config as the adapter in config.source has it (`found`); source and dropout stay this run's own.

    written: names of the fields that the user wrote; None: those that differ from their defaults. ConfigError where a
    written one contradicts the adapter.
    """
    if written is None:
        written = [f.name for f in dataclasses.fields(LoraConfig) if getattr(config, f.name) != f.default]
    for name in written:
        if name not in ("source", "dropout") and _meaning(name, config, spec) != _meaning(name, found, spec):
            mine, theirs = _plain(getattr(config, name)), _plain(getattr(found, name))
            raise ConfigError(
                f"lora.{name}: {mine} here, {theirs} in the adapter {config.source}; leave lora.{name} out, or set it "
                "to the adapter's"
            )
    return dataclasses.replace(found, source=config.source, dropout=config.dropout)


def full_names(config: LoraConfig, spec: DecoderSpec) -> frozenset[str]:
    """Last names in the tree of what is trained in full, in every layer; ConfigError for a name without a parameter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract_params(spec), is_leaf=is_info)
    known = sorted({path[-1].key for path, _ in flat})
    found: set[str] = set()
    for word in config.also_train:
        hits = [name for name in known if name == word or (word == "norm" and name.endswith("norm"))]
        if not hits:
            tied = "; this model's head is its embedding, name embed" if word == "head" and spec.tied else ""
            raise ConfigError(
                f"lora.also_train: the model has no {word!r}{tied}; there are norm (every norm), {', '.join(known)}"
            )
        found |= set(hits)
    return frozenset(found)


def abstract_adapters(config: LoraConfig, spec: DecoderSpec) -> dict:
    """The adapter tree as ParamInfo, with the base's logical axes."""
    full = full_names(config, spec)
    if not config.rank and not full:
        return {}
    base = abstract_params(spec)
    return {name: _whole_info(info) for name, info in base.items() if name in full} | {
        "prefix": [_layer_infos(config, full, layer) for layer in base["prefix"]],
        "blocks": {place: _layer_infos(config, full, layer) for place, layer in base["blocks"].items()},
        "tail": [_layer_infos(config, full, layer) for layer in base["tail"]],
    }


def param_counts(config: LoraConfig, spec: DecoderSpec) -> tuple[int, int]:
    """(parameters in adapters, base weights trained in full that multiply every token): what flops.py asks for."""
    flat, _ = jax.tree_util.tree_flatten_with_path(abstract_adapters(config, spec), is_leaf=is_info)
    sizes = [(path[-1].key, math.prod(info.shape)) for path, info in flat]
    matrices = {*TARGETS, "embed" if spec.tied else "head"}
    return sum(n for name, n in sizes if name in PARTS), sum(n for name, n in sizes if name in matrices)


def init_adapters(config: LoraConfig, spec: DecoderSpec, key: Array, base: Tree | None = None) -> dict:
    """Initial fp32 adapters: a is Kaiming-uniform as in PEFT, b is zero, so the joined model equals its base.

    DoRA's magnitudes (the lengths of columns) and what is trained in full start as `base` has them; only they need it.
    In a layer outside config.layers a (and magnitude) is zero too. All gradients of the adapter then vanish, whatever
    the loss: it never trains.
    """
    adapters = init_params(abstract_adapters(config, spec), key)
    if config.dora or config.also_train:
        adapters = _start(base, adapters)
    if not config.rank:
        return adapters
    idle: dict[tuple, list] = {}  # (part, key) -> rows of the stack
    for slot in map(spec.locate, sorted(set(range(spec.num_layers)) - set(adapted_layers(config, spec)))):
        idle.setdefault(slot[:2], []).append(slot.repeat)
    for (part, place), repeats in idle.items():
        rows = np.asarray(repeats) if part == "blocks" else ...
        adapters[part][place] = jax.tree.map(partial(_clear, rows), adapters[part][place], is_leaf=_is_pair)
    return adapters


def join(base: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """base's tree with a Lora leaf for every adapted projection, and with what is trained in full in its place.

    Gradients flow to whichever argument is traced.
    """
    return _zip(base, adapters, config, lambda weight, leaf: leaf)


def set_idle_apart(joined: Tree, config: LoraConfig, spec: DecoderSpec) -> Tree:
    """A joined tree in which the layers below first_trained_layer are seen to carry no adapter.

    Loose layers there are plain weights again, stacks say where their adapters begin (Lora.first): no result changes,
    and the backward pass ends at the lowest adapter (models/stacks.py).
    """
    first = first_trained_layer(config, spec)
    if first == 0:
        return joined
    plain = partial(jax.tree.map, lambda leaf: leaf.base if _is_lora(leaf) else leaf, is_leaf=_is_lora)
    row = min(max(first - spec.num_prefix, 0) // len(spec.pattern), spec.repeats)
    above = spec.num_layers - spec.num_tail
    return joined | {
        "prefix": [plain(layer) if i < first else layer for i, layer in enumerate(joined["prefix"])],
        "blocks": jax.tree.map(
            lambda leaf: leaf.replace(first=row) if _is_lora(leaf) else leaf, joined["blocks"], is_leaf=_is_lora
        ),
        "tail": [plain(layer) if above + i < first else layer for i, layer in enumerate(joined["tail"])],
    }


def merge(base: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """Plain weights: base + scale * a @ b, with DoRA at its magnitudes, or what is trained in full.

    Summed in fp32 and cast to the base's dtype; other leaves are passed on.
    """

    def plain(weight: Array, leaf: Lora | Array) -> Array:
        return (merged(leaf) if isinstance(leaf, Lora) else leaf).astype(weight.dtype)

    return _zip(base, adapters, config, plain)


def layer_pairs(adapters: Tree, spec: DecoderSpec, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """Layer i's adapters on the host: target -> {"a": f32[in,r], "b": f32[r,out]} and, with DoRA, "magnitude"."""
    slot = spec.locate(layer)
    groups = adapters[slot.part][slot.key]
    row = ... if slot.repeat is None else slot.repeat
    return {
        name: {half: np.asarray(x)[row] for half, x in pair.items()}
        for group in groups.values()
        if isinstance(group, dict)
        for name, pair in group.items()
        if _is_pair(pair)
    }


def _meaning(name: str, config: LoraConfig, spec: DecoderSpec) -> Any:
    """A field's value, equal where two ways of writing it say the same."""
    if name == "layers":
        return adapted_layers(config, spec)
    if name == "also_train":
        return full_names(config, spec)
    value = getattr(config, name)
    return set(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else "null" if value is None else str(value)


def _start(base: Any, adapters: Any) -> Any:
    """adapters with what begins as the base has it."""
    if isinstance(adapters, list):
        return [_start(b, a) for b, a in zip(base, adapters, strict=True)]
    if isinstance(base, dict):
        return {name: _start(base[name], part) for name, part in adapters.items()}
    if not _is_pair(adapters):
        return jnp.copy(base).astype(jnp.float32)  # a copy: the trained state is donated, the base is not
    return adapters | {"magnitude": column_lengths(base)} if "magnitude" in adapters else adapters


def _clear(rows: Any, pair: Any) -> Any:
    """A pair that is zero in these rows; what is trained in full stays."""
    return {name: x.at[rows].set(0) for name, x in pair.items()} if _is_pair(pair) else pair


def _is_lora(x: Any) -> bool:
    return isinstance(x, Lora)


def _is_pair(x: Any) -> bool:
    return isinstance(x, dict) and "a" in x


def _layer_infos(config: LoraConfig, full: Collection[str], layer: dict) -> dict:
    """A layer's, or a group's, part of the tree."""
    found: dict[str, Any] = {}
    for name, part in layer.items():
        if not is_info(part):
            if group := _layer_infos(config, full, part):
                found[name] = group
        elif name in full:
            found[name] = _whole_info(part)
        elif config.rank and name in config.targets:
            found[name] = _pair_infos(config, part)
    return found


def _whole_info(weight: ParamInfo) -> ParamInfo:
    return dataclasses.replace(weight, init="zeros", dtype=jnp.float32)  # init_adapters copies the base


def _pair_infos(config: LoraConfig, weight: ParamInfo) -> dict[str, ParamInfo]:
    *lead, fan_in, fan_out = weight.shape
    *lead_axes, in_axis, out_axis = weight.axes
    infos = {
        "a": ParamInfo((*lead, fan_in, config.rank), (*lead_axes, in_axis, "rank"), "kaiming"),
        "b": ParamInfo((*lead, config.rank, fan_out), (*lead_axes, "rank", out_axis), "zeros"),
    }
    if config.dora:
        infos["magnitude"] = ParamInfo((*lead, fan_out), (*lead_axes, out_axis), "zeros")  # init_adapters fills it
    return infos


def _zip(
    base: Any, adapters: Any, config: LoraConfig, change: Callable[[Array, Lora | Array], Any], path: str = ""
) -> Any:
    """base with change(weight, what stands for it) wherever adapters says so; ValueError where the trees do not fit."""
    if adapters is None or (isinstance(adapters, (dict, list)) and not adapters):
        return base
    if not isinstance(base, (dict, list)):
        if not _fits(base, adapters, config):
            raise ValueError(f"adapter at {path}: does not fit a weight of shape {base.shape}")
        if _is_pair(adapters):
            adapters = Lora(base, scale=config.scale, dropout=config.dropout, **adapters)
        return change(base, adapters)
    if isinstance(base, list):
        if len(base) != len(adapters):
            raise ValueError(f"adapters at {path}: {len(adapters)} layers for a base with {len(base)}")
        pairs = zip(base, adapters, strict=True)
        return [_zip(b, a, config, change, f"{path}/{i}") for i, (b, a) in enumerate(pairs)]
    if unknown := sorted(set(adapters) - set(base)):
        raise ValueError(f"adapters at {path or '/'}: the base has no {', '.join(unknown)}")
    return {name: _zip(value, adapters.get(name), config, change, f"{path}/{name}") for name, value in base.items()}


def _fits(weight: Array, adapter: Any, config: LoraConfig) -> bool:
    if not isinstance(adapter, dict):
        return adapter.shape == weight.shape
    return tuple(sorted(adapter)) == PARTS[: 2 + config.dora] and adapter["a"].shape[:-1] == weight.shape[:-1]


def _nearest(name: str) -> str:
    plain = name.removesuffix("_proj")
    return plain if plain in TARGETS else difflib.get_close_matches(name, TARGETS, 1, cutoff=0.0)[0]
