"""Preference losses over pairs: the DPO family with a reference; KTO, ORPO, SimPO and CPO are re-exported here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpost.losses.kto import kto_loss, kto_z
from jaxpost.losses.preference_kinds import DIVERGENCES, DIVERGENT, KINDS, SMOOTHED, SORTED, Options, Ratios, score
from jaxpost.losses.reference_free import cpo_loss, orpo_loss, simpo_loss
from jaxpost.losses.units import (
    PairLogprobs,
    check_choice,
    check_positive,
    check_smoothing,
    full,
    pair_metrics,
    present,
    weigh,
)
from jaxpost.ops.segments import segment_sums

__all__ = ["PairLogprobs", "cpo_loss", "kto_loss", "kto_z", "ld_sums", "orpo_loss", "preference_loss", "simpo_loss"]


def preference_loss(
    policy: PairLogprobs,
    reference: PairLogprobs | None,
    *,
    kind: str | Sequence[tuple[str, float]] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
    reduce: bool = True,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    reference_free: bool = False,
    ipo_length_normalized: bool = True,
    delta: float | jax.Array = 0.0,
    discopop_tau: float = 0.05,
    pair_weights: jax.Array | None = None,
    chosen_nll: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum over pairs of one kind, or of several with a coefficient each.

        sum_p weights_p * pair_weights_p * sum_k c_k * kind_k(p)  +  c_sft * sum_p chosen_nll_p

    The kinds and their papers are the functions of losses/preference_kinds.py, and `sft`; a list such as
    [("sigmoid", 1.0), ("sft", 1.0)] is RPO (2404.19733). What each reads:

    policy, reference: PairLogprobs of f32[P]. The reference gets no gradient; its lengths are not read. With
    reference_free it counts as 0 and may be None.
    label_smoothing: e of sigmoid (cDPO), robust, exo_pair, aot and aot_unpaired.
    f_divergence, f_alpha: the score s(r) of preference_kinds.score, for the kinds that compare chosen with rejected.
    delta: bco_pair's shift of the reward, a constant. discopop_tau: discopop's. ipo_length_normalized: ipo's form.
    pair_weights: f32[P], WPO's w_chosen * w_rejected (2406.11827), without gradient. They leave the sft term alone
    (TRL multiplies it by their mean).
    chosen_nll: f32[P], each pair's share of the sft term, already normalised: sum_t w_t * -lp_t over the chosen
    tokens, where w are token weights that sum to 1 over the whole batch. So it is added, not weighed again.

    weights: f32[P] unit weights, already normalised; None means 1/P. A weight of 0 removes a pair: no value and no
    gradient, whatever its entries hold, and no place in aot's order. aot and aot_unpaired sort the batch: they need
    all pairs in one call. A completion without tokens counts one.

    Returns the loss, or with reduce=False its terms f32[P], and the metrics of units.pair_metrics, one number a pair,
    rewards being beta * log-ratio: the caller takes their weighted mean. Raises ValueError on unknown names, numbers
    out of range, unequal shapes, and an option that none of the kinds reads.
    """
    kinds = named(kind)
    options = Options(beta, label_smoothing, delta, discopop_tau, ipo_length_normalized)
    check(
        options, [name for name, _ in kinds], f_divergence, f_alpha,
        weighed=pair_weights is not None, with_nll=chosen_nll is not None,
    )  # fmt: skip
    if reference_free:
        reference = jax.tree.map(jnp.zeros_like, policy)
    elif reference is None:
        raise ValueError("preference_loss: reference is None; give its logprobs, or set reference_free=True")
    given = {f"policy.{name}": value for name, value in policy._asdict().items()}
    given |= {f"reference.{name}": getattr(reference, name) for name in ("chosen", "rejected")}
    extra = {"pair_weights": pair_weights, "chosen_nll": chosen_nll}
    given |= {name: value for name, value in extra.items() if value is not None}
    weights, kept, x = present("preference_loss", weights, **given)

    ref_chosen, ref_rejected = (jax.lax.stop_gradient(x[f"reference.{side}"]) for side in ("chosen", "rejected"))
    chosen, rejected = x["policy.chosen"] - ref_chosen, x["policy.rejected"] - ref_rejected
    ratios = Ratios(
        kept,
        chosen,
        rejected,
        score(chosen, f_divergence, f_alpha),
        score(rejected, f_divergence, f_alpha),
        jnp.maximum(x["policy.chosen_len"], 1),
        jnp.maximum(x["policy.rejected_len"], 1),
        x["policy.chosen"] - x["policy.rejected"],
        ref_chosen - ref_rejected,
    )
    values = sum((c * KINDS[name](ratios, options) for name, c in kinds if name != "sft"), jnp.zeros_like(chosen))
    if pair_weights is not None:
        values = values * jax.lax.stop_gradient(x["pair_weights"])
    loss = weigh(values, weights, kept, reduce)
    sft = sum(c for name, c in kinds if name == "sft")
    if sft:
        loss = loss + weigh(x["chosen_nll"], jnp.asarray(sft, weights.dtype), kept, reduce)
    return loss, pair_metrics(beta * chosen, beta * rejected, x["policy.chosen"], x["policy.rejected"])


