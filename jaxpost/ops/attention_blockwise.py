"""Causal attention over packed rows by blocks of queries and keys, which does only the work that the mask leaves.

For one block of queries the loop over key blocks begins where the first query's segment (or window) begins and ends at
the causal edge: a packed row costs the sum of its segments' squares, not the square of its length, and no array larger
than one block of scores exists. Saved for the backward pass are the output and the log-sum-exp of each query; one
backward loop recomputes each block of scores once for dq, dk and dv (the scheme of FlashAttention, arXiv:2205.14135).

The row index is an ordinary loop variable: under vmap the trip counts of a batch would be joined to their maximum.
Legend: B rows, T positions padded to N blocks of `BLOCK`, K key/value heads, G query heads for each, D head width.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array

BLOCK = 64
ROW_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"
HIDDEN = -1e30  # a score that the mask removes; finite, so that a block without visible keys gives no nan


class Static(NamedTuple):
    """What is static in one call."""

    window: int | None
    softcap: float | None
    scale: float
    mesh: Mesh | None


def blockwise(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    mesh: Mesh | None,
) -> Array:
    """float[B,T,H,hd] from q of that shape, k and v [B,T,KV,hd] and contiguous segments i32[B,T] (0: output 0).

    q, k and v must be finite also where the segment is 0. Raises ValueError if the mesh does not divide rows or heads.
    """
    b, t, h, d = q.shape
    on_mesh = mesh is not None and mesh.size > 1
    if on_mesh:
        k, v = split_heads(q, k, v, mesh)
    kv = k.shape[2]
    padding = -t % BLOCK
    starts = jnp.pad(first_visible(segments, window), ((0, 0), (0, padding)), constant_values=t + padding)
    pad = [(0, 0), (0, 0), (0, padding), (0, 0)]
    q = jnp.pad(q.swapaxes(1, 2), pad).reshape(b, kv, h // kv, t + padding, d)
    k, v = (jnp.pad(x.swapaxes(1, 2), pad) for x in (k, v))
    out = _attend(Static(window, softcap, scale, mesh if on_mesh else None), q, k, v, starts)
    return out.reshape(b, h, t + padding, d)[:, :, :t].swapaxes(1, 2)


def first_visible(segments: Array, window: int | None) -> Array:
    """i32[B,T]: index of the first key that each query sees; T (beyond its own index: none) in segment 0."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = lax.cummax(jnp.where(new, index, 0), axis=1)
    if window is not None:
        starts = jnp.maximum(starts, index - window + 1)
    return jnp.where(segments != 0, starts, segments.shape[1])


