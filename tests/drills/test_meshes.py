"""One run moves over meshes, a checkpoint at a time: the same examples in the same order, the same losses."""

import jax
import numpy as np
import pytest

from jaxpost import train
from jaxpost.checkpoint import Checkpointer
from tests import tiny

MESHES = [
    {"data": 1},
    {"data": 1, "fsdp": 2},
    {"data": 1, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1},
]


@pytest.mark.slow
def test_a_run_changes_its_mesh_at_every_start(tmp_path):
    whole = tiny.load(tmp_path / "whole", loop={"steps": 2 * len(MESHES), "save_every": 2}, mesh=MESHES[0])
    train.run(whole, devices=jax.devices()[:1])
    for i, mesh in enumerate(MESHES):
        part = tiny.load(tmp_path / "parts", loop={"steps": 2 * (i + 1)}, mesh=mesh)
        state = train.run(part, allow_changed=["loop.steps"])
        assert int(state.step) == 2 * (i + 1)
    for name in ("loss", "grad_norm", "num_tokens", "epoch"):
        got, want = (tiny.metric(tmp_path / folder / "run", name) for folder in ("parts", "whole"))
        assert len(got) == len(want) == 2 * len(MESHES)
        np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=name)
    places = [
        (Checkpointer(tmp_path / folder / "run").folder / str(2 * len(MESHES)) / "source.json").read_text()
        for folder in ("parts", "whole")
    ]
    assert places[0] == places[1]


def test_a_checkpoint_holds_the_same_bits_on_every_mesh(tmp_path):
    config = tiny.load(tmp_path, loop={"steps": 1}, mesh={"data": 1})
    state = train.run(config, devices=jax.devices()[:1])
    saved = jax.tree.map(np.asarray, (state.params, state.opt_state))
    for mesh in MESHES[1:-1]:
        again = train.run(tiny.load(tmp_path, loop={"steps": 1}, mesh=mesh))
        for ours, theirs in zip(*map(jax.tree.leaves, ((again.params, again.opt_state), saved)), strict=True):
            np.testing.assert_array_equal(np.asarray(ours), theirs)
