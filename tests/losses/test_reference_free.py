"""SimPO, AlphaPO, CPO and ORPO: hand-computed values, gradients, absent pairs, probability one, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.preference import PairLogprobs, cpo_loss, orpo_loss, preference_loss, simpo_loss

# mean logprobs -.5, -2 and -1.25, -.5; sums -1, -8 and -5, -.5
POLICY = PairLogprobs(*(jnp.array(x) for x in ([-1.0, -8.0], [-5.0, -0.5], [2.0, 4.0], [4.0, 1.0])))
NLL = jnp.array([0.1, 0.3])
TERMS = {"weights": jnp.ones(2), "reduce": False}
LOSSES = {  # all with an NLL term
    "simpo": lambda p, nll, **k: simpo_loss(p, chosen_nll=nll, nll_coefficient=0.5, **k),
    "alphapo": lambda p, nll, **k: simpo_loss(p, alpha=0.25, chosen_nll=nll, nll_coefficient=0.5, **k),
    "cpo": lambda p, nll, **k: cpo_loss(p, chosen_nll=nll, **k),
    "cpo_hinge": lambda p, nll, **k: cpo_loss(p, kind="hinge", chosen_nll=nll, **k),
    "cpo_ipo": lambda p, nll, **k: cpo_loss(p, kind="ipo", chosen_nll=nll, **k),
    "orpo": lambda p, nll, **k: orpo_loss(p.chosen / p.chosen_len, p.rejected / p.rejected_len, nll, **k),
}


def test_simpo_by_hand():
    terms, metrics = simpo_loss(POLICY, **TERMS)
    np.testing.assert_allclose(terms, [0.4740769842, 4.0181499279], rtol=1e-6)  # -logsig at 2 * .75 - 1, 2 * -1.5 - 1
    np.testing.assert_allclose(metrics["rewards/chosen"], [-1, -4])
    np.testing.assert_allclose(metrics["logps/rejected"], [-1.25, -0.5])
    np.testing.assert_allclose(metrics["rewards/accuracies"], [1, 0])
    smoothed, _ = simpo_loss(POLICY, label_smoothing=0.1, **TERMS)
    np.testing.assert_allclose(smoothed, [0.5240769842, 4.0181499279 - 0.4], rtol=1e-6)  # + e x


def test_alphapo_by_hand_and_its_limit():
    terms, metrics = simpo_loss(POLICY, alpha=0.25, **TERMS)
    np.testing.assert_allclose(terms[0], 0.3500612089, rtol=1e-6)
    # (1 - exp(.125)) / .25 and (1 - exp(.3125)) / .25, times beta 2
    np.testing.assert_allclose(metrics["rewards/margins"][0], 2 * (-0.5325938123 + 1.4673512), rtol=1e-5)
    near, _ = simpo_loss(POLICY, alpha=1e-4, **TERMS)
    np.testing.assert_allclose(near, simpo_loss(POLICY, **TERMS)[0], rtol=1e-3)


def test_cpo_by_hand():
    kind = lambda kind, **more: cpo_loss(POLICY, kind=kind, beta=0.25, nll_coefficient=0, **more, **TERMS)[0]
    np.testing.assert_allclose(kind("sigmoid"), [0.3132616875, 2.0176751], rtol=1e-6)  # -logsig at 1, -1.875
    np.testing.assert_allclose(kind("sigmoid", label_smoothing=0.2), [0.5132616875, 2.0176751 - 0.375], rtol=1e-6)
    np.testing.assert_allclose(kind("hinge"), [0, 2.875])
    np.testing.assert_allclose(kind("ipo"), [(0.75 - 2) ** 2, (-1.5 - 2) ** 2])
    with_nll, _ = cpo_loss(POLICY, beta=0.25, chosen_nll=NLL, nll_coefficient=0.5, **TERMS)
    np.testing.assert_allclose(with_nll - kind("sigmoid"), 0.5 * NLL, rtol=1e-5)
    free, _ = preference_loss(POLICY, None, reference_free=True, beta=0.25, **TERMS)
    np.testing.assert_allclose(kind("sigmoid"), free)


def test_orpo_by_hand():
    chosen, rejected = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.2, 0.5]))  # odds 1 and 1/4
    terms, metrics = orpo_loss(chosen, rejected, NLL, lam=0.5, **TERMS)
    np.testing.assert_allclose(terms, NLL + 0.5 * np.log([1.25, 5]), rtol=1e-5)  # -logsig(+-log 4)
    np.testing.assert_allclose(metrics["log_odds_chosen"], [np.log(4), -np.log(4)], rtol=1e-5)
    np.testing.assert_allclose(metrics["log_odds_ratio"], -np.log([1.25, 5]), rtol=1e-5)
    np.testing.assert_allclose(orpo_loss(chosen, rejected, NLL, lam=0.0)[0], 0.4, rtol=1e-6)


@pytest.mark.parametrize("edge", [0.0, -1e-30, 1e-6, -1e4, -1e30])
def test_orpo_is_finite_at_probability_one_and_zero(edge):
    """d logsig(o) / d m is at most 2^24; at zero the loss is as large as the logprob."""
    side = jnp.array([edge])
    other = jnp.array([-1.0])
    for chosen, rejected in ((side, other), (other, side), (side, side)):
        loss, slopes = jax.value_and_grad(lambda c, r: orpo_loss(c, r, jnp.zeros(1))[0], argnums=(0, 1))(
            chosen, rejected
        )
        assert np.isfinite(loss) and all(np.all(np.abs(s) <= 2.0**24) for s in slopes)


def test_orpo_gradient_by_hand():
    chosen, rejected = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.2]))
    slope = jax.grad(lambda c, r: orpo_loss(c, r, jnp.zeros(1), lam=1.0)[0], argnums=(0, 1))(chosen, rejected)
    # d/dm log(p/(1-p)) = 1/(1-p); 1 - sig(log 4) = .2
    np.testing.assert_allclose(slope, [[-0.2 / 0.5], [0.2 / 0.8]], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_central_differences(name):
    with jax.enable_x64(True):
        policy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), POLICY)
        loss = jax.jit(lambda x: LOSSES[name](policy._replace(chosen=x[:2], rejected=x[2:4]), x[4:])[0])
        x = jnp.concatenate([*policy[:2], NLL.astype(jnp.float64)])
        slopes = [(loss(x + step) - loss(x - step)) / 2e-5 for step in 1e-5 * np.eye(6)]
        np.testing.assert_allclose(jax.grad(loss)(x), slopes, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_add_up_and_absent_pairs_do_not_count(name):
    weights = jnp.array([0.25, 0.75])
    part = lambda i, w: LOSSES[name](jax.tree.map(lambda x: x[i], POLICY), NLL[i], weights=w)[0]
    whole = part(slice(0, 2), weights)
    np.testing.assert_allclose(part(slice(0, 1), weights[:1]) + part(slice(1, 2), weights[1:]), whole, rtol=1e-6)
    terms, metrics = LOSSES[name](POLICY, NLL, weights=weights, reduce=False)
    np.testing.assert_allclose(terms.sum(), whole, rtol=1e-6)
    assert all(value.shape == (2,) for value in metrics.values())

    def loss(chosen, rejected, nll):  # lengths stay: ORPO's caller divides by them
        return LOSSES[name](POLICY._replace(chosen=chosen, rejected=rejected), nll, weights=jnp.array([1.0, 0.0]))[0]

    spoilt = [x.at[1].set(jnp.nan) for x in (*POLICY[:2], NLL)]
    value, gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))(*spoilt)
    np.testing.assert_allclose(value, part(slice(0, 1), jnp.ones(1)), rtol=1e-6)
    assert all(leaf[1] == 0 and np.isfinite(leaf[0]) for leaf in gradient)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: cpo_loss(POLICY), "give chosen_nll with an nll_coefficient, or neither"),
        (lambda: simpo_loss(POLICY, chosen_nll=NLL), "give chosen_nll with an nll_coefficient"),
        (lambda: cpo_loss(POLICY, kind="higne"), "not one of sigmoid, hinge, ipo; did you mean 'hinge'"),
        (lambda: cpo_loss(POLICY, kind="ipo", label_smoothing=0.1), "read by sigmoid, not by ipo"),
        (lambda: cpo_loss(POLICY, beta=0.0), "beta must be above 0"),
        (lambda: simpo_loss(POLICY, gamma=float("nan")), "gamma must be finite"),
        (lambda: simpo_loss(POLICY, label_smoothing=0.9), "from 0 to 0.5"),
        (lambda: simpo_loss(POLICY, nll_coefficient=float("inf")), "nll_coefficient must be finite"),
        (lambda: orpo_loss(POLICY.chosen, POLICY.rejected, jnp.array(0.3)), r"chosen_nll \(\)"),
        (lambda: orpo_loss(POLICY.chosen, POLICY.rejected, NLL, lam=-1), "lam must be finite and not below 0"),
    ],
)
def test_errors(loss, message):
    with pytest.raises(ValueError, match=message):
        loss()
