"""What pydantic found wrong in a config, said in one line: dotted path, reason, nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

from jaxpost.redact import is_secret_name
from jaxpost.yaml_loader import Path, dotted, inline

# What users of other trainers type, and what it is called here.
SYNONYMS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "max_grad_norm": "clip_norm",
    "warmup": "warmup_steps",
    "output_dir": "run_dir",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "micro_batches",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "per_device_train_batch_size": "batch_size",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "lora_alpha": "alpha",
    "r": "rank",
    "model_name_or_path": "source",
}

COMMAND_LINE = "command line"
_UNKNOWN = "unexpected_keyword_argument"
_REASONS = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (key: value)",
    "dataclass_type": "must be a section (key: value)",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be one of {expected}",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong, where it is, and what to do."""

    path: Path
    reason: str


def explain(error: pydantic.ValidationError, root: type, sections: dict[Path, type], at: Path = ()) -> list[Problem]:
    """The problems of one ValidationError of root, which stands at path `at`; one a path, unknown keys first.

    An unknown key says what was meant, a missing one is often its shadow. sections: where else to look for names.
    """
    found: dict[Path, Problem] = {}
    items = sorted(error.errors(include_url=False), key=lambda item: item["type"] != _UNKNOWN)
    for item in items:
        problem = _explain_item(item, root, sections, at)
        found.setdefault(problem.path, problem)
    return list(found.values())


def one_line(problems: list[Problem], where: Callable[[Path], str | None]) -> str:
    """The first problem with its place, and how many more there are."""
    first = problems[0]
    place = where(first.path)
    reason = first.reason if len(first.reason) <= 600 else f"{first.reason[:400]} ... {first.reason[-150:]}"
    text = f"{show(first.path)}: {reason}"
    text = f"{place}: {text}" if place and place != COMMAND_LINE else f"{text} ({place})" if place else text
    return text + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def show(path: Path) -> str:
    """A dotted path that is safe to print on one line."""
    text = dotted(path)
    return text if text.isprintable() and text and len(text) <= 200 else repr(text)[:200]


def show_value(value: Any, key: str = "") -> str:
    """A value of a config, short, on one line, and never a secret."""
    if isinstance(value, str) and is_secret_name(key):
        return "***"
    if isinstance(value, (dict, list, tuple)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else inline(value)
    return text if len(text) <= 60 else text[:57] + "..."


def nearest(name: str, names: list[str]) -> str | None:
    """The valid name that a wrong one was probably meant to be."""
    close = difflib.get_close_matches(name.lower()[:80], names, n=1, cutoff=0.6)
    return close[0] if close else None


def step(kind: Any, part: str | int) -> Any:
    """The type of the field or item `part` within the type `kind`; None where it has no such part."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return next((t for arg in typing.get_args(kind) if (t := step(arg, part)) is not None), None)
    if origin in (tuple, list) and isinstance(part, int):
        return typing.get_args(kind)[0]
    if origin is dict and isinstance(part, str):
        return typing.get_args(kind)[1]
    if dataclasses.is_dataclass(kind) and isinstance(part, str):
        return hints(kind).get(part)
    return None


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Field name -> type of a section class."""
    known = typing.get_type_hints(kind)
    return {field.name: known[field.name] for field in dataclasses.fields(kind)}


def section_of(kind: Any) -> type | None:
    """The section class inside `LoraConfig | None`, `tuple[SourceConfig, ...]` or the class itself."""
    if dataclasses.is_dataclass(kind):
        return kind
    return next((found for arg in typing.get_args(kind) if (found := section_of(arg)) is not None), None)


def walk_sections(root: type, path: Path = ()) -> Iterator[tuple[Path, type]]:
    """Every section class below root with its path; a list of sections is entered as its item 0."""
    yield path, root
    for name, kind in hints(root).items():
        section = section_of(kind)
        if section is not None:
            below = (*path, name, 0) if typing.get_origin(kind) in (tuple, list) else (*path, name)
            yield from walk_sections(section, below)


def suggest(path: Path, parent: type | None, sections: dict[Path, type]) -> str:
    """`; did you mean X?` for an unknown key, looking among its neighbours first and then in every section."""
    key = str(path[-1])
    wanted = SYNONYMS.get(key, key)
    siblings = list(hints(parent)) if parent is not None else []
    elsewhere = {name: (*at, name) for at, kind in sections.items() for name in hints(kind)}
    if wanted in siblings:
        return f"; did you mean {show((*path[:-1], wanted))}?"
    if wanted in elsewhere:
        return f"; did you mean {show(elsewhere[wanted])}?"
    if near := nearest(key, siblings):
        return f"; did you mean {show((*path[:-1], near))}?"
    if near := nearest(key, list(elsewhere)):
        return f"; did you mean {show(elsewhere[near])}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _explain_item(item: Any, root: type, sections: dict[Path, type], at: Path) -> Problem:
    local, kind = _real_path(item, root)
    path = (*at, *local)
    key = str(path[-1]) if path else ""
    code, context = item["type"], item.get("ctx", {})
    if code == _UNKNOWN:
        return Problem(path, "unknown key" + suggest(path, kind, sections))
    if code == "missing":
        return Problem(path, "is required")
    if code == "value_error":
        return _own_words(path, kind, sections, str(context["error"]))
    reason = _REASONS.get(code)
    if reason is None:
        message = item["msg"]
        return Problem(path, message[:1].lower() + message[1:])
    reason = reason.format(**context) + f", not {show_value(item['input'], key)}"
    if code == "literal_error" and isinstance(item["input"], str):
        near = nearest(item["input"], re.findall(r"'([^']*)'", context["expected"]))
        reason += f"; did you mean {near}?" if near else ""
    return Problem(path, reason)


def _real_path(item: Any, root: type) -> tuple[Path, type | None]:
    """The location without pydantic's union tags, and the section class there (for an unknown key: around it)."""
    path: Path = ()
    kind: Any = root
    parts = item["loc"]
    for i, part in enumerate(parts):
        below = step(kind, part)
        if below is not None:
            path, kind = (*path, part), below
        elif item["type"] == _UNKNOWN and i == len(parts) - 1:
            return (*path, part), section_of(kind)
        elif item["type"] == "missing" and i == len(parts) - 1:
            return (*path, part), None
    return path, section_of(kind)


def _own_words(path: Path, kind: type | None, sections: dict[Path, type], message: str) -> Problem:
    """A section's own ValueError; `key: reason` and `section.key: reason` name the field themselves."""
    message = " ".join(message.split())
    match = re.match(r"([a-z_][\w.\[\]]*): (.+)", message)
    if match:
        named = tuple(int(p) if p.isdigit() else p for p in re.findall(r"\w+", match[1]))
        if kind is not None and named[0] in hints(kind):
            return Problem((*path, *named), match[2])
        if named[0] in hints(sections[()]):
            return Problem(named, match[2])
    return Problem(path, message)
