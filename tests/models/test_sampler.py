"""Generation: greedy equals the uncached argmax, stops, seeds, and independence of batch mates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.models import decoder
from jaxpost.models.policy import Policy
from jaxpost.models.sampler import Sampler, Sampling
from jaxpost.models.spec import abstract_params, init_params
from jaxpost.ops.sampling import filtered, sample
from tests.models.test_decoder import SPEC

PROMPTS = [[5, 9, 3], [1], [7, 7, 2, 30, 11, 12, 1, 1, 4]]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 3, init_params(abstract_params(SPEC), jax.random.key(0)))


def sampler_of(params, batch_size=2, stop=()):
    sampler = Sampler(Policy(SPEC), stop, batch_size=batch_size, bucket=8)
    sampler.load(params)
    return sampler


def greedy_by_hand(params, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        tokens = jnp.asarray([ids])
        hidden, _, _ = decoder.apply(SPEC, params, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens))
        ids.append(int(jnp.argmax(hidden[0, -1] @ decoder.head(params).T)))
    return ids[len(prompt) :]


def test_greedy_equals_the_uncached_model(params):
    outs = sampler_of(params).generate(PROMPTS, Sampling(max_new_tokens=6))
    assert [c.tokens for c in outs] == [greedy_by_hand(params, p, 6) for p in PROMPTS]
    assert {c.stop_reason for c in outs} == {"length"}


def test_a_stop_token_ends_a_row_and_is_kept(params):
    free = sampler_of(params).generate(PROMPTS, Sampling(max_new_tokens=6))
    stop = free[0].tokens[2]
    outs = sampler_of(params, stop=(stop,)).generate(PROMPTS, Sampling(max_new_tokens=6))
    cut = free[0].tokens.index(stop) + 1
    assert outs[0].tokens == free[0].tokens[:cut] and outs[0].stop_reason == "eos"
    assert len(outs[0].logprobs) == cut


def test_samples_do_not_depend_on_batch_mates(params):
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    small = sampler_of(params, batch_size=1).generate(PROMPTS, sampling, seed=3)
    large = sampler_of(params, batch_size=4).generate(PROMPTS, sampling, seed=3)
    other = sampler_of(params, batch_size=4).generate(PROMPTS, sampling, seed=4)
    assert [c.tokens for c in small] == [c.tokens for c in large]
    assert [c.tokens for c in small] != [c.tokens for c in other]
    for a, b in zip(small, large, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_behaviour_logprobs_are_the_models(params):
    sampling = Sampling(max_new_tokens=5, temperature=0.7)
    out = sampler_of(params).generate([PROMPTS[0]], sampling, seed=1)[0]
    ids = jnp.asarray([PROMPTS[0] + out.tokens])
    hidden, _, _ = decoder.apply(SPEC, params, ids, jnp.arange(ids.shape[1])[None], jnp.ones_like(ids))
    scores = jax.nn.log_softmax(hidden[0] @ decoder.head(params).T / 0.7)
    expected = [scores[len(PROMPTS[0]) - 1 + i, token] for i, token in enumerate(out.tokens)]
    np.testing.assert_allclose(out.logprobs, expected, atol=1e-5)


def test_sampled_frequencies_match_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    count = 20000
    tokens, _, _ = sample(
        jnp.broadcast_to(logits, (count, 4)), jax.random.split(jax.random.key(0), count), temperature=1.0
    )
    seen = np.bincount(np.asarray(tokens), minlength=4)
    expected = count * np.array([0.5, 0.3, 0.15, 0.05])
    assert ((seen - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_filters_by_hand():
    scores = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda **kw: np.isfinite(np.asarray(filtered(scores, **kw)))[0].tolist()
    assert kept() == [True] * 4
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.81) == [True, True, True, False]
    assert kept(min_p=0.2) == [True, True, True, False]


def test_refusals(params):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler_of(params).generate([[1], []], Sampling())
    with pytest.raises(ValueError, match="out of range"):
        Sampling(top_p=0.0)
    with pytest.raises(ValueError, match=r"load\(weights\)"):
        Sampler(Policy(SPEC), ()).generate([[1]], Sampling())
