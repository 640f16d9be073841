"""One line of a file to one record: strict JSON, with the field and the reason of whatever is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


class RowError(ValueError):
    """What is wrong with one row; the reader that knows the file and the line turns it into a DataError."""

    def __init__(self, reason: str, field: str = ""):
        super().__init__(f"field {field!r}: {reason}" if field else reason)


def shown_names(names: Iterable[str]) -> str:
    """The keys of a row for a message: one line of bounded length."""
    text = ", ".join(name if name.isprintable() else repr(name) for name in map(str, names))
    return text if len(text) <= 300 else f"{text[:300]}..."


def decode_utf8(line: bytes) -> str:
    """Text of one line without its line end (LF or CRLF). Raises RowError on NUL and on invalid UTF-8."""
    line = line.rstrip(b"\r\n")
    if b"\0" in line:
        raise RowError(f"NUL byte at byte {line.index(0) + 1}")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: byte {line[error.start]:#04x} at byte {error.start + 1}") from None


def parse_json(line: bytes) -> Record:
    """One JSON object. Raises RowError: invalid JSON, not an object, a repeated key, or as check_values."""
    text = decode_utf8(line)
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("invalid JSON: nested too deeply") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise RowError(f"invalid JSON: {str(error).split(';')[0]}") from None
    if not isinstance(record, dict):
        raise RowError(f"expected a JSON object on one line, got {_kind(record)}")
    check_values(record)
    return record


def check_values(record: Record) -> None:
    """Raises RowError naming the field of the first number that is not finite and the first broken string."""
    # A list instead of recursion: depth is the row's, not Python's.
    todo: list[tuple[str, Any]] = [("", record)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise RowError(f"{value} is not a finite number", path)
        elif isinstance(value, dict):
            for key in value:
                _check_text(key, f"{path}.<key>" if path else "<key>")
            todo.extend((f"{path}.{key}" if path else key, item) for key, item in reversed(value.items()))
        elif isinstance(value, list):
            todo.extend((f"{path}[{i}]", value[i]) for i in reversed(range(len(value))))


def _check_text(text: str, path: str) -> None:
    if "\0" in text:
        raise RowError("text with a NUL character", path)
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"lone surrogate U+{ord(text[error.start]):04X}", path) from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                # A broken key may not break the message's own encoding.
                raise RowError("the key appears twice", key.encode("utf-8", "replace").decode())
            seen.add(key)
    return record


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
