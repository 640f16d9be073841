"""The decoder: embed, scanned blocks, final norm. Branches on values of the spec, never on a family's name."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

from jaxpost.models.spec import DecoderSpec, LayerKind
from jaxpost.models.stacks import Stack, stacks
from jaxpost.ops.attention import Impl, attention
from jaxpost.ops.noise import neftune_noise
from jaxpost.ops.norm import rms_norm
from jaxpost.ops.proj import proj
from jaxpost.ops.rope import cos_sin, rotate
from jaxpost.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compute, as opposed to what: results change by rounding alone, of rows within max_segments."""

    dtype: Any = jnp.float32  # of activations and matrix products
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass recomputes
    attention: Impl = "auto"
    max_segments: int | None = None  # the most segments that a packed row holds, where known; one with more is nan
    platform: str | None = None  # "cpu", "gpu" or "tpu", what programs are for; None: jax's own
    rules: Rules | None = None  # None: one device, no constraints

    def shard(self, x: jax.Array, *logical: str | None) -> jax.Array:
        return x if self.rules is None else self.rules.shard(x, *logical)


def _splash_saveable(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name == "pallas_call"


# "dots" keeps products with weights, and attention where its residue is a number a head and token. cuDNN's is that
# times data.max_segments, so its forward pass runs again.
REMAT = {
    "full": checkpoint_policies.nothing_saveable,
    "dots": checkpoint_policies.save_from_both_policies(
        checkpoint_policies.dots_with_no_batch_dims_saveable,
        checkpoint_policies.save_from_both_policies(
            _splash_saveable, checkpoint_policies.save_only_these_names("attention")
        ),
    ),
}


def head(params: dict) -> jax.Array:
    """The output matrix [V, D]."""
    return params["head"] if "head" in params else params["embed"]


def init_cache(spec: DecoderSpec, batch: int, length: int, dtype: Any = jnp.float32) -> dict:
    """KV cache of zeros, following the parameter tree; a token's slot is its position (length slots a row)."""
    shape = (batch, length, spec.num_kv_heads, spec.head_dim)

    def layer(*leading: int) -> dict:
        return {"k": jnp.zeros((*leading, *shape), dtype), "v": jnp.zeros((*leading, *shape), dtype)}

    return {
        "prefix": [layer() for _ in range(spec.num_prefix)],
        "blocks": {str(place): layer(spec.repeats) for place in range(len(spec.pattern)) if spec.repeats},
        "tail": [layer() for _ in range(spec.num_tail)],
    }


def apply(
    spec: DecoderSpec,
    params: dict,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array | None = None,
    *,
    cache: dict | None = None,
    rng: jax.Array | None = None,
    taps: tuple[int, ...] = (),
    soft_tokens: tuple[jax.Array, jax.Array] | None = None,
    embed_noise: float = 0.0,
    options: Options = Options(),
) -> tuple[jax.Array, dict | None, dict]:
    """Hidden states after the final norm, [B,T,D] in options.dtype; the updated cache; aux.

    tokens, positions, segments: i32[B,T]. Without a cache, attention is causal inside each segment of a row (0 =
    padding). With one, a row is one sequence whose keys live at their positions; segments are then not used, a
    position at or past the cache's length is not stored, and a token sees the slots up to its own position.
    rng: keys dropout and noise, None is deterministic. embed_noise: NEFTune's alpha, see ops/noise.py. taps: layers
    whose output comes back as aux["taps"][layer] [B,T,D]. soft_tokens: (vectors [B,N,D], places i32[B,N]): vectors that
    stand in for the embeddings at those places of each row (a place outside 0..T-1 is ignored): the door for other
    modalities; they get no noise.
    """
    if unknown := [t for t in taps if not 0 <= t < spec.num_layers]:
        raise ValueError(f"taps: layer {unknown[0]} of a model with {spec.num_layers} layers")
    with jax.named_scope("embed"):
        x = params["embed"][tokens].astype(options.dtype)
        if embed_noise and rng is not None:
            whole = jnp.ones_like(tokens) if segments is None else segments
            key = _fold(rng, spec.num_layers)  # the layers take the numbers below
            x = x + neftune_noise(key, whole, spec.d_model, embed_noise).astype(x.dtype)
        if soft_tokens is not None:
            vectors, places = soft_tokens
            places = jnp.where(places < 0, tokens.shape[1], places)  # a negative index would wrap around
            rows = jnp.arange(tokens.shape[0])[:, None]
            x = x.at[rows, places].set(vectors.astype(x.dtype), mode="drop")
        x = options.shard(x, "batch", "length", "act_embed")
    rope = [cos_sin(kind, spec.head_dim, positions) for kind in spec.rope]
    block = partial(_block, spec, options, rope, positions, segments)
    tapped: dict[int, jax.Array] = {}
    cache = cache and {part: cache[part] for part in ("prefix", "blocks", "tail")}

    def loose(x: jax.Array, part: str, first: int) -> jax.Array:
        """The unscanned layers of "prefix" or "tail"."""
        for i, layer in enumerate(params[part]):
            x, kv = block(spec.kind(first + i), x, layer, cache and cache[part][i], None, _fold(rng, first + i))
            if cache:
                cache[part] = [*cache[part][:i], kv, *cache[part][i + 1 :]]
            if first + i in taps:
                tapped[first + i] = x
        return x

    def repeat(stack: Stack, carry: tuple, scanned: tuple) -> tuple:
        """One repeat of the pattern; the cache travels in the carry, so that it is updated in place."""
        x, blocks_cache = carry
        index, layers = scanned[0], stack.layers(*scanned)
        outputs = []
        for place, kind in enumerate(spec.pattern):
            key = str(place)
            number = spec.num_prefix + index * len(spec.pattern) + place
            x, kv = block(kind, x, layers[key], blocks_cache and blocks_cache[key], index, _fold(rng, number))
            blocks_cache = blocks_cache and blocks_cache | {key: kv}
            outputs.append(x if taps else None)
        return (x, blocks_cache), outputs

    x = loose(x, "prefix", 0)
    for stack in stacks(params["blocks"], spec.repeats) if spec.repeats else ():
        body, policy = partial(repeat, stack), REMAT.get(options.remat, stack.policy)
        if policy is not None and cache is None:
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        carry = (x, cache and cache["blocks"])
        numbers = jnp.arange(stack.rows.start, stack.rows.stop)
        (x, blocks_cache), outputs = jax.lax.scan(body, carry, (numbers, stack.scanned))
        if cache:
            cache["blocks"] = blocks_cache
        for tap in taps:
            slot = spec.locate(tap)
            if slot.part == "blocks" and slot.repeat in stack.rows:
                tapped[tap] = outputs[int(slot.key)][slot.repeat - stack.rows.start]
    x = loose(x, "tail", spec.num_layers - spec.num_tail)
    with jax.named_scope("final_norm"):
        hidden = rms_norm(x, params["final_norm"], spec.norm_eps)
    return hidden, cache, {"taps": tapped} if taps else {}


def _fold(rng: jax.Array | None, number: Any) -> jax.Array | None:
    return None if rng is None else jax.random.fold_in(rng, number)


def _block(
    spec: DecoderSpec,
    options: Options,
    rope: list,
    positions: jax.Array,
    segments: jax.Array | None,
    kind: LayerKind,
    x: jax.Array,
    layer: dict,
    cache: dict | None,
    index: jax.Array | None,
    rng: jax.Array | None,
) -> tuple[jax.Array, dict | None]:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer["attn_norm"], spec.norm_eps)
        mixed, cache = _attention(
            spec, options, kind, rope, positions, segments, normed, layer["attn"], cache, index, rng
        )
        x = options.shard(x + mixed, "batch", "length", "act_embed")
    with jax.named_scope("mlp"):
        normed = rms_norm(x, layer["mlp_norm"], spec.norm_eps)
        x = options.shard(x + _mlp(options, normed, layer["mlp"], rng), "batch", "length", "act_embed")
    return x, cache


