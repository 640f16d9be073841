"""Values, gradients and metrics of TRL's own code (tests/parity/make_preference_golden.py), and where ours differ.

Tolerances: fp32 in both; the gradient of a squared or exponential loss carries the rounding of a sum of logprobs.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.losses.preference import (
    PairLogprobs,
    cpo_loss,
    kto_loss,
    kto_z,
    ld_sums,
    orpo_loss,
    preference_loss,
    simpo_loss,
)
from jaxpost.losses.preference_kinds import KINDS
from jaxpost.losses.reward import reward_loss

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "preference.json").read_text())
DPO, KTO, REWARD, FREE = (GOLDEN[part] for part in ("dpo", "kto", "reward", "free"))
DIVERGENCE = {"js_divergence": "js", "alpha_divergence": "alpha"}  # TRL's name -> ours
array = functools.partial(jnp.asarray, dtype=jnp.float32)


def same(loss, case: dict, of, metrics: dict) -> None:
    """Loss and gradient at `of` equal TRL's; metrics are means over the pairs."""
    value, gradient = jax.value_and_grad(loss)(of)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-5, atol=1e-6)
    assert metrics, "nothing was compared"
    for name, expected in metrics.items():
        np.testing.assert_allclose(expected, case["metrics"][name], rtol=1e-5, atol=1e-6, err_msg=name)


def means(metrics: dict) -> dict:
    return {name: float(jnp.mean(value)) for name, value in metrics.items()}


def sides(logprobs, mask, ld_alpha) -> PairLogprobs:
    """Rows are all chosen, then all rejected; LD-DPO through packed rows of one pair each, chosen first."""
    lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
    sums = jnp.sum(jnp.where(mask, logprobs, 0), axis=1)
    half = len(sums) // 2
    if ld_alpha is not None:
        rows = jnp.concatenate([logprobs[:half], logprobs[half:]], axis=1)
        packed_mask = jnp.concatenate([mask[:half], mask[half:]], axis=1)
        segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), mask.shape[1]), rows.shape)
        sums = ld_sums(rows, packed_mask, segments, 2, alpha=ld_alpha)[:, 1:].T.reshape(-1)
    return PairLogprobs(sums[:half], sums[half:], lengths[:half], lengths[half:])


def dpo_settings(config: dict) -> dict:
    """TRL's configuration as arguments of preference_loss. TRL's sigmoid and its like read no label_smoothing."""
    divergence = config["f_divergence_type"]
    weights = config["loss_weights"] or [1.0] * len(config["loss_types"])
    smoothed = set(config["loss_types"]) & {"robust", "exo_pair", "aot", "aot_unpaired"}
    return {
        "kind": list(zip(config["loss_types"], weights, strict=True)),
        "beta": config["beta"],
        "label_smoothing": config["label_smoothing"] if smoothed else 0.0,
        "f_divergence": DIVERGENCE.get(divergence, divergence),
        "f_alpha": config["f_alpha_divergence_coef"],
        "discopop_tau": config["discopop_tau"],
    }


@pytest.mark.parametrize("name", DPO["cases"])
def test_dpo_family(name):
    case = DPO["cases"][name]
    config, settings = case["config"], dpo_settings(case["config"])
    mask, policy, reference = np.array(DPO["mask"], bool), array(DPO["policy"]), array(DPO["reference"])
    half = len(mask) // 2
    if config["use_weighting"]:
        gap = jnp.sum((policy - array(DPO["log_sum_sq"])) * mask, axis=1) / mask.sum(1)
        settings["pair_weights"] = jnp.exp(gap[:half]) * jnp.exp(gap[half:])

    def loss(logprobs):
        nll = -jnp.sum(jnp.where(mask, logprobs, 0)[:half], axis=1) / mask[:half].sum()
        extra = {"chosen_nll": nll} if "sft" in config["loss_types"] else {}
        pair = (sides(x, mask, config["ld_alpha"]) for x in (logprobs, reference))
        return preference_loss(*pair, **settings, **extra)

    same(lambda x: loss(x)[0], case, policy, means(loss(policy)[1]))


def test_every_kind_of_trl_is_compared_and_we_have_no_other():
    compared = {kind for case in DPO["cases"].values() for kind in case["config"]["loss_types"]}
    assert compared == {*KINDS, "sft"}


