"""What the losses over units (pairs, examples, rankings) share: weights, absent units, the logistic term, checks."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

EXP_LIMIT = 20.0  # log-ratios are clamped at plus and minus this before exp


class PairLogprobs(NamedTuple):
    """Of each pair, summed over the completion's tokens, the prompt left out."""

    chosen: jax.Array  # f32[P], sum of logprobs, natural log
    rejected: jax.Array  # f32[P]
    chosen_len: jax.Array  # f32[P], number of tokens
    rejected_len: jax.Array  # f32[P]


def present(
    name: str, weights: jax.Array | None, **arrays: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Weights [P], which units are present bool[P], and the arrays [P] with 0 in place of what an absent unit holds.

    weights None: 1/P each. A unit of weight 0 is absent; its entries are replaced here, before any arithmetic, so that
    nan or inf in them reaches neither the value nor the gradient. Floats become fp32 (fp64 stays). Raises ValueError
    where the arrays are not vectors of one length.
    """
    arrays = {key: jnp.asarray(value) for key, value in arrays.items()}
    shape = next(iter(arrays.values())).shape
    if weights is None:
        weights = jnp.full(shape, 1.0 / max(math.prod(shape), 1))
    weights = jnp.asarray(weights)
    shapes = {key: value.shape for key, value in (*arrays.items(), ("weights", weights))}
    if len(shape) != 1 or len(set(shapes.values())) > 1:
        listed = ", ".join(f"{key} {value}" for key, value in shapes.items())
        raise ValueError(f"{name}: needs one number a unit, vectors of one length; got {listed}")
    kept = weights != 0
    return full(weights), kept, {key: jnp.where(kept, full(value), 0) for key, value in arrays.items()}


def full(x: jax.Array) -> jax.Array:
    """At least fp32; booleans and integers too."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def weigh(values: jax.Array, weights: jax.Array, kept: jax.Array, reduce: bool) -> jax.Array:
    """sum_i w_i * v_i over the units that are present; reduce=False: its terms [P]."""
    terms = jnp.where(kept, weights * values, 0)
    return jnp.sum(terms) if reduce else terms


def logistic(x: jax.Array, label_smoothing: float | jax.Array = 0.0) -> jax.Array:
    """-(1-e) * logsig(x) - e * logsig(-x): the cross-entropy of a label that is flipped with probability e."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(x) - label_smoothing * jax.nn.log_sigmoid(-x)


def clamped(x: jax.Array) -> jax.Array:
    """x within plus and minus EXP_LIMIT, for use under exp; the gradient beyond is 0."""
    return jnp.clip(x, -EXP_LIMIT, EXP_LIMIT)


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x <= 0, by the branch at -ln 2 (Maechler 2012).

    x is held below -2^-24: the fp32 probability 1 - 2^-24 is the last one below 1, and the slope 1/(1-exp(-x)) beyond
    it is unbounded, so that one sequence of probability 1 would overflow the norm of the whole gradient.
    """
    x = jnp.minimum(x, -(2.0**-24))
    small = x > -math.log(2)
    near = jnp.log(-jnp.expm1(jnp.where(small, x, -1.0)))  # each branch sees only its own side: no nan in the gradient
    far = jnp.log1p(-jnp.exp(jnp.where(small, -1.0, x)))
    return jnp.where(small, near, far)


def pair_metrics(
    chosen_reward: jax.Array, rejected_reward: jax.Array, chosen_lp: jax.Array, rejected_lp: jax.Array
) -> dict[str, jax.Array]:
    """What every preference method logs, one number a pair, without gradient."""
    found = {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": full(chosen_reward > rejected_reward),
        "logps/chosen": chosen_lp,
        "logps/rejected": rejected_lp,
    }
    return {key: jax.lax.stop_gradient(value) for key, value in found.items()}


def check_choice(name: str, field: str, value: object, options: Iterable[str]) -> None:
    """Raises ValueError, with the nearest option, where value is none of them."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(str(value)[:80], options, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {field} {value!r} is not one of {', '.join(options)}{hint}")


def check_positive(name: str, field: str, value: float) -> None:
    """Raises ValueError unless value is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: {field} must be above 0 and finite, not {value}")


def check_smoothing(name: str, value: float) -> None:
    """Raises ValueError unless 0 <= value <= 0.5."""
    if not 0 <= value <= 0.5:
        raise ValueError(
            f"{name}: label_smoothing is the probability that a label is wrong: from 0 to 0.5, not {value}; "
            "where labels are wrong more often than right, swap chosen and rejected"
        )
