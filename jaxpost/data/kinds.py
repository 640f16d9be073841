"""What a method's rows are, and the task that makes them: the one place where an algorithm and its data meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from jaxpost.data import tasks
from jaxpost.data.pairs import PAIR_COLUMNS, PairTask
from jaxpost.errors import ConfigError

RowKind = Literal["examples", "pairs"]

# Columns [B,S] of a kind of rows: names, and what an absent unit holds.
COLUMNS: dict[str, Mapping[str, float]] = {"examples": {}, "pairs": PAIR_COLUMNS}


def make_task(
    rows: RowKind,
    task: str,
    tokenizer_path: str,
    loss_on: str = "assistant",
    columns: Mapping[str, str] | None = None,
    *,
    chat_template: str | None = None,
    date: str | None = None,
) -> tasks.Task:
    """A picklable task for rows of a kind. ConfigError where `task` or a name in `columns` does not belong to it."""
    if rows == "examples":
        return tasks.make_task(task, tokenizer_path, loss_on, columns, chat_template=chat_template, date=date)
    if rows != "pairs":
        raise ConfigError(f"rows {rows!r}: expected {' or '.join(get_args(RowKind))}")
    if task not in ("auto", "pair"):
        raise ConfigError(f"task: {task!r} rows hold no preference; this algorithm reads pairs (task: pair)")
    known = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", *PAIR_COLUMNS)
    for name in columns or {}:
        if name not in known:
            raise ConfigError(f"columns.{name}: a pair has no such field, only {', '.join(known)}")
    return PairTask("pair", tokenizer_path, loss_on, chat_template, date)
