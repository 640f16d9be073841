"""Adapters on the upper layers only: the same loss and gradients, and no backward pass below the lowest of them."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import lora
from jaxpost.hlo import product_flops
from jaxpost.lora import LoraConfig
from jaxpost.models import decoder
from jaxpost.models.decoder import Options
from jaxpost.models.policy import Policy
from jaxpost.models.spec import DecoderSpec, LayerKind, abstract_params, is_info
from jaxpost.models.stacks import stacks

SPEC = DecoderSpec(vocab_size=32, d_model=16, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=24)
# One layer in the prefix, a pattern of two kinds three times, one layer in the tail.
MIXED = dataclasses.replace(SPEC, num_prefix=1, pattern=(LayerKind(), LayerKind(window=3)))
UPPER = LoraConfig(rank=2, layers="4:")
TOKENS = np.random.RandomState(3).randint(0, SPEC.vocab_size, (2, 8))
POSITIONS = np.broadcast_to(np.arange(8), TOKENS.shape)


def filled(infos: Any) -> Any:
    """An abstract tree with random values of a sensible size."""
    random = np.random.RandomState(0)
    draw = lambda i: jnp.asarray(random.uniform(-1, 1, i.shape) * (i.shape[-2] if i.shape[1:] else 1) ** -0.5, i.dtype)
    return jax.tree.map(draw, infos, is_leaf=is_info)


def weights(spec: DecoderSpec, config: LoraConfig) -> tuple[dict, dict]:
    """A base, and adapters as after some training: zero in the layers that carry none."""
    adapters = filled(lora.abstract_adapters(config, spec))
    for layer in set(range(spec.num_layers)) - set(lora.adapted_layers(config, spec)):
        part, key, repeat = spec.locate(layer)
        rows = ... if repeat is None else repeat
        adapters[part][key] = jax.tree.map(lambda x: x.at[rows].set(0), adapters[part][key])
    return filled(abstract_params(spec)), adapters


def loss(join, base: dict, adapters: dict, policy: Policy) -> jax.Array:
    joined = join(policy, base, adapters)
    hidden, _, _ = policy(joined, jnp.asarray(TOKENS), jnp.asarray(POSITIONS), jnp.ones_like(TOKENS))
    return jnp.mean(jax.nn.logsumexp(hidden @ decoder.head(joined).T, -1) ** 2)


def whole(policy: Policy, base: dict, adapters: dict) -> dict:
    """One scan over everything."""
    return lora.join(base, adapters, policy.adapters)


def apart(policy: Policy, base: dict, adapters: dict) -> dict:
    """As an algorithm joins."""
    return policy.join({"policy": adapters}, {"policy": base}, "policy")


CASES = {
    "uniform-dora-full": (SPEC, dataclasses.replace(UPPER, dora=True), Options(remat="full")),
    "mixed-in-mid-repeat": (MIXED, UPPER, Options(remat="dots")),
    "mixed-tail-only": (MIXED, dataclasses.replace(UPPER, layers="-1:"), Options()),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_and_gradients_are_those_of_one_scan(case):
    spec, config, options = case
    base, adapters = weights(spec, config)
    policy = Policy(spec, options, config)
    (value, grads), (want, wanted) = (
        jax.jit(jax.value_and_grad(partial(loss, join, base, policy=policy)))(adapters) for join in (apart, whole)
    )
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert any(np.any(x) for x in jax.tree.leaves(wanted))
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()


def compiled(spec: DecoderSpec, config: LoraConfig | None) -> str:
    """HLO of loss and gradients, or of the loss of the base alone."""
    policy, base = Policy(spec, Options(), config), filled(abstract_params(spec))
    if config is None:
        return jax.jit(lambda base: loss(lambda *_: base, base, {}, policy)).lower(base).compile().as_text()
    program = jax.jit(lambda base, adapters: jax.value_and_grad(partial(loss, apart, base, policy=policy))(adapters))
    return program.lower(base, filled(lora.abstract_adapters(config, spec))).compile().as_text()


def test_what_lies_below_costs_a_forward_pass_and_no_more():
    half = dataclasses.replace(SPEC, num_layers=4)
    plain = product_flops(compiled(SPEC, None)) - product_flops(compiled(half, None))  # four layers forward
    adapted = product_flops(compiled(half, dataclasses.replace(UPPER, layers=None)))
    assert 0 < plain < 0.6 * adapted
    assert product_flops(compiled(SPEC, UPPER)) == adapted + plain


@pytest.mark.parametrize(
    ("config", "first"),
    [
        (UPPER, 4),
        (LoraConfig(layers=None), 0),
        (LoraConfig(layers=":2"), 0),
        (LoraConfig(layers="-1:"), 7),
        (LoraConfig(layers="4:", also_train=("final_norm",)), 4),
        (LoraConfig(layers="4:", also_train=("head",)), 4),
        (LoraConfig(layers="4:", also_train=("embed",)), 0),
        (LoraConfig(layers="4:", also_train=("norm",)), 0),
        (LoraConfig(layers="4:", also_train=("head", "attn_norm")), 0),
        (LoraConfig(rank=0, also_train=("head",)), 8),
    ],
)
def test_where_the_backward_pass_may_end(config, first):
    assert lora.first_trained_layer(config, SPEC) == first
    found = []

    def look(base: dict, adapters: dict) -> None:
        joined = apart(Policy(SPEC, adapters=config), base, adapters)
        found.extend((stack.rows.start, stack.rows.stop) for stack in stacks(joined["blocks"], SPEC.repeats))

    shapes = (jax.tree.map(lambda i: i.struct, tree, is_leaf=is_info) for tree in
              (abstract_params(SPEC), lora.abstract_adapters(config, SPEC)))  # fmt: skip
    jax.eval_shape(look, *shapes)
    assert found == ([(0, first), (first, 8)] if 0 < first < 8 else [(0, 8)])


def test_taps_caches_and_soft_tokens_cross_the_cut():
    base, adapters = weights(SPEC, UPPER)
    policy = Policy(SPEC, Options(), UPPER)
    one, two = whole(policy, base, adapters), apart(policy, base, adapters)
    assert len(stacks(one["blocks"], 8)) == 1 and len(stacks(two["blocks"], 8)) == 2
    tokens, positions = jnp.asarray(TOKENS), jnp.asarray(POSITIONS)

    @jax.jit
    def everything(joined: dict) -> tuple:
        cached = policy(joined, tokens, positions, None, cache=decoder.init_cache(SPEC, 2, 8))[:2]
        tapped = policy(joined, tokens, positions, tokens * 0 + 1, taps=(1, 3, 6))[2]["taps"]

        def soft(vectors: jax.Array) -> jax.Array:
            places = jnp.array([[1], [2]])
            return jnp.var(policy(joined, tokens, positions, tokens * 0 + 1, soft_tokens=(vectors, places))[0])

        return cached, tapped, jax.grad(soft)(jnp.ones((2, 1, SPEC.d_model)))

    got, wanted = everything(two), everything(one)
    assert np.abs(wanted[2]).max() > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, wanted)
