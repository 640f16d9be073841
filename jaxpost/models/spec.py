"""What a decoder is made of. One abstract tree yields init, shardings, checkpoint targets and the size report.

The parameter tree and its names are for ever (checkpoints use them, ``FORMAT``):

    {"embed": [V,D], "prefix": [layer, ..], "blocks": {"0": layer stacked over repeats, "1": ..}, "tail": [layer, ..],
     "final_norm": [D], "head": [V,D] unless tied}
    layer = {"attn_norm": [D], "attn": {"q": [D,H*hd], "k": [D,KV*hd], "v": [D,KV*hd], "o": [H*hd,D]},
             "mlp_norm": [D], "mlp": {"gate": [D,F], "up": [D,F], "down": [F,D]}}

Matrices are [in, out]. Biases, where the spec has them, are "q_bias" beside "q" and so on.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpost.ops.rope import RopeSpec

FORMAT = 1  # of the names above


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between layers of one decoder."""

    window: int | None = None  # sliding attention window in tokens, None: full
    rope: int | None = 0  # index into DecoderSpec.rope, None: no positions


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """Values that fix a decoder-only transformer; the code branches on them, never on a family's name."""

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float = 1e-5
    tied: bool = False  # head is the embedding
    rope: tuple[RopeSpec, ...] = (RopeSpec(),)
    pattern: tuple[LayerKind, ...] = (LayerKind(),)
    num_prefix: int = 0  # unscanned layers before the repeats; they follow the pattern from its start
    attention_bias: bool = False
    mlp_bias: bool = False
    attn_softcap: float | None = None
    final_softcap: float | None = None
    max_positions: int = 0  # longest trained context, 0: not known

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary pairs halve it")
        if self.num_prefix > self.num_layers:
            raise ValueError(f"num_prefix {self.num_prefix} exceeds num_layers {self.num_layers}")

    @property
    def repeats(self) -> int:
        """How often the pattern repeats in the scanned blocks."""
        return (self.num_layers - self.num_prefix) // len(self.pattern)

    @property
    def num_tail(self) -> int:
        """Layers left over after the repeats; they follow the pattern from its start."""
        return (self.num_layers - self.num_prefix) % len(self.pattern)

    def locate(self, layer: int) -> Slot:
        """Where layer i (0 is next to the embedding) lives in the tree: the one function that knows."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} of a model with {self.num_layers} layers")
        if layer < self.num_prefix:
            return Slot("prefix", layer, None)
        repeat, place = divmod(layer - self.num_prefix, len(self.pattern))
        if repeat < self.repeats:
            return Slot("blocks", str(place), repeat)
        return Slot("tail", place, None)

    def kind(self, layer: int) -> LayerKind:
        """The LayerKind of layer i."""
        return self.pattern[(layer if layer < self.num_prefix else layer - self.num_prefix) % len(self.pattern)]

    @property
    def unrolled(self) -> DecoderSpec:
        """The same model with every layer unscanned: faster to decode with, slower to compile."""
        kinds = tuple(map(self.kind, range(self.num_layers)))
        return dataclasses.replace(self, num_prefix=self.num_layers, pattern=kinds)


class Slot(NamedTuple):
    """A place in the tree: params[part][key], and row `repeat` of every leaf where part is "blocks"."""

    part: str
    key: int | str
    repeat: int | None


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """A parameter before it exists: shape, dtype, logical axes (see sharding.py) and how it is initialised."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"  # normal (truncated, 1/sqrt(fan_in)) | embed (0.02) | ones | zeros | kaiming (LoRA's a)
    dtype: Any = jnp.float32

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def stacked(self, count: int) -> ParamInfo:
        """The same parameter for `count` layers, stacked on a new leading axis."""
        return dataclasses.replace(self, shape=(count, *self.shape), axes=("layers", *self.axes))


def is_info(x: Any) -> bool:
    """For tree_map over abstract trees."""
    return isinstance(x, ParamInfo)


