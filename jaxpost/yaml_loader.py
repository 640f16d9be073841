"""YAML in and out, for configs: the YAML 1.2 core schema, safe, with the position of every value.

Plain PyYAML follows YAML 1.1: it reads `1e-4` as a string, `no` as False, `1:30` as 90, and lets the last of two equal
keys win. Here PyYAML only parses; the values are built in this file. Refused, each with FILE:LINE:COL: duplicate keys,
keys that are not strings, tags (`!!python/...`), merge keys, several documents, recursive aliases, and files that are
too large, too deep or that expand to too many values (alias bombs).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml

from jaxpost.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 10_000  # after aliases are expanded

Path = tuple[str | int, ...]

_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNPRINTABLE = yaml.reader.Reader.NON_PRINTABLE
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+@=-]*(:[A-Za-z0-9_./+@=-]+)*")  # safe without quotes, everywhere


class Parsed(NamedTuple):
    """A tree of dicts, lists and scalars, and where each node of it was written."""

    tree: Any
    positions: dict[Path, tuple[int, int]]  # path -> line and column, from 1


def dotted(path: Path) -> str:
    """The path as a user types it: data.train.0.weight."""
    return ".".join(str(part) for part in path)


def parse_file(name: str) -> Parsed:
    """Reads one YAML file. Raises ConfigError: FILE:LINE:COL: reason."""
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{name}: cannot read the config: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{name}: larger than {MAX_BYTES} bytes; a config is short, rows belong in data files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}:1: not UTF-8 text (byte {data[error.start]:#04x})") from None
    return parse(text, name)


def parse(text: str, name: str = "<string>") -> Parsed:
    """Parses one YAML document; an empty one is None. Raises ConfigError: NAME:LINE:COL: reason."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise ConfigError(f"{name}:{line}:{column}: character U+{code:04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{where}: {error.problem or 'not valid YAML'}{context}") from None
    except (ValueError, OverflowError) as error:  # PyYAML's scanner on an escape beyond Unicode: "\UFFFFFFFF"
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        return Parsed(None, {})
    builder = _Builder(name)
    return Parsed(builder.build(node, ()), builder.positions)


def parse_value(text: str) -> Any:
    """The value of a typed KEY=VALUE: text that opens with [ { " or ' is YAML, any other text is one plain scalar.

    So `*.jsonl`, `a: b` and `x # y` are the strings that were typed. Raises ConfigError.
    """
    text = text.strip()
    if _UNPRINTABLE.search(text):
        raise ConfigError("holds a character that is not printable")
    if text[:1] in ("[", "{", '"', "'"):
        return parse(text, "value").tree
    return resolve_scalar(text)


def resolve_scalar(text: str) -> Any:
    """An unquoted scalar by the YAML 1.2 core schema: null, bool, int, float or the text itself. Raises ConfigError."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text) or _BASED.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        if len(text) > 70 or not -(2**63) <= (number := int(text, base)) < 2**64:
            raise ConfigError(f"{text[:20]}... is an integer of more than 64 bits; quote it if it is text")
        return number
    if _FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1) if text.lower().lstrip("+-") in (".inf", ".nan") else text)
    return text


def dump(tree: Any, comment: Callable[[Path], str] | None = None) -> str:
    """A tree as YAML that parse() reads back equal; comment(path) is appended to the line of each leaf."""
    lines: list[str] = []
    _block(tree, (), "", "", comment, lines)
    return "\n".join(lines) + "\n"


class _Loader(yaml.SafeLoader):
    """PyYAML's parser and composer only: no implicit types, no tags, bounded depth and size."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = self.count = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        self.count += 1
        if self.count > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        if getattr(event, "tag", None) is not None:  # alias events have no tag attribute
            problem = f"the tag {event.tag[:60]!r} is not allowed; a config holds plain values only"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Builder:
    """Turns the node graph into values, counting what aliases expand to."""

    def __init__(self, name: str):
        self.name = name
        self.count = 0
        self.positions: dict[Path, tuple[int, int]] = {}

    def fail(self, node, reason: str) -> ConfigError:
        return ConfigError(f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: {reason}")

    def build(self, node, path: Path) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise self.fail(node, f"aliases expand to more than {MAX_NODES} values")
        if len(path) > MAX_DEPTH:  # also ends a recursive alias
            raise self.fail(node, f"nested deeper than {MAX_DEPTH} levels (a recursive alias?)")
        self.positions[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        return self.scalar(node)

    def scalar(self, node) -> Any:
        if node.style is not None:  # quoted or block text
            return self.text(node)
        try:
            return resolve_scalar(self.text(node))
        except ConfigError as error:
            raise self.fail(node, str(error)) from None

    def text(self, node) -> str:
        if _UNPRINTABLE.search(node.value):  # by an escape: "\0", "\ud800"
            raise self.fail(node, "the text holds a character that is not printable")
        return node.value

    def mapping(self, node, path: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else key_node
            if not isinstance(key, str):
                raise self.fail(key_node, f"a key must be text; quote it: {self.shown(key_node)}")
            if key == "<<" and key_node.style is None:
                raise self.fail(key_node, "merge keys (<<) are not supported; write the keys out")
            if key in lines:
                raise self.fail(key_node, f"duplicate key {_short(key)}, first on line {lines[key]}")
            lines[key] = key_node.start_mark.line + 1
            out[key] = self.build(value_node, (*path, key))
            self.positions[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        return out

    def shown(self, node) -> str:
        return _short(node.value) if isinstance(node, yaml.ScalarNode) else "a list or mapping"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _block(value: Any, path: Path, first: str, rest: str, comment, lines: list[str]) -> None:
    """Appends value; `first` opens its first line ("key: " or "- "), `rest` indents the lines that follow."""
    if isinstance(value, dict) and value:
        for i, (key, child) in enumerate(value.items()):
            lead = first if i == 0 else rest
            _entry(child, (*path, key), f"{lead}{_scalar(key)}:", rest, comment, lines)
    elif isinstance(value, (list, tuple)) and any(isinstance(v, dict) and v for v in value):
        for i, child in enumerate(value):
            lead = first if i == 0 else rest
            _block(child, (*path, i), f"{lead}- ", rest + "  ", comment, lines)
    else:
        line = f"{first}{inline(value)}"
        lines.append(f"{line:<56}  # {comment(path)}" if comment else line)


def _entry(value: Any, path: Path, head: str, indent: str, comment, lines: list[str]) -> None:
    """Appends `head value` where head is "key:"; containers that do not fit one line go below it."""
    nested = isinstance(value, (list, tuple)) and any(isinstance(v, dict) and v for v in value)
    if nested or (isinstance(value, dict) and value):
        lines.append(head)
        _block(value, path, indent + "  ", indent + "  ", comment, lines)
    else:
        _block(value, path, head + " ", indent, comment, lines)


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(inline(v) for v in value) + "]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    if not isinstance(value, str):
        raise TypeError(f"a config holds plain values only, not {type(value).__name__}")
    if _PLAIN.fullmatch(value) and isinstance(resolve_scalar(value), str):
        return value
    return '"' + "".join(_escaped(c) for c in value) + '"'


def _escaped(c: str) -> str:
    if c in '"\\':
        return "\\" + c
    if c in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[c]
    if c.isprintable():
        return c
    return f"\\U{ord(c):08x}" if ord(c) > 0xFFFF else f"\\u{ord(c):04x}"