def test_trl_ignores_label_smoothing_in_sigmoid_and_we_do_not():
    plain, smoothed = DPO["cases"]["sigmoid"], DPO["cases"]["sigmoid_smoothed"]
    assert smoothed["config"]["label_smoothing"] == 0.2 and plain["loss"] == smoothed["loss"]
    pair = [sides(array(DPO[side]), np.array(DPO["mask"], bool), None) for side in ("policy", "reference")]
    ours, metrics = preference_loss(*pair, beta=0.4, label_smoothing=0.2)
    # -(1-e) logsig(x) - e logsig(-x) = -logsig(x) + e x
    np.testing.assert_allclose(ours, plain["loss"] + 0.2 * jnp.mean(metrics["rewards/margins"]), rtol=1e-6)


@pytest.mark.parametrize("name", KTO["cases"])
def test_kto(name):
    case = KTO["cases"][name]
    config = case["config"]
    labels, mask, twins = (np.array(KTO[key], bool) for key in ("labels", "mask", "twin_mask"))
    total = lambda logprobs, mask: jnp.sum(jnp.where(mask, logprobs, 0), axis=1)
    shifted = array(KTO["ref_twin"]) - config["twin_shift"]
    z = kto_z(total(array(KTO["twin"]), twins), total(shifted, twins))

    def loss(logprobs):
        return kto_loss(
            total(logprobs, mask),
            total(array(KTO["reference"]), mask),
            labels,
            z,
            kind=config["loss_type"],
            beta=config["beta"],
            desirable_weight=config["desirable_weight"],
            undesirable_weight=config["undesirable_weight"],
        )

    policy = array(KTO["policy"])
    _, metrics = loss(policy)
    logged = {
        f"{key}/{side}": metrics[key][labels == (side == "chosen")].mean()
        for key in ("rewards", "logps")
        for side in ("chosen", "rejected")
    }
    same(lambda x: loss(x)[0], case, policy, logged | ({"kl": z} if config["loss_type"] == "kto" else {}))


def test_kto_golden_has_a_positive_and_a_clamped_z():
    assert KTO["cases"]["kto"]["metrics"]["kl"] > 0.1 and KTO["cases"]["kto_negative_kl"]["metrics"]["kl"] == 0


@pytest.mark.parametrize("name", REWARD["cases"])
def test_reward(name):
    case = REWARD["cases"][name]
    margin = case["config"].get("margin")

    def loss(scores):
        given = {"margin": None if margin is None else array(margin)}
        return reward_loss(scores[:4], scores[4:], **given, center_coefficient=case["config"].get("center", 0.0))

    scores = array(REWARD["scores"])
    same(lambda x: loss(x)[0], case, scores, means(loss(scores)[1]))


@pytest.mark.parametrize("name", FREE["cases"])
def test_orpo_cpo_simpo(name):
    """From logits: ORPO's NLL is over prompt and completion, CPO's over the completion."""
    case = FREE["cases"][name]
    config = case["config"]
    ids = np.array(FREE["ids"])[:, 1:]
    mask, real = (np.array(FREE[key], bool)[:, 1:] for key in ("mask", "real"))

    def loss(logits):
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[..., None], axis=-1)[..., 0]
        policy = sides(logprobs, mask, None)
        half, counted = len(ids) // 2, real if config["trainer"] == "orpo" else mask
        nll = -jnp.sum(jnp.where(counted, logprobs, 0)[:half], axis=1) / counted[:half].sum()
        if config["trainer"] == "orpo":
            chosen, rejected = policy.chosen / policy.chosen_len, policy.rejected / policy.rejected_len
            return (*orpo_loss(chosen, rejected, nll, lam=config["beta"]), nll)
        settings = {"beta": config["beta"], "nll_coefficient": config["cpo_alpha"]}
        settings |= {"chosen_nll": nll} if config["cpo_alpha"] else {}
        if config["loss_type"] == "simpo":
            return (*simpo_loss(policy, gamma=config["simpo_gamma"], alpha=config["alpha"], **settings), nll)
        smoothing = config["label_smoothing"]
        return (*cpo_loss(policy, kind=config["loss_type"], label_smoothing=smoothing, **settings), nll)

    logits = array(FREE["logits"])
    _, metrics, nll = loss(logits)
    logged = means(metrics) | ({"nll_loss": nll.sum()} if config["cpo_alpha"] else {})
    if config["trainer"] == "orpo":
        assert {"log_odds_ratio", "log_odds_chosen"} <= logged.keys()
    same(lambda x: loss(x)[0], case, logits, logged)
