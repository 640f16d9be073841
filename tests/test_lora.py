"""Adapters as a second tree: join, merge, gradients, dropout, ranges of layers, shardings."""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from jaxpost import lora, sharding
from jaxpost.errors import ConfigError
from jaxpost.lora import LoraConfig
from jaxpost.models import assemble, decoder
from jaxpost.models.spec import DecoderSpec, LayerKind, abstract_params, is_info
from jaxpost.ops.proj import Lora, proj

# One layer in the prefix, two in the scan.
SPEC = DecoderSpec(
    vocab_size=32, d_model=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24, num_prefix=1
)
# One layer in the prefix, a pattern of two kinds twice, one layer in the tail.
LONG = dataclasses.replace(SPEC, num_layers=6, pattern=(LayerKind(), LayerKind(window=3)))
PLAIN = decoder.Options()


def filled(infos: Any, seed: int) -> dict:
    """An abstract tree with random values of a sensible size; also where a real run starts at zero."""
    random = np.random.RandomState(seed)
    draw = lambda i: jnp.asarray(random.uniform(-1, 1, i.shape) * (i.shape[-2] if i.shape[1:] else 1) ** -0.5, i.dtype)
    return jax.tree.map(draw, infos, is_leaf=is_info)


BASE = filled(abstract_params(SPEC), 0)
CONFIG = LoraConfig(rank=4, alpha=8.0)
ADAPTERS = filled(lora.abstract_adapters(CONFIG, SPEC), 1)


@partial(jax.jit, static_argnames="options")
def logits(params: dict, rng: jax.Array | None = None, options: decoder.Options = PLAIN) -> jax.Array:
    tokens = np.random.RandomState(3).randint(0, SPEC.vocab_size, (8, 6))
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
    hidden, _, _ = decoder.apply(
        SPEC, params, jnp.asarray(tokens), positions, positions * 0 + 1, rng=rng, options=options
    )
    return hidden @ decoder.head(params).T.astype(hidden.dtype)


@partial(jax.jit, static_argnames=("config", "options", "weigh"))
def loss_and_grads(adapters: dict, base: dict, config: LoraConfig, options: decoder.Options = PLAIN, weigh=lora.join):
    def loss(adapters: dict) -> jax.Array:
        values = logits(weigh(base, adapters, config), None, options).astype(jnp.float32)
        return jnp.mean(jax.nn.logsumexp(values, -1) ** 2)

    return jax.value_and_grad(loss)(adapters)


def test_join_equals_merge():
    joined, merged = (weigh(BASE, ADAPTERS, CONFIG) for weigh in (lora.join, lora.merge))
    assert isinstance(joined["blocks"]["0"]["mlp"]["down"], Lora)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    got, plain = logits(joined), logits(BASE)
    np.testing.assert_allclose(got, logits(merged), atol=1e-5)
    assert np.abs(got - plain).max() > 0.1


def test_merge_by_hand():
    # scale = 6 / 2 = 3; [[1], [2]] @ [[1, 10]] = [[1, 10], [2, 20]]
    config = LoraConfig(rank=2, alpha=6.0)
    tree = {"w": jnp.full((2, 2), 100.0, jnp.bfloat16), "other": jnp.ones(3)}
    pair = {"a": jnp.array([[1.0, 0.0], [2.0, 0.0]]), "b": jnp.array([[1.0, 10.0], [7.0, 7.0]])}
    merged = lora.merge(tree, {"w": pair}, config)
    np.testing.assert_array_equal(np.asarray(merged["w"], np.float32), [[103, 130], [106, 160]])
    assert merged["w"].dtype == jnp.bfloat16
    assert merged["other"] is tree["other"]


def test_rank_zero_is_the_base_itself():
    config = LoraConfig(rank=0)
    adapters = lora.init_adapters(config, SPEC, jax.random.key(0))
    assert adapters == {} and lora.abstract_adapters(config, SPEC) == {}
    assert lora.join(BASE, adapters, config) is BASE
    assert lora.merge(BASE, adapters, config) is BASE


