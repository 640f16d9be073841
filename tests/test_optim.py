"""AdamW against numpy, schedules against Hugging Face's closed forms, path groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
import pytest

from jaxpost.errors import ConfigError
from jaxpost.optim import (
    OptimConfig,
    decay_mask,
    leaf_paths,
    make_optimizer,
    make_schedule,
    trainable_mask,
)


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    layer = {"attn_norm": leaf(2, 3), "attn": {"q": leaf(2, 3, 3), "q_bias": leaf(2, 3)}}
    return {"policy": {"embed": leaf(5, 3), "blocks": {"0": layer}, "final_norm": leaf(3)}}


def gradients(step, tree):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype), tree)


def run(config, tree, steps, total=10):
    tx, _ = make_optimizer(config, total, tree)
    state = tx.init(tree)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients(step, tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def test_paths_are_dotted_names_with_the_role():
    assert leaf_paths(params()) == [
        "policy.blocks.0.attn.q",
        "policy.blocks.0.attn.q_bias",
        "policy.blocks.0.attn_norm",
        "policy.embed",
        "policy.final_norm",
    ]


def test_five_steps_equal_torch_adamw_in_numpy():
    config = OptimConfig(learning_rate=0.01, b1=0.9, b2=0.95, weight_decay=0.1, schedule="linear", warmup_steps=2)
    tree, state = run(config, params(), 5)
    decays = {"policy.blocks.0.attn.q", "policy.embed"}  # not norms, not biases
    start = dict(zip(leaf_paths(params()), jax.tree.leaves(params()), strict=True))
    for name, got in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        x, m, v = np.asarray(start[name], np.float64), 0.0, 0.0
        for t in range(5):
            grads = dict(zip(leaf_paths(tree), jax.tree.leaves(gradients(t, params())), strict=True))
            g = np.asarray(grads[name], np.float64)
            rate = 0.01 * (t / 2 if t < 2 else (10 - t) / 8)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            if name in decays:
                x = x * (1 - rate * 0.1)
            x = x - rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
        np.testing.assert_allclose(got, x, rtol=2e-6, atol=1e-7)


def hugging_face(kind, t, warmup, total, decay=0, floor=0.0, shape="cosine"):
    """The multipliers of transformers' get_*_schedule_with_warmup, written from their definition."""
    if t < warmup:
        return t / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "wsd":
        start = total - decay
        if t < start:
            return 1.0
        p = (t - start) / decay
        f = {"linear": 1 - p, "cosine": 0.5 * (1 + math.cos(math.pi * p)), "sqrt": 1 - math.sqrt(p)}[shape]
    elif kind == "linear":
        f = (total - t) / max(1, total - warmup)
    else:
        f = 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup)))
    return f * (1 - floor) + floor


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(
    "kind,shape", [("linear", ""), ("cosine", ""), ("wsd", "cosine"), ("wsd", "linear"), ("wsd", "sqrt")]
)
def test_schedules_equal_hugging_face_at_every_step(kind, shape, floor, warmup):
    decay = {"decay_steps": 9, "decay_shape": shape} if kind == "wsd" else {}
    config = OptimConfig(learning_rate=2e-4, schedule=kind, warmup_steps=warmup, min_lr_ratio=floor, **decay)
    schedule = make_schedule(config, 40)
    want = [2e-4 * hugging_face(kind, t, warmup, 40, 9, floor, shape) for t in range(41)]
    np.testing.assert_allclose([float(schedule(t)) for t in range(41)], want, rtol=1e-5, atol=1e-11)
    assert float(schedule(60)) == pytest.approx(want[-1], abs=1e-11)  # never rises again


def test_constant_schedule_warms_up_from_zero():
    schedule = make_schedule(OptimConfig(learning_rate=1.0, schedule="constant", warmup_steps=4), 4)
    assert [float(schedule(t)) for t in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_frozen_leaves_do_not_move_and_have_no_state():
    config = OptimConfig(learning_rate=0.1, freeze=("embed", r"attn\.q$"), weight_decay=0.1)
    tree, state = run(config, params(), 3)
    mask = trainable_mask(config, params())
    same = jax.tree.map(lambda a, b: bool((a == b).all()), tree, params())
    assert jax.tree.map(lambda moved: not moved, same) == mask
    trained = sum(x.size for x, keep in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True) if keep)
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 2 * trained  # mu and nu


def test_default_decay_spares_norms_and_biases_only_and_may_match_nothing():
    mask = decay_mask(OptimConfig(), params())
    spared = [path for path, decays in zip(leaf_paths(mask), jax.tree.leaves(mask), strict=True) if not decays]
    assert spared == ["policy.blocks.0.attn.q_bias", "policy.blocks.0.attn_norm", "policy.final_norm"]
    adapters = {"policy": {"blocks": {"0": {"attn": {"q": {"a": jnp.ones(2), "b": jnp.ones(2)}}}}}}
    assert all(jax.tree.leaves(decay_mask(OptimConfig(), adapters)))


