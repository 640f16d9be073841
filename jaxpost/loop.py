"""The one loop. It sees a source, a step, an evaluator, a checkpointer and sinks, and no algorithm by name."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpost.errors import TrainingError
from jaxpost.fields import SECTION, Bool, NonNegInt, PosFloat, PosInt
from jaxpost.profiling import NO_PROFILE, Profile
from jaxpost.types import Frozen, Metrics, TrainState


@dataclass(frozen=True, config=SECTION)
class LoopConfig:
    """How long to train and how often to look."""

    steps: PosInt | None = None  # optimizer steps; or give epochs
    epochs: PosFloat | None = None  # passes over the training data
    micro_batches: PosInt = 1  # into which each batch is split to save memory; results do not change
    log_every: PosInt = 1
    eval_every: NonNegInt = 0  # 0: only at the end
    eval_first: Bool = False  # evaluate the untouched model too
    save_every: NonNegInt = 0  # 0: only at the end
    max_skipped_in_a_row: PosInt = 10  # refused updates, then the run stops
    skip_spikes: PosFloat | None = None  # refuse updates this many deviations above the last 128 losses or norms; try 6

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("steps: give exactly one of loop.steps and loop.epochs")
        return self


@dataclasses.dataclass
class Job:
    """Built objects of one run; build.py makes it, run() drives it."""

    state: TrainState
    frozen: Frozen
    train_step: Callable[[TrainState, Frozen, Any], tuple[TrainState, Metrics]]
    source: Any
    evaluate: Callable[[int, TrainState, Frozen], dict[str, float]]
    checkpointer: Any
    sinks: Any
    total_steps: int
    meta: dict[str, Any]  # saved beside every checkpoint
    flops_per_token: Callable[[int], float] | None = None  # of the mean segment length
    peak_flops: float | None = None  # of all devices together, None where not known
    num_programs: int = 1  # declared batch shapes: one compilation each


def run(config: LoopConfig, job: Job, profile: Profile = NO_PROFILE) -> TrainState:
    """Train from job.state.step to job.total_steps; returns the last state. Saves and returns early on SIGTERM.

    profile: told of every step, so that it can record some of them.

    Raises TrainingError after config.max_skipped_in_a_row refused updates in a row.
    """
    state, previous, told = job.state, None, {}
    start = int(state.step)
    clock = _Clock(job)
    if start == 0 and config.eval_first:
        _evaluate(job, 0, state)
        clock = _Clock(job)
    with _StopSignal() as stop, profile:
        for step in range(start, job.total_steps):
            profile.before(step, state)
            batch = next(job.source)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = job.train_step(state, job.frozen, batch)
            profile.after(step + 1, metrics)
            job.source.publish(state, step + 1)
            if step == start:
                jax.block_until_ready(metrics)
                job.sinks.event(f"first step after {clock.since_start():.1f} s, compilation included")
            if previous is not None:  # the step before this one: it has surely landed, or will while this one runs
                _log(config, job, clock, *previous)
            job.meta["num_tokens"] += job.source.info["num_tokens"]
            previous = (step + 1, metrics, job.source.info | {"total_tokens": job.meta["num_tokens"]})
            done, last = step + 1, step + 1 == job.total_steps
            stopping = stop.agreed(done)
            evaluating = last or (config.eval_every and done % config.eval_every == 0)
            saving = last or stopping or (config.save_every and done % config.save_every == 0)
            told = _tell_lost(job, told, ending=last or stopping)
            if previous is not None and (evaluating or saving):
                _log(config, job, clock, *previous)
                previous = None
            if evaluating and (last or not stopping):
                _evaluate(job, done, state)
                clock.restart()
            if saving:
                job.sinks.flush()
                job.checkpointer.save(done, state, job.source.state(), job.meta)
                clock.restart()
            _check_programs(job)
            if stopping:
                job.sinks.event(f"stopped by a signal at step {done}; saved. The same command goes on from here")
                break
    return state


def _log(config: LoopConfig, job: Job, clock: _Clock, step: int, metrics: Metrics, info: dict) -> None:
    """Where a line is due: read one step's metrics (the only device read of the loop), write it, watch the guard."""
    clock.count(info["num_tokens"], len(info["example_ids"]))
    if step % config.log_every and step not in (1, job.total_steps):
        return
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    in_a_row, worst = int(values.pop("skipped_in_a_row")), int(values.pop("most_skipped_in_a_row"))
    values |= {name: value for name, value in info.items() if name not in ("total_tokens", "example_ids")}
    values |= clock.read() | {"num_tokens": info["total_tokens"]}
    job.sinks.log(step, values, total_steps=job.total_steps)
    if in_a_row:
        job.sinks.event(
            f"step {step}: loss {values['loss']:g}, grad_norm {values['grad_norm']:g}: update not applied "
            f"({in_a_row} in a row); rows of its batch: {', '.join(info['example_ids'][:8])}"
        )
    if worst >= config.max_skipped_in_a_row:
        raise TrainingError(
            f"step {step}: {worst} updates in a row were not finite or, under loop.skip_spikes, spikes "
            "(loop.max_skipped_in_a_row); lower optim.learning_rate, or look at the rows named in logs/events.log"
        )


