"""Attention: blockwise equals dense equals each segment alone; padding never leaks; blocks are really skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpost.ops.attention import attention
from jaxpost.ops.attention_blockwise import BLOCK, first_visible
from jaxpost.ops.attention_kernels import segment_bounds

ROWS = {
    "one": [[200]],
    "packed": [[30, 70, 60], [150, 50]],  # the first row ends in padding
    "blocks": [[64, 64, 128]],
    "tiny": [[1, 2, 3, 1], [7]],
}


def segments_of(rows, length=None):
    length = length or max(sum(row) for row in rows)
    out = np.zeros((len(rows), length), np.int32)
    for r, row in enumerate(rows):
        ids = np.repeat(np.arange(1, len(row) + 1), row)
        out[r, : len(ids)] = ids
    return out


def example(batch, length, heads=4, kv_heads=2, width=8, dtype=np.float32, seed=0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, length, n, width)).astype(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def by_hand(q, k, v, visible, softcap, scale):
    """float64 loops over rows and heads; visible bool[B,T,S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            kv = h // (q.shape[2] // k.shape[2])
            scores = q[b, :, h] @ k[b, :, kv].T * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.where(visible[b], np.exp(scores), 0)
            total = weights.sum(-1, keepdims=True)
            out[b, :, h] = weights / np.where(total == 0, 1, total) @ v[b, :, kv]
    return out


def visible_in(segments, window):
    index = np.arange(segments.shape[1])
    distance = index[:, None] - index[None]
    near = (distance >= 0) & (distance < (window or segments.shape[1]))
    return near[None] & (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] != 0)


def value_and_grads(impl, q, k, v, cotangent, *, segments, **options):
    def loss(q, k, v, cotangent, segments):
        out = attention(q, k, v, scale=0.3, impl=impl, segments=segments, **options)
        return jnp.sum(cotangent * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v, cotangent, segments)
    return out, *grads


