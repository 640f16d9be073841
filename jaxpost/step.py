"""The train step: prepare, gradients over micro-batches, clip, update, and a guard against non-finite updates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpost import spikes
from jaxpost.types import Array, Batch, Frozen, Mean, Metrics, Stream, TrainState

scope = jax.named_scope  # the parts of a step by name, in HLO and in profiles; decoder.py and ops/logprobs.py go on
COUNTERS = ("skipped_steps", "skipped_in_a_row", "most_skipped_in_a_row")


def init_state(
    params: dict,
    tx: optax.GradientTransformation,
    slow: dict,
    *,
    scalars: dict[str, Array] | None = None,
    skip_spikes: float | None = None,
) -> TrainState:
    """A state at step 0. slow: role -> SlowRule; each slow copy starts as a copy of the role's weights.

    An average is fp32 whatever the weights are: it moves by less than bf16 can hold. scalars: the algorithm's own;
    skip_spikes: make_step's.
    """

    def copy(rule: Any, x: Array) -> Array:
        return jnp.copy(x) if rule.decay is None else jnp.copy(x).astype(jnp.float32)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        slow={role: jax.tree.map(partial(copy, rule), params[role]) for role, rule in slow.items()},
        scalars={name: jnp.zeros((), jnp.int32) for name in COUNTERS}
        | ({} if skip_spikes is None else spikes.start())
        | (scalars or {}),
    )


def make_step(
    algorithm: Any,
    apply: Any,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    schedule: Callable[[Array], Array] | None = None,
    clip_norm: float | None = None,
    trainable: Any = None,
    seed: int = 0,
    stochastic: bool = False,
    skip_spikes: float | None = None,
) -> Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]:
    """(state, frozen, batch) -> (state, metrics): pure, to be jitted with the state donated.

    Weights are normalised over the whole batch before it is split, so micro_batches changes rounding only. An update
    whose loss or gradient norm is not finite is not applied and counted in state.scalars; state.step advances all the
    same. schedule: the optimiser's, only to report its value. trainable: a tree of bools like params; the gradient of a
    leaf marked False is dropped before the norm is taken. stochastic: hand the loss a key, folded from (seed, step,
    micro-batch); else its rng is None. skip_spikes: updates whose loss or norm lies that many standard deviations above
    the last ones' (spikes.py) are not applied either.
    """

    def train_step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        with scope("prepare"):
            batch, scalars = algorithm.prepare(apply, state, frozen, batch)
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), Stream.DROPOUT), state.step)

        def value_and_grad(part: Batch, number: Array) -> tuple[Any, Metrics]:
            key = jax.random.fold_in(rng, number) if stochastic else None
            loss = scope("loss")(lambda params: algorithm.loss(apply, params, frozen, part, key))
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)  # bf16 sums would lose micro-batches
            return wide, {"loss": value, **metrics}

        grads, metrics = _accumulate(value_and_grad, batch, micro_batches)
        with scope("clip"):
            if trainable is not None:
                grads = jax.tree.map(lambda wanted, g: g if wanted else jnp.zeros_like(g), trainable, grads)
            norm = optax.global_norm(grads)
            scale = 1.0 if clip_norm is None else jnp.minimum(1.0, clip_norm / (norm + 1e-6))  # as in torch
            grads = jax.tree.map(lambda g: g * scale, grads)
        with scope("update"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        with scope("guard"):
            good = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
            if skip_spikes is not None:
                good &= spikes.is_calm(state.scalars, metrics["loss"], norm, skip_spikes)
                scalars = scalars | spikes.remember(state.scalars, metrics["loss"], norm)
            params, opt_state, scalars = _keep_if(
                good, (params, opt_state, scalars), (state.params, state.opt_state, state.scalars)
            )
            skipped = state.scalars["skipped_steps"] + ~good
            in_a_row = jnp.where(good, 0, state.scalars["skipped_in_a_row"] + 1)
            most = jnp.maximum(state.scalars["most_skipped_in_a_row"], in_a_row)  # so that a log step misses none
            counters = dict(zip(COUNTERS, (skipped, in_a_row, most), strict=True))
            slow = {
                role: _keep_if(good, _move(rule, state.slow[role], params[role], state.step + 1), state.slow[role])
                for role, rule in algorithm.slow.items()
            }
        new = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            slow=slow,
            scalars=scalars | counters,
        )
        metrics = {name: value.value if isinstance(value, Mean) else value for name, value in metrics.items()}
        metrics |= counters | {"grad_norm": norm}
        if schedule is not None:
            metrics["learning_rate"] = schedule(state.step - state.scalars["skipped_steps"])
        return new, metrics

    return train_step


def _accumulate(value_and_grad: Callable, batch: Batch, micro_batches: int) -> tuple[Any, Metrics]:
    """Sum gradients and metrics over micro-batches. Each takes rows from every device: nothing is resharded."""
    if micro_batches == 1:
        return value_and_grad(batch, jnp.zeros((), jnp.int32))
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, scanned: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(*scanned)), None

    numbers = jnp.arange(micro_batches)
    shapes = jax.eval_shape(value_and_grad, jax.tree.map(lambda x: x[0], parts), numbers[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, numbers))[0]


def _keep_if(good: Array, new: Any, old: Any) -> Any:
    """new where good, else old, element by element (a branch would copy the state)."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def _move(rule: Any, slow: Any, params: Any, step: Array) -> Any:
    """A slow copy after one step: an EMA, or a copy every k steps (see SlowRule)."""
    if rule.decay is not None:
        return jax.tree.map(lambda s, p: rule.decay * s + (1 - rule.decay) * p.astype(s.dtype), slow, params)
    return jax.tree.map(lambda s, p: jnp.where(step % rule.every == 0, p, s), slow, params)
