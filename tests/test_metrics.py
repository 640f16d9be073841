"""Sinks: what is written, what survives a crash, and what must never be written."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.metrics import MetricsConfig, Sinks, read_metrics
from jaxpost.metrics_plot import plot_losses

FILES_ONLY = MetricsConfig(tensorboard=False, console="none")


def test_a_line_is_valid_json_with_the_step_first(tmp_path):
    with Sinks(tmp_path, FILES_ONLY) as sinks:
        sinks.log(
            1, {"loss": jnp.float32(0.5), "n": 7, "x": np.float64(2), "nan": float("nan"), "inf": np.float32("inf")}
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5, "n": 7, "x": 2.0, "nan": null, "inf": null}\n'
    json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_every_line_is_there_before_flush(tmp_path):
    sinks = Sinks(tmp_path, FILES_ONLY)
    sinks.log(1, {"loss": 1})
    assert len(read_metrics(tmp_path)) == 1  # as a killed process would leave it
    sinks.close()
    sinks.close()


def test_what_is_not_a_number_is_refused(tmp_path):
    with Sinks(tmp_path, FILES_ONLY) as sinks, pytest.raises(TypeError, match="must be a number"):
        sinks.log(1, {"loss": "low"})


def test_truncate_drops_later_steps_and_a_cut_line(tmp_path):
    with Sinks(tmp_path, FILES_ONLY) as sinks:
        for step in range(1, 6):
            sinks.log(step, {"loss": step})
            sinks.log(step, {"eval/loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    with Sinks(tmp_path, FILES_ONLY) as sinks:
        sinks.truncate(3)
        sinks.log(4, {"loss": 40})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss"] == 40


def test_a_cut_line_does_not_swallow_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    with Sinks(tmp_path, FILES_ONLY) as sinks:
        sinks.log(2, {"loss": 2})
    assert [line["step"] for line in read_metrics(tmp_path)] == [2]


def scalars(folder):
    """(step, value) of loss in every TensorBoard file, and the steps at which a restart asked to purge."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    points, purges = [], []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its crc (4), event, its crc (4)
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            points += [(event.step, value.simple_value) for value in event.summary.value]
            if event.session_log.status == SessionLog.START:
                purges.append(event.step)
    return points, purges


def test_tensorboard_gets_the_numbers_and_a_purge_on_resume(tmp_path):
    config = MetricsConfig(console="none")
    with Sinks(tmp_path, config) as sinks:
        for step in (1, 2, 3):
            sinks.log(step, {"loss": step})
    with Sinks(tmp_path, config) as sinks:
        sinks.truncate(2)
        sinks.log(3, {"loss": 30})
        sinks.flush()
    points, purges = scalars(tmp_path / "tensorboard")
    assert sorted(points) == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 30.0)] and purges == [3]


def test_lines_are_ascii_sparse_and_show_evaluations(tmp_path, capsys):
    with Sinks(tmp_path, MetricsConfig(tensorboard=False, console="lines", line_seconds=1000.0)) as sinks:
        for step in range(1, 5):
            sinks.log(step, {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_sec": 1234.5, "epoch": 0.1}, total_steps=4)
        sinks.log(4, {"eval/loss": 1.25})
        sinks.event("naïve ☃")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/4  loss 2.5  lr 1.00e-04  tok/s 1,234"
    assert lines[1].startswith("step 4/4  loss 2.5") and lines[1].endswith("left 0:00:00")
    assert lines[2:] == ["step 4  eval/loss 1.25", "na\\xefve \\u2603"]


def test_auto_console_is_a_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Sinks(tmp_path, MetricsConfig(tensorboard=False)) as sinks:
        sinks.log(1, {"loss": 2.5}, total_steps=3)
        sinks.log(1, {"eval/loss": 1.25})
        sinks.event("[bold] is not markup")
        sinks.log(3, {"loss": 0.5}, total_steps=3)
    text = sys.stdout.getvalue()
    assert "3/3" in text and "loss 0.5" in text and "eval/loss 1.25" in text and "[bold] is not markup" in text


def test_secrets_do_not_reach_the_event_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    with Sinks(tmp_path, MetricsConfig(tensorboard=False, console="lines")) as sinks:
        sinks.event("loading with very-secret-value failed")
    log = (tmp_path / "logs" / "events.log").read_text()
    assert "very-secret" not in log + capsys.readouterr().out and "loading with *** failed" in log


def test_other_processes_write_nothing(tmp_path):
    with Sinks(tmp_path / "run", MetricsConfig(), writer=False) as sinks:
        sinks.log(1, {"loss": 1})
        sinks.event("hello")
        sinks.truncate(0)
        sinks.flush()
    assert not (tmp_path / "run").exists()


def test_plot_draws_a_png(tmp_path):
    assert plot_losses(tmp_path) is None
    with Sinks(tmp_path, FILES_ONLY) as sinks:
        for step in range(1, 4):
            sinks.log(step, {"loss": 1 / step, "learning_rate": 1e-3})
        sinks.log(2, {"loss": float("nan")})
        sinks.log(3, {"eval/loss": 0.4})
    assert plot_losses(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_costs_the_picture_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_losses(tmp_path) is None
