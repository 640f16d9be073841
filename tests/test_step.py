"""Slow copies: an EMA and a copy every k steps follow by hand, and a refused update moves neither."""

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
