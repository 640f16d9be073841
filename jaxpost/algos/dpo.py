"""Direct preference optimisation and its relatives: one class, the kind is a field."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpost.algos.pairs import (
    Pairs,
    chosen_nll,
    pair_logprobs,
    pair_means,
    pair_weights,
    reference_logprobs,
    segment_totals,
    sides,
    token_means,
)
from jaxpost.fields import SECTION, Bool, Float, Fraction, PosFloat
from jaxpost.losses import preference
from jaxpost.losses.preference_kinds import SORTED

Kind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "aot", "aot_unpaired", "discopop", "sft",
]  # fmt: skip


@dataclass(frozen=True, config=SECTION)
class DPO(Pairs):
    """Pairs against a frozen reference: the start's weights, or the base below trained adapters (2305.18290)."""

    name: Literal["dpo"] = "dpo"
    kind: Kind | tuple[tuple[Kind, Float], ...] = "sigmoid"  # or a list of [kind, coefficient], "sft" among them
    beta: PosFloat = 0.1
    label_smoothing: Float = 0.0  # share of wrong labels: sigmoid (cDPO), robust, exo_pair, aot
    reference_free: Bool = False  # the reference counts as uniform
    ipo_length_normalized: Bool = True  # false: the paper's form of ipo, on sums
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"  # 2309.16240
    f_alpha: Float = 0.5  # of f_divergence: alpha
    delta: Float = 0.0  # bco_pair's shift of the reward
    discopop_tau: PosFloat = 0.05
    ld_alpha: Fraction = 1.0  # LD-DPO: weight of tokens past the pair's shared length (2409.06411)

    @model_validator(mode="after")
    def _check(self):
        preference.check_config(self.kind, **self._options)
        return self

    @property
    def _options(self) -> dict:
        names = ("beta", "label_smoothing", "reference_free", "ipo_length_normalized", "f_divergence", "f_alpha")
        return {name: getattr(self, name) for name in (*names, "delta", "discopop_tau")}

    @property
    def _kinds(self) -> tuple[str, ...]:
        return (self.kind,) if isinstance(self.kind, str) else tuple(kind for kind, _ in self.kind)

    @property
    def needs(self) -> tuple[str, ...]:
        """The reference."""
        return () if self.reference_free else ("ref",)

    @property
    def whole_batch(self) -> bool:
        """Whether the loss sorts the batch, so that it cannot be split into micro-batches."""
        return any(kind in SORTED for kind in self._kinds)

    def annotate(self, apply, frozen, batch):
        """ref_logprobs."""
        return batch if self.reference_free else reference_logprobs(apply, frozen, batch)

    def loss(self, apply, params, frozen, batch, rng):
        """preference_loss of the pairs, each 1 / number of pairs."""
        stats = apply.target_stats(apply.join(params, frozen, "policy"), batch, rng=rng)
        weights = pair_weights(batch)
        extra = {"chosen_nll": chosen_nll(stats.logprobs, batch)} if "sft" in self._kinds else {}
        loss, metrics = preference.preference_loss(
            self._sums(stats.logprobs, batch),
            None if self.reference_free else self._sums(batch.ref_logprobs, batch),
            kind=self.kind,
            weights=weights,
            **self._options,
            **extra,
        )
        return loss, pair_means(metrics, weights) | token_means(stats, batch)

    def _sums(self, logprobs, batch):
        """PairLogprobs; under LD-DPO the tail of the longer completion weighs ld_alpha."""
        found = pair_logprobs(logprobs, batch)
        if self.ld_alpha == 1:
            return found
        most = segment_totals(batch.mask, batch).shape[1]
        sums = preference.ld_sums(logprobs, batch.mask, batch.segments, most, alpha=self.ld_alpha)[:, 1:]
        chosen, rejected = sides(sums)
        return found._replace(chosen=chosen, rejected=rejected)