def named(kind: str | Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """A name or a list of (name, coefficient) as a list; raises ValueError on anything else."""
    known = (*KINDS, "sft")
    if isinstance(kind, str):
        kind = [(kind, 1.0)]
    pairs = isinstance(kind, (list, tuple)) and all(isinstance(k, (list, tuple)) and len(k) == 2 for k in kind)
    if not pairs or not kind:
        raise ValueError(
            f"preference_loss: kind {kind!r} is neither a name nor a list of (name, coefficient) "
            'such as [("sigmoid", 1.0), ("sft", 0.5)]'
        )
    for name, coefficient in kind:
        check_choice("preference_loss", "kind", name, known)
        if not math.isfinite(coefficient):
            raise ValueError(
                f"preference_loss: the coefficient of kind {name!r} is {coefficient}; give a finite number"
            )
    return [(name, coefficient) for name, coefficient in kind]


def check_config(kind: str | Sequence[tuple[str, float]], *, reference_free: bool, **options) -> None:
    """Raises ValueError as preference_loss would with these arguments, before there is any data."""
    kinds = [name for name, _ in named(kind)]
    f_divergence, f_alpha = options.pop("f_divergence"), options.pop("f_alpha")
    check(Options(**options), kinds, f_divergence, f_alpha, weighed=False, with_nll="sft" in kinds)


def check(
    options: Options,
    kinds: list[str],
    f_divergence: str,
    f_alpha: float,
    *,
    weighed: bool,
    with_nll: bool,
) -> None:
    """Raises ValueError on a number out of range or a combination that the kinds have no meaning for."""
    name, e = "preference_loss", options.label_smoothing
    check_positive(name, "beta", options.beta)
    check_positive(name, "discopop_tau", options.discopop_tau)
    check_smoothing(name, e)
    check_choice(name, "f_divergence", f_divergence, DIVERGENCES)
    if not math.isfinite(f_alpha):
        raise ValueError(f"{name}: f_alpha must be finite, not {f_alpha}")
    if e == 0.5 and "robust" in kinds:
        raise ValueError(f"{name}: robust divides by 1 - 2 * label_smoothing; set label_smoothing below 0.5")
    if e == 0 and "exo_pair" in kinds:
        raise ValueError(f"{name}: exo_pair takes the logarithm of label_smoothing; set it to 1e-3, the paper's value")
    if e and not set(kinds) & set(SMOOTHED):
        raise ValueError(
            f"{name}: label_smoothing {e} is read by {', '.join(SMOOTHED)}, not by {', '.join(kinds)}; set it to 0"
        )
    if f_divergence != "reverse_kl" and (left := [k for k in kinds if k not in DIVERGENT]):
        raise ValueError(
            f"{name}: f_divergence {f_divergence!r} has no meaning for {', '.join(left)}; "
            f"it goes with {', '.join(DIVERGENT)}, or use reverse_kl"
        )
    if weighed and (left := [k for k in kinds if k in SORTED]):
        raise ValueError(
            f"{name}: {left[0]} compares ranks, not pairs, so pair_weights have no meaning; leave them out"
        )
    if ("sft" in kinds) != with_nll:
        raise ValueError(f"{name}: chosen_nll and the kind 'sft' go together; give both or neither")


def ld_sums(logprobs: jax.Array, mask: jax.Array, segments: jax.Array, num_segments: int, *, alpha: float) -> jax.Array:
    """Length-desensitised sums of packed pairs (LD-DPO, 2409.06411): f32[B, num_segments + 1], column 0 is padding.

        sum_{t <= m} lp_t + alpha * sum_{t > m} lp_t,    m = min(n_chosen, n_rejected), t counted in the completion

    Use it for policy and reference alike, in place of the plain sums. alpha 1 is the plain sum, alpha 0 drops what is
    past the shared length. logprobs: f32[B,T]; mask: bool[B,T] completion tokens (what is masked out may be nan);
    segments: i32[B,T], 0 padding, 1..num_segments from left to right; pair k is segments 2k-1 (chosen) and 2k
    (rejected), and its other side missing counts 0 tokens. Raises ValueError on an odd num_segments, unequal shapes,
    or alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ld_sums: alpha must be from 0 to 1, not {alpha}")
    if num_segments % 2:
        raise ValueError(f"ld_sums: num_segments must be even, two a pair, not {num_segments}")
    if not logprobs.shape == mask.shape == segments.shape:
        raise ValueError(
            f"ld_sums: logprobs {logprobs.shape}, mask {mask.shape} and segments {segments.shape} differ in shape"
        )
    counted = mask.astype(jnp.int32) * (segments > 0)
    lengths = segment_sums(counted, segments, num_segments)[:, 1:]
    shared = jnp.repeat(jnp.min(lengths.reshape(len(lengths), -1, 2), axis=-1), 2, axis=-1)
    last = jnp.cumsum(lengths, axis=1) - lengths + shared  # count of the row's completion tokens at the shared length
    last = jnp.take_along_axis(jnp.pad(last, ((0, 0), (1, 0))), segments, axis=1)
    scale = jnp.where(jnp.cumsum(counted, axis=1) <= last, 1.0, alpha)
    return segment_sums(jnp.where(counted > 0, scale * full(logprobs), 0), segments, num_segments)
