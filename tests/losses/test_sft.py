"""Hand-computed values, gradients, and tokens of weight 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.sft import sft_loss

LP = jnp.log(jnp.array([[0.5, 0.25], [0.125, 1.0]]))
W = jnp.array([[0.5, 0.0], [0.5, 0.0]])


@pytest.mark.parametrize("jit", [True, False])
def test_nll_by_hand(jit):
    fn = jax.jit(sft_loss) if jit else sft_loss
    loss, metrics = fn(LP, W)
    np.testing.assert_allclose(loss, 0.5 * np.log(2) + 0.5 * np.log(8), rtol=1e-6)
    assert metrics == {}


def test_dft_by_hand_and_its_gradient_treats_p_as_a_constant():
    loss, _ = sft_loss(LP, W, kind="dft")
    np.testing.assert_allclose(loss, 0.5 * 0.5 * np.log(2) + 0.5 * 0.125 * np.log(8), rtol=1e-6)
    grad = jax.grad(lambda lp: sft_loss(lp, W, kind="dft")[0])(LP)
    np.testing.assert_allclose(grad, [[-0.25, 0.0], [-0.0625, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("kind", ["nll", "dft"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_zero_removes_a_token_whatever_it_holds(kind, bad):
    lp = LP.at[:, 1].set(bad)
    loss, grad = jax.value_and_grad(lambda x: sft_loss(x, W, kind=kind)[0])(lp)
    np.testing.assert_allclose(loss, sft_loss(LP, W, kind=kind)[0], rtol=1e-7)
    assert np.all(np.asarray(grad)[:, 1] == 0) and np.all(np.isfinite(grad))


def test_reduce_false_sums_to_the_loss():
    terms, _ = sft_loss(LP, W, reduce=False)
    assert terms.shape == LP.shape
    np.testing.assert_allclose(jnp.sum(terms), sft_loss(LP, W)[0], rtol=1e-7)


def test_all_masked_is_zero_with_zero_gradient():
    loss, grad = jax.value_and_grad(lambda x: sft_loss(x, jnp.zeros_like(W))[0])(LP)
    assert loss == 0 and np.all(np.asarray(grad) == 0)


def test_errors_say_what():
    with pytest.raises(ValueError, match="kind 'ppo'"):
        sft_loss(LP, W, kind="ppo")
    with pytest.raises(ValueError, match="differ in shape"):
        sft_loss(LP, W[0])


def test_z_loss_by_hand():
    lse = jnp.array([[2.0, jnp.nan], [-3.0, jnp.inf]])
    loss, grad = jax.value_and_grad(lambda x: sft_loss(LP, W, z_loss=0.1, lse=x)[0])(lse)
    np.testing.assert_allclose(loss, sft_loss(LP, W)[0] + 0.1 * (0.5 * 4 + 0.5 * 9), rtol=1e-6)
    np.testing.assert_allclose(grad, [[0.2, 0.0], [-0.3, 0.0]], rtol=1e-6)
    with pytest.raises(ValueError, match="z_loss needs lse of shape"):
        sft_loss(LP, W, z_loss=0.1)
