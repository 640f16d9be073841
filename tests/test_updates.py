"""Every optimiser against numpy, layer by layer; stacked layers equal single ones; what the state weighs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpost.leaves import is_layer_matrix, leaf_paths
from jaxpost.optim import OptimConfig, make_optimizer
from jaxpost.step import init_state, make_step
from jaxpost.updates import orthogonalise, scale_by_adafactor

OPTIMIZERS = {
    "adamw": {"b2": 0.95},
    "adafactor": {},
    "lion": {"b1": 0.8},
    "muon": {"b2": 0.95},
    "sgd": {"momentum": 0.9},
}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def layer(leaf, *lead):
    return {"attn_norm": leaf(*lead, 4), "attn": {"q": leaf(*lead, 4, 6), "q_bias": leaf(*lead, 6)}}


def full(seed=0, scale=1.0):
    """Two places of a pattern repeated three times, after one single layer and before another."""
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    return {
        "policy": {
            "embed": leaf(9, 4),
            "prefix": [layer(leaf)],
            "blocks": {"0": layer(leaf, 3), "1": layer(leaf, 3)},
            "tail": [layer(leaf)],
            "final_norm": leaf(4),
            "head": leaf(9, 4),
        }
    }


def adapters(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)
    pair = {"a": leaf(3, 4, 2), "b": leaf(3, 2, 6)}
    return {"policy": {"prefix": [], "blocks": {"0": {"attn": {"q": pair}}}, "tail": []}}


def unstacked(tree):
    """The same layers one by one, under prefix; the repeats interleave the places of the pattern."""
    tree = tree["policy"]
    blocks = [jax.tree.map(lambda x: x[i], block) for i in range(3) for block in tree["blocks"].values()]
    return {"policy": tree | {"prefix": [*tree["prefix"], *blocks, *tree["tail"]], "blocks": {}, "tail": []}}


@dataclasses.dataclass(frozen=True)
class Given:
    """The batch is the gradient."""

    slow: ClassVar = {}

    def prepare(self, apply, state, frozen, batch):
        return batch, state.scalars

    def loss(self, apply, params, frozen, batch, rng):
        return sum(jax.tree.leaves(jax.tree.map(lambda p, g: jnp.vdot(p, g), params, batch))), {}


def train(config, make, split=lambda tree: tree):
    """The states after one, two and three steps."""
    tx, _ = make_optimizer(config, 10, split(make()))
    step = jax.jit(make_step(Given(), None, tx, clip_norm=config.clip_norm))
    states = [init_state(split(make()), tx, {})]
    for number in range(3):
        states.append(step(states[-1], {}, split(make(seed=100 + number, scale=0.15 / (number + 1))))[0])
    return states[1:]


# numpy: (gradient, memory of this matrix or vector, step from 1) -> update for a learning rate of 1


def adamw(g, memory, t, b1=0.9, b2=0.95):
    memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g * g
    return memory["m"] / (1 - b1**t) / (np.sqrt(memory["v"] / (1 - b2**t)) + 1e-8)


def lion(g, memory, t):
    m = memory.get("m", 0)
    memory["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.8 * m + 0.2 * g)


def sgd(g, memory, t):
    memory["m"] = 0.9 * memory.get("m", 0) + g
    return memory["m"]


def muon(g, memory, t):
    """As in Jordan's code: an average of weight 0.05, Nesterov's look ahead, five iterations on the wide side."""
    memory["m"] = 0.95 * memory.get("m", 0) + 0.05 * g
    x = 0.05 * g + 0.95 * memory["m"]
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / (np.sqrt((x * x).sum()) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(rows, columns)) * (x.T if rows > columns else x)


def adafactor(g, memory, t):
    b, square = 1 - t**-0.8, g * g + 1e-30
    if g.ndim == 2:
        memory["r"] = b * memory.get("r", 0) + (1 - b) * square.mean(1)
        memory["c"] = b * memory.get("c", 0) + (1 - b) * square.mean(0)
        v = np.outer(memory["r"], memory["c"]) / memory["r"].mean()
    else:
        v = memory["v"] = b * memory.get("v", 0) + (1 - b) * square
    u = g / np.sqrt(v)
    return u / max(1, np.sqrt((u * u).mean()))


def reference(name, make, steps=3, rate=0.01, decay=0.1, clip=1.0):
    """The same training in float64, each layer by itself; linear schedule over 10 steps."""
    start = unstacked(make())
    wide = lambda tree: [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    params, paths = wide(start), leaf_paths(start)
    memories = [{} for _ in params]
    for t in range(1, steps + 1):
        grads = wide(unstacked(make(seed=99 + t, scale=0.15 / t)))
        norm = np.sqrt(sum((g * g).sum() for g in grads))
        assert (norm > clip) == (t < 3)  # both sides of the clip
        for i, (path, g) in enumerate(zip(paths, grads, strict=True)):
            rule = adamw if name == "muon" and not is_layer_matrix(path, g.ndim) else globals()[name]
            u = rule(g * min(1, clip / (norm + 1e-6)), memories[i], t)
            lr = rate * (1 - (t - 1) / 10)
            params[i] = params[i] - lr * (u + (0 if path.endswith(("norm", "bias")) else decay) * params[i])
    return dict(zip(paths, params, strict=True))


@EACH
def test_three_steps_equal_numpy(name):
    config = OptimConfig(name=name, learning_rate=0.01, weight_decay=0.1, schedule="linear", **OPTIMIZERS[name])
    found = unstacked(train(config, full)[-1].params)
    wanted = reference(name, full)
    for path, got in zip(leaf_paths(found), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, wanted[path], rtol=2e-5, atol=2e-7, err_msg=path)


@pytest.mark.parametrize(
    ("name", "make"), [(name, adapters) for name in OPTIMIZERS] + [("adafactor", full), ("muon", full)]
)
def test_stacked_layers_equal_single_ones(name, make):
    """Muon and Adafactor treat each layer as a matrix of its own, groups reach each layer by its number."""
    groups = ({"match": "attn", "layers": "2:5", "lr_multiplier": 0.5}, {"match": r"\.q", "weight_decay": 0.0})
    config = OptimConfig(
        name=name, learning_rate=0.01, weight_decay=0.1, lr_layer_decay=0.8, groups=groups, **OPTIMIZERS[name]
    )
    stacked, single = train(config, make)[-1], train(config, make, split=unstacked)[-1]
    for ours, theirs in zip(*map(jax.tree.leaves, (unstacked(stacked.params), single.params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_newton_schulz_makes_singular_values_one_and_keeps_the_vectors():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24, 16)), jnp.float32)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    found = u.mT @ np.asarray(orthogonalise(x)) @ vt.mT  # diagonal in the same vectors
    diagonal = np.diagonal(found, axis1=-2, axis2=-1)
    assert 0.65 < diagonal.min() and diagonal.max() < 1.25 and s.max() / s.min() > 5
    assert np.abs(found - diagonal[..., None] * np.eye(16)).max() < 1e-4
    np.testing.assert_allclose(orthogonalise(x.mT), orthogonalise(x).mT, atol=1e-5)
    assert not orthogonalise(jnp.zeros((4, 3))).any()


def test_a_muon_update_is_as_large_as_one_of_adamw():
    """2502.16982: an rms of 0.2, whatever the shape and the number of layers, so that learning rates carry over."""
    config = OptimConfig(name="muon", learning_rate=1.0, schedule="constant", clip_norm=None)
    params = {"policy": {"blocks": {"0": {"q": jnp.zeros((90, 32, 48)), "down": jnp.zeros((90, 64, 16))}}}}
    tx, _ = make_optimizer(config, 10, params)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for x in jax.tree.leaves(updates):
        assert 0.16 < np.sqrt(np.mean(np.square(x[0]))) < 0.22


def test_adafactor_equals_optax_on_one_matrix():
    x = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)}
    theirs = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    ours = scale_by_adafactor({"w": False})
    a, b = ours.init(x), theirs.init(x)
    for i in range(3):
        g = jax.tree.map(lambda p: jnp.sin((i + 1) * p), x)
        (u, a), (v, b) = ours.update(g, a, x), theirs.update(g, b, x)
        np.testing.assert_allclose(u["w"], v["w"], rtol=2e-6)


def nbytes(state):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def count(tree, matrices=None):
    """Numbers in a tree: all, or those in (not in) matrices of layers."""
    pairs = zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    return sum(x.size for path, x in pairs if matrices in (None, is_layer_matrix(path, x.ndim)))


def test_state_bytes():
    """Two fp32 moments a weight for AdamW; one for Lion, SGD and Muon's matrices; rows + columns for Adafactor."""
    tree = jax.eval_shape(full)
    size = lambda **given: nbytes(jax.eval_shape(make_optimizer(OptimConfig(**given), 10, tree)[0].init, tree))
    total, matrices = count(tree), count(tree, True)
    assert matrices == 8 * 24
    wanted = {"adamw": (8, 6), "lion": (4, 2), "sgd": (4, 2)}
    for name, each in wanted.items():
        extra = {"momentum": 0.9} if name == "sgd" else {}
        found = [size(name=name, first_moment_dtype=dtype, **extra) for dtype in ("float32", "bfloat16")]
        assert found == [total * n for n in each], name
    others = total - matrices
    assert size(name="muon") == 4 * matrices + 8 * others
    assert size(name="muon", first_moment_dtype="bfloat16") == 2 * matrices + 6 * others
    vectors = sum(x.size for p, x in zip(leaf_paths(tree), jax.tree.leaves(tree)) if p.endswith(("norm", "bias")))
    assert size(name="adafactor") == 4 * (8 * (4 + 6) + 2 * (9 + 4) + vectors)
    assert size(name="sgd") == 0


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_a_bf16_first_moment_rounds_the_memory_only(name):
    """The first update is the exact one; later ones differ by what bf16 loses; the second moment is fp32."""
    config = OptimConfig(name=name, learning_rate=0.01, **OPTIMIZERS[name])
    short = dataclasses.replace(config, first_moment_dtype="bfloat16")
    first, *_, last = train(config, adapters)
    first_short, *_, last_short = train(short, adapters)
    gap = lambda a, b: max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    assert gap(first.params, first_short.params) == 0
    sizes = {x.dtype.name for x in jax.tree.leaves(last_short.opt_state) if x.ndim}
    assert sizes == ({"bfloat16", "float32"} if name == "adamw" else {"bfloat16"})
    # A sign of Lion that flips costs two learning rates a step.
    assert (0 if name == "lion" else 1e-9) <= gap(last.params, last_short.params) < (0.05 if name == "lion" else 2e-4)
