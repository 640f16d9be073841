"""Causal attention over packed rows or a cache, with grouped heads, window and soft cap.

One formula: a plain form that XLA schedules, a blockwise one for the CPU (attention_blockwise.py), and
the kernels of TPU and GPU (attention_kernels.py); only the plain one holds [T,T] scores. Legend: B rows, T queries,
S keys, H query heads, KV key/value heads, G = H / KV query heads that share one.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpost.ops.attention_blockwise import blockwise
from jaxpost.ops.attention_kernels import cudnn, splash

Array = jax.Array
Impl = Literal["auto", "xla", "blockwise", "splash", "cudnn"]

BLOCKWISE_FROM = 512  # positions; below, one dense product is quicker on a CPU


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    query_positions: Array | None = None,
    segments: Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float,
    impl: Impl = "auto",
    max_segments: int | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> Array:
    """softmax(cap(scale q k^T) where visible) v, the softmax in fp32.

    Either `segments` i32[B,T] is given (S == T): a key is visible from its own and later indices of the same segment;
    segments are contiguous and 0 is padding, whose queries return 0 and whose q, k, v may hold anything and get zero
    gradients. Or `query_positions` i32[B,T] is given, for a cache whose slot s holds position s: key s is visible iff
    s <= query_position; slots that no query of the row sees may hold anything. A query that sees nothing returns 0.

    Args:
      q: float[B,T,H,hd]. k, v: float[B,S,KV,hd], KV divides H; query head h reads head h // (H / KV).
      window: only keys less than `window` positions back are visible. softcap: c for cap(z) = c tanh(z / c).
      impl: "auto" is, for segments, the quickest that can do it: blockwise on a CPU from 512 positions, splash on a
        TPU, cudnn on a GPU from Hopper on in bf16; else xla, and always where a context axis splits the positions.
      max_segments: the most segments that a row holds; cudnn needs it, and returns nan for a row with more.
      mesh: all but xla run under shard_map, rows over data and fsdp, heads over tensor. They see whole rows: over a
        context axis each of its devices does all of the work.
      platform: "cpu", "gpu" or "tpu", what the program is for; None: the mesh's, or jax's own.

    Returns:
      float[B,T,H,hd] in q's dtype.

    Raises:
      ValueError: shapes that do not fit, both or neither of segments and query_positions, a kernel with a cache, cudnn
        where it cannot run.
    """
    _check(q, k, v, query_positions, segments, window, impl)
    if platform is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if impl == "auto":
        whole = segments is not None and (mesh is None or mesh.shape.get("context", 1) == 1)
        impl = _quickest(platform, q, softcap, max_segments) if whole else "xla"
    if segments is not None:
        real = (segments != 0)[:, :, None, None]  # before any product: 0 * nan is nan
        q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
        common = dict(window=window, scale=scale, mesh=mesh)
        if impl == "blockwise":
            out = blockwise(q, k, v, segments, softcap=softcap, **common)
        elif impl == "splash":
            out = splash(q, k, v, segments, softcap=softcap, interpret=platform == "cpu", **common)
        elif impl == "cudnn":
            if missing := _cudnn_misses(platform, q, softcap, max_segments):
                raise ValueError(f"attention impl 'cudnn' {missing}; use 'auto'")
            out = cudnn(q, k, v, segments, max_segments=max_segments, **common)
        else:
            index = jnp.arange(q.shape[1])
            visible = _causal(index[None, :], index, window) & (segments[:, :, None] == segments[:, None, :])
            out = _dense(q, k, v, visible & (segments[:, :, None] != 0), softcap, scale)
        return jnp.where(real, out, 0)  # stops a nan cotangent of padding, too
    visible = _causal(query_positions, jnp.arange(k.shape[1]), window)
    seen = jnp.any(visible, axis=1)[:, :, None, None]
    return _dense(q, jnp.where(seen, k, 0), jnp.where(seen, v, 0), visible, softcap, scale)


def _quickest(platform: str, q: Array, softcap: float | None, max_segments: int | None) -> Impl:
    """What "auto" is for packed rows that are whole."""
    if platform == "tpu":
        return "splash"
    if _cudnn_misses(platform, q, softcap, max_segments) is None:
        return "cudnn"
    return "blockwise" if platform == "cpu" and q.shape[1] >= BLOCKWISE_FROM else "xla"


def _cudnn_misses(platform: str, q: Array, softcap: float | None, max_segments: int | None) -> str | None:
    """What keeps cuDNN from packed rows here, None where nothing does."""
    if platform != "gpu" or jax.default_backend() != "gpu":  # a described GPU has no cuDNN to ask either
        return "needs an NVIDIA GPU"
    capability = str(jax.local_devices()[0].compute_capability)
    generation = capability.partition(".")[0]
    if not generation.isdigit() or int(generation) < 9:
        return f"needs compute capability 9.0 for packed rows, this GPU has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bf16 or fp16, got {q.dtype} (model.compute_dtype)"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"needs heads of at most 256 and a multiple of 8, got {q.shape[3]}"
    if softcap is not None:
        return "has no soft cap"
    return "needs max_segments" if max_segments is None else None


def _check(q, k, v, query_positions, segments, window, impl) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q [B,T,H,hd], k and v [B,S,KV,hd] do not fit: {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not divisible by {k.shape[2]} key/value heads")
    if (segments is None) == (query_positions is None):
        raise ValueError("attention needs either segments (no cache) or query_positions (a cache)")
    if segments is not None and not (segments.shape == q.shape[:2] == k.shape[:2]):
        raise ValueError(f"segments {segments.shape} must be the [B,T] of q {q.shape} and k {k.shape}")
    if query_positions is not None and query_positions.shape != q.shape[:2]:
        raise ValueError(f"query_positions {query_positions.shape} must be the [B,T] of q {q.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be positive, got {window}")
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl not in ("auto", "xla") and segments is None:
        raise ValueError(f"{impl} attention needs segments; use impl='xla' with a cache")


def _causal(query: Array, key: Array, window: int | None) -> Array:
    """bool[B,T,S] from positions [B,T] and [S]."""
    distance = query[:, :, None] - key[None, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _dense(q: Array, k: Array, v: Array, visible: Array, softcap: float | None, scale: float) -> Array:
    """The formula itself, heads first; visible bool[B,T,S]."""
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], h // k.shape[2], d).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, d).astype(q.dtype)
