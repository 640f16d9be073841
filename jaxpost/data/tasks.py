"""One record of a file to one Example: row types by their columns, checks field by field.

A task is picklable: it holds the tokenizer's path, not the tokenizer, which each worker process reads once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from jaxpost.data.chat import LossOn, Tokenizer, load_tokenizer
from jaxpost.data.rows import shown_names
from jaxpost.errors import ConfigError, DataError

Record = Mapping[str, Any]
TaskName = Literal["auto", "text", "chat", "completion", "sharegpt", "alpaca", "pair"]

# task -> (columns it must find, columns it may find)
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ()),
    "chat": (("messages",), ("tools", "chat_template_kwargs")),
    "completion": (("prompt", "completion"), ("tools", "chat_template_kwargs")),
    "sharegpt": (("conversations",), ("system", "tools", "chat_template_kwargs")),
    "alpaca": (("instruction", "output"), ("input", "system", "chat_template_kwargs")),
}
# Rows of other methods, recognised so that the error can name them.
FOREIGN: dict[str, tuple[str, ...]] = {
    "preference pair (chosen, rejected)": ("chosen", "rejected"),
    "unpaired preference (prompt, completion, label)": ("prompt", "completion", "label"),
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as the model sees it. trainable[i] says that token i is a target; token 0 never is."""

    tokens: np.ndarray  # i32[n]
    trainable: np.ndarray  # bool[n]
    id: str  # "file:line": stable over runs, orders and worker counts
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what a method's rows tell beside tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """record, "file:line" -> Example. Raises DataError that begins with the place."""

    name: TaskName
    tokenizer_path: str
    loss_on: LossOn = "assistant"
    chat_template: str | None = None
    date: str | None = None

    def __call__(self, record: Record, where: str) -> Example:
        try:
            record = {key: value for key, value in expect(record, dict, "").items() if value is not None}
            name = detect(record) if self.name == "auto" else self.name
            tokens, trainable = ENCODERS[name](self, self.tokenizer, record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return Example(tokens, trainable, where)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read at first use in each process."""
        return load_tokenizer(self.tokenizer_path, self.chat_template, self.date)


def make_task(
    task: str,
    tokenizer_path: str,
    loss_on: str = "assistant",
    columns: Mapping[str, str] | None = None,
    *,
    chat_template: str | None = None,
    date: str | None = None,
) -> Task:
    """A picklable task. columns are the fields that the source renames, checked here: ConfigError on unknown names."""
    if task == "pair":
        raise ConfigError("task: pair rows are for methods that learn from preferences, not for this algorithm")
    if task != "auto" and task not in COLUMNS:
        raise ConfigError(f"task: {task!r} is unknown, expected auto, {', '.join(COLUMNS)}")
    known = {name for key in COLUMNS if task in ("auto", key) for group in COLUMNS[key] for name in group}
    for name in columns or {}:
        if name not in known:
            raise ConfigError(f"columns.{name}: task {task!r} reads no such field, only {', '.join(sorted(known))}")
    if loss_on not in ("assistant", "last", "completion", "all"):
        raise ConfigError(f"loss_on {loss_on!r}: expected assistant, last, completion or all")
    return Task(task, tokenizer_path, loss_on, chat_template, date)


def detect(record: Record) -> str:
    """The task of a row by its columns. Raises DataError on none, on several, and on rows of other methods."""
    for kind, names in FOREIGN.items():
        if all(name in record for name in names):
            raise DataError(f"a {kind} row: supervised fine-tuning cannot train on it; it has {_names(record)}")
    found = [task for task, (needed, _) in COLUMNS.items() if all(name in record for name in needed)]
    if len(found) > 1:
        choices = ", ".join(f"{task} ({', '.join(COLUMNS[task][0])})" for task in found)
        raise DataError(f"an ambiguous row, it could be {choices}: set `task`; it has {_names(record)}")
    if found:
        return found[0]
    if "prompt" in record:
        raise DataError(f"a prompt row without a completion: only methods that sample use it; it has {_names(record)}")
    raise DataError(f"no known row type: it has {_names(record)}; set `task` and `columns`")


def expect(value: Any, kind: type | tuple[type, ...], field: str) -> Any:
    """value if it is of kind. Raises DataError that names the field."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds):
        place = f"field {field!r}" if field else "row"
        raise DataError(f"{place}: expected {' or '.join(k.__name__ for k in kinds)}, got {_type(value)}")
    return value


def need(record: Record, name: str, kind: type | tuple[type, ...], parent: str = "") -> Any:
    """record[name], checked. Raises DataError that names the field."""
    field = f"{parent}.{name}" if parent else name
    if name not in record or record[name] is None:
        raise DataError(f"field {field!r}: missing, found {_names(record)}")
    return expect(record[name], kind, field)


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _names(record: Record) -> str:
    return shown_names(record) or "nothing"


def check_messages(messages: Any, field: str) -> list[dict[str, Any]]:
    """A non-empty list of messages with a role, and content or tool calls. Raises DataError that names the field."""
    expect(messages, list, field)
    if not messages:
        raise DataError(f"field {field!r}: empty")
    for i, message in enumerate(messages):
        place = f"{field}[{i}]"
        expect(message, dict, place)
        need(message, "role", str, place)
        calls = message.get("tool_calls")
        if calls is not None:
            for k, call in enumerate(expect(calls, list, f"{place}.tool_calls")):
                expect(call, dict, f"{place}.tool_calls[{k}]")
        if calls and message.get("content") is None:
            continue
        content = need(message, "content", (str, list), place)
        for k, part in enumerate(content if isinstance(content, list) else ()):
            expect(part, dict, f"{place}.content[{k}]")
    return messages


def parse_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The column tools: a list of schemas, or that list as JSON. Raises DataError."""
    if isinstance(tools, str):  # files that cannot hold nested values of mixed types store JSON
        try:
            tools = json.loads(tools) if tools else None
        except ValueError as error:
            raise DataError(f"field 'tools': not JSON: {error}") from None
    for k, tool in enumerate(expect(tools, list, "tools") if tools is not None else ()):
        expect(tool, dict, f"tools[{k}]")
    return tools


def template_options(record: Record) -> dict[str, Any]:
    """What a row gives to the chat template besides its messages: tools, and variables by name. Raises DataError."""
    variables = expect(record.get("chat_template_kwargs", {}), dict, "chat_template_kwargs")
    return {"tools": parse_tools(record.get("tools")), **variables}


def _chat_options(tokenizer: Tokenizer, record: Record, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Tools and template variables of a row; tool calls that the template would silently leave out are refused."""
    options = template_options(record)
    calling = next((i for i, message in enumerate(messages) if message.get("tool_calls")), None)
    if calling is not None and not tokenizer.renders_tool_calls:
        raise DataError(
            f"messages[{calling}].tool_calls: the chat template never writes tool calls, this turn would train an "
            "empty reply; set model.chat_template to one that does"
        )
    return options


Encoded = tuple[np.ndarray, np.ndarray]


def encode_text(task: Task, tokenizer: Tokenizer, record: Record) -> Encoded:
    """{"text": str}: every token is trained, whatever loss_on says."""
    text = need(record, "text", str)
    if not text:
        raise DataError("field 'text': empty")
    return tokenizer.encode_text(text)


def encode_messages(task: Task, tokenizer: Tokenizer, record: Record) -> Encoded:
    """{"messages": [{"role", "content"}, ...], "tools"?: list or JSON}."""
    messages = check_messages(need(record, "messages", list), "messages")
    return tokenizer.encode_chat(messages, loss_on=task.loss_on, **_chat_options(tokenizer, record, messages))


def encode_completion(task: Task, tokenizer: Tokenizer, record: Record) -> Encoded:
    """{"prompt", "completion"}: two strings, or two lists of messages."""
    prompt, completion = need(record, "prompt", (str, list)), need(record, "completion", (str, list))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(f"field 'completion': expected {_type(prompt)} as prompt is, got {_type(completion)}")
    if isinstance(prompt, str):
        return tokenizer.encode_pair(prompt, completion, loss_on=task.loss_on)
    messages = check_messages(prompt, "prompt") + check_messages(completion, "completion")
    options = _chat_options(tokenizer, record, messages)
    return tokenizer.encode_chat(messages, loss_on=task.loss_on, prompt_messages=len(prompt), **options)


def encode_sharegpt(task: Task, tokenizer: Tokenizer, record: Record) -> Encoded:
    """{"conversations": [{"from", "value"}, ...], "system"?: str}; turns with role and content pass unchanged."""
    return encode_messages(task, tokenizer, {**record, "messages": sharegpt_messages(record)})


def encode_alpaca(task: Task, tokenizer: Tokenizer, record: Record) -> Encoded:
    """{"instruction", "input"?, "output", "system"?}: a user turn (instruction, blank line, input) and the reply."""
    reply = {"role": "assistant", "content": need(record, "output", str)}
    return encode_messages(task, tokenizer, {**record, "messages": [*alpaca_messages(record), reply]})


def sharegpt_messages(record: Record) -> list[dict[str, Any]]:
    """The turns of a ShareGPT row as messages. Raises DataError that names the field."""
    turns = need(record, "conversations", list)
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": expect(record["system"], str, "system")})
    for i, turn in enumerate(turns):
        place = f"conversations[{i}]"
        if "role" in expect(turn, dict, place):
            messages.append(turn)
            continue
        speaker = need(turn, "from", str, place)
        if speaker not in SHAREGPT_ROLES:
            raise DataError(f"field '{place}.from': unknown {speaker!r}, expected {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": need(turn, "value", str, place)})
    return check_messages(messages, "conversations")


def alpaca_messages(record: Record) -> list[dict[str, Any]]:
    """The prompt of an Alpaca row as messages, without the reply. Raises DataError that names the field."""
    question = need(record, "instruction", str)
    if extra := expect(record.get("input", ""), str, "input"):
        question = f"{question}\n\n{extra}"
    system = expect(record.get("system", ""), str, "system")
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]


ENCODERS: dict[str, Callable[[Task, Tokenizer, Record], Encoded]] = {
    "text": encode_text,
    "chat": encode_messages,
    "completion": encode_completion,
    "sharegpt": encode_sharegpt,
    "alpaca": encode_alpaca,
}
