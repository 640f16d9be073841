"""Where numbers go: metrics.jsonl, TensorBoard, the terminal, and logs/events.log. One process writes.

A metrics.jsonl line is one JSON object, "step" first; a number that is not finite is null (JSON has no nan). A step may
have two lines, one of training and one of evaluation ("eval/...").
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic

from jaxpost.fields import SECTION, Bool, NonNegFloat
from jaxpost.manifest import replace_file
from jaxpost.redact import redact_text

# Shown in the terminal, in this order, with these short names; everything else is in the files.
SHOWN = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad", "tokens_per_sec": "tok/s"}


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class MetricsConfig:
    """Which sinks are on; metrics.jsonl and logs/events.log always are."""

    tensorboard: Bool = True
    console: Literal["auto", "bar", "lines", "none"] = "auto"  # auto: a bar on a terminal, else lines
    line_seconds: NonNegFloat = 10.0  # lines: at most one training line in this time


class Sinks:
    """All sinks of one run. writer: False on processes other than 0, where every call is a no-op."""

    def __init__(self, run_dir: str | os.PathLike, config: MetricsConfig, *, writer: bool = True):
        self._folder, self._config, self._writer = Path(run_dir), config, writer
        self._path = self._folder / "metrics.jsonl"
        self._file = self._events = self._board = None
        self._console: _Bar | _Lines | None = None
        if not writer:
            return
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        self._events = (self._folder / "logs" / "events.log").open("a", encoding="utf-8")
        self._open()
        kind = config.console
        if kind == "auto":
            kind = "bar" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else "lines"
        if kind != "none":
            self._console = _Bar() if kind == "bar" else _Lines(config.line_seconds)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Any], *, total_steps: int | None = None) -> None:
        """Write numbers (Python, numpy, one-element arrays) under a step; total_steps: for the console, time left."""
        if not self._writer:
            return
        numbers = {name: _number(value) for name, value in values.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step} | line, allow_nan=False) + "\n")
        self._file.flush()  # a killed process loses nothing that was logged
        if self._board_writer() is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._console is not None:
            self._console.log(step, numbers, total_steps)

    def event(self, text: str) -> None:
        """One remarkable thing: to the terminal and, with the time, to logs/events.log; secrets are masked."""
        if not self._writer:
            return
        text = redact_text(text)
        self._events.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
        self._events.flush()
        if self._console is not None:
            self._console.event(text)

    def flush(self) -> None:
        """Everything logged so far is on disk when this returns; called before a checkpoint is saved."""
        if not self._writer:
            return
        for file in (self._file, self._events):
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def truncate(self, step: int) -> None:
        """Forget what was logged after `step`, the restored one; -1 forgets all, for a run that died before it saved.

        A line cut short by a crash goes too. TensorBoard gets a new file that tells it to drop the later steps.
        """
        if not self._writer:
            return
        self._file.close()
        kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        replace_file(self._path, "".join(f"{line}\n" for line in kept))
        if self._board is not None:
            self._board.close()
            self._board = None
        self._open(purge_step=step + 1)

    def close(self) -> None:
        """Flush and close everything, and stop the bar; a second call does nothing."""
        if not self._writer or self._file is None:
            return
        self.flush()
        if self._console is not None:
            self._console.close()
        if self._board is not None:
            self._board.close()
        self._file.close()
        self._events.close()
        self._file = self._board = self._console = None
        self._writer = False

    def _open(self, purge_step: int | None = None) -> None:
        """metrics.jsonl for appending, on a fresh line even after a crash in mid-line."""
        cut = self._path.exists() and self._path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = self._path.open("a", encoding="utf-8", newline="\n")
        if cut:
            self._file.write("\n")
        self._purge_step = purge_step

    def _board_writer(self) -> Any:
        """The TensorBoard writer, made on first use: its import takes a second."""
        if self._config.tensorboard and self._board is None:
            from tensorboardX import SummaryWriter

            # Without a suffix of its own a restart within the same second overwrites the last file.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            folder = str(self._folder / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=self._purge_step, filename_suffix=suffix)
        return self._board


def _number(value: Any) -> int | float:
    """A Python number, without turning a count into a float."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, (int, float)):
        raise TypeError(f"a metric must be a number, got {type(value).__name__}")
    return value


def _step_of(line: str) -> float:
    """The step of a metrics.jsonl line, infinity for one that is not whole."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl, in order; [] if there is none yet."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) != math.inf]


def before_and_after(run_dir: str | os.PathLike) -> str:
    """First and last value of everything that was evaluated, a line each; "" where there are not two evaluations."""
    evaluations = [record for record in read_metrics(run_dir) if any(name.startswith("eval/") for name in record)]
    if len(evaluations) < 2:
        return ""
    first, last = evaluations[0], evaluations[-1]
    lines = [f"before (step {first['step']}) and after (step {last['step']})"]
    names = [name for name in last if name.startswith("eval/") and isinstance(first.get(name), int | float)]
    lines += [f"  {name.removeprefix('eval/'):<22}{first[name]:>10.4f}{last[name]:>10.4f}" for name in names]
    return "\n".join(lines)


def summary(numbers: Mapping[str, float]) -> str:
    """The numbers worth a place in the terminal: the known few of training, or all of an evaluation."""
    known = {short: numbers[name] for name, short in SHOWN.items() if name in numbers}
    known |= {name: value for name, value in numbers.items() if name.startswith("eval/")}
    return "  ".join(f"{name} {_short(name, value)}" for name, value in known.items())


def _short(name: str, value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class _Lines:
    """One plain ASCII line a report, for files, pipes and CI."""

    def __init__(self, seconds: float):
        self._seconds, self._last = seconds, -math.inf
        self._first: tuple[int, float] | None = None

    def log(self, step: int, numbers: Mapping[str, float], total: int | None) -> None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        evaluation = any(name.startswith("eval/") for name in numbers)
        if not evaluation and step != total:
            if now - self._last < self._seconds:
                return
            self._last = now
        left = ""
        if total and step > self._first[0] and not evaluation:
            left = f"  left {_clock((now - self._first[1]) / (step - self._first[0]) * (total - step))}"
        self.event(f"step {step}{f'/{total}' if total else ''}  {summary(numbers)}{left}")

    def event(self, text: str) -> None:
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)

    def close(self) -> None:
        sys.stdout.flush()


class _Bar:
    """A progress bar with the newest numbers; evaluations and events scroll by above it."""

    def __init__(self):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        text = TextColumn("{task.fields[numbers]}", markup=False)
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, refresh_per_second=2)
        self._task = None

    def log(self, step: int, numbers: Mapping[str, float], total: int | None) -> None:
        if any(name.startswith("eval/") for name in numbers):
            self.event(f"step {step}  {summary(numbers)}")
            return
        if self._task is None:
            self._task = self._progress.add_task("", total=total, completed=step, numbers="")
            self._progress.start()
        self._progress.update(self._task, completed=step, total=total, numbers=summary(numbers))

    def event(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
