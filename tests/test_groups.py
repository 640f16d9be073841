"""Learning rates by group, by layer and for adapters, against DecoderSpec.locate and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.groups import GroupConfig, lr_factors
from jaxpost.leaves import layer_numbers, leaf_paths
from jaxpost.lora import LoraConfig, abstract_adapters
from jaxpost.models.spec import DecoderSpec, LayerKind, abstract_params, is_info
from jaxpost.optim import OptimConfig, make_optimizer

SPEC = DecoderSpec(vocab_size=16, d_model=8, num_layers=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12)
MIXED = dataclasses.replace(SPEC, num_prefix=1, pattern=(LayerKind(window=4), LayerKind(), LayerKind(rope=None)))
LORA = LoraConfig(rank=2, targets=("q", "down"), layers="1:3")


def structs(infos):
    return {"policy": jax.tree.map(lambda info: info.struct, infos, is_leaf=is_info)}


FULL, ADAPTERS = structs(abstract_params(MIXED)), structs(abstract_adapters(LORA, MIXED))


def factors(params=FULL, groups=(), **given):
    """Path -> (lr factor, weight decay) of each leaf."""
    every = jax.tree.map(lambda _: True, params)
    found = lr_factors([GroupConfig(**group) for group in groups], params, every, **given)
    return dict(zip(leaf_paths(params), zip(*map(jax.tree.leaves, found), strict=True), strict=True))


def flat(value):
    return value if isinstance(value, float) else np.ravel(value).tolist()


@pytest.mark.parametrize("params", [FULL, ADAPTERS], ids=["full", "lora"])
def test_layers_are_numbered_as_the_decoder_locates_them(params):
    held = dict(zip(leaf_paths(params), zip(*layer_numbers(params)), strict=True))
    for layer in range(MIXED.num_layers):
        part, key, repeat = MIXED.locate(layer)
        numbers, count = held[f"policy.{part}.{key}.attn.q" + ("" if params is FULL else ".a")]
        assert count == 8 and (numbers if repeat is None else numbers[repeat]) == layer
    assert params is ADAPTERS or held["policy.embed"] == (None, 8)


def test_the_first_match_wins_layer_by_layer():
    groups = (
        {"match": r"attn\.q$", "layers": "3:", "lr_multiplier": 2.0},
        {"match": "attn", "lr_multiplier": 3.0, "weight_decay": 0.5},
        {"match": r"attn\.k", "lr_multiplier": 9.0},
    )
    found = factors(groups=groups, weight_decay=0.1)
    # layers 1 and 4 are the two repeats of place 0
    assert [flat(x) for x in found["policy.blocks.0.attn.q"]] == [[3.0, 2.0], pytest.approx([0.5, 0.1])]
    assert found["policy.blocks.0.attn.q"][0].shape == (2, 1, 1)
    assert found["policy.prefix.0.attn.q"] == found["policy.prefix.0.attn.k"] == (3.0, 0.5)
    assert found["policy.tail.0.attn.q"] == (2.0, 0.1)
    assert found["policy.blocks.2.attn.k"] == (3.0, 0.5)
    assert found["policy.embed"] == found["policy.blocks.0.mlp.up"] == (1.0, 0.1)


def test_layer_decay_by_hand():
    found = {path: flat(factor) for path, (factor, _) in factors(layer_decay=0.5).items()}
    assert found["policy.final_norm"] == found["policy.head"] == 1.0
    assert found["policy.tail.0.mlp.up"] == 0.5 and found["policy.prefix.0.mlp.up"] == 0.5**8
    assert found["policy.blocks.1.attn_norm"] == [0.5**6, 0.5**3]
    assert found["policy.embed"] == 0.5**9


def test_lora_plus_moves_b_alone():
    groups = ({"match": "down", "layers": "0:2", "lr_multiplier": 0.5},)
    found = {path: flat(factor) for path, (factor, _) in factors(ADAPTERS, groups, lora_plus_ratio=16.0).items()}
    assert found["policy.prefix.0.attn.q.b"] == 16 and found["policy.prefix.0.attn.q.a"] == 1
    assert found["policy.blocks.0.mlp.down.b"] == [8, 16] and found["policy.blocks.0.mlp.down.a"] == [0.5, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": ({"match": "policy.embedd"},)}, r"optim.groups.0.match: 'policy.embedd' matches no.*policy\.embed"),
        (
            {"groups": ({"match": "q"}, {"match": "embed", "layers": "0:"})},
            "optim.groups.1.layers: '0:' holds no",
        ),
        ({"groups": ({"match": "attn", "layers": "8:"},)}, "optim.groups.0.layers: '8:' holds no layer that 'attn'"),
        ({"lora_plus_ratio": 2.0}, "optim.lora_plus_ratio: there are no adapters"),
        ({"lr_layer_decay": 0.5, "only": "head"}, "optim.lr_layer_decay: the parameters have no layers"),
    ],
)
def test_what_reaches_nothing_is_refused(given, message):
    given = dict(given)
    params = {"policy": {"head": FULL["policy"]["head"]}} if given.pop("only", None) else FULL
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimConfig(**given), 10, params)


def test_a_group_moves_its_layers_that_much_more_and_zero_holds_them():
    groups = ({"match": "attn", "layers": "1:", "lr_multiplier": 0.0}, {"match": "attn", "lr_multiplier": 3.0})
    config = OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.1, groups=groups)
    params = {"policy": {"blocks": {"0": {"attn": {"q": jnp.ones((2, 3, 4))}, "mlp": {"up": jnp.ones((2, 3, 4))}}}}}
    tx, _ = make_optimizer(config, 10, params)
    updates, _ = tx.update(params, tx.init(params), params)
    q, up = updates["policy"]["blocks"]["0"]["attn"]["q"], updates["policy"]["blocks"]["0"]["mlp"]["up"]
    np.testing.assert_allclose(up, -0.1 * 1.1, rtol=1e-5)
    np.testing.assert_allclose(q[0], -0.3 * 1.1, rtol=1e-5)
    assert not q[1].any()
