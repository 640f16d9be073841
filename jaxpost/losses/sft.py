"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

KINDS = ("nll", "dft")


def sft_loss(
    logprobs: jax.Array, weights: jax.Array, *, kind: Literal["nll", "dft"] = "nll", reduce: bool = True
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted negative log-likelihood of target tokens.

        nll: sum_t w_t * -lp_t
        dft: sum_t w_t * -sg(exp(lp_t)) * lp_t        (dynamic fine-tuning, 2508.05629)

    logprobs: f32[...] natural log; weights: f32[...] of the same shape, already normalised (the loss never divides). A
    weight of 0 removes a token: no value and no gradient, even where its logprob is nan or inf. reduce=False gives the
    per-token weighted terms. Raises ValueError on an unknown kind or unequal shapes. Left out: z-loss.
    """
    if kind not in KINDS:
        raise ValueError(f"sft_loss: kind {kind!r} is not one of {', '.join(KINDS)}")
    if logprobs.shape != weights.shape:
        raise ValueError(f"sft_loss: logprobs {logprobs.shape} and weights {weights.shape} differ in shape")
    kept = weights != 0
    lp = jnp.where(kept, logprobs.astype(jnp.float32), 0.0)  # before any product: 0 * nan is nan
    scale = jax.lax.stop_gradient(jnp.exp(lp)) if kind == "dft" else 1.0
    terms = jnp.where(kept, -weights * scale * lp, 0.0)
    return (jnp.sum(terms) if reduce else terms), {}
