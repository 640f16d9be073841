"""Causal attention over packed rows by the accelerators' own kernels: splash on a TPU, cuDNN on an NVIDIA GPU.

Both are the scheme of FlashAttention (arXiv:2205.14135): no [T,T] array, forward or backward. Splash skips the blocks
outside the causal band or window; cuDNN is told where each segment begins and ends and computes nothing between two.
Legend: B rows, T positions, H query heads, KV key/value heads, S the most segments of a row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpost.ops.attention_blockwise import shard_rows_and_heads, split_heads

Array = jax.Array

LANES = 128  # a TPU register's width: splash works on multiples of it
SPLASH_BLOCKS = (512, 256, 128)


def splash(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None,
    softcap: float | None,
    scale: float,
    mesh: Mesh | None,
    interpret: bool = False,
) -> Array:
    """float[B,T,H,hd], of q's shape; k, v float[B,T,KV,hd]; segments i32[B,T]. Segment 0 is one among others here.

    interpret: run the kernel's program step by step on a CPU: exact and slow.
    """
    length = q.shape[1]
    pad = [(0, 0), (0, -length % LANES)]
    q, k, v = (jnp.pad(x, [*pad, (0, 0), (0, 0)]) for x in (q, k, v))
    segments = jnp.pad(segments, pad)
    run = functools.partial(_splash_shard, window, softcap, scale, interpret)
    if mesh is not None and mesh.size > 1:
        k, v = split_heads(q, k, v, mesh)
        run = shard_rows_and_heads(run, mesh, "qkks", "q", heads_at=2)
    return run(q, k, v, segments)[:, :length]


def _splash_shard(window, softcap, scale, interpret, q: Array, k: Array, v: Array, segments: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    length, heads = q.shape[1:3]
    shape = (length, length)
    mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
    attend = kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(*[block] * 8),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel does not scale
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(attend)(q, k, v, kernels.SegmentIds(segments, segments)).swapaxes(1, 2).astype(q.dtype)


def cudnn(
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    *,
    window: int | None,
    scale: float,
    max_segments: int,
    mesh: Mesh | None,
) -> Array:
    """bf16 or fp16 [B,T,H,hd], of q's shape; k, v [B,T,KV,hd]; segments i32[B,T], contiguous, 1..S in order, 0 padding.

    max_segments: S. A row with more would be wrong, so it is nan instead. What comes back for padding is undefined.
    """
    run = functools.partial(_cudnn_shard, window, scale, max(2, max_segments))  # one segment a row is another layout
    if mesh is not None and mesh.size > 1:
        k, v = split_heads(q, k, v, mesh)
        run = shard_rows_and_heads(run, mesh, "qkks", "q", heads_at=2)
    return jnp.where((segments <= max_segments)[..., None, None], run(q, k, v, segments), jnp.nan)


def _cudnn_shard(window, scale, max_segments, q: Array, k: Array, v: Array, segments: Array) -> Array:
    # jax.nn.dot_product_attention does not pass the places of segments on, so this is the layer below it.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    starts, lengths = segment_bounds(segments, max_segments)
    offsets = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    return dot_product_attention(
        q, k, v, None, None, lengths, lengths, offsets, offsets,
        scale=scale, mask_type=MaskType.PADDING_CAUSAL, sliding_window_length=window,
    )  # fmt: skip


def segment_bounds(segments: Array, max_segments: int) -> tuple[Array, Array]:
    """(starts, lengths) i32[B,S] of segments 1..S in each row; -1 for one that is not there."""
    rows, index = jnp.arange(segments.shape[0])[:, None], jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    place = jnp.where(segments == 0, max_segments, segments - 1)  # out of range: dropped
    empty = jnp.zeros((segments.shape[0], max_segments), jnp.int32)
    lengths = empty.at[rows, place].add(1, mode="drop")
    starts = (empty + segments.shape[1]).at[rows, place].min(jnp.broadcast_to(index, segments.shape), mode="drop")
    there = lengths > 0
    return jnp.where(there, starts, -1), jnp.where(there, lengths, -1)