def _linear(x: jax.Array, group: dict, name: str, rng: jax.Array | None, number: int) -> jax.Array:
    """proj plus the bias, where there is one; `number` tells the dropout keys of one layer apart."""
    y = proj(x, group[name], _fold(rng, number))
    return y + group[f"{name}_bias"].astype(y.dtype) if f"{name}_bias" in group else y


def _attention(
    spec: DecoderSpec,
    options: Options,
    kind: LayerKind,
    rope: list,
    positions: jax.Array,
    segments: jax.Array | None,
    x: jax.Array,
    layer: dict,
    cache: dict | None,
    index: jax.Array | None,
    rng: jax.Array | None,
) -> tuple[jax.Array, dict | None]:
    """Grouped-query attention; with a cache, keys and values are written at their positions first."""
    B, T, _ = x.shape
    q = _linear(x, layer, "q", rng, 0).reshape(B, T, spec.num_heads, spec.head_dim)
    k = _linear(x, layer, "k", rng, 1).reshape(B, T, spec.num_kv_heads, spec.head_dim)
    v = _linear(x, layer, "v", rng, 2).reshape(B, T, spec.num_kv_heads, spec.head_dim)
    q = options.shard(q, "batch", "length", "act_heads", None)
    k = options.shard(k, "batch", "length", "act_kv_heads", None)
    v = options.shard(v, "batch", "length", "act_kv_heads", None)
    if kind.rope is not None:
        q, k = rotate(q, *rope[kind.rope]), rotate(k, *rope[kind.rope])
    common = dict(window=kind.window, softcap=spec.attn_softcap, scale=spec.head_dim**-0.5)
    if cache is None:
        mesh = options.rules.mesh if options.rules else None
        how = dict(impl=options.attention, max_segments=options.max_segments, mesh=mesh, platform=options.platform)
        out = attention(q, k, v, segments=segments, query_positions=None, **how, **common)
    else:
        rows = jnp.arange(B)[:, None]
        place = (rows, positions) if index is None else (index, rows, positions)
        cache = {
            "k": cache["k"].at[place].set(k.astype(cache["k"].dtype), mode="drop"),
            "v": cache["v"].at[place].set(v.astype(cache["v"].dtype), mode="drop"),
        }
        keys, values = (cache["k"], cache["v"]) if index is None else (cache["k"][index], cache["v"][index])
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        out = attention(q, keys, values, segments=None, query_positions=positions, impl="xla", **common)
    return _linear(out.reshape(B, T, -1), layer, "o", rng, 3), cache


def _mlp(options: Options, x: jax.Array, layer: dict, rng: jax.Array | None) -> jax.Array:
    """SwiGLU (2002.05202): down(silu(gate(x)) * up(x))."""
    gate, up = _linear(x, layer, "gate", rng, 4), _linear(x, layer, "up", rng, 5)
    inner = options.shard(jax.nn.silu(gate) * up, "batch", "length", "act_ffn")
    return _linear(inner, layer, "down", rng, 6)
