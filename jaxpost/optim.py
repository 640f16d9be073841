"""From OptimConfig to an optax transformation: optimisers, schedules, path-regex groups.

Schedules follow Hugging Face's (and so TRL's) step for step: update number t, counted from 0, uses the multiplier at t,
which is 0 at t = 0 under warm-up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic

from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, Fraction, NonNegFloat, NonNegInt, PosFloat, Str
from jaxpost.groups import GroupConfig, lr_factors
from jaxpost.leaves import check_pattern, is_layer_matrix, is_stacked, leaf_paths, matching
from jaxpost.types import Array, Tree
from jaxpost.updates import MUON_RMS, add_decay, multiply, narrow, scale_by_adafactor, scale_by_muon

# Norm weights and biases, as in Hugging Face's trainer; embeddings do decay. This default may match nothing (a LoRA
# tree has neither), a pattern typed by a user may not.
NO_DECAY = (r"(^|[._])(norm|bias)$",)

# Half a step of bfloat16 between two neighbours near 0.02, the size of a usual weight: AdamW moves a weight by about
# its learning rate, and what is below is rounded away.
BF16_HALF_STEP = 2.0**-15

# Who reads the fields that not everybody reads: away from its default, a field is refused for the others.
USED_BY = {
    "b1": ("adamw", "lion", "muon"),
    "b2": ("adamw", "muon"),
    "eps": ("adamw", "muon"),
    "momentum": ("lion", "muon", "sgd"),
    "first_moment_dtype": ("adamw", "lion", "muon", "sgd"),
}
MOMENTUM = {"lion": 0.99, "muon": 0.95, "sgd": 0.0}  # where the config says null


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class OptimConfig:
    """Optimizer, its schedule, and which parameters it moves."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"  # muon: layer matrices; the rest gets adamw
    learning_rate: PosFloat = 1e-5  # the peak
    b1: Fraction = 0.9  # of adamw, lion, and the adamw part of muon
    b2: Fraction = 0.999  # of adamw and the adamw part of muon
    eps: PosFloat = 1e-8  # added outside the square root, of adamw and the adamw part of muon
    momentum: Fraction | None = None  # null: sgd none, muon 0.95, lion 0.99 (the beta2 of its paper)
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"  # what b1 or momentum average rests in this dtype
    weight_decay: NonNegFloat = 0.0  # decoupled: multiplied by the learning rate, as in torch's AdamW
    no_decay: tuple[Str, ...] = NO_DECAY  # path regexes that weight decay leaves alone
    freeze: tuple[Str, ...] = ()  # path regexes that get no update and no optimizer state
    groups: tuple[GroupConfig, ...] = ()  # learning rates by path and layer; the first match wins
    lr_layer_decay: Fraction | None = None  # a layer's learning rate is this share of the next one's (2106.08254)
    lora_plus_ratio: PosFloat | None = None  # times the learning rate of the adapters' b (LoRA+, 2402.12354)
    clip_norm: PosFloat | None = 1.0  # global norm of the trained leaves; null: off
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: NonNegInt = 0  # linear from 0
    decay_steps: NonNegInt = 0  # wsd: length of the final decay
    decay_shape: Literal["cosine", "linear", "sqrt"] = "cosine"  # wsd: shape of it; sqrt is 1 - sqrt(progress)
    min_lr_ratio: Fraction = 0.0  # the decay ends at this share of the peak

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.b1 >= 1 or self.b2 >= 1 or self.momentum == 1:
            raise ValueError("optim.b1, optim.b2, optim.momentum: must be below 1")
        self._refuse_unread()
        if self.lr_layer_decay == 0:
            raise ValueError("optim.lr_layer_decay: 0 would stop every layer; give optim.groups or optim.freeze")
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("optim.decay_steps: schedule wsd needs at least 1")
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(f"optim.decay_steps: used by schedule wsd only, not by {self.schedule}")
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("optim.min_lr_ratio: schedule constant has no decay")
        for key in ("no_decay", "freeze"):
            for pattern in getattr(self, key):
                check_pattern(f"optim.{key}", pattern)
        return self

    def _refuse_unread(self) -> None:
        """A field that the optimiser does not read is a mistake, not a wish to be passed over."""
        for field in dataclasses.fields(self):
            users = USED_BY.get(field.name, (self.name,))
            if self.name not in users and getattr(self, field.name) != field.default:
                hint = "; its beta2 is optim.momentum" if (field.name, self.name) == ("b2", "lion") else ""
                raise ValueError(f"optim.{field.name}: used by {', '.join(users)}, not by {self.name}{hint}")
        if self.name == "sgd" and not self.momentum and self.first_moment_dtype != "float32":
            raise ValueError("optim.first_moment_dtype: sgd without optim.momentum keeps no moment")


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


def trainable_mask(config: OptimConfig, params: Tree) -> Tree:
    """Tree of bool, False where a freeze pattern matches; ConfigError for a pattern without a match or nothing left."""
    mask = [not frozen for frozen in matching(config.freeze, params, "freeze")]
    if not mask:
        raise ConfigError("lora.rank: 0 leaves nothing to train")
    if not any(mask):
        raise ConfigError(f"optim.freeze: {', '.join(config.freeze)} leave nothing to train")
    return jax.tree.unflatten(jax.tree.structure(params), mask)


