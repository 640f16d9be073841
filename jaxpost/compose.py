"""From YAML text and typed key=value to one resolved tree that knows where each value was written.

The tree is plain data and is not checked here; config.py checks it against the section classes. Mistakes that show up
already here (a broken key=value, an unset variable, contradicting shorthands) are ConfigErrors of one line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from jaxpost import problems, yaml_loader
from jaxpost.data.sources import FILE_KINDS, split_source
from jaxpost.errors import ConfigError
from jaxpost.evals.metrics import is_path
from jaxpost.models.loading import SMOLLM2
from jaxpost.problems import COMMAND_LINE, Problem
from jaxpost.yaml_loader import Path

_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value was written: a line of a file (0: the file as a whole), or (file None) the command line."""

    file: str | None = None
    line: int = 0

    def __str__(self) -> str:
        if self.file is None:
            return COMMAND_LINE
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def folder(self) -> str:
        """What relative paths belong to."""
        return os.getcwd() if self.file is None else os.path.dirname(os.path.abspath(self.file))


@dataclasses.dataclass
class Draft:
    """A config on its way: plain dicts, lists and scalars, and the origin of each node by its path."""

    tree: dict[str, Any] = dataclasses.field(default_factory=dict)
    origins: dict[Path, Origin] = dataclasses.field(default_factory=dict)

    def error(self, *found: Problem) -> ConfigError:
        """The first problem in one line, with the place of its key or of the section around it."""
        return ConfigError(problems.one_line(list(found), self._place))

    def override(self, text: str) -> None:
        """Puts one typed key=value into the tree, making the sections and the next list item that it needs."""
        key, equals, value = text.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"{problems.show_value(text)} is not KEY=VALUE ({COMMAND_LINE})")
        node, path = self._descend(parts)
        try:
            node[path[-1]] = yaml_loader.parse_value(value)
        except ConfigError as error:
            raise ConfigError(f"{problems.show(path)}: {error} ({COMMAND_LINE})") from None
        self._stamp(path, node[path[-1]], Origin())

    def resolve(self) -> None:
        """Replaces ${NAME} by environment variables and makes paths absolute."""
        self.tree = map_text(self.tree, self._expand_variables)
        self.tree = map_text(self.tree, lambda path, text: _absolute(path, text, self.origins[path]))

    def _place(self, path: Path) -> str | None:
        for size in range(len(path), -1, -1):
            if path[:size] in self.origins:
                return str(self.origins[path[:size]])
        return None

    def _descend(self, parts: list[str]) -> tuple[Any, Path]:
        """The dict or list that holds the last of parts, and the whole path."""
        node: Any = self.tree
        path: Path = ()
        for i, part in enumerate(parts):
            step = self._index(node, path, part) if isinstance(node, list) else part
            path = (*path, step)
            if i == len(parts) - 1:
                break
            child = node[step] if isinstance(node, list) else node.get(step)
            if child is None:  # absent or null
                child = node[step] = [] if parts[i + 1] == "0" else {}
                self._stamp(path, child, Origin())
            if not isinstance(child, (dict, list)):
                reason = f"is {problems.show_value(child, part)}, which has no key {problems.show_value(parts[i + 1])}"
                raise self.error(Problem(path, reason))
            node = child
        return node, path

    def _index(self, node: list, path: Path, part: str) -> int:
        """A typed list position; the one behind the last makes room for one more."""
        if not (part.isascii() and part.isdigit() and len(part) < 7 and int(part) <= len(node)):
            places = f"0 to {len(node) - 1}, and {len(node)} for one more" if node else "0 for the first"
            raise ConfigError(f"{problems.show((*path, part))}: the list has positions {places} ({COMMAND_LINE})")
        if int(part) == len(node):
            node.append(None)
        return int(part)

    def _stamp(self, path: Path, value: Any, origin: Origin) -> None:
        """value, all of it, now stands at path and comes from origin."""
        for old in [at for at in self.origins if at[: len(path)] == path]:
            del self.origins[old]
        self.origins.update(dict.fromkeys(paths(value, path), origin))

    def _expand_variables(self, path: Path, text: str) -> str:
        def value(match: re.Match) -> str:
            name = match[1]
            if name is None:  # $${
                return "${"
            if name == "JAXPOST_DATA":  # belongs to the working directory, wherever it is mentioned
                return os.path.abspath(os.path.expanduser(os.environ.get(name) or "data"))
            if name not in os.environ:
                reason = f"the environment variable {problems.show_value(name)} is not set"
                raise self.error(Problem(path, reason + " ($${ stands for a plain ${)"))
            return os.environ[name]

        return _VARIABLE.sub(value, text)


