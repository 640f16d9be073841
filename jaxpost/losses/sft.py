"""Supervised fine-tuning."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

KINDS = ("nll", "dft")


def sft_loss(
    logprobs: jax.Array,
    weights: jax.Array,
    *,
    kind: Literal["nll", "dft"] = "nll",
    reduce: bool = True,
    z_loss: float = 0.0,
    lse: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted negative log-likelihood of target tokens.

        nll: sum_t w_t * -lp_t
        dft: sum_t w_t * -sg(exp(lp_t)) * lp_t        (dynamic fine-tuning, 2508.05629)

    and, with z_loss z, + sum_t w_t * z * lse_t^2: it holds the softmax's normaliser near 1 (PaLM, 2204.02311).

    logprobs: f32[...] natural log; weights: f32[...] of the same shape, already normalised (the loss never divides);
    lse: f32[...] log-sum-exp of the logits, needed by z_loss. A weight of 0 removes a token: no value and no gradient,
    even where its logprob is nan or inf. reduce=False gives the per-token weighted terms. Raises ValueError on an
    unknown kind, unequal shapes, or z_loss without lse.
    """
    if kind not in KINDS:
        raise ValueError(f"sft_loss: kind {kind!r} is not one of {', '.join(KINDS)}")
    if logprobs.shape != weights.shape:
        raise ValueError(f"sft_loss: logprobs {logprobs.shape} and weights {weights.shape} differ in shape")
    if z_loss and (lse is None or lse.shape != weights.shape):
        raise ValueError(
            f"sft_loss: z_loss needs lse of shape {weights.shape}, got {None if lse is None else lse.shape}"
        )
    kept = weights != 0
    lp = jnp.where(kept, logprobs.astype(jnp.float32), 0.0)  # before any product: 0 * nan is nan
    scale = jax.lax.stop_gradient(jnp.exp(lp)) if kind == "dft" else 1.0
    terms = jnp.where(kept, -weights * scale * lp, 0.0)
    if z_loss:
        terms = terms + weights * z_loss * jnp.where(kept, lse.astype(jnp.float32), 0.0) ** 2
    return (jnp.sum(terms) if reduce else terms), {}
