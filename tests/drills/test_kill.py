"""kill -9 at random moments, the same command again, until the run is done: nothing may differ from a run in peace."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxpost.checkpoint import Checkpointer
from tests import tiny

VOLATILE = ("tokens_per_sec", "step_time", "time", "mfu")
LOOP = {"steps": 240, "save_every": 12, "eval_every": 60}


def start(config: pathlib.Path) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": ""}
    args = [sys.executable, "-m", "jaxpost.train", f"--config={config}"]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(config: pathlib.Path) -> None:
    process = start(config)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out


def lines(run: pathlib.Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text(errors="replace").count("\n") if file.exists() else 0


def records(run: pathlib.Path) -> list[dict]:
    parsed = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in parsed]


def state(run: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Every array of the last checkpoint, parameters, moments and counters alike, and the data position."""
    checkpointer = Checkpointer(run)
    step = checkpointer.latest()
    assert step == LOOP["steps"]
    leaves = checkpointer.leaves(step)
    found = {}
    for part in ("params", "opt_state", "scalars"):
        tree = {name.removeprefix(f"{part}."): x for name, x in leaves.items() if name.startswith(f"{part}.")}
        found |= {f"{part}.{k}": np.asarray(x) for k, x in checkpointer.restore_params(step, tree, part=part).items()}
    assert len(found) > 10
    return found, json.loads((checkpointer.folder / str(step) / "source.json").read_text())


def kill_until_done(config: pathlib.Path, run: pathlib.Path, kills: int, rng: random.Random) -> None:
    for _ in range(kills):
        process = start(config)
        wanted = lines(run) + rng.randrange(1, 40)
        deadline = time.monotonic() + 120
        while lines(run) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)  # anywhere in a step, a save, or the hashing after it
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(config)


def check(tmp_path: pathlib.Path, kills: int, seed: int) -> None:
    sections = {"loop": LOOP, "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}, "data": {"window": 64}}
    calm = tiny.write_config(tmp_path / "calm", **sections)
    hard = tiny.write_config(tmp_path / "hard", **sections)
    finish(calm)
    kill_until_done(hard, tmp_path / "hard" / "run", kills, random.Random(seed))
    assert records(tmp_path / "hard" / "run") == records(tmp_path / "calm" / "run")
    (hard_state, hard_place), (calm_state, calm_place) = (
        state(tmp_path / "hard" / "run"),
        state(tmp_path / "calm" / "run"),
    )
    assert hard_place == calm_place and hard_state.keys() == calm_state.keys()
    for name, array in calm_state.items():
        np.testing.assert_array_equal(hard_state[name], array, err_msg=name)
    steps = {p.name for p in (tmp_path / "hard" / "run" / "checkpoints").iterdir() if p.name.isdecimal()}
    assert steps == {str(s) for s in Checkpointer(tmp_path / "hard" / "run").steps()}  # no partial step is left


def test_three_kills(tmp_path):
    check(tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_thirty_kills(tmp_path, seed):
    check(tmp_path, kills=5, seed=seed)
