"""One writer a run directory; env.json remembers every start without secrets."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpost.errors import ConfigError
from jaxpost.rundir import RunLock, clear, start_date, write_env


def test_a_second_start_is_refused_with_the_holder(tmp_path):
    with RunLock(tmp_path), pytest.raises(ConfigError, match=rf"in use by pid {os.getpid()} on "):
        RunLock(tmp_path)
    with RunLock(tmp_path):  # released
        pass
    assert (tmp_path / "LOCK").read_text().count("pid") == 1


def test_a_killed_holder_does_not_lock_anyone_out(tmp_path):
    script = """
import sys, time
from jaxpost.rundir import RunLock
lock = RunLock(sys.argv[1])
print(1, flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, env=environment)
    holder.stdout.readline()
    with pytest.raises(ConfigError, match=f"in use by pid {holder.pid} "):
        RunLock(tmp_path)
    holder.kill()
    holder.communicate()
    RunLock(tmp_path).release()


def test_paths_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunLock(tmp_path / "file")
    with pytest.raises(ConfigError, match="only local"):
        RunLock("gs://bucket/run")


def test_env_lists_every_start_and_masks_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("JAX_TEST_NOTE", "0123456789abcdef")
    write_env(tmp_path, ["train", "x.token=hf_abcdefghijklmnopqrstu"])
    write_env(tmp_path, ["train"])
    text = (tmp_path / "env.json").read_text()
    first, second = json.loads(text)["starts"]
    assert first["command"] == ["train", "x.token=***"] and second["command"] == ["train"]
    assert "0123456789abcdef" not in text and first["environment"]["JAX_TEST_NOTE"] == "***"
    assert first["versions"]["jax"] and sum(first["devices"].values()) == 8


def test_a_run_keeps_the_date_of_its_first_start(tmp_path):
    today = datetime.date.today().isoformat()
    assert start_date(tmp_path) == today
    write_env(tmp_path, [])
    assert start_date(tmp_path) == today
    starts = json.loads((tmp_path / "env.json").read_text())["starts"]
    first = [starts[0] | {"time": "2024-02-29T23:59:59+0000"}]
    (tmp_path / "env.json").write_text(json.dumps({"starts": first + starts}))
    assert start_date(tmp_path) == "2024-02-29"
    (tmp_path / "env.json").write_text("{")  # damaged: today again
    assert start_date(tmp_path) == today


def test_overwrite_clears_runs_and_nothing_else(tmp_path):
    clear(tmp_path)  # nothing there yet
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "thesis.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match="--overwrite would delete checkpoints in .*, where no run of jaxpost has been"
    ):
        clear(tmp_path)
    assert (tmp_path / "checkpoints" / "thesis.txt").is_file()
    write_env(tmp_path, [])
    (tmp_path / "notes.txt").write_text("mine")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
