"""Preferences from single labelled examples: KTO and the unpaired form of APO-zero."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxpost.losses.units import check_choice, check_positive, present, weigh

KINDS = ("kto", "apo_zero_unpaired")


def kto_loss(
    policy_logps: jax.Array,
    ref_logps: jax.Array,
    labels: jax.Array,
    z: float | jax.Array,
    *,
    kind: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: jax.Array | None = None,
    reduce: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum over examples, r = policy_logps - ref_logps.

        kto (2402.01306):               desirable: D * (1 - sig(b (r - z)));   undesirable: U * (1 - sig(b (z - r)))
        apo_zero_unpaired (2408.06266): the same with z = 0

    policy_logps, ref_logps: f32[E], sums over the completion; the reference gets no gradient. labels: bool[E], True is
    desirable. z: scalar, `kto_z` of the whole global batch, a constant here: taken of a part, the loss would depend on
    how the batch is split. weights: f32[E] unit weights, already normalised; None means 1/E; 0 removes an example
    whatever it holds. reduce=False gives the terms f32[E].

    Metrics, one number an example and without gradient: rewards (b * r) and logps; under weights * labels and
    weights * ~labels they give rewards/chosen, rewards/rejected and so on. Raises ValueError on an unknown kind,
    unequal shapes, a z that is not one number, and numbers out of range.
    """
    check_choice("kto_loss", "kind", kind, KINDS)
    check_positive("kto_loss", "beta", beta)
    for name, value in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"kto_loss: {name} must be finite and not below 0, not {value}")
    if jnp.shape(z) != ():
        raise ValueError(f"kto_loss: z is one number for the whole batch (kto_z gives it), not shape {jnp.shape(z)}")
    given = {"policy_logps": policy_logps, "ref_logps": ref_logps, "labels": labels}
    weights, kept, x = present("kto_loss", weights, **given)
    ratio = x["policy_logps"] - jax.lax.stop_gradient(x["ref_logps"])
    gain = beta * (ratio - (jax.lax.stop_gradient(z) if kind == "kto" else 0.0))
    desirable = x["labels"] != 0
    values = jnp.where(desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain))
    metrics = {"rewards": beta * ratio, "logps": x["policy_logps"]}
    return weigh(values, weights, kept, reduce), jax.lax.stop_gradient(metrics)


def kto_z(policy_twin_logps: jax.Array, ref_twin_logps: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """max(0, sum w (lp_policy - lp_ref) / sum w) over mismatched twins: the KL term of KTO (2402.01306, eq. 8).

    f32[E] each, sums over the twin's completion, of the *whole global batch*; no gradient. Here alone a loss's helper
    divides: the mean is clamped at 0, so that parts of it cannot be added. A twin of weight 0 is left out whatever it
    holds; no twin at all gives 0. Raises ValueError on unequal shapes.
    """
    given = {"policy_twin_logps": policy_twin_logps, "ref_twin_logps": ref_twin_logps}
    weights, kept, x = present("kto_z", weights, **given)
    total = jnp.sum(weights)
    gap = weigh(x["policy_twin_logps"] - x["ref_twin_logps"], weights, kept, reduce=True)
    mean = gap / jnp.where(total > 0, total, 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0))
