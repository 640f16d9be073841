"""A profile of some steps of a run: jax's trace, written where xprof, TensorBoard and Perfetto read it.

A trace of steps 10:12 begins when 10 steps are done and ends when 12 are: it holds the steps that the console numbers
11 and 12, whose annotations say 10 and 11 (`train`, step_num). It is a property of one start, not of the run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError

FOLDER = "profile"  # in the run directory


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """ "10:12" as (10, 12); None stays None. ConfigError for any other text and for a range without a step."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}:[0-9]{1,15}", text):
        raise ConfigError(f"--profile_steps: {text!r} is not a range of steps such as 10:12")
    first, last = map(int, text.split(":"))
    if first >= last:
        raise ConfigError(f"--profile_steps: {text} holds no step; 10:12 are the two steps after the tenth")
    return first, last


class Profile:
    """What the loop calls around every step; without `steps` it does nothing."""

    def __init__(
        self,
        run_dir: str | os.PathLike,
        steps: tuple[int, int] | None,
        event: Callable[[str], None],
        *,
        writes: bool = True,
    ):
        """steps: (done before, done after), see parse_steps; event: takes the line that says where the trace is.

        writes: False on processes other than 0, which check the steps and record nothing: every process runs the same
        program, and a pod's traces in one shared folder would be as many times as large.
        """
        self._folder, self._steps, self._event, self._writes = Path(run_dir) / FOLDER, steps, event, writes
        self._metrics: Any = None  # of the newest step in the trace
        self._running = False

    def check(self, start: int, total: int) -> None:
        """ConfigError where a run that goes on from step `start` to step `total` does not do all of the steps."""
        if self._steps is None:
            return
        first, last = self._steps
        if last > total:
            raise ConfigError(f"--profile_steps: {first}:{last} ends behind the run, which has {total} steps")
        if first < start:
            raise ConfigError(f"--profile_steps: {first}:{last} begins before step {start}, from which the run goes on")

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if not self._running:
            return
        if kind is None:  # the run was stopped between the first and the last step
            self._stop("the steps until then")
        else:
            import jax

            jax.profiler.stop_trace()

    def before(self, done: int, state: Any) -> None:
        """Begin the trace if it is due after `done` steps; `state` is theirs, so that none of them reaches into it."""
        if self._steps is None or done != self._steps[0] or not self._writes:
            return
        import jax

        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a line for each Python call would push the steps out of the trace viewer
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._running = True

    def after(self, done: int, metrics: Any) -> None:
        """End the trace if it is due after `done` steps; `metrics` are the newest one's, waited for if so."""
        if not self._running:
            return
        self._metrics = metrics
        if done == self._steps[1]:
            self._stop(f"steps {self._steps[0]}:{done}")

    def _stop(self, what: str) -> None:
        import jax

        jax.block_until_ready(self._metrics)
        jax.profiler.stop_trace()
        self._running, self._metrics = False, None
        self._event(
            f"profile of {what} in {self._folder}; to look at it: pip install xprof, xprof --logdir={self._folder} "
            "(TensorBoard reads it too), or open the newest *.trace.json.gz in it at https://ui.perfetto.dev"
        )


NO_PROFILE = Profile("", None, print)
