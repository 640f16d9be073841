"""One device equals two, four and eight, on every mesh axis alone and combined: losses, gradients, metrics."""

import pytest

from tests.properties.harness import Run, assert_same, case_named, packed, parameters

AXES = ("data", "fsdp", "tensor", "context")
TOGETHER = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
]
QUICK = [{"data": 1} | {axis: 8} for axis in AXES] + TOGETHER
SLOW = [{"data": 1} | {axis: size} for axis in AXES for size in (2, 4)]
SLOW += [{"data": 2, "fsdp": 2, "context": 2}, {"data": 4, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}]


def check(case, meshes, share: float = 1.0) -> None:
    batch = packed(case.units)
    want = Run(case)(batch)
    for mesh in meshes:
        assert_same(Run(case, mesh)(batch), want, share * case.tolerance)


ONCE = {"sft": QUICK, "sft-lora": TOGETHER[:1], "sft-lora-upper": TOGETHER[2:], "dpo": TOGETHER, "orpo": TOGETHER[1:2]}


@pytest.mark.parametrize("name", ONCE)
def test_eight_devices(name):
    check(case_named(name), ONCE[name])


@pytest.mark.slow
@pytest.mark.parametrize("case", parameters())
def test_every_mesh(case):
    # The worst leaf of 18 meshes, four cases and two jax versions: rounding alone reaches 2.3e-6.
    check(case, QUICK + SLOW, 1.5)
