"""What methods that learn from pairs share: sums over the two completions, weights of pairs, the reference's column.

Pair k of a row is its segments 2k-1 (chosen) and 2k (rejected), the prompt in both. Legend: P = B * S/2 places for
pairs in a batch, from left to right in each row, most of them empty.
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxpost.algos.base import Algorithm, Context, Source
from jaxpost.losses.units import PairLogprobs
from jaxpost.models.policy import Policy
from jaxpost.ops.logprobs import TokenStats
from jaxpost.ops.segments import segment_sums
from jaxpost.types import Array, Batch, Frozen, Mean, Metrics, weighted_mean


class Pairs(Algorithm):
    """Base of methods over packed pairs: every pair counts the same, whatever row it lies in."""

    rows: ClassVar = "pairs"

    def source(self, ctx: Context) -> Source:
        """Packed pairs."""
        return ctx.rows()

    def prepare(self, apply, state, frozen, batch):
        """unit_weights: 1 / pairs, at both places of each; weights: 1 / chosen tokens, of their likelihood term."""
        there = jnp.all(segment_totals(batch.mask, batch).reshape(len(batch.mask), -1, 2) > 0, axis=2)
        pairs = there / jnp.maximum(jnp.sum(there), 1)
        counted = self.likely(batch) & is_chosen(batch)
        weights = counted / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
        return batch.replace(unit_weights=jnp.repeat(pairs, 2, axis=1), weights=weights), state.scalars

    def likely(self, batch: Batch) -> Array:
        """bool[B,T]: which targets of the chosen side its likelihood term is over."""
        return batch.mask

    def evaluate(self, apply, state, frozen, batch):
        """Held-out metrics, and the loss, a mean over pairs."""
        batch, _ = self.prepare(apply, state, frozen, batch)
        loss, metrics = self.loss(apply, state.params, frozen, batch, None)
        pairs = jnp.sum(pair_weights(batch) > 0, dtype=jnp.float32)
        found = {name: value for name, value in metrics.items() if isinstance(value, Mean)}
        return found | {"loss": Mean(loss * pairs, pairs)}


def segment_totals(values: Array, batch: Batch) -> Array:
    """f32[B,S]: sums of values [B,T] over the segments 1..S of each row. S is that of the unit columns."""
    return segment_sums(values.astype(jnp.float32), batch.segments, batch.extra["margin"].shape[1])[:, 1:]


def is_chosen(batch: Batch) -> Array:
    """bool[B,T]: positions of chosen sides."""
    return batch.segments % 2 == 1


def sides(units: Array) -> tuple[Array, Array]:
    """[B,S] -> (chosen [P], rejected [P])."""
    return tuple(jnp.moveaxis(units.reshape(-1, 2), 1, 0))


def pair_logprobs(logprobs: Array, batch: Batch) -> PairLogprobs:
    """Sums of logprobs [B,T] over the completion tokens of each pair, and their counts."""
    kept = jnp.where(batch.mask, logprobs, 0.0)  # a product would let nan through
    return PairLogprobs(*sides(segment_totals(kept, batch)), *sides(segment_totals(batch.mask, batch)))


def pair_weights(batch: Batch) -> Array:
    """f32[P], 0 where there is no pair."""
    return sides(batch.unit_weights)[0]


def chosen_nll(logprobs: Array, batch: Batch) -> Array:
    """f32[P]: each pair's share of the mean negative log-likelihood of the chosen tokens, under batch.weights."""
    terms = jnp.where(batch.weights != 0, -logprobs * batch.weights, 0.0)
    return sides(segment_totals(terms, batch))[0]


def pair_means(metrics: dict[str, Array], weights: Array) -> Metrics:
    """One number a pair -> means over the pairs that are there."""
    there = (weights != 0).astype(jnp.float32)
    return {name: weighted_mean(values, there) for name, values in metrics.items()}


def token_means(stats: TokenStats, batch: Batch) -> Metrics:
    """Of the chosen side's tokens: what supervised fine-tuning reports."""
    there = (batch.weights != 0).astype(jnp.float32)
    return {
        "nll_loss": weighted_mean(-stats.logprobs, there),
        "entropy": weighted_mean(stats.entropy, there),
        "mean_token_accuracy": weighted_mean(stats.correct, there),
    }


def reference_logprobs(apply: Policy, frozen: Frozen, batch: Batch) -> Batch:
    """The batch with ref_logprobs [B,T]: of the role "ref", or of the base that trained adapters sit on."""
    weights = frozen["ref"] if "ref" in frozen else frozen["policy"]
    return batch.replace(ref_logprobs=apply.logprobs(weights, batch)[0])
