"""The DPO family: hand-computed values, properties of every kind, absent pairs, errors, length-desensitised sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.preference import PairLogprobs, ld_sums, preference_loss
from jaxpost.losses.preference_kinds import DIVERGENCES, DIVERGENT, KINDS, SORTED
from jaxpost.losses.units import log1mexp

# Log-ratios: chosen 1, -2, -1; rejected -1, -1, 2; so d = 2, -1, -3, and with beta 0.5 b d = 1, -0.5, -1.5.
POLICY = PairLogprobs(*(jnp.array(x) for x in ([-4.0, -6, -2], [-7.0, -3, -2], [2.0, 4, 1], [4.0, 1, 1])))
REFERENCE = PairLogprobs(*(jnp.array(x) for x in ([-5.0, -4, -1], [-6.0, -2, -4], [2.0, 4, 1], [4.0, 1, 1])))
BY_HAND = {  # -logsig at 1, -1, .5, -.5: .3132616875 1.3132616875 .4740769842 .9740769842
    "sigmoid": ({}, [0.3132616875, 0.9740769842, 1.7014132780]),
    "cdpo": ({"kind": "sigmoid", "label_smoothing": 0.2}, [0.5132616875, 0.8740769842, 1.4014132780]),
    "robust": ({"label_smoothing": 0.2}, [-0.0200716458, 1.1407436509, 2.2014132779]),
    "hinge": ({}, [0.0, 1.5, 2.5]),
    "ipo": ({}, [0.0625, 0.25, 16.0]),  # per token .75, .5, -3 against 1/(2b) = 1
    "ipo_printed": ({"kind": "ipo", "ipo_length_normalized": False}, [1.0, 4.0, 16.0]),
    "sigmoid_norm": ({}, [0.5231232641, 0.5759394199, 1.7014132780]),  # -logsig at .375, .25, -1.5
    "exo_pair": ({"label_smoothing": 0.1}, [0.1140821077, 0.8101961380, 1.4267036849]),
    "nca_pair": ({}, [1.1981539684, 1.7069310234, 1.8677463201]),
    "bco_pair": ({}, [0.9481539684, 1.7873386717, 2.2873386717]),
    "bco_shifted": ({"kind": "bco_pair", "delta": 0.5}, [1.0064088681, 2.0146749654, 2.2873386717]),
    "sppo_hard": ({}, [0.0, 9.0, 13.0]),
    "apo_zero": ({}, [0.7550813376, 1.1085992474, 1.3535179098]),
    "apo_down": ({}, [0.8914007526, 0.8914007526, 1.1951151450]),
    "discopop": ({}, [0.3678794411, 0.9741076116, 1.7014132780]),
    # margins of the policy 3 -3 0, of the reference 1 -2 3: by rank 3-3, -3+2, 0-1
    "aot": ({}, [0.6931471806, 0.9740769842, 0.9740769842]),
    "aot_unpaired": ({}, [0.9740769842, 0.9740769842, 0.6931471806]),  # 1-2, -2+1, -1+1
    "forward_kl": ({"kind": "sigmoid", "f_divergence": "forward_kl"}, [0.2690777199, 2.4277593772, 1.5343139812]),
    "js": ({"kind": "sigmoid", "f_divergence": "js"}, [0.4740769842, 0.9171117886, 1.0330814212]),
    "alpha": ({"kind": "sigmoid", "f_divergence": "alpha"}, [0.3020887322, 1.3645850706, 1.5259842917]),
    "alpha_1": ({"kind": "hinge", "f_divergence": "alpha", "f_alpha": 1.0}, [0.0, 1.5, 2.5]),
    "free": ({"kind": "hinge", "reference_free": True}, [0.0, 2.5, 1.0]),  # d of the policy alone: 3, -3, 0
}
SETTINGS = {  # every kind, and what it needs
    name: {"kind": name} | ({"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {}) for name in KINDS
}
SETTINGS |= {f: {"kind": "sigmoid_norm", "f_divergence": f, "f_alpha": 1.6} for f in DIVERGENCES[1:]}
SETTINGS |= {"mixed": {"kind": [("sigmoid", 0.8), ("bco_pair", 0.2)], "label_smoothing": 0.1, "delta": 0.3}}


def pairs(count: int, seed: int = 0, dtype=np.float32) -> tuple[PairLogprobs, PairLogprobs]:
    """Random policy and reference; log-ratios of about one nat, so that nothing is clamped."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, (2, count)).astype(dtype)
    lp = -rng.uniform(0.2, 2.0, (2, count)).astype(dtype) * lengths
    ref = lp + rng.normal(size=(2, count)).astype(dtype)
    return PairLogprobs(*lp, *lengths), PairLogprobs(*ref, *lengths)


