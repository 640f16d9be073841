"""Supervised fine-tuning: the negative log-likelihood of the trainable targets."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpost.algos.base import Algorithm, Context, Normalise, SlowRule, Source, raw_weights, token_weights
from jaxpost.fields import SECTION, NonNegFloat, PosFloat
from jaxpost.losses.sft import sft_loss
from jaxpost.types import weighted_mean


@dataclass(frozen=True, config=SECTION)
class SFT(Algorithm):
    """Masked next-token training on text, chat, or prompt/completion rows."""

    name: Literal["sft"] = "sft"
    kind: Literal["nll", "dft"] = "nll"  # dft: 2508.05629
    normalise: Normalise = "token"  # what every trainable token's loss is divided by
    constant: PosFloat | None = None  # the divisor of normalise: constant
    neftune_alpha: NonNegFloat = 0.0  # strength of uniform noise on embeddings in training (2310.05914); 5 is usual
    z_loss: NonNegFloat = 0.0  # weight of the squared log-sum-exp of the logits (2204.02311); 1e-4 is usual
    ema_decay: PosFloat | None = None  # below 1: also keep averaged weights, in evaluation under eval/ema/

    @model_validator(mode="after")
    def _check(self):
        if (self.normalise == "constant") != (self.constant is not None):
            raise ValueError("constant: give it with normalise: constant, and only then")
        if self.ema_decay is not None and self.ema_decay >= 1:
            raise ValueError("ema_decay: must be below 1")
        return self

    @property
    def slow(self) -> dict[str, SlowRule]:
        """The averaged policy, where there is one."""
        return {} if self.ema_decay is None else {"policy": SlowRule("policy", decay=self.ema_decay)}

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self.neftune_alpha > 0

    def source(self, ctx: Context) -> Source:
        """Packed rows."""
        return ctx.rows()

    def prepare(self, apply, state, frozen, batch):
        """weights, from the mask and the rule."""
        weights = token_weights(batch.mask, batch.segments, self.normalise, self.constant)
        return batch.replace(weights=weights), state.scalars

    def loss(self, apply, params, frozen, batch, rng):
        """sum of weights * (nll or dft, and z-loss); entropy and accuracy are means under the same rule."""
        weights = apply.join(params, frozen, "policy")
        stats = apply.target_stats(weights, batch, rng=rng, embed_noise=self.neftune_alpha)
        loss, _ = sft_loss(stats.logprobs, batch.weights, kind=self.kind, z_loss=self.z_loss, lse=stats.lse)
        counts = raw_weights(batch.mask, batch.segments, self.normalise)
        return loss, {
            "nll": weighted_mean(-stats.logprobs, counts),
            "entropy": weighted_mean(stats.entropy, counts),
            "mean_token_accuracy": weighted_mean(stats.correct, counts),
        }