def assert_close(got, want, tolerance=2e-6):
    """Within the tolerance of each leaf's greatest value, or of 0.5: small gradients are differences of such terms."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(0.5, float(np.max(np.abs(y)))))


@pytest.mark.parametrize(
    "rows,window,softcap",
    [("one", None, None), ("packed", None, None), ("packed", 40, 1.5), ("blocks", 64, None), ("blocks", None, 1.5)]
    + [("tiny", 1, None), ("tiny", 3, None)],
)
def test_blockwise_equals_dense_equals_by_hand(rows, window, softcap):
    segments = segments_of(ROWS[rows])
    q, k, v, cotangent = example(*segments.shape)
    options = {"segments": segments, "window": window, "softcap": softcap}
    dense = value_and_grads("xla", q, k, v, cotangent, **options)
    assert_close(value_and_grads("blockwise", q, k, v, cotangent, **options), dense)
    np.testing.assert_allclose(dense[0], by_hand(q, k, v, visible_in(segments, window), softcap, 0.3), atol=2e-6)


@pytest.mark.parametrize("heads,kv_heads", [(3, 3), (3, 1)])
def test_head_groups(heads, kv_heads):
    segments = segments_of(ROWS["packed"])
    args = example(*segments.shape, heads, kv_heads, width=5)
    got, want = (value_and_grads(impl, *args, segments=segments) for impl in ("blockwise", "xla"))
    assert_close(got, want)


def test_bf16_keeps_its_dtype_and_agrees():
    segments = segments_of(ROWS["packed"])
    args = example(*segments.shape, dtype=jnp.bfloat16)
    got, want = (value_and_grads(impl, *args, segments=segments) for impl in ("blockwise", "xla"))
    assert all(x.dtype == jnp.bfloat16 for x in got)
    got, want = (jax.tree.map(lambda x: np.asarray(x, np.float32), t) for t in (got, want))
    assert_close(got, want, 2e-2)  # 2^-8 a rounding


@pytest.mark.parametrize("impl", ["xla", "blockwise"])
def test_packed_equals_each_segment_alone(impl):
    lengths = [30, 70, 60]
    args = example(1, sum(lengths))
    packed = value_and_grads(impl, *args, segments=segments_of([lengths]))
    ends = np.cumsum(lengths)
    for n, end in zip(lengths, ends, strict=True):
        alone = value_and_grads(impl, *(x[:, end - n : end] for x in args), segments=np.ones((1, n), np.int32))
        assert_close([x[:, end - n : end] for x in packed], alone)


@pytest.mark.parametrize("impl", ["xla", "blockwise"])
def test_padding_does_not_leak(impl):
    """nan in padded q, k, v and in the cotangent of padding: output 0 there, gradients 0 there, all else unchanged."""
    segments = segments_of([[30, 40], [10]], length=130)
    segments[1, 70:90] = 2  # padding between segments, too
    real = (segments != 0)[:, :, None, None]
    clean = [np.where(real, x, np.float32(0)) for x in example(*segments.shape)]
    dirty = [np.where(real, x, np.float32(np.nan)) for x in clean]
    got, want = (value_and_grads(impl, *args, segments=segments) for args in (dirty, clean))
    assert_close(got, want, 0)
    for x in got:
        assert not np.any(np.where(real, 0, x))


def test_cache_equals_full_row_and_ignores_unwritten_slots():
    q, k, v, _ = example(2, 12)
    last = np.array([[11], [6]], np.int32)
    written = np.arange(20)[None, :, None, None] <= last[..., None, None]
    caches = [np.where(written, np.pad(x, ((0, 0), (0, 8), (0, 0), (0, 0))), np.float32(np.nan)) for x in (k, v)]
    one = np.take_along_axis(q, last[..., None, None], axis=1)
    for window in (None, 4):
        decode = jax.jit(functools.partial(attention, scale=0.3, window=window))
        full = by_hand(q, k, v, visible_in(np.ones((2, 12), int), window), None, 0.3)
        got = decode(one, *caches, query_positions=last)
        assert_close(got, np.take_along_axis(full, last[..., None, None], axis=1))


def test_first_visible():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [0, 1, 1, 0, 2, 2, 2]])
    first = jax.jit(first_visible, static_argnums=1)
    assert first(segments, None).tolist() == [
        [0, 0, 2, 2, 2, 7, 7],
        [7, 1, 1, 7, 4, 4, 4],
    ]
    assert first(segments, 2).tolist() == [
        [0, 0, 2, 2, 3, 7, 7],
        [7, 1, 1, 7, 4, 4, 5],
    ]


def test_blocks_outside_are_not_touched():
    """A nan in keys of an earlier segment's block would spread through 0 * nan if that block were visited."""
    from jaxpost.ops.attention_blockwise import blockwise

    segments = segments_of([[BLOCK, BLOCK, 2 * BLOCK]])
    q, k, v, cotangent = example(*segments.shape)
    v[:, :BLOCK] = np.nan

    def loss(q, k, v):
        out = blockwise(q, k, v, jnp.asarray(segments), window=BLOCK, softcap=None, scale=0.3, mesh=None)
        return jnp.sum(cotangent[:, BLOCK:] * out[:, BLOCK:])

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g[:, BLOCK:])) for g in grads)


def test_auto_is_blockwise_from_512_positions_and_never_holds_the_square():
    def compiled(length, impl):
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        q, k = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (9, 3))

        def loss(q, k, v, segments):
            return jnp.sum(attention(q, k, v, segments=segments, scale=0.25, impl=impl) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments).compile()

    auto, dense = (compiled(2048, impl).memory_analysis().temp_size_in_bytes for impl in ("auto", "xla"))
    assert dense > 2 * 9 * 2048 * 2048 * 4
    assert auto < dense / 20
    assert ",512,512]" not in compiled(512, "auto").as_text()
    assert ",511,511]" in compiled(511, "auto").as_text()


