"""NEFTune: strength by hand, by the sequence and not by the row, and where the decoder adds it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.models import decoder
from jaxpost.models.spec import DecoderSpec, abstract_params, init_params
from jaxpost.ops.noise import neftune_noise

SPEC = DecoderSpec(vocab_size=32, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=24)
KEY = jax.random.key(3)
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2], [1] * 9 + [0] * 7])


def test_strength_by_hand():
    noise = np.asarray(neftune_noise(KEY, SEGMENTS, 4096, 5.0))
    for row, part, length in ((0, slice(0, 4), 4), (0, slice(4, 16), 12), (1, slice(0, 9), 9)):
        bound = 5 / np.sqrt(length * 4096)
        found = noise[row, part] / bound
        assert 0.999 < found.max() <= 1 and -1 <= found.min() < -0.999
        np.testing.assert_allclose([found.mean(), found.var()], [0, 1 / 3], atol=0.02)
    assert not noise[1, 9:].any()


def test_an_example_gets_as_much_noise_packed_or_alone():
    """Of the same draw: strength follows from the sequence's own length, not from what stands beside it."""
    alone = jnp.where(SEGMENTS == 1, 1, 0)
    packed, single = neftune_noise(KEY, SEGMENTS, 8, 5.0), neftune_noise(KEY, alone, 8, 5.0)
    np.testing.assert_array_equal(packed[SEGMENTS == 1], single[SEGMENTS == 1])
    assert not single[0, 4:].any()


def test_another_key_is_another_noise():
    one, again, other = (neftune_noise(key, SEGMENTS, 8, 5.0) for key in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(one, again)
    assert (one != other)[SEGMENTS > 0].all()


def test_the_decoder_adds_it_to_the_embeddings_in_training_only():
    params = init_params(abstract_params(SPEC), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), SEGMENTS.shape, 0, 32)
    positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
    run = lambda **given: decoder.apply(SPEC, params, tokens, positions, SEGMENTS, **given)[0]
    plain = run()
    np.testing.assert_array_equal(run(rng=KEY), plain)  # alpha 0 is exactly plain
    np.testing.assert_array_equal(run(embed_noise=5.0), plain)  # evaluation: no key
    noisy = run(rng=KEY, embed_noise=5.0)
    vectors = params["embed"][tokens] + neftune_noise(jax.random.fold_in(KEY, SPEC.num_layers), SEGMENTS, 16, 5.0)
    np.testing.assert_allclose(noisy, run(soft_tokens=(vectors, positions)), atol=1e-6)
    assert (noisy != plain)[SEGMENTS > 0].any(-1).all()
