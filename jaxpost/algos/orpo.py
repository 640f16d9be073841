"""ORPO: supervised fine-tuning on the chosen side and an odds ratio against the rejected one, without a reference."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from pydantic.dataclasses import dataclass

from jaxpost.algos.pairs import Pairs, chosen_nll, is_chosen, pair_logprobs, pair_means, pair_weights, token_means
from jaxpost.fields import SECTION, NonNegFloat
from jaxpost.losses.preference import orpo_loss


@dataclass(frozen=True, config=SECTION)
class ORPO(Pairs):
    """Odds ratio preference optimisation (2403.07691)."""

    name: Literal["orpo"] = "orpo"
    lam: NonNegFloat = 0.1  # of the odds-ratio term; TRL calls it beta
    nll_over: Literal["all", "completion"] = "all"  # all: prompt and completion, as the paper and TRL have it

    def likely(self, batch):
        """All real targets, or those of completions."""
        return batch.mask if self.nll_over == "completion" else batch.segments != 0

    def loss(self, apply, params, frozen, batch, rng):
        """orpo_loss of the pairs, each 1 / number of pairs."""
        scored = batch.replace(mask=batch.mask | (self.likely(batch) & is_chosen(batch)))
        stats = apply.target_stats(apply.join(params, frozen, "policy"), scored, rng=rng)
        weights, policy = pair_weights(batch), pair_logprobs(stats.logprobs, batch)
        loss, metrics = orpo_loss(
            policy.chosen / jnp.maximum(policy.chosen_len, 1),
            policy.rejected / jnp.maximum(policy.rejected_len, 1),
            chosen_nll(stats.logprobs, batch),
            lam=self.lam,
            weights=weights,
        )
        return loss, pair_means(metrics, weights) | token_means(stats, batch)