@pytest.mark.parametrize(
    "axes,kv_heads", [({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"tensor": 8}, 2), ({"data": 2, "tensor": 4}, 8)]
)
@pytest.mark.parametrize("impl", ["xla", "blockwise"])
def test_sharded_equals_unsharded(axes, kv_heads, impl):
    shape = {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1} | axes
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 5)
    segments = segments_of([[30, 70], [100], [50, 20], [1, 2, 97]])
    args = example(*segments.shape, heads=8, kv_heads=kv_heads)
    options = {"segments": segments, "window": 60, "softcap": 2.0}
    assert_close(value_and_grads(impl, *args, mesh=mesh, **options), value_and_grads("xla", *args, **options))


def test_wrong_arguments_are_refused():
    q, k, v, _ = example(2, 6)
    ones = np.ones((2, 6), np.int32)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    for args, options, message in (
        ((q, k, v[:, :5]), {"segments": ones}, "do not fit"),
        ((q[:, :, :3], k, v), {"segments": ones}, "not divisible by 2 key/value heads"),
        ((q, k, v), {}, "either segments"),
        ((q, k, v), {"segments": ones, "query_positions": ones}, "either segments"),
        ((q, k, v), {"segments": ones[:, :5]}, "segments"),
        ((q, k, v), {"query_positions": ones[:, :5]}, "query_positions"),
        ((q, k, v), {"segments": ones, "window": 0}, "window must be positive"),
        ((q, k, v), {"segments": ones, "impl": "flash"}, "impl must be"),
        ((q, k, v), {"query_positions": ones, "impl": "blockwise"}, "needs segments"),
        ((q, k, v), {"segments": ones, "impl": "blockwise", "mesh": mesh}, "2 rows are not divisible by 4"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda args=args, options=options: attention(*args, scale=1.0, **options))


@pytest.mark.parametrize("rows,window,softcap", [("packed", None, None), ("packed", 40, 1.5), ("blocks", 64, None)])
def test_splash_equals_dense(rows, window, softcap):
    """The TPU kernel, run step by step on the CPU."""
    segments = segments_of(ROWS[rows])
    args = example(*segments.shape, width=8)
    options = {"segments": segments, "window": window, "softcap": softcap}
    got, want = (value_and_grads(impl, *args, **options) for impl in ("splash", "xla"))
    assert_close(got, want, 1e-5)


def test_segment_bounds():
    segments = np.array([[1, 1, 2, 2, 2, 0, 0], [0, 1, 1, 0, 3, 3, 3]])
    starts, lengths = segment_bounds(segments, 3)
    assert starts.tolist() == [[0, 2, -1], [1, -1, 4]]
    assert lengths.tolist() == [[2, 3, -1], [2, -1, 3]]


def test_cudnn_is_refused_with_the_reason_and_never_chosen_on_a_cpu():
    segments = segments_of(ROWS["packed"])
    q, k, v, _ = example(*segments.shape)
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU; use 'auto'"):
        attention(q, k, v, segments=segments, scale=0.3, impl="cudnn", max_segments=4)


def test_kernels_on_a_mesh_and_whole_rows_over_a_context_axis():
    """Splash under shard_map equals the plain form; over a context axis "auto" keeps that, which splits queries."""
    segments = segments_of([[30, 70, 28], [100]], length=128)
    args = example(*segments.shape, heads=4, kv_heads=2)
    want = value_and_grads("xla", *args, segments=segments)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    assert_close(value_and_grads("splash", *args, segments=segments, mesh=mesh), want, 1e-5)
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    q, k, v, _ = example(1, 512)
    whole = np.ones((1, 512), np.int32)
    loops = {}
    for axis, where in (("context", mesh), ("none", None)):
        program = jax.jit(lambda q, k, v, where=where: attention(q, k, v, segments=whole, scale=0.3, mesh=where))
        loops[axis] = program.lower(q, k, v).as_text().count("stablehlo.while")
    assert loops["context"] == 0 < loops["none"]