@pytest.mark.parametrize("case", BY_HAND)
def test_values_by_hand(case):
    settings, expected = BY_HAND[case]
    settings = {"kind": case, "beta": 0.5} | settings
    terms, _ = preference_loss(POLICY, REFERENCE, **settings, weights=jnp.ones(3), reduce=False)
    np.testing.assert_allclose(terms, expected, rtol=2e-6, atol=1e-7)
    loss, _ = preference_loss(POLICY, REFERENCE, **settings)
    np.testing.assert_allclose(loss, np.mean(expected), rtol=2e-6)


def test_every_kind_has_a_value_by_hand():
    assert {settings.get("kind", case) for case, (settings, _) in BY_HAND.items()} == set(KINDS)
    assert set(DIVERGENT) - {"sft"} <= set(KINDS)


def test_metrics_are_one_number_a_pair():
    _, metrics = preference_loss(POLICY, REFERENCE, kind="ipo", beta=0.5, f_divergence="js")
    expected = {
        "rewards/chosen": [0.5, -1.0, -0.5],
        "rewards/rejected": [-0.5, -0.5, 1.0],
        "rewards/margins": [1.0, -0.5, -1.5],
        "rewards/accuracies": [1.0, 0.0, 0.0],
        "logps/chosen": [-4.0, -6.0, -2.0],
        "logps/rejected": [-7.0, -3.0, -2.0],
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, err_msg=name)


def test_kinds_combine_as_a_weighted_sum_and_the_sft_term_is_not_weighed_again():
    nll = jnp.array([0.3, 0.5, 0.2])
    kinds = [("hinge", 0.5), ("sppo_hard", 2.0), ("sft", 0.25)]
    terms, _ = preference_loss(POLICY, REFERENCE, kind=kinds, beta=0.5, chosen_nll=nll, reduce=False)
    expected = (0.5 * np.array([0, 1.5, 2.5]) + 2 * np.array([0, 9, 13.0])) / 3 + 0.25 * np.array([0.3, 0.5, 0.2])
    np.testing.assert_allclose(terms, expected, rtol=1e-6)
    loss, _ = preference_loss(POLICY, REFERENCE, kind=kinds, beta=0.5, chosen_nll=nll)
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-6)


def test_pair_weights_scale_a_pair_and_get_no_gradient():
    given = {"kind": "hinge", "beta": 0.5, "weights": jnp.ones(3)}
    loss = lambda w: preference_loss(POLICY, REFERENCE, **given, pair_weights=w, reduce=False)[0]
    np.testing.assert_allclose(loss(jnp.array([9.0, 0.5, 0.2])), [0, 0.75, 0.5], rtol=1e-6)
    assert not np.any(jax.grad(lambda w: loss(w).sum())(jnp.ones(3)))


def test_the_reference_and_delta_get_no_gradient():
    def loss(reference, delta):
        return preference_loss(POLICY, reference, kind="bco_pair", delta=delta)[0]

    grads = jax.grad(loss, argnums=(0, 1))(REFERENCE, 0.3)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def losses(policy, reference, weights, beta=0.1):
    """One number a setting, in the order of SETTINGS: one program for all of them."""
    loss = lambda settings: preference_loss(policy, reference, **settings, beta=beta, weights=weights)[0]
    return jnp.stack([loss(settings) for settings in SETTINGS.values()])


