"""From OptimConfig to an optax transformation: AdamW, schedules, path-regex groups.

A path is the dotted name of a leaf, role included: "policy.blocks.0.attn.q". Schedules follow Hugging Face's (and so
TRL's) step for step: update number t, counted from 0, uses the multiplier at t, which is 0 at t = 0 under warm-up.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import pydantic

from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, Fraction, NonNegFloat, NonNegInt, PosFloat, Str
from jaxpost.types import Array, Tree

# Norm weights and biases, as in Hugging Face's trainer; embeddings do decay. This default may match nothing (a LoRA
# tree has neither), a pattern typed by a user may not.
NO_DECAY = (r"(^|[._])(norm|bias)$",)

# Half a step of bfloat16 between two neighbours near 0.02, the size of a usual weight: AdamW moves a weight by about
# its learning rate, and what is below is rounded away.
BF16_HALF_STEP = 2.0**-15


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class OptimConfig:
    """Optimizer, its schedule, and which parameters it moves."""

    name: Literal["adamw"] = "adamw"
    learning_rate: PosFloat = 1e-5  # the peak
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PosFloat = 1e-8  # added outside the square root
    weight_decay: NonNegFloat = 0.0  # decoupled: multiplied by the learning rate, as in torch
    no_decay: tuple[Str, ...] = NO_DECAY  # path regexes that weight decay leaves alone
    freeze: tuple[Str, ...] = ()  # path regexes that get no update and no optimizer state
    clip_norm: PosFloat | None = 1.0  # global norm of the trained leaves; null: off
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: NonNegInt = 0  # linear from 0
    decay_steps: NonNegInt = 0  # wsd: length of the final decay
    decay_shape: Literal["cosine", "linear", "sqrt"] = "cosine"  # wsd: shape of it; sqrt is 1 - sqrt(progress)
    min_lr_ratio: Fraction = 0.0  # the decay ends at this share of the peak

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.b1 >= 1 or self.b2 >= 1:
            raise ValueError("optim.b1, optim.b2: must be below 1")
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("optim.decay_steps: schedule wsd needs at least 1")
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"optim.decay_steps: used by schedule wsd only, not by {self.schedule}")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("optim.min_lr_ratio: schedule constant has no decay")
        for key in ("no_decay", "freeze"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"optim.{key}: {pattern!r} is not a regular expression: {error}") from None
        return self


def make_schedule(config: OptimConfig, total_steps: int) -> Callable[[Array | int], Array]:
    """Learning rate f32[] of update t = 0, 1, ...; past total_steps it stays where it ended.

    With p = (t - warmup) / (total - warmup) in [0, 1]: linear 1 - p; cosine (1 + cos(pi p)) / 2; wsd 1 until the last
    decay_steps, then decay_shape over them. The result f becomes f (1 - min_lr_ratio) + min_lr_ratio, then times the
    peak. Warm-up always rises from 0 (Hugging Face's wsd starts it at min_lr_ratio).
    """
    warmup, decay = config.warmup_steps, config.decay_steps
    if config.schedule != "constant" and warmup + decay > total_steps:
        raise ConfigError(
            f"optim: warmup_steps {warmup} + decay_steps {decay} are more than the run's {total_steps} steps"
        )
    shapes = {
        "constant": lambda p: jnp.ones_like(p),
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + jnp.cos(jnp.pi * p)),
        "sqrt": lambda p: 1 - jnp.sqrt(p),
    }
    wsd = config.schedule == "wsd"
    shape = shapes[config.decay_shape if wsd else config.schedule]
    start = total_steps - decay if wsd else warmup
    length = max(1, total_steps - start)

    def schedule(step: Array | int) -> Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - start) / length, 0, 1)
        decayed = shape(progress) * (1 - config.min_lr_ratio) + config.min_lr_ratio
        return config.learning_rate * jnp.where(step < warmup, step / max(1, warmup), decayed)

    return schedule


def leaf_paths(tree: Tree) -> list[str]:
    """Dotted path of every leaf, in flattening order."""
    return [dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def dotted(path: tuple) -> str:
    """A jax key path as "policy.blocks.0.attn.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _match(patterns: tuple[str, ...], params: Tree, key: str, must_match: bool) -> Tree:
    """Tree of bool: does any pattern match the leaf's path?"""
    paths = leaf_paths(params)
    for pattern in patterns if must_match else ():
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
            raise ConfigError(f"optim.{key}: {pattern!r} matches no parameter; the nearest are {', '.join(near)}")
    hits = [any(re.search(pattern, path) for pattern in patterns) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), hits)


def trainable_mask(config: OptimConfig, params: Tree) -> Tree:
    """Tree of bool, False where a freeze pattern matches; ConfigError for a pattern without a match or nothing left."""
    mask = jax.tree.map(lambda frozen: not frozen, _match(config.freeze, params, "freeze", must_match=True))
    if not jax.tree.leaves(mask):
        raise ConfigError("lora.rank: 0 leaves nothing to train")
    if not any(jax.tree.leaves(mask)):
        raise ConfigError(f"optim.freeze: {', '.join(config.freeze)} leave nothing to train")
    return mask


def decay_mask(config: OptimConfig, params: Tree) -> Tree:
    """Tree of bool, True where weight decay applies."""
    spared = _match(config.no_decay, params, "no_decay", must_match=config.no_decay != NO_DECAY)
    return jax.tree.map(lambda spare: not spare, spared)


def make_optimizer(
    config: OptimConfig, total_steps: int, params: Tree
) -> tuple[optax.GradientTransformation, Callable[[Array | int], Array]]:
    """(transformation, schedule) for a tree of arrays or ShapeDtypeStructs. Clipping is the step's (it needs the norm).

    The transformation counts applied updates: the learning rate of the next one is schedule(steps - refused updates).
    Moments are fp32 whatever the parameters are; frozen leaves have none.
    """
    trained = trainable_mask(config, params)
    _refuse_lost_updates(config, params, trained)
    schedule = make_schedule(config, total_steps)
    tx = _in_float32(
        optax.chain(
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, decay_mask(config, params)),
            optax.scale_by_learning_rate(schedule),
        )
    )
    if all(jax.tree.leaves(trained)):
        return tx, schedule
    labels = jax.tree.map(lambda train: "trained" if train else "frozen", trained)
    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels), schedule


def _refuse_lost_updates(config: OptimConfig, params: Tree, trained: Tree) -> None:
    """bf16 master weights swallow updates below half a step: refused rather than trained in vain."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(trained), strict=True)
    if config.learning_rate < BF16_HALF_STEP and any(leaf.dtype == jnp.bfloat16 and train for leaf, train in pairs):
        raise ConfigError(
            f"optim.learning_rate: updates of {config.learning_rate:g} vanish in bfloat16 weights (half a step near "
            f"0.02 is {BF16_HALF_STEP:.1g}); keep master weights with model.param_dtype=float32"
        )


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """tx whose state, gradients and parameters are fp32; apply_updates then rounds once, to the parameter's dtype."""

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params):
        return tx.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)