@pytest.mark.parametrize("key", ["freeze", "no_decay"])
def test_a_pattern_without_a_match_is_refused_with_near_names(key):
    with pytest.raises(ConfigError, match=rf"optim.{key}: 'policy.embedd' matches no parameter.*policy\.embed"):
        make_optimizer(OptimConfig(**{key: ("policy.embedd",)}), 10, params())


def test_freezing_everything_is_refused():
    with pytest.raises(ConfigError, match="nothing to train"):
        make_optimizer(OptimConfig(freeze=("policy",)), 10, params())


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps 11"):
        make_schedule(OptimConfig(warmup_steps=11), 10)


def test_bf16_weights_get_fp32_moments_and_one_rounding():
    config = OptimConfig(learning_rate=0.01, schedule="constant")
    tree, state = run(config, params(jnp.bfloat16), 1)
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("float32")}
    start = params(jnp.bfloat16)["policy"]["embed"]
    grads = gradients(0, params(jnp.bfloat16))["policy"]["embed"].astype(jnp.float32)
    want = (start.astype(jnp.float32) - 0.01 * grads / (jnp.abs(grads) + 1e-8)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(tree["policy"]["embed"].astype(jnp.float32), want.astype(jnp.float32))


def test_updates_that_bf16_weights_would_lose_are_refused():
    with pytest.raises(ConfigError, match="vanish in bfloat16"):
        make_optimizer(OptimConfig(learning_rate=1e-6), 10, params(jnp.bfloat16))
    make_optimizer(OptimConfig(learning_rate=1e-6), 10, params())


@pytest.mark.parametrize(
    ("given", "lost"),
    [
        ({"name": "lion", "learning_rate": 2e-5}, "updates of 2e-05 vanish in bfloat16 weights such as policy.blocks"),
        ({"name": "adafactor", "learning_rate": 4e-5}, None),
        ({"name": "muon", "learning_rate": 1e-4}, r"updates of 2e-05 vanish .* such as policy.blocks.0.attn.q \("),
        ({"name": "muon", "learning_rate": 2e-4}, None),
        ({"name": "sgd", "learning_rate": 1.0}, "optim.name: sgd's updates are as small as its gradients"),
        ({"learning_rate": 1e-4, "lr_layer_decay": 0.3}, "updates of 9e-06 vanish in .*attn.q "),
        ({"learning_rate": 1e-4, "groups": ({"match": "attn", "layers": ":1", "lr_multiplier": 0.0},)}, None),
        ({"learning_rate": 1e-6, "freeze": ("attn", "norm", "embed"), "name": "sgd"}, "nothing to train"),
    ],
)
def test_what_bf16_weights_lose_depends_on_the_optimiser_and_on_factors(given, lost):
    make = lambda: make_optimizer(OptimConfig(schedule="constant", **given), 10, params(jnp.bfloat16))
    if lost is None:
        make()
    else:
        with pytest.raises(ConfigError, match=lost):
            make()


UNREAD = [
    ({"name": "adafactor", "b1": 0.8}, "optim.b1: used by adamw, lion, muon, not by adafactor"),
    ({"name": "adafactor", "first_moment_dtype": "bfloat16"}, "optim.first_moment_dtype: used by"),
    ({"name": "lion", "b2": 0.99}, "optim.b2: used by adamw, muon, not by lion; its beta2 is optim.momentum"),
    ({"name": "lion", "eps": 1e-6}, "optim.eps: used by adamw, muon, not by lion"),
    ({"name": "sgd", "b1": 0.8}, "optim.b1: used by"),
    ({"name": "sgd", "first_moment_dtype": "bfloat16"}, "sgd without optim.momentum keeps no moment"),
    ({"name": "adamw", "momentum": 0.0}, "optim.momentum: used by lion, muon, sgd, not by adamw"),
    ({"name": "muon", "momentum": 1.0}, "must be below 1"),
]


@pytest.mark.parametrize(("given", "message"), UNREAD)
def test_a_field_that_the_optimiser_does_not_read_is_refused(given, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        OptimConfig(**given)


def test_abstract_parameters_are_enough():
    abstract = jax.eval_shape(params)
    tx, schedule = make_optimizer(OptimConfig(freeze=("embed",)), 10, abstract)
    state = jax.eval_shape(tx.init, abstract)
    assert jax.tree.leaves(state) and float(schedule(0)) > 0


@pytest.mark.parametrize(
    "bad",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": True},
        {"b2": 1.0},
        {"clip_norm": 0.0},
        {"name": "adam"},
        {"schedule": "wsd"},
        {"decay_steps": 3},
        {"schedule": "constant", "min_lr_ratio": 0.1},
        {"freeze": ("(",)},
        {"warmup": 3},
    ],
)
def test_bad_configs_are_refused(bad):
    with pytest.raises(pydantic.ValidationError):
        OptimConfig(**bad)
