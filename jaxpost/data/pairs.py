"""A preference row as a unit of two examples, chosen and rejected, that share a prompt.

The prompt stands in its own field, or is what `chosen` and `rejected` begin with in common. Both may be text or
messages; tools and template variables reach the template as they do for chats.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jaxpost.data.tasks import (
    Example,
    Record,
    Task,
    check_messages,
    encode_completion,
    expect,
    need,
)
from jaxpost.errors import DataError

# What a pair tells beside its tokens, as columns [B,S], with the value of a row that says nothing.
PAIR_COLUMNS = {"margin": 0.0, "agreement": 1.0}


@dataclasses.dataclass(frozen=True)
class PairTask(Task):
    """{"prompt"?, "chosen", "rejected", "margin"?: by how much, "agreement"?: share of annotators, 0.5 is a tie}."""

    def __call__(self, record: Record, where: str) -> tuple[Example, Example]:
        """(chosen, rejected). Raises DataError that begins with the place."""
        try:
            record = {key: value for key, value in expect(record, dict, "").items() if value is not None}
            prompt, chosen, rejected = split_pair(record)
            told = {name: _number(record, name, default) for name, default in PAIR_COLUMNS.items()}
            if not 0 <= told["agreement"] <= 1:
                raise DataError(f"field 'agreement': {told['agreement']:g} is no share between 0 and 1")
            options = {name: record[name] for name in ("tools", "chat_template_kwargs") if name in record}
            made = []
            for side, completion in (("chosen", chosen), ("rejected", rejected)):
                try:
                    row = {"prompt": prompt, "completion": completion, **options}
                    tokens, trainable = encode_completion(self, self.tokenizer, row)
                except DataError as error:
                    raise DataError(f"{side}: {error}") from None
                made.append(Example(tokens, trainable, where, told))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        return made[0], made[1]


def split_pair(record: Record) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), all text or all messages. Raises DataError that names the field."""
    chosen, rejected = need(record, "chosen", (str, list)), need(record, "rejected", (str, list))
    if type(chosen) is not type(rejected):
        raise DataError(
            f"field 'rejected': expected {type(chosen).__name__} as chosen is, got {type(rejected).__name__}"
        )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, list):
            check_messages(side, name)
    prompt = record.get("prompt")
    if prompt is None or _repeats(prompt, chosen, rejected):
        prompt, chosen, rejected = _common_start(chosen, rejected)
    else:
        expect(prompt, (str, list), "prompt")
        if isinstance(prompt, list):
            check_messages(prompt, "prompt")
        if isinstance(prompt, str) != isinstance(chosen, str):
            raise DataError(
                f"field 'prompt': {type(prompt).__name__} beside chosen as {type(chosen).__name__}, which does not "
                "begin with it: give both as text or both as messages"
            )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if _is_empty(side):
            raise DataError(f"field {name!r}: an empty completion")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same: there is nothing to prefer")
    return prompt, chosen, rejected


def _repeats(prompt: Any, chosen: Any, rejected: Any) -> bool:
    """Whether both sides are whole chats that begin with the prompt, which is written once more on its own."""
    if not isinstance(chosen, list):
        return False
    start = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return all(
        len(side) > len(start) and [_said(m) for m in side[: len(start)]] == [_said(m) for m in start]
        for side in (chosen, rejected)
    )


def _said(message: Any) -> Any:
    return (message.get("role"), message.get("content")) if isinstance(message, dict) else message


def _common_start(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt as the longest common start. Text is cut before a space, so that words stay whole."""
    if chosen == rejected:
        raise DataError("chosen and rejected are the same: there is nothing to prefer")
    if isinstance(chosen, str):
        at = len(os.path.commonprefix([chosen, rejected]))
        while at and not (chosen[at - 1].isspace() or chosen[at : at + 1].isspace() or rejected[at : at + 1].isspace()):
            at -= 1
        if at and chosen[at - 1] == " ":
            at -= 1  # the space belongs to the word behind it
    else:
        at = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if not at:
        raise DataError("no field 'prompt', and chosen and rejected do not begin alike: their prompts differ")
    return chosen[:at], chosen[at:], rejected[at:]


def _is_empty(completion: str | list) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    replies = [m for m in completion if m.get("role") == "assistant"]
    return not any(m.get("content") or m.get("tool_calls") for m in replies)


def _number(record: Record, name: str, default: float) -> float:
    value = record.get(name, default)
    if isinstance(value, bool):
        raise DataError(f"field {name!r}: expected a number, got bool")
    return float(expect(value, (int, float), name))