def test_initial_adapters_leave_the_model_unchanged_to_the_bit():
    config = LoraConfig(rank=4)
    adapters = lora.init_adapters(config, SPEC, jax.random.key(1))
    np.testing.assert_array_equal(logits(lora.join(BASE, adapters, config)), logits(BASE))
    # Uniform in +-1/sqrt(in), which is PEFT's kaiming_uniform(sqrt 5).
    a = np.asarray(adapters["blocks"]["0"]["mlp"]["down"]["a"])
    assert a.shape == (2, 24, 4) and np.abs(a).max() <= 24**-0.5 and np.abs(a).max() > 0.9 * 24**-0.5
    assert abs(a.std() - 24**-0.5 / 3**0.5) < 0.02
    assert not any(np.any(pair["b"]) for pair in pairs(adapters))


def pairs(tree: dict) -> list[dict]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, dict) and "a" in x)


def test_keys_follow_places_so_targets_do_not_reshuffle_each_other():
    key = jax.random.key(7)
    few, many = (
        jax.jit(partial(lora.init_adapters, LoraConfig(rank=4, targets=targets), LONG))(key)
        for targets in (("q", "v"), ("q", "k", "v", "down"))
    )
    assert set(few["tail"][0]) == {"attn"} and set(few["tail"][0]["attn"]) == {"q", "v"}
    np.testing.assert_array_equal(few["blocks"]["1"]["attn"]["v"]["a"], many["blocks"]["1"]["attn"]["v"]["a"])
    assert np.any(many["blocks"]["1"]["attn"]["v"]["a"] != many["blocks"]["0"]["attn"]["v"]["a"])


