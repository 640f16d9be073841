"""Which updates are spikes: a loss or a gradient norm far above those of the last applied updates (as OLMo 2 does)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpost.types import Array

WINDOW = 128  # applied updates that are looked back on
FEWEST = 16  # before that many, nothing is a spike
LEAST = 0.01  # a deviation counts as at least this share of the mean: equal values would make a spike of anything


def start() -> dict[str, Array]:
    """The memory before the first update, for TrainState.scalars: f32[WINDOW] each, nan where nothing is known yet."""
    return {name: jnp.full(WINDOW, jnp.nan) for name in ("recent_loss", "recent_grad_norm")}


def is_calm(memory: dict[str, Array], loss: Array, grad_norm: Array, sigma: float) -> Array:
    """bool[]: are both at most `sigma` standard deviations above their mean over the memory?"""
    return _within(memory["recent_loss"], loss, sigma) & _within(memory["recent_grad_norm"], grad_norm, sigma)


def remember(memory: dict[str, Array], loss: Array, grad_norm: Array) -> dict[str, Array]:
    """The memory after an update that was applied."""
    new = {"recent_loss": loss, "recent_grad_norm": grad_norm}
    return {name: jnp.roll(memory[name], -1).at[-1].set(value) for name, value in new.items()}


def _within(recent: Array, value: Array, sigma: float) -> Array:
    mean, deviation = jnp.nanmean(recent), jnp.nanstd(recent)
    few = jnp.sum(~jnp.isnan(recent)) < FEWEST
    return few | (value <= mean + sigma * jnp.maximum(deviation, LEAST * jnp.abs(mean)))
