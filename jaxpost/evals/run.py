"""Evaluation during a run: held-out loss, sample generations, and task metrics."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from jaxpost.data.prompts import Question
from jaxpost.data.sources import SourceConfig
from jaxpost.errors import DataError
from jaxpost.evals import metrics
from jaxpost.fields import SECTION, NonEmptyStr, NonNegFloat, NonNegInt, PosInt, Str
from jaxpost.models.sampler import Sampler, Sampling
from jaxpost.types import Frozen, TrainState

RESERVED = ("loss", "perplexity", "entropy", "mean_token_accuracy")  # eval/NAME of the held-out rows


@dataclass(frozen=True, config=SECTION)
class TaskConfig:
    """Rows whose prompts are answered and scored."""

    name: NonEmptyStr  # reported as eval/NAME
    source: NonEmptyStr  # as data.train.source
    metric: NonEmptyStr  # a name, or file.py:function typed on the command line
    limit: PosInt | None = None  # rows
    max_new_tokens: PosInt = 128

    @model_validator(mode="after")
    def _check(self):
        SourceConfig(source=self.source)  # says what is wrong with it
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name in RESERVED:
            raise ValueError(
                f"name: {self.name!r} names a file and a metric: letters, digits, _ - ., not {RESERVED[0]}"
            )
        return self


@dataclass(frozen=True, config=SECTION)
class EvalConfig:
    """What is looked at every loop.eval_every steps, beside the loss on data.eval."""

    samples: NonNegInt = 0  # completions written to the console, of the first task or of the first held-out rows
    max_new_tokens: PosInt = 128  # of samples that belong to no task
    temperature: NonNegFloat = 0.0  # 0: greedy
    batch_size: PosInt = 32  # rows generated at once
    tasks: tuple[TaskConfig, ...] = ()
    metric: Str | None = None  # one more metric, over the prompts of data.eval

    @model_validator(mode="after")
    def _names_differ(self):
        names = [task.name for task in self.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"tasks: two of them are named {sorted(twice)[0]!r}")
        return self


@dataclasses.dataclass(frozen=True)
class Task:
    """A built TaskConfig: rows as they were read, their questions, and these as ids."""

    name: str
    rows: Sequence[dict]
    questions: Sequence[Question]
    prompts: Sequence[Sequence[int]]
    score: metrics.Metric | None  # None: only samples are shown
    max_new_tokens: int


class Evaluator:
    """evaluate(step, state, frozen) -> {"eval/..": value}; writes samples/STEP.jsonl into the run directory."""

    def __init__(
        self,
        config: EvalConfig,
        *,
        batches: Callable[[], Iterable[Any]],
        eval_step: Callable[[TrainState, Frozen, Any], dict],
        sampler: Sampler,
        tasks: Sequence[Task],
        decode: Callable[[Sequence[int]], str],
        folder: pathlib.Path,
        report: Callable[[str], None],
        writes: bool,
        seed: int,
        averaged: bool = False,
    ):
        self._config, self._batches, self._eval_step = config, batches, eval_step
        self._sampler, self._tasks, self._decode = sampler, tasks, decode
        self._folder, self._report, self._writes, self._seed = folder, report, writes, seed
        self._averaged = averaged

    def __call__(self, step: int, state: TrainState, frozen: Frozen) -> dict[str, float]:
        values = self._look(step, state, frozen)
        if self._averaged:  # state.slow is an EMA of the policy: the same figures under eval/ema/, without samples
            ema = state.replace(params=state.params | {"policy": state.slow["policy"]})
            values |= {f"ema/{name}": value for name, value in self._look(None, ema, frozen).items()}
        return {f"eval/{name}": value for name, value in values.items()}

    def _look(self, step: int | None, state: TrainState, frozen: Frozen) -> dict[str, float]:
        """Held-out metrics and task scores; samples are shown and written where a step is given."""
        values = self._held_out(state, frozen)
        if self._tasks:
            if "policy" in frozen:
                self._sampler.load(frozen["policy"], state.params["policy"])
            else:
                self._sampler.load(state.params["policy"])
            for place, task in enumerate(self._tasks):
                if step is not None or task.score is not None:
                    values |= self._run_task(step, task, show=self._config.samples if place == 0 else 0)
            self._sampler.unload()  # training needs the memory
        return values

    def _held_out(self, state: TrainState, frozen: Frozen) -> dict[str, float]:
        total = None
        for batch in self._batches():
            part = self._eval_step(state, frozen, batch)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        if total is None:
            return {}
        values = {name: float(mean.value) for name, mean in jax.device_get(total).items()}
        if "nll" in values:  # without what regularises the loss
            values["loss"] = values.pop("nll")
            values["perplexity"] = math.exp(min(values["loss"], 700.0))
        return values

    def _run_task(self, step: int | None, task: Task, show: int) -> dict[str, float]:
        sampling = Sampling(max_new_tokens=task.max_new_tokens, temperature=self._config.temperature)
        completions = self._sampler.generate(task.prompts, sampling, seed=self._seed)
        records, scores = [], []
        for row, question, completion in zip(task.rows, task.questions, completions, strict=True):
            text = self._decode(completion.tokens)
            score = None if task.score is None else _score(task, text, row)
            scores.append(score)
            records.append(
                {"task": task.name, "asked": question.last, "completion": text, "score": score,
                 "reference": question.answer, "stop_reason": completion.stop_reason}
            )  # fmt: skip
        for record in records[: show if step is not None else 0]:
            mark = "" if record["score"] is None else f"  (score {record['score']:g})"
            self._report(
                f"step {step} sample{mark}: {_one_line(record['asked'])}\n  -> {_one_line(record['completion'])}"
            )
        if self._writes and step is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"{step:08d}-{task.name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        return {} if task.score is None or not scores else {task.name: sum(scores) / len(scores)}


def _score(task: Task, text: str, row: dict) -> float:
    try:
        return float(task.score(text, row))
    except Exception as error:
        raise DataError(f"eval metric of task {task.name}: {type(error).__name__}: {error}; row {row}") from error


def _one_line(text: str) -> str:
    text = " / ".join(text.split("\n")).strip()
    return text if len(text) <= 320 else f"{text[:317]}..."


def make_eval_step(algorithm: Any, apply: Any) -> Callable[[TrainState, Frozen, Any], dict]:
    """(state, frozen, batch) -> held-out Means of one batch; to be jitted."""

    def eval_step(state: TrainState, frozen: Frozen, batch: Any) -> dict:
        return algorithm.evaluate(apply, state, frozen, batch)

    return eval_step
