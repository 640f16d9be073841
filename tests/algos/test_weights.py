"""token_weights: the three rules by hand, and that packing does not change them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.algos.base import SlowRule, registry, token_weights

MASK = jnp.array([[1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 0, 0]])


def test_rules_by_hand():
    np.testing.assert_allclose(token_weights(MASK, SEGMENTS, "token"), MASK / 5)
    np.testing.assert_allclose(token_weights(MASK, SEGMENTS, "constant", 8.0), MASK / 8)
    # three sequences have trainable targets: 3, 1 and 1 of them
    expected = [[1 / 9, 1 / 9, 1 / 9, 0, 1 / 3, 0], [0, 1 / 3, 0, 0, 0, 0]]
    np.testing.assert_allclose(token_weights(MASK, SEGMENTS, "sequence"), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", ["token", "sequence"])
def test_weights_sum_to_one_and_to_zero_when_all_is_masked(rule):
    np.testing.assert_allclose(token_weights(MASK, SEGMENTS, rule).sum(), 1.0, rtol=1e-6)
    assert token_weights(jnp.zeros_like(MASK), SEGMENTS, rule).sum() == 0


def test_packed_equals_unpacked():
    packed = token_weights(MASK, SEGMENTS, "sequence")
    rows = [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 2)), (1, slice(2, 4))]
    mask = np.zeros((4, 3), bool)
    for i, (row, part) in enumerate(rows):
        mask[i, : part.stop - part.start] = MASK[row, part]
    unpacked = token_weights(jnp.asarray(mask), jnp.ones((4, 3), int), "sequence")
    for i, (row, part) in enumerate(rows):
        np.testing.assert_allclose(packed[row, part], unpacked[i, : part.stop - part.start], rtol=1e-6)


def test_registry_finds_subclasses():
    import jaxpost.algos  # noqa: F401

    assert "sft" in registry()


def test_slow_rule_is_one_of_two():
    with pytest.raises(ValueError, match="exactly one"):
        SlowRule("policy")
