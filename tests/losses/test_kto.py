"""KTO and unpaired APO-zero: hand-computed values, z, absent examples, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.preference import kto_loss, kto_z

POLICY, REFERENCE = jnp.array([-2.0, -4.0, -6.0]), jnp.array([-5.0, -4.0, -7.0])  # r = 3, 0, 1
LABELS = jnp.array([True, False, False])
SETTINGS = {"beta": 0.5, "weights": jnp.ones(3), "reduce": False}


def test_kto_by_hand():
    terms, metrics = kto_loss(POLICY, REFERENCE, LABELS, 1.0, **SETTINGS)
    np.testing.assert_allclose(terms, [0.2689414214, 0.3775406688, 0.5], rtol=1e-6)  # 1 - sig of .5 * (2, 1, 0)
    np.testing.assert_allclose(metrics["rewards"], [1.5, 0, 0.5])
    np.testing.assert_allclose(metrics["logps"], POLICY)
    weighed, _ = kto_loss(POLICY, REFERENCE, LABELS, 1.0, **SETTINGS, desirable_weight=2.0, undesirable_weight=0.5)
    np.testing.assert_allclose(weighed, terms * jnp.array([2.0, 0.5, 0.5]))
    loss, _ = kto_loss(POLICY, REFERENCE, LABELS, 1.0, beta=0.5)
    np.testing.assert_allclose(loss, np.mean([0.2689414214, 0.3775406688, 0.5]), rtol=1e-6)


def test_apo_zero_unpaired_by_hand_and_without_z():
    terms, _ = kto_loss(POLICY, REFERENCE, LABELS, jnp.nan, kind="apo_zero_unpaired", **SETTINGS)
    np.testing.assert_allclose(terms, [0.1824255238, 0.5, 0.6224593312], rtol=1e-6)  # sig(-1.5), sig(0), sig(.5)
    np.testing.assert_allclose(kto_loss(POLICY, REFERENCE, LABELS, 0.0, **SETTINGS)[0], terms)


def test_gradient_by_hand_and_none_for_reference_and_z():
    def loss(policy, reference, z):
        return kto_loss(policy, reference, LABELS, z, beta=0.5)[0]

    policy, reference, z = jax.grad(loss, argnums=(0, 1, 2))(POLICY, REFERENCE, 1.0)
    slope = 0.5 / 3 * np.array([-0.1966119332, 0.2350037122, 0.25])  # beta / E * sig'(x)
    np.testing.assert_allclose(policy, slope, rtol=1e-6)
    assert not np.any(reference) and z == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_zero_removes_an_example_whatever_it_holds(bad):
    weights = jnp.array([0.5, 0.0, 0.5])
    loss = lambda p: kto_loss(p, REFERENCE.at[1].set(bad), LABELS, 1.0, beta=0.5, weights=weights)[0]
    value, gradient = jax.value_and_grad(loss)(POLICY.at[1].set(bad))
    np.testing.assert_allclose(value, 0.5 * 0.2689414214 + 0.5 * 0.5, rtol=1e-6)
    assert gradient[1] == 0 and np.all(np.isfinite(gradient))
    z = kto_z(POLICY.at[1].set(bad), REFERENCE, weights)
    np.testing.assert_allclose(z, 2.0)


def test_z_is_the_clamped_mean_without_gradient():
    np.testing.assert_allclose(kto_z(POLICY, REFERENCE), 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(kto_z(POLICY, REFERENCE, jnp.array([1.0, 0.0, 3.0])), 1.5)
    assert kto_z(REFERENCE, POLICY) == 0
    assert kto_z(POLICY, REFERENCE, jnp.zeros(3)) == 0
    assert not np.any(jax.grad(lambda p: kto_z(p, REFERENCE))(POLICY))


def test_parts_add_up_under_one_z():
    weights = jnp.array([0.2, 0.3, 0.5])
    loss = lambda i: kto_loss(POLICY[i], REFERENCE[i], LABELS[i], 1.0, weights=weights[i])[0]
    np.testing.assert_allclose(loss(slice(0, 1)) + loss(slice(1, 3)), loss(slice(0, 3)), rtol=1e-6)


def test_swapped_labels_mirror_around_z():
    there, _ = kto_loss(POLICY, REFERENCE, LABELS, 1.0, **SETTINGS)
    back, _ = kto_loss(POLICY, REFERENCE, ~LABELS, 1.0, **SETTINGS)
    np.testing.assert_allclose(there + back, 1, rtol=1e-6)  # 1 - sig(x) and 1 - sig(-x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kot"}, "kind 'kot' is not one of kto, apo_zero_unpaired; did you mean 'kto'"),
        ({"beta": -1.0}, "beta must be above 0"),
        ({"desirable_weight": -1.0}, "desirable_weight must be finite and not below 0"),
        ({"weights": jnp.ones(2)}, "vectors of one length"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        kto_loss(POLICY, REFERENCE, LABELS, 1.0, **settings)
    with pytest.raises(ValueError, match="one number for the whole batch"):
        kto_loss(POLICY, REFERENCE, LABELS, jnp.ones(3))