def test_gradients_are_those_of_the_merged_weights_and_of_adapters_only():
    _, grads = loss_and_grads(ADAPTERS, BASE, CONFIG)
    _, wanted = loss_and_grads(ADAPTERS, BASE, CONFIG, weigh=lora.merge)
    assert jax.tree.structure(grads) == jax.tree.structure(ADAPTERS)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.any(got)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_fp32_adapters_on_a_bf16_base():
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    _, grads = loss_and_grads(ADAPTERS, small, CONFIG, decoder.Options(dtype=jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves((ADAPTERS, grads))} == {jnp.dtype("float32")}
    merged = lora.merge(small, ADAPTERS, CONFIG)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    pair, weight = ADAPTERS["prefix"][0]["attn"]["o"], small["prefix"][0]["attn"]["o"]
    want = np.asarray(weight, np.float32) + 2 * np.asarray(pair["a"]) @ np.asarray(pair["b"])
    np.testing.assert_allclose(np.asarray(merged["prefix"][0]["attn"]["o"], np.float32), want, rtol=2**-8)


def test_scale():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8
    assert LoraConfig(rank=0).scale == 0
    leaf = lora.join({"w": jnp.ones((2, 2))}, {"w": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}, LoraConfig(rank=4))
    assert leaf["w"].scale == 8


def test_dropout_acts_on_the_adapters_input_alone_and_keeps_its_mean():
    config = LoraConfig(rank=4, alpha=4.0, dropout=0.25)
    keys = jax.random.split(jax.random.key(0), 4)
    weight, x = jax.random.normal(keys[0], (8, 5)), jax.random.normal(keys[1], (3, 8))
    pair = {"a": jax.random.normal(keys[2], (8, 4)), "b": jax.random.normal(keys[3], (4, 5))}
    leaf = lora.join({"w": weight}, {"w": pair}, config)["w"]
    plain = proj(x, leaf)
    np.testing.assert_allclose(plain, x @ (weight + pair["a"] @ pair["b"]), rtol=1e-4, atol=1e-4)
    draws = jax.vmap(lambda key: proj(x, leaf, key))(jax.random.split(jax.random.key(1), 20_000))
    error = draws.std(0) / 20_000**0.5
    assert np.all(np.abs(draws.mean(0) - plain) < 5 * error)
    # An input is dropped or divided by 0.75, in the update only.
    one = jnp.eye(8)[:1]
    updates = jax.vmap(lambda key: proj(one, leaf, key))(jax.random.split(jax.random.key(2), 64))[:, 0] - weight[0]
    kept = np.asarray((pair["a"] @ pair["b"])[0] / 0.75)
    assert all(np.allclose(u, kept, atol=1e-4) or np.allclose(u, 0, atol=1e-4) for u in np.asarray(updates))


def test_dropout_needs_a_key():
    joined = lora.join(BASE, ADAPTERS, dataclasses.replace(CONFIG, dropout=0.5))
    off = lora.join(BASE, ADAPTERS, CONFIG)
    np.testing.assert_array_equal(logits(joined), logits(off))
    np.testing.assert_array_equal(logits(off, jax.random.key(5)), logits(off))
    first = logits(joined, jax.random.key(5))
    np.testing.assert_array_equal(first, logits(joined, jax.random.key(5)))
    assert np.any(first != logits(joined, jax.random.key(6)))


def test_every_layer_and_projection_has_its_own_dropout_key(monkeypatch):
    seen = []

    def record(key: jax.Array, p: float, shape: tuple) -> jax.Array:
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return jnp.ones(shape, bool)

    monkeypatch.setattr(jax.random, "bernoulli", record)
    joined = lora.join(BASE, ADAPTERS, dataclasses.replace(CONFIG, dropout=0.25))
    logits(joined, jax.random.key(5)).block_until_ready()
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == SPEC.num_layers * len(CONFIG.targets)


@pytest.mark.parametrize("layers, carried", [("3:", [3, 4, 5]), (":2", [0, 1]), ("1:5", [1, 2, 3, 4]), ("-1:", [5])])
def test_a_range_of_layers(layers, carried):
    config = LoraConfig(rank=2, targets=("q", "up"), layers=layers)
    assert list(lora.adapted_layers(config, LONG)) == carried
    adapters = lora.init_adapters(config, LONG, jax.random.key(1))
    for layer in range(LONG.num_layers):
        for pair in lora.layer_pairs(adapters, LONG, layer).values():
            assert np.any(pair["a"]) == (layer in carried)


def test_layers_out_of_the_range_never_train():
    config = LoraConfig(rank=4, layers="2:")
    adapters = lora.init_adapters(config, SPEC, jax.random.key(1))
    adapters = jax.tree.map(lambda x, g: x - g, adapters, loss_and_grads(adapters, BASE, config)[1])  # b moves
    _, grads = loss_and_grads(adapters, BASE, config)
    for layer in range(SPEC.num_layers):
        for pair in lora.layer_pairs(grads, SPEC, layer).values():
            assert np.any(pair["a"]) == np.any(pair["b"]) == (layer == 2)


DORA = dataclasses.replace(CONFIG, dora=True)
DORA_ADAPTERS = filled(lora.abstract_adapters(DORA, SPEC), 1)


def test_dora_starts_as_its_base():
    adapters = jax.jit(partial(lora.init_adapters, DORA, SPEC))(jax.random.key(1), BASE)
    down = adapters["blocks"]["0"]["mlp"]["down"]["magnitude"]
    assert down.shape == (2, 16) and down.dtype == jnp.float32
    np.testing.assert_allclose(down, np.linalg.norm(BASE["blocks"]["0"]["mlp"]["down"], axis=1), rtol=1e-6)
    np.testing.assert_allclose(logits(lora.join(BASE, adapters, DORA)), logits(BASE), atol=2e-6)


def test_dora_by_hand():
    # scale 2; columns of base + 2 a b: (3 + 2*0, 0 + 2*2) = (3, 4) of length 5, and (0, 1) of length 1
    tree, pair = (
        {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])},
        {"a": jnp.array([[0.0], [1.0]]), "b": jnp.array([[2.0, 0.0]])},
    )
    adapters = {"w": pair | {"magnitude": jnp.array([10.0, -3.0])}}
    config = LoraConfig(rank=1, alpha=2.0, dora=True)
    np.testing.assert_allclose(lora.merge(tree, adapters, config)["w"], [[6, 0], [8, -3]], rtol=1e-6)
    np.testing.assert_allclose(proj(jnp.ones((1, 2)), lora.join(tree, adapters, config)["w"]), [[14, -3]], rtol=1e-6)


