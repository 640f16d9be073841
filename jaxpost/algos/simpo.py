"""SimPO: pairs by the mean logprob of their tokens, without a reference; AlphaPO and CPO-SimPO are fields."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpost.algos.pairs import Pairs, chosen_nll, pair_logprobs, pair_means, pair_weights, token_means
from jaxpost.fields import SECTION, Float, NonNegFloat, PosFloat
from jaxpost.losses.preference import simpo_loss
from jaxpost.losses.units import check_smoothing


@dataclass(frozen=True, config=SECTION)
class SimPO(Pairs):
    """Length-normalised rewards with a target margin (2405.14734)."""

    name: Literal["simpo"] = "simpo"
    beta: PosFloat = 2.0
    gamma: Float = 1.0  # target margin of the rewards; TRL's simpo_gamma, which stands inside beta, is the same number
    alpha: Float = 0.0  # not 0: AlphaPO's reward (2501.03884)
    label_smoothing: Float = 0.0
    nll_coefficient: NonNegFloat = 0.0  # of the chosen tokens' likelihood; above 0: CPO-SimPO

    @model_validator(mode="after")
    def _check(self):
        check_smoothing("simpo", self.label_smoothing)
        return self

    def loss(self, apply, params, frozen, batch, rng):
        """simpo_loss of the pairs, each 1 / number of pairs."""
        stats = apply.target_stats(apply.join(params, frozen, "policy"), batch, rng=rng)
        weights = pair_weights(batch)
        loss, metrics = simpo_loss(
            pair_logprobs(stats.logprobs, batch),
            beta=self.beta,
            gamma=self.gamma,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            chosen_nll=chosen_nll(stats.logprobs, batch) if self.nll_coefficient else None,
            nll_coefficient=self.nll_coefficient,
            weights=weights,
        )
        return loss, pair_means(metrics, weights) | token_means(stats, batch)
