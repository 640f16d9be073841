"""How a batch is laid out changes nothing: packing, padding, row order, micro-batches, what stands under weight 0."""

import dataclasses

import jax
import pytest

from tests.properties import harness
from tests.properties.harness import Run, SpoiltPolicy, assert_same, packed, parameters, shuffled, spoilt, unpacked


@pytest.mark.parametrize("case", parameters())
def test_layout_changes_nothing(case):
    batch = packed(case.units)
    assert (batch.segments.max(axis=1) > 1).any() and (batch.segments == 0).any()
    run = Run(case)
    want = run(batch)
    wider = packed(case.units, width=2 * harness.WIDTH)
    for other in (unpacked(case.units), shuffled(batch), packed(case.units[::-1]), wider):
        assert_same(run(other), want, case.tolerance)
    if not case.algorithm.whole_batch:  # every leaf is rounded four times more
        assert_same(Run(case, micro_batches=4)(batch), want, 2 * case.tolerance)
    assert_same(Run(case, policy=SpoiltPolicy)(spoilt(batch, case.trains_prompts)), want, case.tolerance)


@pytest.mark.parametrize("case", parameters())
def test_without_jit(case):
    units = case.units[:2]
    batch = packed(units, rows=1, width=64)
    run = Run(case)
    want = run(batch)
    with jax.disable_jit():
        assert_same(run(batch), want, case.tolerance)


@pytest.mark.parametrize("case", parameters(knobs=True))
def test_a_knob_without_strength_is_the_simpler_method_exactly(case):
    batch = packed(case.units, rows=1)
    plain = dataclasses.replace(case, algorithm=case.same_as)
    assert_same(Run(case)(batch), Run(plain)(batch), tolerance=0)
