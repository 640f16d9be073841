"""A profile holds whole steps and names the parts of the step; a second start compiles nothing."""

import functools
import gzip
import json
import pathlib
import re

import jax
import pytest

from jaxpost import cli, train
from jaxpost.build import build_job
from jaxpost.metrics import MetricsConfig, Sinks
from tests import tiny

run = functools.partial(train.run, devices=jax.devices()[:1])
TRAINED = ("embed", "attention", "mlp", "head", "final_norm")  # forward and backward
OTHERS = ("prepare", "clip", "update", "guard")


@pytest.fixture
def no_cache():
    """A program from the persistent cache has the names that it was compiled with, maybe older ones."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


def test_the_parts_of_the_step_are_named(tmp_path, no_cache):
    config = tiny.load(tmp_path, data={"eval": []})
    pathlib.Path(config.run_dir).mkdir()
    with Sinks(config.run_dir, MetricsConfig(tensorboard=False, console="none")) as sinks:
        job = build_job(config, sinks, devices=jax.devices()[:1])
        text = job.train_step.lower(job.state, job.frozen, next(job.source)).compile().as_text()
        job.source.close()
    names = [name.split("/") for name in set(re.findall(r'op_name="jit\(train_step\)/([^"]*)"', text))]
    for part in OTHERS:
        assert any(name[0] == part for name in names), part
    for part in TRAINED:
        for way in ("jvp(loss)", "transpose(jvp(loss))"):
            assert any(name[0] == way and part in name for name in names), (way, part)
    products = re.findall(r'= \S+ (?:dot|custom-call)\(.*op_name="([^"]*)"', text)
    assert len(products) > 20
    unnamed = [name for name in products if not set(TRAINED) & set(name.split("/"))]
    assert not unnamed, unnamed  # every matrix product belongs to a part of the model


def test_a_profile_of_two_steps(tmp_path, capsys):
    config = tiny.load(tmp_path, loop={"steps": 6}, data={"eval": []}, metrics={"console": "lines"})
    run(config, profile_steps=(3, 5))
    assert len(tiny.metric(config.run_dir, "loss")) == 6
    folder = pathlib.Path(config.run_dir, "profile")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile of ")]
    assert len(lines) == 1 and f"profile of steps 3:5 in {folder};" in lines[0] and "xprof" in lines[0]
    assert "profile_steps" not in pathlib.Path(config.run_dir, "config.yaml").read_text()

    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["3", "4"]
    (file,) = folder.rglob("*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(file))
    events = [event for plane in trace.planes for line in plane.lines for event in line.events]
    # whole: both executions are in it from the first operation to the last, and no other step's
    work = [dict(event.stats) for event in events if "hlo_op" in dict(event.stats)]
    runs = {stats["run_id"] for stats in work if stats["hlo_module"] == "jit_train_step"}
    counts = [sum(stats["run_id"] == one for stats in work) for one in runs]
    assert len(counts) == 2 and counts[0] == counts[1] > 50


def test_a_stopped_run_keeps_the_profile_so_far(tmp_path, monkeypatch, capsys):
    from jaxpost import loop

    monkeypatch.setattr(loop._StopSignal, "agreed", lambda self, step: step == 2)
    config = tiny.load(tmp_path, loop={"steps": 6}, data={"eval": []}, metrics={"console": "lines"})
    run(config, profile_steps=(1, 5))
    assert "profile of the steps until then in" in capsys.readouterr().out
    (file,) = pathlib.Path(config.run_dir, "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert [event["args"]["step_num"] for event in events if event.get("name") == "train"] == ["1"]


@pytest.mark.parametrize(("steps", "message"), [("5-6", "not a range of steps"), ("7:9", "which has 8 steps")])
def test_steps_that_cannot_be_profiled(tmp_path, capsys, steps, message):
    argv = ["train", str(tiny.write_config(tmp_path, data={"eval": []})), f"--profile_steps={steps}"]
    assert cli.execute(train.main, argv, doc="", flags=train.FLAGS) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --profile_steps: ") and message in error and error.count("\n") == 1
    assert not pathlib.Path(tmp_path, "run", "metrics.jsonl").exists() or not tiny.metric(tmp_path / "run", "loss")


def test_a_second_start_compiles_nothing(tmp_path):
    """The persistent cache: what the first start compiled, the second one reads."""
    from jax._src import compilation_cache

    events = []
    listen = lambda name, **_: events.append(name.rpartition("/")[2]) if "compilation_cache" in name else None
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(listen)
    try:
        counts = []
        for start in ("first", "second"):
            jax.clear_caches()
            events.clear()
            run(tiny.load(tmp_path / start, loop={"steps": 1}, data={"eval": []}))
            counts.append((events.count("cache_hits"), events.count("cache_misses")))
            steps = [
                file
                for file in (tmp_path / "cache").iterdir()
                if "train_step" in file.name and "atime" not in file.name
            ]
            assert len(steps) == 1
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    (_, compiled), (read, again) = counts
    assert compiled > 0 and again == 0 and read >= compiled