VALUES = jax.jit(losses)
VALUES_AND_SLOPES = jax.jit(lambda *given: (losses(*given), jax.jacrev(losses)(*given)))


def test_gradients_equal_central_differences():
    with jax.enable_x64(True):
        policy, reference = jax.tree.map(jnp.asarray, pairs(4, seed=3, dtype=np.float64))
        weights = jnp.array([0.3, 0.1, 0.35, 0.25])

        @jax.jit
        def run(x):
            return losses(policy._replace(chosen=x[:4], rejected=x[4:]), reference, weights, beta=0.3)

        x, steps = jnp.concatenate(policy[:2]), 1e-5 * np.eye(8)
        assert run(x).dtype == jnp.float64
        slopes = np.stack([run(x + step) - run(x - step) for step in steps], axis=1) / 2e-5
        gradients = np.asarray(jax.jacrev(run)(x))
    for name, gradient, slope in zip(SETTINGS, gradients, slopes, strict=True):
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-8, err_msg=name)
        assert np.abs(gradient).max() > 1e-3, name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_zero_removes_a_pair_whatever_it_holds(bad):
    """The values and gradients of the other pairs are as if the absent ones were not there."""
    policy, reference = pairs(6, seed=1)
    absent = np.array([False, True, False, False, True, False])
    weights = np.where(absent, 0, 1 / 4).astype(np.float32)
    some = jax.tree.map(lambda x: np.where(absent, np.float32(bad), x), (policy, reference))
    few = jax.tree.map(lambda x: x[~absent], (policy, reference))
    values, slopes = VALUES_AND_SLOPES(*some, weights)
    expected, expected_slopes = VALUES_AND_SLOPES(*few, weights[~absent])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    for side in ("chosen", "rejected"):
        found = np.asarray(getattr(slopes, side))
        assert np.all(found[:, absent] == 0)
        np.testing.assert_allclose(found[:, ~absent], getattr(expected_slopes, side), rtol=1e-5, atol=1e-7)


def test_weight_zero_removes_sft_and_pair_weights_too():
    nll, scale = jnp.array([0.3, jnp.nan, 0.2]), jnp.array([1.0, jnp.nan, 1.0])
    weights = jnp.array([0.5, 0.0, 0.5])
    loss = lambda nll: preference_loss(
        POLICY,
        REFERENCE,
        kind=[("hinge", 1.0), ("sft", 1.0)],
        beta=0.5,
        weights=weights,
        chosen_nll=nll,
        pair_weights=scale,
    )[0]
    value, gradient = jax.value_and_grad(loss)(nll)
    np.testing.assert_allclose(value, 1.25 + 0.5, rtol=1e-6)
    np.testing.assert_allclose(gradient, [1.0, 0.0, 1.0])


def test_parts_of_a_batch_add_up_to_the_whole_and_order_does_not_matter():
    given = (*pairs(6, seed=2), np.full(6, 1 / 6, np.float32))
    whole = VALUES(*given)
    parts = sum(VALUES(*jax.tree.map(lambda x: x[i : i + 2], given)) for i in (0, 2, 4))
    linear = np.array([name not in SORTED for name in SETTINGS])
    np.testing.assert_allclose(parts[linear], whole[linear], rtol=1e-6)
    assert not np.any(np.isclose(parts[~linear], whole[~linear], rtol=1e-4))  # a sort needs the whole batch
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(VALUES(*jax.tree.map(lambda x: x[order], given)), whole, rtol=1e-6)


