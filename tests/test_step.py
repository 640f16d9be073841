"""Slow copies by hand; refused updates, non-finite ones and spikes, move nothing."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpost.algos.base import SlowRule
from jaxpost.step import _move, init_state, make_step


@dataclasses.dataclass(frozen=True)
class Constant:
    """Stands for any algorithm: d loss / d w is the batch itself."""

    slow: ClassVar = {"a": SlowRule("a", decay=0.75), "b": SlowRule("b", every=2)}

    def prepare(self, apply, state, frozen, batch):
        return batch, state.scalars

    def loss(self, apply, params, frozen, batch, rng):
        return jnp.sum(batch) * (params["a"] + params["b"]), {}


class WithoutSlow(Constant):
    slow: ClassVar = {}


def test_slow_copies_by_hand():
    tx = optax.sgd(1.0)
    step = jax.jit(make_step(Constant(), None, tx))
    state = init_state({"a": jnp.float32(0), "b": jnp.float32(0)}, tx, Constant.slow)
    seen = []
    for value in (1.0, 1.0, np.nan, 1.0):  # w: -1, -2, refused, -3
        state, metrics = step(state, {}, jnp.array([value]))
        seen.append((float(state.params["a"]), float(state.slow["a"]), float(state.slow["b"])))
    np.testing.assert_allclose(seen, [(-1, -0.25, 0), (-2, -0.6875, -2), (-2, -0.6875, -2), (-3, -1.265625, -3)])
    assert int(state.step) == 4 and int(metrics["skipped_steps"]) == 1
    assert int(metrics["skipped_in_a_row"]) == 0 and int(metrics["most_skipped_in_a_row"]) == 1


def test_an_average_of_bf16_weights_is_fp32():
    """0.001 of a change is below what bf16 can hold: an average kept in bf16 would stand still."""
    rules = {"a": SlowRule("a", decay=0.999), "b": SlowRule("b", every=1)}
    params = {role: jnp.ones((), jnp.bfloat16) for role in rules}
    slow = init_state(params, optax.sgd(1.0), rules).slow
    assert slow["a"].dtype == jnp.float32 and slow["b"].dtype == jnp.bfloat16
    moved = _move(rules["a"], slow["a"], params["a"] * 2, jnp.int32(1))
    np.testing.assert_allclose(moved, 1.001, rtol=1e-6)


def test_a_spike_is_refused_and_costs_nothing_else():
    tx = optax.sgd(1e-3)
    values = [*(1 + 0.1 * np.sin(np.arange(40))), 100.0, 1.0, np.inf, 1.1]

    def run(values, sigma):
        step = jax.jit(make_step(WithoutSlow(), None, tx, skip_spikes=sigma))
        state = init_state({"a": jnp.float32(2), "b": jnp.float32(3)}, tx, {}, skip_spikes=sigma)
        weights, skipped = [], []
        for value in values:
            state, metrics = step(state, {}, jnp.array([value]))
            weights.append(float(state.params["a"]))
            skipped.append(int(metrics["skipped_steps"]))
        return weights, skipped

    weights, skipped = run(values, 6.0)
    assert skipped[:40] == [0] * 40 and skipped[40:] == [1, 1, 2, 2]
    assert weights[40] == weights[39] and weights[41] < weights[40]
    calm = [value for value in values if value < 2]
    assert run(calm, 6.0)[0] == run(calm, None)[0] == weights[:40] + [weights[41], weights[43]]
    assert run(values[:41], None)[1][-1] == 0  # off: the same spike is applied
