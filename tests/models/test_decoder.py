"""The decoder against itself: packing, caches, patterns, unrolling, soft tokens, taps, remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models import decoder
from jaxpost.models.spec import DecoderSpec, LayerKind, abstract_params, init_params, num_params, unroll
from jaxpost.ops.rope import RopeSpec

SPEC = DecoderSpec(vocab_size=64, d_model=32, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48, tied=True)
MIXED = dataclasses.replace(
    SPEC,
    tied=False,
    num_prefix=1,
    pattern=(LayerKind(window=4), LayerKind(rope=1), LayerKind(rope=None)),
    rope=(RopeSpec(), RopeSpec(theta=500000.0)),
    attention_bias=True,
    mlp_bias=True,
    attn_softcap=20.0,
)
CACHED = 1e-5  # one row at a time sums in another order than many: 2.4e-6 was seen on values of about 1
SPECS = pytest.mark.parametrize("spec", [SPEC, MIXED], ids=["uniform", "mixed"])


def params_of(spec, seed=0):
    params = init_params(abstract_params(spec), jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), params)


def rows(spec, batch=2, length=12, seed=0):
    tokens = jax.random.randint(jax.random.key(seed), (batch, length), 0, spec.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return tokens, positions, jnp.ones((batch, length), jnp.int32)


def test_tree_has_the_promised_names():
    tree = abstract_params(MIXED)
    assert set(tree) == {"embed", "prefix", "blocks", "tail", "final_norm", "head"}
    assert (len(tree["prefix"]), set(tree["blocks"]), len(tree["tail"])) == (1, {"0", "1", "2"}, 1)
    assert tree["blocks"]["0"]["attn"]["q"].shape == (1, 32, 32) and tree["blocks"]["0"]["attn"]["k"].shape == (
        1,
        32,
        16,
    )
    assert "head" not in abstract_params(SPEC) and num_params(abstract_params(SPEC)) == 64 * 32 + 32 + 5 * (
        2 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    )


def test_locate_and_kind_agree():
    places = [tuple(MIXED.locate(i)) for i in range(5)]
    assert places == [
        ("prefix", 0, None),
        ("blocks", "0", 0),
        ("blocks", "1", 0),
        ("blocks", "2", 0),
        ("tail", 0, None),
    ]
    assert [MIXED.kind(i).window for i in range(5)] == [4, 4, None, None, 4]
    with pytest.raises(ValueError, match="layer 5"):
        MIXED.locate(5)


@SPECS
def test_packed_equals_each_segment_alone(spec):
    params = params_of(spec)
    tokens, _, _ = rows(spec, batch=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    packed, _, _ = decoder.apply(spec, params, tokens, positions, segments)
    for part in (slice(0, 5), slice(5, 9)):
        alone, _, _ = decoder.apply(spec, params, tokens[:, part], positions[:, part], jnp.ones_like(tokens[:, part]))
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-6)


@SPECS
def test_cached_equals_uncached_token_by_token(spec):
    params = params_of(spec)
    tokens, positions, segments = rows(spec)
    whole, _, _ = decoder.apply(spec, params, tokens, positions, segments)
    cache = decoder.init_cache(spec, 2, 16)
    cache = jax.tree.map(lambda x: x + 7.0, cache)  # slots not yet written must not be seen
    first, cache, _ = decoder.apply(spec, params, tokens[:, :7], positions[:, :7], None, cache=cache)
    np.testing.assert_allclose(first, whole[:, :7], atol=CACHED)
    for t in range(7, 12):
        one, cache, _ = decoder.apply(spec, params, tokens[:, t : t + 1], positions[:, t : t + 1], None, cache=cache)
        np.testing.assert_allclose(one, whole[:, t : t + 1], atol=CACHED)


def test_the_cache_is_updated_in_place():
    params = params_of(SPEC)
    tokens, positions, _ = rows(SPEC, length=1)
    cache = decoder.init_cache(SPEC, 2, 64)

    def one(cache):
        return decoder.apply(SPEC, params, tokens, positions, None, cache=cache)[:2]

    compiled = jax.jit(one, donate_argnums=0).lower(cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(cache))


@SPECS
def test_unrolled_is_the_same_model(spec):
    params = params_of(spec)
    whole, _, _ = decoder.apply(spec, params, *rows(spec))
    loose, _, _ = decoder.apply(spec.unrolled, unroll(spec, params), *rows(spec))
    np.testing.assert_allclose(loose, whole, atol=2e-6)


@SPECS
def test_taps_are_the_outputs_of_layers(spec):
    params = params_of(spec)
    hidden, _, aux = decoder.apply(spec, params, *rows(spec), taps=(0, 2, 4))
    plain, _, none = decoder.apply(spec, params, *rows(spec))
    np.testing.assert_array_equal(hidden, plain)
    assert none == {} and set(aux["taps"]) == {0, 2, 4}
    last = decoder.rms_norm(aux["taps"][4], params["final_norm"], spec.norm_eps)
    np.testing.assert_allclose(last, hidden, atol=1e-6)
    with pytest.raises(ValueError, match="taps: layer 5"):
        decoder.apply(spec, params, *rows(spec), taps=(5,))


def test_soft_tokens_stand_in_for_embeddings_also_packed():
    params = params_of(SPEC)
    tokens, _, _ = rows(SPEC, batch=1)
    segments, positions = jnp.array([[1] * 6 + [2] * 6]), jnp.array([list(range(6)) * 2])
    vectors = jax.random.normal(jax.random.key(5), (1, 3, 32))
    places = jnp.array([[1, 7, -1]])  # the third is ignored
    mixed, _, _ = decoder.apply(SPEC, params, tokens, positions, segments, soft_tokens=(vectors, places))
    plain, _, _ = decoder.apply(SPEC, params, tokens, positions, segments)
    np.testing.assert_array_equal(mixed[:, 0], plain[:, 0])
    assert np.abs(mixed[:, 1] - plain[:, 1]).max() > 1e-3
    alone, _, _ = decoder.apply(
        SPEC, params, tokens[:, 6:], positions[:, 6:], jnp.ones((1, 6), int),
        soft_tokens=(vectors[:, 1:2], jnp.array([[1]])),
    )  # fmt: skip
    np.testing.assert_allclose(mixed[:, 6:], alone, atol=2e-6)
    # a vector that equals the embedding changes nothing; the gradient reaches the vectors
    same, _, _ = decoder.apply(
        SPEC, params, tokens, positions, segments, soft_tokens=(params["embed"][tokens[:, 3:4]], jnp.array([[3]]))
    )
    np.testing.assert_array_equal(same, plain)
    grad = jax.grad(
        lambda v: decoder.apply(SPEC, params, tokens, positions, segments, soft_tokens=(v, places))[0].sum()
    )(vectors)
    assert np.abs(grad[0, 0]).max() > 0 and np.all(np.asarray(grad[0, 2]) == 0)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_not_results(remat):
    params = params_of(MIXED)

    def loss(params, options):
        return decoder.apply(MIXED, params, *rows(MIXED), options=options)[0].sum()

    value, grad = jax.value_and_grad(loss)(params, decoder.Options())
    other, other_grad = jax.value_and_grad(loss)(params, decoder.Options(remat=remat))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(other_grad), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, float(jnp.abs(a).max())))


def test_bf16_compute_stays_close():
    params = params_of(SPEC)
    exact, _, _ = decoder.apply(SPEC, params, *rows(SPEC))
    rough, _, _ = decoder.apply(SPEC, params, *rows(SPEC), options=decoder.Options(dtype=jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    assert 0 < np.abs(rough.astype(jnp.float32) - exact).max() < 0.15


def test_remat_dots_does_not_run_attention_twice():
    """Loops of the blockwise kernel: as many under "dots" as when everything is kept, more under "full"."""
    spec = dataclasses.replace(SPEC, num_layers=2)
    params = init_params(abstract_params(spec), jax.random.key(0))
    tokens, segments = jnp.zeros((1, 512), jnp.int32), jnp.ones((1, 512), jnp.int32)

    def loops(remat):
        options = decoder.Options(remat=remat, attention="blockwise")
        loss = lambda params: decoder.apply(spec, params, tokens, tokens, segments, options=options)[0].sum()
        return jax.jit(jax.grad(loss)).lower(params).compile().as_text().count(" while(")

    assert loops("dots") == loops("none") < loops("full")
