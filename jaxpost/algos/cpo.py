"""CPO: contrast of the policy's own logprobs, and the likelihood of the chosen side, without a reference."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpost.algos.pairs import Pairs, chosen_nll, pair_logprobs, pair_means, pair_weights, token_means
from jaxpost.fields import SECTION, Float, NonNegFloat, PosFloat
from jaxpost.losses.preference import cpo_loss
from jaxpost.losses.units import check_smoothing


@dataclass(frozen=True, config=SECTION)
class CPO(Pairs):
    """Contrastive preference optimisation (2401.08417)."""

    name: Literal["cpo"] = "cpo"
    kind: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: PosFloat = 0.1
    label_smoothing: Float = 0.0  # sigmoid alone
    nll_coefficient: NonNegFloat = 1.0  # of the chosen tokens' likelihood

    @model_validator(mode="after")
    def _check(self):
        check_smoothing("cpo", self.label_smoothing)
        if self.label_smoothing and self.kind != "sigmoid":
            raise ValueError(f"label_smoothing: read by kind sigmoid, not by {self.kind}; leave it out")
        return self

    def loss(self, apply, params, frozen, batch, rng):
        """cpo_loss of the pairs, each 1 / number of pairs."""
        stats = apply.target_stats(apply.join(params, frozen, "policy"), batch, rng=rng)
        weights = pair_weights(batch)
        loss, metrics = cpo_loss(
            pair_logprobs(stats.logprobs, batch),
            kind=self.kind,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            chosen_nll=chosen_nll(stats.logprobs, batch) if self.nll_coefficient else None,
            nll_coefficient=self.nll_coefficient,
            weights=weights,
        )
        return loss, pair_means(metrics, weights) | token_means(stats, batch)