def test_swapping_chosen_and_rejected():
    policy, reference = pairs(6, seed=5)
    swap = lambda p: PairLogprobs(p.rejected, p.chosen, p.rejected_len, p.chosen_len)
    d = 0.1 * (policy.chosen - reference.chosen - policy.rejected + reference.rejected)

    def both(**settings):
        there, _ = preference_loss(policy, reference, **settings, weights=np.ones(6), reduce=False)
        back, _ = preference_loss(swap(policy), swap(reference), **settings, weights=np.ones(6), reduce=False)
        return there, back

    there, back = both(kind="sigmoid")
    np.testing.assert_allclose(there - back, -d, rtol=1e-4, atol=1e-6)  # logsig(x) - logsig(-x) = x
    there, back = both(kind="robust", label_smoothing=0.2)
    np.testing.assert_allclose(there - back, -d / 0.6, rtol=1e-4, atol=1e-6)
    there, back = both(kind="sigmoid", label_smoothing=0.5)
    np.testing.assert_allclose(there, back, rtol=1e-6)
    there, back = both(kind="apo_zero")
    np.testing.assert_allclose(there + back, 2, rtol=1e-6)
    there, back = both(kind="ipo", beta=0.1, ipo_length_normalized=False)
    np.testing.assert_allclose(there - back, -2 * (d / 0.1) / 0.1, rtol=1e-4, atol=1e-3)  # (x-c)^2 - (x+c)^2, c = 5


def test_zero_strength_is_the_simpler_loss():
    policy, reference = pairs(6, seed=6)
    plain = preference_loss(policy, reference)[0]
    for more in (
        {"kind": [("sigmoid", 1.0), ("sft", 0.0)], "chosen_nll": np.ones(6, np.float32)},
        {"kind": [("sigmoid", 1.0), ("hinge", 0.0)]},
        {"pair_weights": np.ones(6, np.float32)},
        {"f_divergence": "alpha", "f_alpha": 1.0},
        {"label_smoothing": 0.0, "kind": "robust"},
    ):
        assert preference_loss(policy, reference, **more)[0] == plain, more
    halves = policy._replace(chosen_len=np.ones(6), rejected_len=np.ones(6))
    assert preference_loss(halves, reference, kind="sigmoid_norm")[0] == plain


def test_far_log_ratios_stay_finite():
    """Beyond the clamp at 20 the exponential kinds are flat, not infinite."""
    far = PairLogprobs(*(np.array(3 * x, np.float32) for x in ([-1e4, -1.0], [-1.0, -1e4], [9.0, 9.0], [9.0, 9.0])))
    near = far._replace(chosen=far.rejected, rejected=far.chosen)
    values, slopes = VALUES_AND_SLOPES(far, near, np.full(6, 1 / 6, np.float32))
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(slopes.chosen)) and np.all(np.isfinite(slopes.rejected))
    far, near = jax.tree.map(lambda x: x[:2], (far, near))
    terms, _ = preference_loss(far, near, kind="discopop", beta=1.0, weights=jnp.ones(2), reduce=False)
    np.testing.assert_allclose(terms, [19998.0, np.exp(-20)], rtol=1e-5)  # -logsig(-19998); exp(-19998) at its clamp