def test_dora_joined_equals_merged():
    joined, merged = (weigh(BASE, DORA_ADAPTERS, DORA) for weigh in (lora.join, lora.merge))
    np.testing.assert_allclose(logits(joined), logits(merged), atol=1e-5)
    short = jax.tree.map(lambda m: m / 2, DORA_ADAPTERS)  # the magnitudes count, and a and b do
    assert np.abs(logits(joined) - logits(lora.join(BASE, short, DORA))).max() > 0.1
    with pytest.raises(ValueError, match="does not fit"):
        lora.join(BASE, DORA_ADAPTERS, CONFIG)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_gradients_are_those_of_the_plain_formula(dropout):
    """m (x W + s d A B) / |W + s A B| + (x - d) W, with the length a constant and d the input after dropout."""
    keys = jax.random.split(jax.random.key(0), 6)
    weight, x = jax.random.normal(keys[0], (8, 5)), jax.random.normal(keys[1], (3, 8))
    parts = {"a": jax.random.normal(keys[2], (8, 2)), "b": jax.random.normal(keys[3], (2, 5))}
    parts["magnitude"] = jax.random.normal(keys[4], (5,))
    config = LoraConfig(rank=2, alpha=3.0, dropout=dropout, dora=True)
    keep = jax.random.bernoulli(keys[5], 1 - dropout, x.shape)

    def plain(x, parts):
        low = jnp.where(keep, x / (1 - dropout), 0)
        length = jnp.linalg.norm(jax.lax.stop_gradient(weight + 1.5 * parts["a"] @ parts["b"]), axis=0)
        gain = parts["magnitude"] / length
        return jnp.sum(jnp.sin(gain * (low @ weight + 1.5 * low @ parts["a"] @ parts["b"]) + (x - low) @ weight))

    def ours(x, parts):
        leaf = lora.join({"w": weight}, {"w": parts}, config)["w"]
        return jnp.sum(jnp.sin(proj(x, leaf, keys[5] if dropout else None)))

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, parts) for f in (ours, plain))
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())


def test_dora_of_layers_out_of_the_range_never_trains():
    config = dataclasses.replace(DORA, layers="2:")
    adapters = jax.jit(partial(lora.init_adapters, config, SPEC))(jax.random.key(1), BASE)
    adapters = jax.tree.map(lambda x, g: x - g, adapters, loss_and_grads(adapters, BASE, config)[1])  # b moves
    _, grads = loss_and_grads(adapters, BASE, config)
    for layer in range(SPEC.num_layers):
        for pair in lora.layer_pairs(grads, SPEC, layer).values():
            assert all(np.any(part) == (layer == 2) for part in pair.values()) and len(pair) == 3


def test_dora_keeps_no_matrix_for_the_backward_pass():
    """Under remat "dots" the products without batch dims are kept: none of them is as large as a weight."""
    options = decoder.Options(remat="dots")
    saved = jax.ad_checkpoint.saved_residuals if hasattr(jax.ad_checkpoint, "saved_residuals") else None
    if saved is None:
        from jax._src.ad_checkpoint import saved_residuals as saved
    found = saved(lambda adapters: logits(lora.join(BASE, adapters, DORA), None, options).sum(), DORA_ADAPTERS)
    shapes = [aval.shape for aval, where in found if "argument" not in where and "constant" not in where]
    assert shapes and not [shape for shape in shapes if shape in [(2, 16, 16), (2, 16, 8), (2, 16, 24), (2, 24, 16)]]


@functools.cache
def grads_of_all_weights() -> dict:
    return loss_and_grads(BASE, {}, LoraConfig(rank=0), weigh=lambda _, weights, config: weights)[1]


@pytest.mark.parametrize("rank", [4, 0])
def test_parameters_trained_in_full_beside_adapters(rank):
    config = LoraConfig(rank=rank, targets=("q",), layers="1:", also_train=("norm", "embed", "down"))
    adapters = jax.jit(partial(lora.init_adapters, config, SPEC))(jax.random.key(1), BASE)
    assert set(adapters) == {"embed", "final_norm", "prefix", "blocks", "tail"}
    layer = adapters["prefix"][0]
    assert set(layer) == {"attn_norm", "mlp_norm", "mlp"} | ({"attn"} if rank else set())
    np.testing.assert_array_equal(layer["mlp"]["down"], BASE["prefix"][0]["mlp"]["down"])  # also in an idle layer
    np.testing.assert_array_equal(logits(lora.join(BASE, adapters, config)), logits(BASE))

    _, grads = loss_and_grads(adapters, BASE, config)
    whole = grads_of_all_weights()
    for path in (("embed",), ("final_norm",), ("blocks", "0", "mlp", "down"), ("prefix", 0, "attn_norm")):
        got, want = assemble.follow(grads, path), assemble.follow(whole, path)
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())

    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    moved = jax.tree.map(lambda x: x + 0.25, adapters)
    assert lora.join(small, moved, config)["embed"].dtype == jnp.float32  # the trained copy is never rounded
    merged = lora.merge(small, moved, config)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(merged["final_norm"], moved["final_norm"].astype(jnp.bfloat16))
    assert merged["head"] is small["head"]