def read(path: str | os.PathLike | None) -> Draft:
    """The tree of one YAML file, or an empty one. Raises ConfigError: FILE:LINE:COL: reason."""
    if path is None:
        return Draft()
    name = os.fspath(path)
    tree, positions = yaml_loader.parse_file(name)
    if tree is None:
        raise ConfigError(f"{name}: the config is empty")
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: a config is a mapping (key: value), this is {problems.show_value(tree)}")
    return Draft(tree, {at: Origin(name, line) for at, (line, _) in positions.items()})


def map_text(tree: Any, change: Callable[[Path, str], str], path: Path = ()) -> Any:
    """A copy of the tree with change(path, text) in the place of every text; keys stay."""
    if isinstance(tree, dict):
        return {key: map_text(child, change, (*path, key)) for key, child in tree.items()}
    if isinstance(tree, list):
        return [map_text(child, change, (*path, i)) for i, child in enumerate(tree)]
    return change(path, tree) if isinstance(tree, str) else tree


def escape(tree: Any) -> Any:
    """The tree such that reading it again, with its ${NAME} expanded, gives it back."""
    return map_text(tree, lambda _, text: text.replace("${", "$${"))


def unescape(tree: Any) -> Any:
    """The inverse of escape, for a saved config that must not look at the environment."""
    return map_text(tree, lambda _, text: text.replace("$${", "${"))


def paths(tree: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every node of a tree, containers first."""
    yield path
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths(child, (*path, key))


def is_metric(path: Path) -> bool:
    """Whether a key may name a function of the user's own, FILE.py:NAME."""
    return path == ("eval", "metric") or (path[:2] == ("eval", "tasks") and path[3:] == ("metric",))


def _is_source(path: Path) -> bool:
    listed = path[:2] in (("data", "train"), ("data", "eval"), ("eval", "tasks")) and path[3:] == ("source",)
    return listed or path == ("data", "path")


def _absolute(path: Path, text: str, origin: Origin) -> str:
    """text with the path in it made absolute, where the key at `path` holds one. Runs belong to the working folder."""
    if not text:
        return text
    if _is_source(path):
        kind, pattern = split_source(text)
        is_file = kind in FILE_KINDS or (kind == "tfds" and pattern.startswith((".", "~")))
        return f"{kind}:{_join(origin.folder, pattern)}" if is_file and pattern else text
    if path in (("model", "source"), ("model", "tokenizer")):
        kind, colon, rest = text.partition(":")
        if text == SMOLLM2 or (colon and (kind in ("hf", "init") or not rest)):
            return text
        if colon and kind in ("gguf", "ckpt"):
            return f"{kind}:{_join(os.getcwd() if kind == 'ckpt' else origin.folder, rest)}"
        return _join(origin.folder, text)
    if path == ("run_dir",):
        return _join(os.getcwd(), text)
    if path in (("model", "chat_template"), ("lora", "source")) or (is_metric(path) and is_path(text)):
        return _join(origin.folder, text)
    return text


def _join(folder: str, path: str) -> str:
    return path if "://" in path else os.path.normpath(os.path.join(folder, os.path.expanduser(path)))
