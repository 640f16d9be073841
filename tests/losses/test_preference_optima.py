"""Exact optima on a tabular policy: what each preference loss converges to, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.preference import PairLogprobs, preference_loss

REFERENCE = jax.nn.log_softmax(jnp.array([0.3, -0.5, 1.0, 0.0]))  # one prompt, four answers of one token
REWARD = jnp.array([1.0, 0.2, -0.7, 0.5])
BETA = 0.5
FIRST, SECOND = np.array([(i, j) for i in range(4) for j in range(4) if i != j]).T


def pair(logprobs, first, second) -> PairLogprobs:
    one = jnp.ones(len(first))
    return PairLogprobs(logprobs[first], logprobs[second], one, one)


def trainer(first, second, weights, rate: float, **settings):
    """steps -> logprobs after so many steps of gradient descent on the logits, from the reference on."""

    def loss(logits):
        policy = pair(jax.nn.log_softmax(logits), first, second)
        return preference_loss(policy, pair(REFERENCE, first, second), beta=BETA, weights=weights, **settings)[0]

    step = lambda _, logits: logits - rate * jax.grad(loss)(logits)
    return jax.jit(lambda steps: jax.nn.log_softmax(jax.lax.fori_loop(0, steps, step, REFERENCE)))


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_dpo_reaches_the_tilted_reference(kind):
    """Bradley-Terry preferences of a reward r, every pair in both orders: pi = pi_ref exp(r / beta) / Z.

    robust is an unbiased estimate: flipped with probability e, it has the same optimum.
    """
    weights = jax.nn.sigmoid(REWARD[FIRST] - REWARD[SECOND]) / 6
    settings = {}
    if kind == "robust":
        weights, settings = 0.8 * weights + 0.2 * (1 / 6 - weights), {"label_smoothing": 0.2}
    found = trainer(FIRST, SECOND, weights, 5.0, kind=kind, **settings)(600)
    np.testing.assert_allclose(found, jax.nn.log_softmax(REFERENCE + REWARD / BETA), atol=2e-5)


def test_deterministic_preferences():
    """Always 0 over 1: DPO's log-ratio margin grows like log(steps); IPO's stops at 1/(2 beta), cDPO's at the odds."""

    def margin_after(rate=1.0, **settings):
        train = trainer(np.array([0]), np.array([1]), jnp.ones(1), rate, **settings)
        gap = lambda steps: train(steps) - REFERENCE
        return lambda steps: float(gap(steps)[0] - gap(steps)[1])

    dpo = margin_after(kind="sigmoid")
    early, later, late = dpo(100), dpo(1000), dpo(10000)
    assert later - early > 3 and late - later > 3
    np.testing.assert_allclose(late - later, np.log(10) / BETA, rtol=0.05)
    np.testing.assert_allclose(margin_after(0.1, kind="ipo")(300), 1 / (2 * BETA), rtol=1e-5)
    smoothed = margin_after(kind="sigmoid", label_smoothing=0.1)(1000)
    np.testing.assert_allclose(smoothed, np.log(0.9 / 0.1) / BETA, rtol=1e-4)
