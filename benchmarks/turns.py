"""Several training loops in several environments that take turns on one machine; standard library only.

A worker calls `Turns.boundary` before each of its steps. At the end of a turn that waits for all computation, reports
what the turn took and blocks until the driver's next word. So all loops are warm, one of them runs at a time, and other
load on the machine hits all alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

THREADS = 2


class Turns:
    """A worker's side. Whatever else is printed goes to stderr: stdout belongs to the driver."""

    def __init__(self) -> None:
        self._reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._steps = self._until = 0
        self._began: tuple[float, float, float, float] | None = None

    def boundary(self, drain: Callable[[], object], useful: float, computed: float = 0.0) -> None:
        """Before a step. drain waits for the steps before it; useful, computed: tokens of all steps so far."""
        if self._steps == self._until:
            drain()
            now = time.perf_counter(), time.process_time(), useful, computed
            if self._began is not None:
                took = dict(zip(("seconds", "cpu", "useful", "computed"), (b - a for a, b in zip(self._began, now))))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                print(json.dumps(took | {"gib": peak}), file=self._reports, flush=True)
            if not (word := sys.stdin.readline()):
                os._exit(0)  # without the framework's own farewell
            self._until += int(word)
            self._began = time.perf_counter(), time.process_time(), useful, computed
        self._steps += 1


@dataclasses.dataclass(frozen=True)
class Variant:
    """One loop: how a table names it, the interpreter (None: not installed, `missing` says what to do), the script."""

    label: str
    python: str | None
    script: str
    arguments: dict
    steps: int = 2  # a turn
    missing: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Measured:
    """What the turns of one variant took."""

    variant: Variant
    turns: list[dict[str, float]] = dataclasses.field(default_factory=list)
    failure: str = ""

    @property
    def rates(self) -> list[float]:
        """Useful tokens (or what the worker counts) a second, of each turn."""
        return [turn["useful"] / turn["seconds"] for turn in self.turns]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def per_cpu(self) -> float:
        """Useful tokens a second of processor time."""
        return statistics.median(turn["useful"] / turn["cpu"] for turn in self.turns)

    @property
    def useful_share(self) -> float:
        """Useful tokens among those computed, over all turns."""
        return sum(turn["useful"] for turn in self.turns) / sum(turn["computed"] for turn in self.turns)

    def ratio(self, other: Measured) -> float:
        """Median over the turns of this rate over another variant's; over all turns where rows differ between them."""
        if any(turn["computed"] for turn in self.turns):
            return self.whole / other.whole
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))

    @property
    def whole(self) -> float:
        """Useful tokens a second over all turns together: rows of different lengths make single turns differ."""
        return sum(turn["useful"] for turn in self.turns) / sum(turn["seconds"] for turn in self.turns)


def play(variants: list[Variant], rounds: int, logs: pathlib.Path, environment: dict[str, str]) -> list[Measured]:
    """Start every variant, warm it up with one turn that does not count, then `rounds` times a turn each."""
    measured, workers = [Measured(variant) for variant in variants], []
    cores = sorted(os.sched_getaffinity(0))[:THREADS] if hasattr(os, "sched_getaffinity") else []
    try:
        for entry in measured:
            workers.append(_start(entry, logs, environment, cores))
        for turn in range(rounds + 1):
            for entry, worker in zip(measured, workers, strict=True):
                if not entry.failure:
                    _turn(entry, worker, count=turn > 0)
    finally:
        for worker in workers:
            if worker is not None:
                worker.kill()
                worker.communicate()
    return measured


def _start(entry: Measured, logs: pathlib.Path, environment: dict[str, str], cores: list[int]):
    variant = entry.variant
    if variant.python is None:
        entry.failure = variant.missing
        return None
    script = pathlib.Path(__file__).parent / variant.script
    name = "".join(c if c.isalnum() else "_" for c in variant.label)
    threads = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (logs / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [variant.python, str(script), json.dumps(variant.arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | threads | environment | variant.environment,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )


def _turn(entry: Measured, worker: subprocess.Popen, count: bool) -> None:
    try:
        worker.stdin.write(f"{entry.variant.steps}\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass
    line = worker.stdout.readline()
    if not line:
        entry.failure = f"{entry.variant.label}: the loop ended by itself; its log says why"
        entry.turns = []
    elif count:
        entry.turns.append(json.loads(line))
    print(
        f"{time.strftime('%H:%M:%S')}  {entry.variant.label}  {line.strip() or 'failed'}", file=sys.stderr, flush=True
    )
