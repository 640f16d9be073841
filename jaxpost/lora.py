"""Low-rank adapters (2106.09685) as a second tree beside a frozen base.

The adapter tree mirrors the parameter tree and holds only the projections that carry an adapter, stacked as they are:

    {"prefix": [{..}], "blocks": {"0": {"attn": {"q": {"a": f32[R,in,r], "b": f32[R,r,out]}}}}, "tail": [{..}]}

With DoRA (2402.09353) a pair has a third part, "magnitude" f32[R,out].
``join`` zips it with the base into Lora leaves, which the layer scan slices together; the trained tree, its optimizer
state and its checkpoint are the adapters alone. Rank 0 is the empty tree: joined, it is the base itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import numpy as np
import pydantic

from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, Bool, Fraction, NonEmptyStr, NonNegInt, PosFloat, Str
from jaxpost.models.spec import DecoderSpec, ParamInfo, abstract_params, init_params
from jaxpost.ops.proj import Lora, column_lengths, merged
from jaxpost.types import Array, Tree

# Where a target lives in a layer. Names are those of the parameter tree.
TARGETS = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}


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
        if self.dropout == 1:
            raise ValueError("lora.dropout: 1 would drop every input; use a value below 1")
        if self.layers is not None and not re.fullmatch(r"(-?\d+)?:(-?\d+)?", self.layers):
            raise ValueError(f"lora.layers: {self.layers!r} is not a range of layers such as '15:' or '0:10'")
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
    start, stop = (int(end) if end else None for end in config.layers.split(":"))
    found = range(spec.num_layers)[start:stop]
    if not found:
        raise ConfigError(f"lora.layers: {config.layers!r} holds none of the model's {spec.num_layers} layers")
    return found


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


def abstract_adapters(config: LoraConfig, spec: DecoderSpec) -> dict:
    """The adapter tree as ParamInfo, with the base's logical axes."""
    if not config.rank:
        return {}
    base = abstract_params(spec)
    return {
        "prefix": [_layer_infos(config, layer) for layer in base["prefix"]],
        "blocks": {place: _layer_infos(config, layer) for place, layer in base["blocks"].items()},
        "tail": [_layer_infos(config, layer) for layer in base["tail"]],
    }


def init_adapters(config: LoraConfig, spec: DecoderSpec, key: Array, base: Tree | None = None) -> dict:
    """Initial fp32 adapters: a is Kaiming-uniform as in PEFT, b is zero, so the joined model equals its base.

    DoRA's magnitudes are the lengths of the columns of `base`, which it needs. In a layer outside config.layers a (and
    magnitude) is zero too. All gradients then vanish, whatever the loss: it never trains.
    """
    adapters = init_params(abstract_adapters(config, spec), key)
    if not config.rank:
        return adapters
    if config.dora:
        adapters = _start(base, adapters)
    idle: dict[tuple, list] = {}  # (part, key) -> rows of the stack
    for slot in map(spec.locate, sorted(set(range(spec.num_layers)) - set(adapted_layers(config, spec)))):
        idle.setdefault(slot[:2], []).append(slot.repeat)
    for (part, place), repeats in idle.items():
        rows = np.asarray(repeats) if part == "blocks" else ...
        adapters[part][place] = jax.tree.map(partial(_clear, rows), adapters[part][place])
    return adapters


def join(base: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """base's tree with a Lora leaf for every adapted projection; gradients flow to whichever argument is traced."""
    return _zip(base, adapters, config, lambda leaf: leaf)


def merge(base: Tree, adapters: Tree, config: LoraConfig) -> Tree:
    """Plain weights base + scale * a @ b, with DoRA at its magnitudes, summed in fp32 and cast to the base's dtype.

    Other leaves are passed on.
    """
    return _zip(base, adapters, config, lambda leaf: merged(leaf).astype(leaf.dtype))


def layer_pairs(adapters: Tree, spec: DecoderSpec, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """Layer i's adapters on the host: target -> {"a": f32[in,r], "b": f32[r,out]}."""
    slot = spec.locate(layer)
    groups = adapters[slot.part][slot.key]
    row = ... if slot.repeat is None else slot.repeat
    return {
        name: {half: np.asarray(x)[row] for half, x in pair.items()}
        for group in groups.values()
        for name, pair in group.items()
    }


def _meaning(name: str, config: LoraConfig, spec: DecoderSpec) -> Any:
    """A field's value, equal where two ways of writing it say the same."""
    if name == "layers":
        return adapted_layers(config, spec)
    value = getattr(config, name)
    return set(value) if isinstance(value, tuple) else value


def _plain(value: Any) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else "null" if value is None else str(value)


def _start(base: Any, adapters: Any) -> Any:
    """adapters with what begins as the base has it."""
    if isinstance(adapters, list):
        return [_start(b, a) for b, a in zip(base, adapters, strict=True)]
    if isinstance(base, dict):
        return {name: _start(base[name], part) for name, part in adapters.items()}
    return adapters | {"magnitude": column_lengths(base)} if "magnitude" in adapters else adapters


def _clear(rows: Any, x: Array) -> Array:
    return x.at[rows].set(0)


def _layer_infos(config: LoraConfig, layer: dict) -> dict:
    groups: dict[str, dict] = {}
    for name, group in TARGETS.items():
        if name in config.targets:
            groups.setdefault(group, {})[name] = _pair_infos(config, layer[group][name])
    return groups


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


def _zip(base: Any, adapters: Any, config: LoraConfig, change: Callable[[Lora], Any], path: str = "") -> Any:
    """base with change(Lora leaf) wherever adapters has a pair; ValueError where the trees do not fit."""
    if not isinstance(base, (dict, list)):
        if not adapters:
            return base
        parts = {"a", "b", "magnitude"} if config.dora else {"a", "b"}
        if set(adapters) != parts or adapters["a"].shape[:-1] != base.shape[:-1]:
            raise ValueError(f"adapter at {path}: does not fit a weight of shape {base.shape}")
        return change(Lora(base, scale=config.scale, dropout=config.dropout, **adapters))
    if not adapters:
        return base
    if isinstance(base, list):
        if len(base) != len(adapters):
            raise ValueError(f"adapters at {path}: {len(adapters)} layers for a base with {len(base)}")
        pairs = zip(base, adapters, strict=True)
        return [_zip(b, a, config, change, f"{path}/{i}") for i, (b, a) in enumerate(pairs)]
    if unknown := sorted(set(adapters) - set(base)):
        raise ValueError(f"adapters at {path or '/'}: the base has no {', '.join(unknown)}")
    return {name: _zip(value, adapters.get(name), config, change, f"{path}/{name}") for name, value in base.items()}


def _nearest(name: str) -> str:
    plain = name.removesuffix("_proj")
    return plain if plain in TARGETS else difflib.get_close_matches(name, TARGETS, 1, cutoff=0.0)[0]