def _tell_lost(job: Job, told: dict[str, int], ending: bool) -> dict[str, int]:
    """Say that rows are dropped or cut: at the first of each kind, and their numbers when the run ends."""
    info = job.source.info
    lost = {name: n for name, n in info.items() if n and (name == "truncated" or name.startswith("dropped/"))}
    if not (lost.keys() - told.keys() or (ending and lost != told)):
        return told
    counts = {name: info[name] for name in ("rows_read", *lost) if name in info}
    job.sinks.event(f"training rows so far: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    return lost


def _evaluate(job: Job, step: int, state: TrainState) -> None:
    if values := job.evaluate(step, state, job.frozen):
        job.sinks.log(step, values, total_steps=job.total_steps)


def _check_programs(job: Job) -> None:
    """One compilation per declared batch shape, for the whole run."""
    if (compiled := job.train_step._cache_size()) > job.num_programs:
        raise TrainingError(f"the train step compiled {compiled} times for {job.num_programs} declared batch shapes")


class _Clock:
    """Tokens and steps between two reads, so that logging every k steps reports means over those k."""

    def __init__(self, job: Job):
        self._job, self._began = job, time.perf_counter()
        self.restart()

    def restart(self) -> None:
        self._last, self._tokens, self._segments, self._steps = time.perf_counter(), 0, 0, 0

    def since_start(self) -> float:
        return time.perf_counter() - self._began

    def count(self, tokens: int, segments: int) -> None:
        """One more step's tokens and packed examples."""
        self._tokens, self._segments, self._steps = self._tokens + tokens, self._segments + segments, self._steps + 1

    def read(self) -> dict[str, float]:
        """Rates since the last read, or since an evaluation or a save ended."""
        seconds = max(time.perf_counter() - self._last, 1e-9)
        rate = self._tokens / seconds
        values = {"tokens_per_sec": rate, "step_time": seconds / max(self._steps, 1)}
        if self._job.peak_flops and self._job.flops_per_token and self._tokens:
            length = max(1, round(self._tokens / max(self._segments, 1)))
            values["mfu"] = rate * self._job.flops_per_token(length) / self._job.peak_flops
        self.restart()
        return values


class _StopSignal:
    """SIGTERM or Ctrl-C asks for a save at the next step boundary; every process takes the same decision.

    A second Ctrl-C does not wait for that boundary: it interrupts (KeyboardInterrupt) and the last save stands.
    """

    def __enter__(self):
        self._asked: int | None = None  # signal number
        self._old = {}
        if jax.distributed.is_initialized():  # jax watches SIGTERM itself, and tells all processes the same step
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread (a notebook, a server): the default handlers stay
                pass
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number

    def agreed(self, step: int) -> bool:
        """Whether to stop after this step."""
        if not jax.distributed.is_initialized():
            return self._asked is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
