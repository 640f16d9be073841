"""Drill 15, going back by hand as docs/sft.md says: remove the steps that went wrong, run the same command again."""

import functools
import shutil

import jax
import numpy as np
import pytest

from jaxpost import train
from jaxpost.checkpoint import Checkpointer
from jaxpost.errors import TrainingError
from tests import tiny

run = functools.partial(train.run, devices=jax.devices()[:1])
SMALL = "init:llama,vocab_size=264,d_model=16,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=8,d_ff=24,tied=true"


def settings(folder, steps: int, rate: float = 0.01):
    loop = {"steps": steps, "save_every": 1, "max_skipped_in_a_row": 2}
    return tiny.load(
        folder, [f"model.source={SMALL}"], loop=loop, optim={"learning_rate": rate}, data={"eval": []},
        checkpoint={"keep": 8},
    )  # fmt: skip


def test_a_run_that_diverged_goes_on_from_an_older_step_as_if_it_never_had(tmp_path):
    calm = run(settings(tmp_path / "calm", 6))
    run(settings(tmp_path / "hard", 3))
    wild, changed = settings(tmp_path / "hard", 8, rate=1e30), ["loop.steps", "optim.learning_rate"]
    with pytest.raises(TrainingError, match="2 updates in a row were not finite"):
        run(wild, allow_changed=changed)
    found = Checkpointer(wild.run_dir)
    spoilt = [step for step in found.steps() if step > 3]
    assert spoilt  # whole, so nothing else would go back behind them
    with pytest.raises(TrainingError):
        run(settings(tmp_path / "hard", 8), allow_changed=changed)

    for step in found.steps():
        if step > 3:
            shutil.rmtree(found.folder / str(step))
    back = run(settings(tmp_path / "hard", 6), allow_changed=changed)
    for ours, theirs in zip(*map(jax.tree.leaves, (back, calm)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    for name in ("loss", "grad_norm", "num_tokens", "step"):
        assert tiny.metric(back_dir := wild.run_dir, name) == tiny.metric(tmp_path / "calm/run", name), back_dir
    assert "resumed at step 3 of 6" in (tmp_path / "hard/run/logs/events.log").read_text()
