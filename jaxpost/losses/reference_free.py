"""Preference losses over pairs that need no reference policy: SimPO with AlphaPO, CPO, ORPO.

`policy` is losses.preference.PairLogprobs. All share: weights f32[P] are unit weights, already normalised, None means
1/P, and 0 removes a pair whatever it holds; reduce=False gives the terms f32[P]; metrics are one number a pair,
without gradient, for the caller's weighted mean. chosen_nll f32[P] is each pair's share of the NLL term, already
normalised: sum_t w_t * -lp_t with token weights that sum to 1 over the whole batch; it is added, not weighed again.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxpost.losses.units import (
    PairLogprobs,
    check_choice,
    check_positive,
    check_smoothing,
    clamped,
    log1mexp,
    logistic,
    pair_metrics,
    present,
    weigh,
)

CPO_KINDS = ("sigmoid", "hinge", "ipo")


def simpo_loss(
    policy: PairLogprobs,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    chosen_nll: jax.Array | None = None,
    nll_coefficient: float = 0.0,
    weights: jax.Array | None = None,
    reduce: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum_p w_p * -logsig(b (s_w - s_l) - gamma) + nll_coefficient * sum_p chosen_nll_p: SimPO (2405.14734).

        s = m, the mean logprob of the completion's tokens
        s = (1 - exp(-alpha m)) / alpha where alpha != 0: AlphaPO (2501.03884); the exponent is clamped at +-20

    TRL writes gamma inside, b (s_w - s_l - gamma/b): the same number, with defaults of its own (beta 0.1, gamma 0.5).
    label_smoothing as in cDPO. With nll_coefficient it is CPO-SimPO. Rewards logged are beta * s, logps the means.
    Raises ValueError on unequal shapes and numbers out of range.
    """
    check_positive("simpo_loss", "beta", beta)
    check_smoothing("simpo_loss", label_smoothing)
    for name, value in (("gamma", gamma), ("alpha", alpha)):
        if not math.isfinite(value):
            raise ValueError(f"simpo_loss: {name} must be finite, not {value}")
    weights, kept, x = present("simpo_loss", weights, **given(policy, "simpo_loss", chosen_nll, nll_coefficient))
    (chosen, rejected) = means(x)
    scores = [-jnp.expm1(clamped(-alpha * m)) / alpha if alpha else m for m in (chosen, rejected)]
    values = logistic(beta * (scores[0] - scores[1]) - gamma, label_smoothing)
    loss = with_nll(weigh(values, weights, kept, reduce), x, kept, nll_coefficient, reduce)
    return loss, pair_metrics(beta * scores[0], beta * scores[1], chosen, rejected)


def cpo_loss(
    policy: PairLogprobs,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    chosen_nll: jax.Array | None = None,
    nll_coefficient: float = 1.0,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
    reduce: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum_p w_p * kind(p) + nll_coefficient * sum_p chosen_nll_p: CPO (2401.08417), d = lp_w - lp_l of the policy.

        sigmoid: -(1-e) logsig(b d) - e logsig(-b d)
        hinge:   max(0, 1 - b d)
        ipo:     (m_w - m_l - 1/(2b))^2, m the mean logprob of the completion's tokens

    Rewards logged are beta * lp (ipo: beta * m), logps the same without beta. Raises ValueError on an unknown kind,
    unequal shapes, numbers out of range, and a coefficient without chosen_nll.
    """
    check_choice("cpo_loss", "kind", kind, CPO_KINDS)
    check_positive("cpo_loss", "beta", beta)
    check_smoothing("cpo_loss", label_smoothing)
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"cpo_loss: label_smoothing {label_smoothing} is read by sigmoid, not by {kind}; set it to 0")
    weights, kept, x = present("cpo_loss", weights, **given(policy, "cpo_loss", chosen_nll, nll_coefficient))
    chosen, rejected = means(x) if kind == "ipo" else (x["policy.chosen"], x["policy.rejected"])
    d = chosen - rejected
    if kind == "sigmoid":
        values = logistic(beta * d, label_smoothing)
    elif kind == "hinge":
        values = jax.nn.relu(1 - beta * d)
    else:
        values = (d - 1 / (2 * beta)) ** 2
    loss = with_nll(weigh(values, weights, kept, reduce), x, kept, nll_coefficient, reduce)
    return loss, pair_metrics(beta * chosen, beta * rejected, chosen, rejected)


def orpo_loss(
    chosen_mean_lp: jax.Array,
    rejected_mean_lp: jax.Array,
    chosen_nll: jax.Array,
    *,
    lam: float = 0.1,
    weights: jax.Array | None = None,
    reduce: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """sum_p chosen_nll_p - lam * sum_p w_p * logsig(o_p): ORPO (2403.07691).

        o = (m_w - m_l) - (log(1 - exp(m_w)) - log(1 - exp(m_l)))        the log odds ratio

    chosen_mean_lp, rejected_mean_lp: f32[P], m, the mean logprob of the completion's tokens. chosen_nll: f32[P], over
    prompt and completion (the paper and TRL) or the completion alone: the caller's choice. Rewards logged are lam * m,
    as TRL's; beside them log_odds_ratio = logsig(o) and log_odds_chosen = o. A probability of
    1 has finite odds and gradient, see units.log1mexp. Raises ValueError on unequal shapes and a negative lam.
    """
    if not 0 <= lam < math.inf:
        raise ValueError(f"orpo_loss: lam must be finite and not below 0, not {lam}")
    arrays = {"chosen_mean_lp": chosen_mean_lp, "rejected_mean_lp": rejected_mean_lp, "chosen_nll": chosen_nll}
    weights, kept, x = present("orpo_loss", weights, **arrays)
    chosen, rejected = x["chosen_mean_lp"], x["rejected_mean_lp"]
    odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    loss = with_nll(weigh(lam * logistic(odds), weights, kept, reduce), x, kept, 1.0, reduce)
    metrics = pair_metrics(lam * chosen, lam * rejected, chosen, rejected)
    found = {"log_odds_ratio": -logistic(odds), "log_odds_chosen": odds}
    return loss, metrics | jax.lax.stop_gradient(found)


def given(policy: PairLogprobs, name: str, chosen_nll: jax.Array | None, coefficient: float) -> dict[str, jax.Array]:
    """The arrays of one call by name; raises ValueError where the NLL term and its coefficient do not go together."""
    if not math.isfinite(coefficient):
        raise ValueError(f"{name}: nll_coefficient must be finite, not {coefficient}")
    if (chosen_nll is not None) != bool(coefficient):
        raise ValueError(f"{name}: give chosen_nll with an nll_coefficient, or neither (nll_coefficient=0)")
    arrays = {f"policy.{field}": value for field, value in policy._asdict().items()}
    return arrays if chosen_nll is None else arrays | {"chosen_nll": chosen_nll}


def means(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean logprob of the chosen and of the rejected completion's tokens; one without tokens counts one."""
    sides = ("chosen", "rejected")
    chosen, rejected = (x[f"policy.{side}"] / jnp.maximum(x[f"policy.{side}_len"], 1) for side in sides)
    return chosen, rejected


def with_nll(loss: jax.Array, x: dict[str, jax.Array], kept: jax.Array, coefficient: float, reduce: bool) -> jax.Array:
    """loss + coefficient * chosen_nll of the pairs that are present."""
    if not coefficient:
        return loss
    nll = jnp.where(kept, coefficient * x["chosen_nll"], 0)
    return loss + (jnp.sum(nll) if reduce else nll)
