"""The prompt of a row, as ids: what a model is asked when it is sampled."""

from __future__ import annotations

from typing import Any

from jaxpost.data.chat import Tokenizer
from jaxpost.data.rows import Record
from jaxpost.data.tasks import parse_tools
from jaxpost.errors import DataError


def prompt_of(record: Record, where: str) -> str | list[dict[str, Any]]:
    """The prompt: the field prompt, or messages without the assistant turn at their end. Raises DataError."""
    record = {name: value for name, value in record.items() if value is not None}  # parquet's absent fields
    if "prompt" in record:
        prompt = record["prompt"]
        if isinstance(prompt, str) and prompt or isinstance(prompt, list) and prompt:
            return prompt
        raise DataError(f"{where}: field 'prompt': expected a text or a list of messages")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise DataError(f"{where}: no field prompt or messages to ask the model with; it has {', '.join(record)}")
    return messages[:-1] if messages[-1].get("role") == "assistant" and len(messages) > 1 else messages


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict[str, Any]], tools: Any = None) -> list[int]:
    """Ids of a text, or of messages rendered up to where the assistant begins to speak."""
    if isinstance(prompt, str):
        bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return bos + tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.render(prompt, tools=parse_tools(tools), add_generation_prompt=True))
