"""Task metrics: score(completion: str, row: dict) -> float. Ours by name, a user's as file.py:name."""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
from collections.abc import Callable

from jaxpost.data.prompts import question_of
from jaxpost.errors import ConfigError
from jaxpost.evals import orders

Metric = Callable[[str, dict], float]


def exact_match(completion: str, row: dict) -> float:
    """1 where the completion equals the row's own answer, but for white space around both."""
    if (answer := question_of(row, "eval").answer) is None:
        raise ConfigError(f"eval: a row with the fields {', '.join(row)} has no answer to compare with")
    return float(completion.strip() == answer.strip())


METRICS: dict[str, Metric] = {"exact_match": exact_match, "orders": orders.score}


def is_path(name: str) -> bool:
    """Whether a metric is named as file.py:function."""
    return ".py:" in name


def find(name: str, where: str) -> Metric:
    """The metric of that name; `where` is the dotted key that errors name."""
    if not is_path(name):
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}: no metric {name!r} (have {', '.join(METRICS)}, or file.py:function){hint}")
        return METRICS[name]
    file, _, function = name.rpartition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise ConfigError(f"{where}: no file {file}")
    spec = importlib.util.spec_from_file_location(f"jaxpost_metric_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{where}: {file} does not import: {type(error).__name__}: {error}") from error
    if not callable(metric := getattr(module, function, None)):
        raise ConfigError(f"{where}: {file} has no function {function}")
    return metric