def test_bf16_inputs_are_computed_in_fp32():
    policy, reference = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), pairs(4))
    loss, metrics = preference_loss(policy, reference)
    assert loss.dtype == jnp.float32 and metrics["rewards/chosen"].dtype == jnp.float32
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), (policy, reference))
    assert loss == preference_loss(*rounded)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sigmiod"}, "kind 'sigmiod' is not one of sigmoid, .* sft; did you mean 'sigmoid'"),
        ({"kind": ("sigmoid", 1.0)}, "neither a name nor a list of"),
        ({"kind": []}, "neither a name nor a list of"),
        ({"kind": [("hinge", float("nan"))]}, "coefficient of kind 'hinge' is nan"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.7}, "from 0 to 0.5, not 0.7"),
        ({"kind": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"kind": "exo_pair"}, "set it to 1e-3"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "not by hinge; set it to 0"),
        (
            {"f_divergence": "jsd"},
            "f_divergence 'jsd' is not one of reverse_kl, forward_kl, js, alpha; did you mean 'js'",
        ),
        ({"kind": "apo_zero", "f_divergence": "js"}, "no meaning for apo_zero"),
        ({"f_alpha": float("inf")}, "f_alpha must be finite"),
        ({"kind": "aot", "pair_weights": np.ones(3)}, "compares ranks"),
        ({"kind": "sft"}, "give both or neither"),
        ({"chosen_nll": np.ones(3)}, "give both or neither"),
        ({"weights": np.ones(2)}, r"vectors of one length; got policy.chosen \(3,\).* weights \(2,\)"),
    ],
)
def test_errors_say_what_and_what_to_do(settings, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(POLICY, REFERENCE, **settings)


def test_a_missing_reference_is_refused_unless_reference_free():
    with pytest.raises(ValueError, match="set reference_free=True"):
        preference_loss(POLICY, None)
    assert np.isfinite(preference_loss(POLICY, None, reference_free=True)[0])


# One row: a pair of 3 and 1 completion tokens behind prompts of one and two, padding, all masked positions nan.
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 3, 3, 4, 4, 4, 0]])
MASK = jnp.array([[0, 1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
LP = jnp.where(MASK, -jnp.arange(1.0, 19).reshape(2, 9), jnp.nan)


def test_ld_sums_by_hand():
    got = ld_sums(LP, MASK, SEGMENTS, 4, alpha=0.5)
    first = [0, -2 - 0.5 * (3 + 4), -7, 0, 0]
    second = [0, -10, -11 - 0.5 * 12, -14, -15 - 0.5 * (16 + 17)]
    np.testing.assert_allclose(got, [first, second])
    gradient = jax.grad(lambda lp: ld_sums(lp, MASK, SEGMENTS, 4, alpha=0.5).sum())(LP)
    np.testing.assert_allclose(gradient, [[0, 1, 0.5, 0.5, 0, 0, 1, 0, 0], [1, 1, 0.5, 0, 1, 1, 0.5, 0.5, 0]])


def test_ld_sums_at_one_and_zero():
    np.testing.assert_allclose(ld_sums(LP, MASK, SEGMENTS, 4, alpha=1.0), [[0, -9, -7, 0, 0], [0, -10, -23, -14, -48]])
    np.testing.assert_allclose(ld_sums(LP, MASK, SEGMENTS, 4, alpha=0.0), [[0, -2, -7, 0, 0], [0, -10, -11, -14, -15]])


def test_ld_sums_errors():
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, not 2"):
        ld_sums(LP, MASK, SEGMENTS, 4, alpha=2)
    with pytest.raises(ValueError, match="even, two a pair, not 3"):
        ld_sums(LP, MASK, SEGMENTS, 3, alpha=0.5)
    with pytest.raises(ValueError, match="differ in shape"):
        ld_sums(LP[:1], MASK, SEGMENTS, 4, alpha=0.5)


def test_log1mexp():
    x = jnp.array([-1e-3, -0.5, -0.6931471, -0.7, -5.0, -50.0, -1e30, -jnp.inf])
    wide = np.asarray(x, np.float64)
    exact = np.where(wide > -1, np.log(-np.expm1(wide)), np.log1p(-np.exp(wide)))
    np.testing.assert_allclose(log1mexp(x), exact, rtol=2e-6)
    slope = jax.vmap(jax.grad(log1mexp))
    np.testing.assert_allclose(slope(x[:6]), -1 / np.expm1(-np.asarray(x[:6], np.float64)), rtol=2e-6)
    edge = jnp.array([0.0, -0.0, 1e-6, -1e-30, -(2.0**-24), -jnp.inf])
    assert np.all(np.isfinite(log1mexp(edge)[:5])) and np.all(np.isfinite(slope(edge)))