def test_a_tied_embedding_trained_in_full_stays_tied():
    spec = dataclasses.replace(SPEC, tied=True)
    base = {name: value for name, value in BASE.items() if name != "head"}
    config = LoraConfig(rank=0, also_train=("embed",))
    adapters = jax.tree.map(lambda x: 2 * x, lora.init_adapters(config, spec, jax.random.key(0), base))
    joined = lora.join(base, adapters, config)
    assert decoder.head(joined) is joined["embed"] is adapters["embed"]
    with pytest.raises(ConfigError, match="no 'head'; this model's head is its embedding, name embed"):
        lora.abstract_adapters(LoraConfig(also_train=("head",)), spec)
    with pytest.raises(ConfigError, match=r"lora.also_train: the model has no 'lm_head'; there are norm .*attn_norm"):
        lora.abstract_adapters(LoraConfig(also_train=("lm_head",)), spec)


def test_counts_for_the_flops():
    # q: in 16, out 16, rank 2: 3 layers of (2 * 16 * 2 + 16). The head and down multiply every token, norms do not.
    config = LoraConfig(rank=2, targets=("q",), dora=True, also_train=("embed", "norm", "down", "head"))
    assert lora.param_counts(config, SPEC) == (3 * (2 * 16 * 2 + 16), 3 * 24 * 16 + 32 * 16)
    tied = dataclasses.replace(SPEC, tied=True)
    assert lora.param_counts(LoraConfig(rank=0, also_train=("embed",)), tied) == (0, 32 * 16)


def test_layers_that_do_not_exist():
    with pytest.raises(ConfigError, match="'6:' holds none of the model's 3 layers"):
        lora.init_adapters(LoraConfig(layers="6:"), SPEC, jax.random.key(0))


@pytest.mark.parametrize("config, adapters", [(CONFIG, ADAPTERS), (DORA, DORA_ADAPTERS)], ids=["lora", "dora"])
def test_equal_on_eight_devices(config, adapters):
    want, want_grads = loss_and_grads(adapters, BASE, config)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    rules = sharding.rules_for(mesh, num_heads=4, num_kv_heads=2, d_model=16, d_ff=24, vocab_size=32)
    base = jax.device_put(BASE, sharding.tree_shardings(abstract_params(SPEC), rules))
    there = jax.device_put(adapters, sharding.tree_shardings(lora.abstract_adapters(config, SPEC), rules))
    got, grads = loss_and_grads(there, base, config, decoder.Options(rules=rules))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    worst = max(
        float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True)
    )
    # DoRA divides by lengths whose squares are summed over a dimension that the mesh splits: a few more roundings.
    assert worst <= (4e-6 if config.dora else 2e-6)
    down = there["blocks"]["0"]["mlp"]["down"]
    assert down["a"].sharding.spec == jax.P(None, "tensor", None)
    assert down["b"].sharding.spec == jax.P(None, None, "fsdp")
    if config.dora:
        assert down["magnitude"].sharding.spec == jax.P(None, "fsdp")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"targets": ("q", "q_proj")}, "no projection 'q_proj', did you mean 'q'"),
        ({"targets": ("gat",)}, "did you mean 'gate'"),
        ({"targets": ()}, "at least one"),
        ({"targets": ("q", "q")}, "each once"),
        ({"dropout": 1.0}, "below 1"),
        ({"also_train": ("embed", "embed")}, "each parameter once"),
        ({"also_train": ("embed", "q")}, "q carries an adapter"),
        ({"dora": True, "rank": 0}, "lora.dora: needs adapters"),
        ({"layers": "15"}, "not a range"),
        ({"rank": -1}, "greater than or equal to 0"),
        ({"rank": True}, "valid integer"),
        ({"alpha": 0.0}, "greater than 0"),
        ({"ranks": 4}, "ranks"),
    ],
)
def test_wrong_options(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        LoraConfig(**fields)


def test_trees_that_do_not_fit():
    for wrong, message in [
        ({"blocks": {"7": ADAPTERS["blocks"]["0"]}}, "/blocks: the base has no 7"),
        ({"blocks": {"0": ADAPTERS["prefix"][0]}}, "/blocks/0/attn/k: does not fit a weight of shape"),
        ({"prefix": ADAPTERS["prefix"] * 2}, "/prefix: 2 layers for a base with 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            lora.join(BASE, wrong, CONFIG)
    assert lora.join(BASE, ADAPTERS | {"prefix": []}, CONFIG)["prefix"] is BASE["prefix"]
