"""What a row asks the model, and the answer that it holds: for sampling, whatever type the row is of."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxpost.data.chat import Tokenizer
from jaxpost.data.pairs import split_pair
from jaxpost.data.tasks import Record, alpaca_messages, check_messages, sharegpt_messages, template_options
from jaxpost.errors import DataError


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, as text or as messages; what its template needs besides; the reference answer, where there is one."""

    prompt: str | list[dict[str, Any]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    answer: str | None = None

    @property
    def last(self) -> str:
        """What the prompt ends with: its text, or that of its last message."""
        return self.prompt if isinstance(self.prompt, str) else _text(self.prompt[-1])

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the text, or of the messages rendered up to where the assistant begins to speak."""
        if isinstance(self.prompt, str):
            bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
            return bos + tokenizer.encode(self.prompt)
        return tokenizer.encode(tokenizer.render(self.prompt, add_generation_prompt=True, **self.options))


def question_of(record: Record, where: str) -> Question:
    """The question of a row: prompt (and completion, or the chosen side of a pair), or a chat without its last answer.

    Chats are messages, ShareGPT's conversations, or Alpaca's instruction, input and output. Raises DataError.
    """
    record = {name: value for name, value in record.items() if value is not None}  # parquet's absent fields
    try:
        prompt, answer = _split(record)
        return Question(prompt, template_options(record), answer)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _split(record: Record) -> tuple[str | list[dict[str, Any]], str | None]:
    if "chosen" in record and "rejected" in record:
        prompt, chosen, _ = split_pair(record)
        return prompt, chosen if isinstance(chosen, str) else _text(chosen[-1])
    if "prompt" in record:
        prompt, completion = record["prompt"], record.get("completion")
        if not isinstance(prompt, str):
            check_messages(prompt, "prompt")
        elif not prompt:
            raise DataError("field 'prompt': empty")
        return prompt, _text(completion[-1]) if isinstance(completion, list) and completion else completion
    if "messages" in record:
        messages = check_messages(record["messages"], "messages")
    elif "conversations" in record:
        messages = sharegpt_messages(record)
    elif "instruction" in record:
        return alpaca_messages(record), record.get("output")
    else:
        known = "prompt, messages, conversations or instruction"
        raise DataError(f"no field {known} to ask the model with; it has {', '.join(record)}")
    if messages[-1]["role"] == "assistant" and len(messages) > 1:
        return messages[:-1], _text(messages[-1])
    return messages, None


def _text(message: dict[str, Any]) -> str:
    """The text of a message; that of its parts where it comes in parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