def decay_mask(config: OptimConfig, params: Tree) -> Tree:
    """Tree of bool, True where weight decay applies."""
    spared = matching(config.no_decay, params, "no_decay", must_match=config.no_decay != NO_DECAY)
    return jax.tree.unflatten(jax.tree.structure(params), [not spare for spare in spared])


def make_optimizer(
    config: OptimConfig, total_steps: int, params: Tree
) -> tuple[optax.GradientTransformation, Callable[[Array | int], Array]]:
    """(transformation, schedule) for role -> tree of arrays or ShapeDtypeStructs. Clipping is the step's: it needs the
    norm.

    The transformation counts applied updates: the learning rate of the next one is schedule(steps - refused updates).
    Its state is fp32 whatever the parameters are, but for first moments under optim.first_moment_dtype; frozen leaves
    have none.
    """
    trained = trainable_mask(config, params)
    factors, decays = lr_factors(
        config.groups,
        params,
        decay_mask(config, params),
        weight_decay=config.weight_decay,
        layer_decay=config.lr_layer_decay,
        lora_plus_ratio=config.lora_plus_ratio,
    )
    _refuse_lost_updates(config, params, trained, factors)
    schedule = make_schedule(config, total_steps)
    kept = lambda tree: jax.tree.map(lambda keep, leaf: leaf if keep else optax.MaskedNode(), trained, tree)
    parts = [  # a part's place is in the names of its state in checkpoints: new ones go last
        _update_rule(config, kept(_path_tree(params))),
        add_decay(kept(decays)),
        optax.scale_by_learning_rate(schedule),
        multiply(kept(factors)),
    ]
    tx = _in_float32(optax.chain(*parts))
    if all(jax.tree.leaves(trained)):
        return tx, schedule
    labels = jax.tree.map(lambda train: "trained" if train else "frozen", trained)
    return optax.multi_transform({"trained": tx, "frozen": optax.set_to_zero()}, labels), schedule


def _path_tree(params: Tree) -> Tree:
    """The dotted path of each leaf, in its place."""
    return jax.tree.unflatten(jax.tree.structure(params), leaf_paths(params))


def _update_rule(config: OptimConfig, paths: Tree) -> optax.GradientTransformation:
    """From gradients to updates for a learning rate of 1, before weight decay. paths: of every trained leaf."""
    dtype = jnp.dtype(config.first_moment_dtype)
    momentum = MOMENTUM.get(config.name) if config.momentum is None else config.momentum
    adam = narrow(optax.scale_by_adam(config.b1, config.b2, config.eps), "mu", dtype)
    if config.name == "adamw":
        return adam
    if config.name == "adafactor":
        return scale_by_adafactor(jax.tree.map(is_stacked, paths))
    if config.name == "lion":  # 2302.06675
        return narrow(optax.scale_by_lion(config.b1, momentum), "mu", dtype)
    if config.name == "sgd":
        return narrow(optax.trace(momentum), "trace", dtype) if momentum else optax.identity()

    def labels(updates: Tree) -> Tree:
        return jax.tree.map(lambda path, x: "muon" if is_layer_matrix(path, x.ndim) else "adamw", paths, updates)

    return optax.multi_transform({"muon": scale_by_muon(momentum, dtype), "adamw": adam}, labels)


def _refuse_lost_updates(config: OptimConfig, params: Tree, trained: Tree, factors: Tree) -> None:
    """bf16 master weights swallow updates below half a step: refused rather than trained in vain.

    AdamW, Lion and Adafactor move a weight by about the learning rate, Muon those of a matrix by a fifth of it. SGD's
    updates are as small as its gradients, which nobody knows beforehand: it is always refused. A layer whose factor is
    0 is not meant to move.
    """
    advice = "keep master weights with model.param_dtype=float32"
    leaves = map(jax.tree.leaves, (_path_tree(params), params, trained, factors))
    for path, leaf, train, factor in zip(*leaves, strict=True):
        if leaf.dtype != jnp.bfloat16 or not train:
            continue
        if config.name == "sgd":
            raise ConfigError(f"optim.name: sgd's updates are as small as its gradients; bfloat16 loses them; {advice}")
        matrix = config.name == "muon" and is_layer_matrix(path, leaf.ndim)
        sizes = np.atleast_1d(factor) * (MUON_RMS if matrix else 1.0) * config.learning_rate
        lost = sizes[(sizes > 0) & (sizes < BF16_HALF_STEP)]
        if lost.size:
            raise ConfigError(
                f"optim.learning_rate: updates of {lost.min():g} vanish in bfloat16 weights such as {path} (half a "
                f"step near 0.02 is {BF16_HALF_STEP:.1g}); {advice}"
            )


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """tx whose state, gradients and parameters are fp32; apply_updates then rounds once, to the parameter's dtype."""

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates, state, params):
        return tx.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)
