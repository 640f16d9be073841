"""Reward models: Bradley-Terry on pairs, and on rankings of K completions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxpost.losses.units import full, logistic, present, weigh


def reward_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    margin: jax.Array | None = None,
    center_coefficient: float = 0.0,
    weights: jax.Array | None = None,
    reduce: bool = True,
    probability: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum over pairs (Bradley-Terry; InstructGPT 2203.02155), d = chosen - rejected.

        -logsig(d - margin) + center_coefficient * (chosen + rejected)^2
        with probability q:  -q logsig(d - margin) - (1-q) logsig(-d - margin)

    chosen, rejected: f32[P] scores. margin: f32[P], how much better the better one is (Llama 2, 2307.09288).
    center_coefficient: holds scores near 0 (2312.09244); 0.01 is usual. probability: f32[P] in [0, 1], the share of
    annotators who prefer `chosen`; the loss is then the mean over annotators, the margin being on each one's own side,
    and 0.5 is a tie. weights: f32[P] unit weights, already normalised; None means 1/P; 0 removes a pair whatever it
    holds. reduce=False gives the terms f32[P].

    Metrics, one number a pair and without gradient: accuracy (1 where the higher score was preferred, 0 where scores
    are equal; with probability the share of annotators agreed with), margin (d), mean_reward (of both). Raises
    ValueError on unequal shapes and a negative coefficient.
    """
    if not 0 <= center_coefficient < math.inf:
        raise ValueError(f"reward_loss: center_coefficient must be finite and not below 0, not {center_coefficient}")
    given = {"chosen": chosen, "rejected": rejected, "margin": margin, "probability": probability}
    weights, kept, x = present("reward_loss", weights, **{k: v for k, v in given.items() if v is not None})
    d, side = x["chosen"] - x["rejected"], x.get("margin", 0.0)
    values, accuracy = logistic(d - side), full(d > 0)
    if probability is not None:
        q = jax.lax.stop_gradient(x["probability"])
        values = q * values + (1 - q) * logistic(-d - side)
        accuracy = q * accuracy + (1 - q) * full(d < 0)
    if center_coefficient:
        values = values + center_coefficient * (x["chosen"] + x["rejected"]) ** 2
    metrics = {"accuracy": accuracy, "margin": d, "mean_reward": (x["chosen"] + x["rejected"]) / 2}
    return weigh(values, weights, kept, reduce), jax.lax.stop_gradient(metrics)


def ranking_loss(
    scores: jax.Array,
    ranks: jax.Array,
    *,
    mask: jax.Array | None = None,
    center_coefficient: float = 0.0,
    weights: jax.Array | None = None,
    reduce: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum over prompts of the mean over a prompt's ordered pairs (InstructGPT 2203.02155, eq. 1).

        mean over (i, j) with rank_i < rank_j of  -logsig(s_i - s_j) + center_coefficient * (s_i + s_j)^2

    scores: f32[P,K] of K completions a prompt. ranks: [P,K], 1 is best; equal ranks are a tie and make no pair, so
    without ties there are K(K-1)/2. mask: bool[P,K], False where a prompt has fewer than K completions; their scores
    and ranks may be anything. A prompt without a pair (all tied, or one completion) has value 0: give it weight 0 if it
    should not count. weights: f32[P] unit weights, already normalised; None means 1/P; 0 removes a prompt whatever it
    holds. reduce=False gives the terms f32[P]. With K = 2 it equals reward_loss.

    Metrics, one number a prompt (means over its pairs) and without gradient: accuracy, margin; pairs is their count.
    Raises ValueError on unequal shapes and a negative coefficient.
    """
    if not 0 <= center_coefficient < math.inf:
        raise ValueError(f"ranking_loss: center_coefficient must be finite and not below 0, not {center_coefficient}")
    mask = jnp.ones(jnp.shape(scores), bool) if mask is None else mask
    if jnp.ndim(scores) != 2 or not jnp.shape(scores) == jnp.shape(ranks) == jnp.shape(mask):
        raise ValueError(
            f"ranking_loss: scores {jnp.shape(scores)}, ranks {jnp.shape(ranks)} and mask {jnp.shape(mask)} "
            "must have one shape [prompts, completions]"
        )
    weights, kept, _ = present("ranking_loss", weights, scores=scores[:, 0])
    mask = mask & kept[:, None]
    s, rank = jnp.where(mask, full(scores), 0), jnp.where(mask, ranks, 0)
    ordered = (rank[:, :, None] < rank[:, None, :]) & mask[:, :, None] & mask[:, None, :]  # [P,K,K]: i better than j
    count = jnp.sum(ordered, axis=(1, 2))

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(ordered, x, 0), axis=(1, 2)) / jnp.maximum(count, 1)

    d = s[:, :, None] - s[:, None, :]
    values = mean(logistic(d))
    if center_coefficient:
        values = values + center_coefficient * mean((s[:, :, None] + s[:, None, :]) ** 2)
    metrics = {"accuracy": mean(full(d > 0)), "margin": mean(d), "pairs": full(count)}
    return weigh(values, weights, kept, reduce), jax.lax.stop_gradient(metrics)
