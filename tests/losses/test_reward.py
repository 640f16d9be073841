"""Bradley-Terry on pairs and rankings: hand-computed values, gradients, absent units, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.reward import ranking_loss, reward_loss

CHOSEN, REJECTED = jnp.array([1.5, 0.0, 2.0]), jnp.array([0.5, 1.0, 2.0])  # d = 1, -1, 0
LOGISTIC = np.array([0.3132616875, 1.3132616875, 0.6931471806])  # -logsig of those
ONES = jnp.ones(3)


def test_plain_by_hand():
    terms, metrics = reward_loss(CHOSEN, REJECTED, weights=ONES, reduce=False)
    np.testing.assert_allclose(terms, LOGISTIC, rtol=1e-6)
    np.testing.assert_allclose(reward_loss(CHOSEN, REJECTED)[0], LOGISTIC.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], [1, 0, 0])  # equal scores agree with nobody
    np.testing.assert_allclose(metrics["margin"], [1, -1, 0])
    np.testing.assert_allclose(metrics["mean_reward"], [1, 0.5, 2])


def test_margin_and_centring_by_hand():
    margin = jnp.array([0.5, -1.5, 0.0])  # d - margin = .5, .5, 0
    terms, _ = reward_loss(CHOSEN, REJECTED, margin=margin, center_coefficient=0.1, weights=ONES, reduce=False)
    np.testing.assert_allclose(terms, [0.4740769842 + 0.4, 0.4740769842 + 0.1, 0.6931471806 + 1.6], rtol=1e-6)


def test_soft_labels_are_the_mean_over_annotators():
    q, margin = jnp.array([0.75, 0.75, 0.25]), jnp.array([0.0, 0.0, 0.5])
    terms, metrics = reward_loss(CHOSEN, REJECTED, probability=q, margin=margin, weights=ONES, reduce=False)
    # 3 of 4 say chosen; the last pair: -logsig(-.5) whoever is asked
    np.testing.assert_allclose(terms, [0.5632616875, 1.0632616875, 0.9740769842], rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], [0.75, 0.25, 0])
    sure, _ = reward_loss(CHOSEN, REJECTED, probability=ONES, margin=margin)
    assert sure == reward_loss(CHOSEN, REJECTED, margin=margin)[0]
    tie = lambda d: reward_loss(d[None], jnp.zeros(1), probability=jnp.full(1, 0.5))[0]
    np.testing.assert_allclose(jax.grad(tie)(jnp.array(0.0)), 0, atol=1e-7)
    assert jax.grad(tie)(jnp.array(1.0)) > 0 > jax.grad(tie)(jnp.array(-1.0))


def test_gradient_by_hand():
    chosen, rejected = jax.grad(lambda c, r: reward_loss(c, r, center_coefficient=0.1)[0], argnums=(0, 1))(
        CHOSEN, REJECTED
    )
    push = np.array([0.2689414214, 0.7310585786, 0.5]) / 3  # 1 - sig(d)
    centre = 0.2 * np.array([2.0, 1, 4]) / 3
    np.testing.assert_allclose(chosen, -push + centre, rtol=1e-5)
    np.testing.assert_allclose(rejected, push + centre, rtol=1e-5)


def test_swapping_a_pair_and_adding_a_constant():
    there, _ = reward_loss(CHOSEN, REJECTED, weights=ONES, reduce=False)
    back, _ = reward_loss(REJECTED, CHOSEN, weights=ONES, reduce=False)
    np.testing.assert_allclose(there - back, REJECTED - CHOSEN, atol=1e-6)
    np.testing.assert_allclose(reward_loss(CHOSEN + 7, REJECTED + 7, weights=ONES, reduce=False)[0], there, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_zero_removes_a_pair_whatever_it_holds(bad):
    weights = jnp.array([0.5, 0.0, 0.5])
    spoil = lambda x: x.at[1].set(bad)

    def loss(chosen, rejected):
        given = {"margin": spoil(ONES), "probability": spoil(ONES), "center_coefficient": 0.1}
        return reward_loss(chosen, rejected, **given, weights=weights)[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(spoil(CHOSEN), spoil(REJECTED))
    kept = np.array([0, 2])
    expected, _ = reward_loss(CHOSEN[kept], REJECTED[kept], margin=jnp.ones(2), center_coefficient=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert all(g[1] == 0 and np.all(np.isfinite(g)) for g in gradients)


def test_far_scores_stay_finite():
    loss, gradient = jax.value_and_grad(lambda c: reward_loss(c, -c)[0])(jnp.array([-1e5, 1e5]))
    np.testing.assert_allclose(loss, 1e5)
    np.testing.assert_allclose(gradient, [-1, 0])


def test_errors():
    with pytest.raises(ValueError, match=r"vectors of one length; got chosen \(3,\), rejected \(2,\)"):
        reward_loss(CHOSEN, REJECTED[:2])
    with pytest.raises(ValueError, match="center_coefficient must be finite and not below 0"):
        reward_loss(CHOSEN, REJECTED, center_coefficient=-1)


# A full ranking of three, one with a tie, one with a single pair, one completion alone.
SCORES = jnp.array([[1.0, 0.0, 2.0], [1.0, 0.0, 0.0], [0.0, 1.0, jnp.nan], [5.0, jnp.inf, jnp.nan]])
RANKS = jnp.array([[1, 2, 3], [2, 1, 1], [1, 2, 1], [1, 1, 2]])
MASK = jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)


def test_rankings_by_hand():
    terms, metrics = ranking_loss(SCORES, RANKS, mask=MASK, weights=jnp.ones(4), reduce=False)
    first = (0.3132616875 + 1.3132616875 + 2.1269280110) / 3  # -logsig at 1-0, 1-2, 0-2
    np.testing.assert_allclose(terms, [first, 1.3132616875, 1.3132616875, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics["pairs"], [3, 2, 1, 0])
    np.testing.assert_allclose(metrics["accuracy"], [1 / 3, 0, 0, 0])
    np.testing.assert_allclose(metrics["margin"], [-2 / 3, -1, -1, 0], rtol=1e-6)
    centred, _ = ranking_loss(SCORES, RANKS, mask=MASK, center_coefficient=0.3, weights=jnp.ones(4), reduce=False)
    np.testing.assert_allclose(centred - terms, [0.3 * (1 + 9 + 4) / 3, 0.3, 0.3, 0], rtol=1e-5)


def test_ranking_of_two_is_the_pair_loss():
    ranks = jnp.array([[1, 2], [2, 1], [1, 2]])
    scores = jnp.stack([CHOSEN, REJECTED], axis=1)
    scores = jnp.take_along_axis(scores, ranks - 1, axis=1)
    expected = reward_loss(CHOSEN, REJECTED, center_coefficient=0.1)[0]
    np.testing.assert_allclose(ranking_loss(scores, ranks, center_coefficient=0.1)[0], expected, rtol=1e-6)


def test_order_within_a_ranking_does_not_matter():
    order = np.array([2, 0, 1])
    expected, _ = ranking_loss(SCORES, RANKS, mask=MASK)
    np.testing.assert_allclose(
        ranking_loss(SCORES[:, order], RANKS[:, order], mask=MASK[:, order])[0], expected, rtol=1e-6
    )


def test_absent_entries_and_prompts_get_no_gradient():
    weights = jnp.array([0.5, 0.0, 0.5, 0.0])
    scores = SCORES.at[1].set(jnp.nan)
    loss = lambda s: ranking_loss(s, RANKS, mask=MASK, center_coefficient=0.1, weights=weights)[0]
    value, gradient = jax.value_and_grad(loss)(scores)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~np.asarray(MASK) | (weights == 0)[:, None]] == 0)
    push = 0.7310585786 / 2 + 0.1  # one pair, 0 above 1: -(1 - sig(-1)) on the better, centring 2 * .1 * 1 / 2 on both
    np.testing.assert_allclose(gradient[2], [-push + 0.2, push, 0], rtol=1e-5)


def test_ranking_errors():
    with pytest.raises(ValueError, match=r"one shape \[prompts, completions\]"):
        ranking_loss(SCORES, RANKS[:, :2])
    with pytest.raises(ValueError, match="one shape"):
        ranking_loss(SCORES[0], RANKS[0])
    with pytest.raises(ValueError, match=r"weights \(3,\)"):
        ranking_loss(SCORES, RANKS, mask=MASK, weights=ONES)
    with pytest.raises(ValueError, match="center_coefficient"):
        ranking_loss(SCORES, RANKS, center_coefficient=-0.1)
