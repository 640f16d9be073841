"""A second signal, anywhere in the stop or the save that the first one asked for: the save is whole or invisible."""

import random
import signal
import time

import numpy as np
import pytest

from jaxpost import manifest
from jaxpost.checkpoint import Checkpointer
from tests import tiny
from tests.drills.test_kill import finish, lines, start

STEPS = 60


def stop_twice(config, run, rng: random.Random) -> None:
    process = start(config)
    wanted, deadline = lines(run) + rng.randrange(1, 8), time.monotonic() + 120
    while lines(run) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
    time.sleep(rng.random() * 0.3)
    process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGTERM, -signal.SIGINT), out
    assert "Traceback" not in out.split("Exception ignored in")[0], out  # the interpreter's own, while it ends


def check(tmp_path, stops: int, seed: int) -> None:
    loop = {"steps": STEPS, "save_every": 7}
    config = tiny.write_config(tmp_path, loop=loop, data={"eval": []})
    run, rng = tmp_path / "run", random.Random(seed)
    for _ in range(stops):
        stop_twice(config, run, rng)
        found = Checkpointer(run)
        for step in found.steps():
            assert not manifest.problems(found.folder / str(step), step)
    finish(config)
    assert Checkpointer(run).latest() == STEPS
    losses = tiny.metric(run, "loss")
    assert len(losses) == STEPS and np.isfinite(losses).all()


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(1, 4))
def test_two_signals_again_and_again(tmp_path, seed):
    check(tmp_path, stops=6, seed=seed)


def test_ctrl_c_before_the_first_step(tmp_path):
    process = start(tiny.write_config(tmp_path))
    lock, deadline = tmp_path / "run" / "LOCK", time.monotonic() + 120
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # among imports, compilations and reading of rows
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT), out
    assert "Traceback" not in out.split("Exception ignored in")[0], out