def abstract_layer(spec: DecoderSpec) -> dict:
    """One layer's tree of ParamInfo."""
    d, f, q, kv = spec.d_model, spec.d_ff, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attn = {
        "q": ParamInfo((d, q), ("embed", "heads")),
        "k": ParamInfo((d, kv), ("embed", "kv_heads")),
        "v": ParamInfo((d, kv), ("embed", "kv_heads")),
        "o": ParamInfo((q, d), ("heads", "embed")),
    }
    mlp = {
        "gate": ParamInfo((d, f), ("embed", "ffn")),
        "up": ParamInfo((d, f), ("embed", "ffn")),
        "down": ParamInfo((f, d), ("ffn", "embed")),
    }
    for group, wanted in ((attn, spec.attention_bias), (mlp, spec.mlp_bias)):
        if wanted:
            group |= {f"{name}_bias": ParamInfo(w.shape[1:], w.axes[1:], "zeros") for name, w in group.items()}
    norm = ParamInfo((d,), ("norm",), "ones")
    return {"attn_norm": norm, "attn": attn, "mlp_norm": norm, "mlp": mlp}


def abstract_params(spec: DecoderSpec, dtype: Any = jnp.float32) -> dict:
    """The whole tree of ParamInfo."""
    layer = abstract_layer(spec)
    blocks = {
        str(place): jax.tree.map(lambda info: info.stacked(spec.repeats), layer, is_leaf=is_info)
        for place in range(len(spec.pattern))
        if spec.repeats
    }
    table = ParamInfo((spec.vocab_size, spec.d_model), ("vocab", "embed"), "embed")
    tree = {
        "embed": table,
        "prefix": [layer] * spec.num_prefix,
        "blocks": blocks,
        "tail": [layer] * spec.num_tail,
        "final_norm": ParamInfo((spec.d_model,), ("norm",), "ones"),
    }
    if not spec.tied:
        tree["head"] = table
    return jax.tree.map(lambda info: dataclasses.replace(info, dtype=dtype), tree, is_leaf=is_info)


def init_leaf(info: ParamInfo, key: jax.Array) -> jax.Array:
    """One parameter's initial value."""
    if info.init in ("ones", "zeros"):
        return jnp.full(info.shape, float(info.init == "ones"), info.dtype)
    if info.init == "kaiming":  # uniform in +-1/sqrt(fan_in), as nn.Linear and PEFT's lora_A
        bound = 1 / math.sqrt(info.shape[-2])
        return jax.random.uniform(key, info.shape, info.dtype, -bound, bound)
    scale = 0.02 if info.init == "embed" else 1 / math.sqrt(info.shape[-2])
    return (jax.random.truncated_normal(key, -3, 3, info.shape, jnp.float32) * scale).astype(info.dtype)


def init_params(infos: Any, key: jax.Array) -> Any:
    """Initial values of an abstract tree; a leaf's key follows from its place, so trees grow without reshuffling."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(infos, is_leaf=is_info)
    values = [init_leaf(info, jax.random.fold_in(key, _place_number(path))) for path, info in leaves]
    return jax.tree.unflatten(treedef, values)


def _place_number(path: tuple) -> int:
    return zlib.crc32(jax.tree_util.keystr(path).encode())


def unroll(spec: DecoderSpec, params: dict) -> dict:
    """The tree of spec.unrolled: every layer a tree of its own under "prefix"."""

    def layer(number: int) -> dict:
        part, key, repeat = spec.locate(number)
        tree = params[part][key]
        return tree if repeat is None else jax.tree.map(lambda x: x[repeat], tree)

    rest = {name: value for name, value in params.items() if name not in ("prefix", "blocks", "tail")}
    return rest | {"prefix": [layer(i) for i in range(spec.num_layers)], "blocks": {}, "tail": []}


def num_params(infos: Any) -> int:
    """Number of parameters in an abstract or a real tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(infos, is_leaf=is_info))