def split_heads(q: Array, k: Array, v: Array, mesh: Mesh) -> tuple[Array, Array]:
    """k, v with heads repeated just so often that the tensor axis divides them."""
    rows = math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)
    tensor = mesh.shape.get(HEAD_AXIS, 1)
    heads, kv = q.shape[2], k.shape[2]
    if q.shape[0] % rows:
        raise ValueError(f"{q.shape[0]} rows are not divisible by {rows} shards over {ROW_AXES}")
    if heads % tensor:
        raise ValueError(f"{heads} query heads are not divisible by {tensor} shards over {HEAD_AXIS!r}")
    copies = tensor // math.gcd(kv, tensor)
    if (heads // kv) % copies:
        copies = heads // kv
    return (k, v) if copies == 1 else (jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, starts):
    return _attend_fwd(static, q, k, v, starts)[0]


def _attend_fwd(static, q, k, v, starts):
    out, lse = checkpoint_name(_on_mesh(static, _forward, "qkks", "ql", q, k, v, starts), "attention")
    return out, (q, k, v, starts, out, lse)


def _attend_bwd(static, saved, d_out):
    return *_on_mesh(static, _backward, "qkksqlq", "qkk", *saved, d_out), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _on_mesh(static: Static, function, in_kinds: str, out_kinds: str, *args):
    """Runs the function on each shard's rows and heads; a letter says where an array has them."""
    function = functools.partial(function, static)
    if static.mesh is not None:
        function = shard_rows_and_heads(function, static.mesh, in_kinds, out_kinds, heads_at=1)
    return function(*args)


def shard_rows_and_heads(function, mesh: Mesh, in_kinds: str, out_kinds: str, heads_at: int):
    """The function under shard_map: rows (dim 0) over data and fsdp; heads (dim heads_at) over tensor, except "s"."""
    names = mesh.shape
    rows = tuple(axis for axis in ROW_AXES if axis in names) or None
    heads = HEAD_AXIS if HEAD_AXIS in names else None
    split, whole = PartitionSpec(rows, *(None,) * (heads_at - 1), heads), PartitionSpec(rows)
    in_specs, out_specs = (tuple(whole if kind == "s" else split for kind in kinds) for kinds in (in_kinds, out_kinds))
    out_specs = out_specs if len(out_specs) > 1 else out_specs[0]
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _query_block(x: Array, row: Array, i: Array) -> Array:
    """[B,K,G,T,*rest] -> [K, G * BLOCK, *rest]: the heads of a group share their keys, so they are one matrix."""
    size = (1, *x.shape[1:3], BLOCK, *x.shape[4:])
    block = lax.dynamic_slice(x, (row, 0, 0, i * BLOCK, *[0] * (x.ndim - 4)), size)
    return block.reshape(x.shape[1], x.shape[2] * BLOCK, *x.shape[4:])


def _key_block(x: Array, row: Array, j: Array) -> Array:
    """[B,K,T,D] -> [K,BLOCK,D]."""
    return lax.dynamic_slice(x, (row, 0, j * BLOCK, 0), (1, x.shape[1], BLOCK, x.shape[3]))[0]


def _bounds(starts: Array, i: Array) -> tuple[Array, Array]:
    """Range of key blocks that the queries of block i see, from their first visible keys; empty for padding."""
    low, high = jnp.min(starts) // BLOCK, i + 1
    return jnp.minimum(low, high), high


def _scores(static: Static, q: Array, k: Array, starts: Array, i: Array, j: Array) -> tuple[Array, Array | float]:
    """Scores f32[K, G * BLOCK, BLOCK] with HIDDEN where not visible, and their slope by the raw product."""
    scores = _dot(q, k, 2, 2) * static.scale
    slope = static.scale
    if static.softcap is not None:
        ratio = jnp.tanh(scores / static.softcap)
        scores, slope = static.softcap * ratio, static.scale * (1 - ratio**2)
    query, key = i * BLOCK + jnp.arange(BLOCK)[:, None], j * BLOCK + jnp.arange(BLOCK)[None, :]
    visible = jnp.tile((key >= starts[:, None]) & (key <= query), (q.shape[1] // BLOCK, 1))
    return jnp.where(visible, scores, HIDDEN), slope


def _forward(static: Static, q, k, v, starts):
    """(out, lse f32[B,K,G,T]); a query that sees nothing has output 0 and an infinite lse."""
    blocks = q.shape[3] // BLOCK

    def one(index):
        row, i = index // blocks, index % blocks
        queries = _query_block(q, row, i)
        first = lax.dynamic_slice(starts, (row, i * BLOCK), (1, BLOCK))[0]

        def step(j, carry):
            top, total, out = carry
            scores, _ = _scores(static, queries, _key_block(k, row, j), first, i, j)
            new_top = jnp.maximum(top, jnp.max(scores, axis=2))
            weights, scale = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            out = out * scale[..., None] + _dot(weights.astype(v.dtype), _key_block(v, row, j), 2, 1)
            return new_top, total * scale + jnp.sum(weights, axis=2), out

        zeros = jnp.zeros(queries.shape[:2], jnp.float32)
        top, total, out = lax.fori_loop(
            *_bounds(first, i), step, (zeros + HIDDEN, zeros, jnp.zeros(queries.shape, jnp.float32))
        )
        # A padding query next to real ones: every weight was exp(HIDDEN - HIDDEN), so total is not 0 but top tells.
        seen = top > HIDDEN / 2
        out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1)[..., None], 0).astype(q.dtype)
        return out, jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), jnp.inf)

    out, lse = lax.map(one, jnp.arange(q.shape[0] * blocks))
    return _join(out, q.shape), _join(lse, q.shape[:4])


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """[B * N, K, G * BLOCK, *rest] -> [B,K,G,T,*rest]."""
    b, kv, g, t = shape[:4]
    x = x.reshape(b, t // BLOCK, kv, g, BLOCK, *shape[4:])
    return jnp.moveaxis(x, 1, 3).reshape(shape)


def _backward(static: Static, q, k, v, starts, out, lse, d_out):
    """(dq, dk, dv). With p the weights and s the scores: ds = p (dp - sum_d out d_out), dp = d_out v^T."""
    blocks = q.shape[3] // BLOCK
    inner = jnp.sum(out.astype(jnp.float32) * d_out, axis=4)

    def one(carry, index):
        row, i = index // blocks, index % blocks
        queries, grads = _query_block(q, row, i), _query_block(d_out, row, i)
        lse_i, inner_i = (_query_block(x, row, i)[..., None] for x in (lse, inner))
        first = lax.dynamic_slice(starts, (row, i * BLOCK), (1, BLOCK))[0]

        def step(j, carry):
            dq, dk, dv = carry
            keys, values = _key_block(k, row, j), _key_block(v, row, j)
            scores, slope = _scores(static, queries, keys, first, i, j)
            weights = jnp.exp(scores - lse_i)
            d_scores = (weights * (_dot(grads, values, 2, 2) - inner_i) * slope).astype(q.dtype)
            dq = dq + _dot(d_scores, keys, 2, 1)
            dk = _add_block(dk, _dot(d_scores, queries, 1, 1), row, j)
            dv = _add_block(dv, _dot(weights.astype(grads.dtype), grads, 1, 1), row, j)
            return dq, dk, dv

        zeros = jnp.zeros(queries.shape, jnp.float32)
        dq, dk, dv = lax.fori_loop(*_bounds(first, i), step, (zeros, *carry))
        return (dk, dv), dq

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one, (zeros, zeros), jnp.arange(q.shape[0] * blocks))
    return _join(dq, q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _add_block(total: Array, block: Array, row: Array, j: Array) -> Array:
    return lax.dynamic_update_slice(total, (_key_block(total, row, j) + block)[None], (row, 0, j * BLOCK, 0))


def _dot(a: Array, b: Array, a_dim: int, b_dim: int) -> Array:
    """Product over the given dims of each key/value head, accumulated in fp32."""
    return lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((0,), (0,))), preferred_element_type=jnp.float32)
