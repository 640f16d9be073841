"""Sources of records: a string such as `jsonl:GLOB` becomes random access to plain dicts.

    jsonl:GLOB     one JSON object a line (.jsonl, .json, .gz of either); empty lines are skipped
    parquet:GLOB   one record a row
    text:GLOB      one record {"text": line} a non-empty line
    tfds:NAME      a prepared TFDS data set (ArrayRecord), by name or by the folder of one version

Files of a glob are read in sorted order as one long list. Sources read and check values; what the fields mean is
decided by the task.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping

import numpy as np
import pydantic

from jaxpost.data import files
from jaxpost.data.rows import Record, RowError, shown_names
from jaxpost.data.tasks import TaskName
from jaxpost.errors import ConfigError, DataError
from jaxpost.fields import SECTION, NonEmptyStr, NonNegInt, PosFloat, PosInt

FILE_KINDS = {"jsonl": files.jsonl_file, "parquet": files.Parquet, "text": files.text_file}
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text"}


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class SourceConfig:
    """One set of records of data.train or data.eval."""

    source: NonEmptyStr  # KIND:PATTERN, see the top of this file
    task: TaskName = "auto"  # how a record becomes an example; auto looks at the fields
    weight: PosFloat | None = None  # share of the drawn records; without weights each record comes once an epoch
    split: NonEmptyStr | None = None  # tfds only (default train): files have no splits
    columns: dict[NonEmptyStr, NonEmptyStr] = pydantic.Field(default_factory=dict)  # field the task reads: file's name
    limit: PosInt | None = None  # at most so many records, after skip
    skip: NonNegInt = 0  # leave out the first so many records

    @pydantic.model_validator(mode="after")
    def _check(self) -> SourceConfig:
        kind, pattern = split_source(self.source)
        if kind == "hf":
            raise ValueError(
                f"source: {self.source}: the hub is not read yet; download the files and name them with "
                "jsonl:GLOB or parquet:GLOB"
            )
        if kind not in FILE_KINDS and kind != "tfds":
            raise ValueError(f"source: {self.source}: unknown kind; use jsonl:, parquet: or text:GLOB, or tfds:NAME")
        if not pattern:
            raise ValueError(f"source: {self.source}: nothing after '{kind}:'")
        if self.split is not None and kind != "tfds":
            raise ValueError(f"split: {kind} files have no splits; use skip and limit, or another file")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("columns: two fields are read from the same column")
        return self


def split_source(source: str) -> tuple[str, str]:
    """(kind, pattern) of a source string; a bare path gets its kind from the suffix, ("", path) if it is unknown."""
    kind, colon, pattern = source.partition(":")
    if colon and kind.isalnum():
        return kind, pattern
    stem = source.removesuffix(".gz")
    return SUFFIXES.get(os.path.splitext(stem)[1], ""), source


class Records:
    """Random access to one source's records after skip, limit and renamed columns. Picklable by path."""

    def __init__(self, config: SourceConfig, readers: list[files.Reader]):
        self._config = config
        self._readers = readers
        self._ends = np.cumsum([len(reader) for reader in readers], dtype=np.int64)
        stop = int(self._ends[-1]) - config.skip
        self._size = max(0, stop if config.limit is None else min(stop, config.limit))
        if not self._size:
            raise DataError(f"{config.source}: no records" + (f" after skipping {config.skip}" if config.skip else ""))

    def __len__(self) -> int:
        return self._size

    @property
    def fingerprint(self) -> dict[str, object]:
        """What identifies the records and their order: content and fields, not the folder they lie in."""
        content = hashlib.sha256("".join(reader.fingerprint for reader in self._readers).encode()).hexdigest()[:16]
        config = self._config
        return {"content": content, "records": self._size, "skip": config.skip, "columns": dict(config.columns)}

    def _locate(self, index: int) -> tuple[files.Reader, int]:
        if not 0 <= index < self._size:
            raise IndexError(index)
        index += self._config.skip
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._readers[part], index - (int(self._ends[part - 1]) if part else 0)

    def where(self, index: int) -> str:
        """ "FILE:LINE" of record index: its stable id."""
        reader, local = self._locate(index)
        return reader.where(local)

    def __getitem__(self, index: int) -> Record:
        """Record number index. Raises DataError("FILE:LINE: field F: reason")."""
        reader, local = self._locate(index)
        try:
            return _rename(reader.read(local), self._config.columns)
        except RowError as error:
            raise DataError(f"{reader.where(local)}: {error}") from None


def open_source(config: SourceConfig, key: str = "data.train") -> Records:
    """Index a source's files. key is the config key for messages.

    Raises ConfigError if no file matches, DataError if a file cannot be read or holds no record.
    """
    kind, pattern = split_source(config.source)
    if kind == "tfds":
        return Records(config, [files.Tfds(pattern, config.split or "train")])
    paths = find_files(pattern, key)
    try:
        return Records(config, [FILE_KINDS[kind](path) for path in paths])
    except OSError as error:
        raise DataError(f"{error.filename or config.source}: {error.strerror or error}") from None


def find_files(pattern: str, key: str = "data.train") -> list[str]:
    """Files of a glob (or plain path), sorted. Raises ConfigError naming the pattern if there is none."""
    exact = [pattern] if os.path.isfile(pattern) else []  # a name with [brackets] is a name first
    paths = exact or sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        hint = ""
        if "JAXPOST_DATA" not in os.environ and pattern.startswith(os.path.join(os.getcwd(), "data", "")):
            hint = "; where a config says ${JAXPOST_DATA}, set that to your folder of data sets, or pass data.path=FILE"
        raise ConfigError(f"{key}: no file matches {pattern}{hint}")
    return paths


def _rename(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with each column under the field's name that the task reads."""
    if not columns:
        return record
    for column in columns.values():
        if column not in record:
            raise RowError(f"missing; the row has {shown_names(sorted(map(str, record))) or 'no fields'}", column)
    taken = set(columns.values())
    kept = {key: value for key, value in record.items() if key not in taken}
    return kept | {field: record[column] for field, column in columns.items()}
