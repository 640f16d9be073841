"""The true loop on a tiny model: it learns, resumes bit for bit, refuses what changed, and stops on SIGTERM."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxpost import config, train
from jaxpost.checkpoint import Checkpointer
from jaxpost.errors import CheckpointError, TrainingError
from tests import tiny

run = functools.partial(train.run, devices=jax.devices()[:1])
VOLATILE = ("tokens_per_sec", "step_time", "time", "mfu")


def steps_of(run_dir):
    """metrics.jsonl without what a clock measured."""
    lines = pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0, "dropout": 0.1}], ids=["full", "lora"])
def test_it_learns_and_resumes_bit_for_bit(tmp_path, lora):
    whole = tiny.load(tmp_path / "a", lora=lora, loop={"steps": 12, "save_every": 4, "eval_every": 6})
    final = run(whole)
    losses = tiny.metric(whole.run_dir, "loss")
    assert len(losses) == 12 and losses[-1] < (0.75 if lora is None else 0.95) * losses[0]  # adapters of a random base
    held_out = tiny.metric(whole.run_dir, "eval/loss")
    assert len(held_out) == 2 and held_out[1] < held_out[0]

    # the same run cut after 8 steps: only what step 8's checkpoint holds goes on
    cut = tiny.load(tmp_path / "b", lora=lora, loop={"steps": 12, "save_every": 4, "eval_every": 6})
    run(cut)
    folder = pathlib.Path(cut.run_dir, "checkpoints")
    shutil.rmtree(folder / "12")
    (folder / "LATEST").write_text("8\n")
    resumed = run(cut)
    equal(jax.device_get(final.params), jax.device_get(resumed.params))
    equal(jax.device_get(final.opt_state), jax.device_get(resumed.opt_state))
    assert steps_of(whole.run_dir) == steps_of(cut.run_dir)


def test_a_finished_run_says_so_and_a_changed_one_is_refused(tmp_path, capsys):
    config = tiny.load(tmp_path, loop={"steps": 2}, metrics={"console": "lines"})
    run(config)
    capsys.readouterr()
    run(config)
    assert "this run is done: 2 steps" in capsys.readouterr().out
    changed = tiny.load(tmp_path, ["optim.learning_rate=0.5"], loop={"steps": 2})
    with pytest.raises(CheckpointError, match=r"optim.learning_rate: 0.01 -> 0.5.*--allow_changed=optim.learning_rate"):
        run(changed)
    tiny.write_rows(tmp_path / "train.jsonl", 119)
    with pytest.raises(CheckpointError, match=r"data.train\[0\]"):
        run(config)
    run(changed, overwrite=True)
    assert len(tiny.metric(config.run_dir, "loss")) == 2


def test_one_program_and_one_read_a_step(tmp_path, monkeypatch):
    """No recompilation after the first step, and one batch of metrics read a log step, nothing else."""
    from jaxpost import loop

    reads = []
    real = jax.device_get
    monkeypatch.setattr(loop.jax, "device_get", lambda x: reads.append(1) or real(x))
    config = tiny.load(tmp_path, loop={"steps": 9, "log_every": 3, "save_every": 0}, data={"eval": []})
    compiled = []
    monkeypatch.setattr(loop, "_check_programs", lambda job: compiled.append(job.train_step._cache_size()))
    run(config)
    assert compiled == [1] * 9
    assert len(reads) == 4  # steps 1, 3, 6, 9
    assert tiny.metric(config.run_dir, "num_tokens") == sorted(tiny.metric(config.run_dir, "num_tokens"))


def test_non_finite_updates_are_not_applied_and_end_the_run(tmp_path):
    config = tiny.load(
        tmp_path, loop={"steps": 8, "max_skipped_in_a_row": 3, "save_every": 1}, optim={"clip_norm": None}
    )
    good = run(tiny.load(tmp_path / "good", loop={"steps": 1}))
    assert np.isfinite(np.asarray(good.params["policy"]["embed"])).all()
    from jaxpost.losses import sft

    real = sft.sft_loss
    import jaxpost.algos.sft as algo

    def poisoned(logprobs, weights, **kwargs):
        loss, metrics = real(logprobs, weights, **kwargs)
        return loss * np.nan, metrics

    before = algo.sft_loss
    algo.sft_loss = poisoned
    try:
        with pytest.raises(TrainingError, match="3 updates in a row were not finite"):
            run(config)
    finally:
        algo.sft_loss = before
    start = run(tiny.load(tmp_path / "start", loop={"steps": 1}, optim={"freeze": ["mlp", "attn", "norm"]}))
    checkpointer = Checkpointer(config.run_dir)
    saved = checkpointer.restore_params(checkpointer.latest(), jax.eval_shape(lambda: start.params))
    assert np.isfinite(np.asarray(saved["policy"]["embed"])).all()
    equal(saved["policy"]["blocks"], start.params["policy"]["blocks"])  # untouched: the initial weights


def test_micro_batches_change_rounding_only(tmp_path):
    one = run(tiny.load(tmp_path / "a", loop={"steps": 1}))
    four = run(tiny.load(tmp_path / "b", loop={"steps": 1, "micro_batches": 4}))
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        np.testing.assert_allclose(
            tiny.metric(tmp_path / "a/run", name), tiny.metric(tmp_path / "b/run", name), rtol=2e-6
        )
    # After one step the moments are the gradient and its square: an Adam update itself would amplify the last bit.
    for x, y in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(four.opt_state), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.abs(x - y).max() <= 4e-6 * np.abs(x).max()  # 2e-6 for the gradient, twice that for its square


def test_the_state_is_donated_whole(tmp_path):
    from jaxpost.build import build_job
    from jaxpost.checkpoint import tree_bytes
    from jaxpost.metrics import MetricsConfig, Sinks

    config = tiny.load(tmp_path)
    pathlib.Path(config.run_dir).mkdir()
    with Sinks(config.run_dir, MetricsConfig(tensorboard=False, console="none")) as sinks:
        job = build_job(config, sinks, devices=jax.devices()[:1])
        compiled = job.train_step.lower(job.state, job.frozen, next(job.source)).compile()
        job.source.close()
    assert compiled.memory_analysis().alias_size_in_bytes == tree_bytes(job.state)


def command(config: pathlib.Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "jaxpost.train", f"--config={config}", *more]


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    config = tiny.write_config(
        tmp_path, loop={"steps": 5000, "save_every": 0}, metrics={"console": "lines"}, data={"eval": []}
    )
    process = subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"XLA_FLAGS": ""}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "stopped by a signal" in out
    step = Checkpointer(tmp_path / "run").latest()
    assert step == len(metrics.read_text().splitlines())


def test_two_starts_of_one_run_directory(tmp_path):
    from jaxpost.errors import ConfigError
    from jaxpost.rundir import RunLock

    config = tiny.load(tmp_path)
    with RunLock(config.run_dir), pytest.raises(ConfigError, match=f"in use by pid {os.getpid()}"):
        run(config)


def test_what_is_lost_or_out_of_reach_is_said(tmp_path):
    file = tiny.write_config(
        tmp_path, model={"source": f"{tiny.MODEL},max_positions=32"}, loop={"steps": 1, "save_every": 0}
    )
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "B" * 90}]}
    with (tmp_path / "heldout.jsonl").open("a") as held_out:
        held_out.write(json.dumps(long) + "\n")
    run(config.load(file).config)
    events = (tmp_path / "run" / "logs" / "events.log").read_text()
    assert "data.seq_len 64 is more than the 32 positions that the model was trained on" in events
    assert "of 13 held-out rows: dropped/too_long 1" in events


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_the_held_out_loss_does_not_depend_on_the_batch_size(tmp_path, normalise):
    """It is the mean over all held-out targets (or sequences), not of batches, whose sizes differ."""
    found = []
    for rows in (1, 8):
        config = tiny.load(
            tmp_path / str(rows), data={"batch_size": rows}, mesh={"data": 1}, loop={"steps": 1, "eval_first": True},
            algorithm={"name": "sft", "normalise": normalise},
        )  # fmt: skip
        run(config)
        found.append(tiny.metric(config.run_dir, "eval/loss")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_run_that_goes_on_keeps_its_rows(tmp_path):
    """data.max_segments followed from the data at the start; the checkpoint remembers it, whatever data say later."""
    sections = {"data": {"batch_size": 2, "seq_len": 512}, "mesh": {"data": 1}, "loop": {"steps": 2, "save_every": 1}}
    first = tiny.load(tmp_path, **sections)
    run(first)
    saved = Checkpointer(first.run_dir).source_state(2)["fingerprint"]["data.max_segments"]
    assert saved > 8  # short rows
    longer = [{"messages": [{"role": r, "content": 20 * "long "} for r in ("user", "assistant")]} for _ in range(400)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in longer))
    longer_run = config.load(tmp_path / "config.yaml", ["loop.steps=3"]).config
    run(longer_run, allow_changed=("data.train", "loop.steps"))
    assert Checkpointer(longer_run.run_dir).source_state(3)["fingerprint"]["data.max_segments"] == saved
