"""Random access to the records of one file, by byte offset or by Arrow batch.

Every reader is picklable by path: worker processes open the file again. A reader's `name` is what the user typed (after
globbing) and is used in messages and example ids; `path` may be a decompressed temporary copy.
"""

from __future__ import annotations

import array
import gzip
import hashlib
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxpost.data.rows import Record, RowError, check_values, decode_utf8, parse_json
from jaxpost.errors import DataError

BOM = b"\xef\xbb\xbf"


class Reader(Protocol):
    """Random access to records; read(i) also says where record i is, "FILE:LINE"."""

    fingerprint: str

    def __len__(self) -> int: ...

    def where(self, index: int) -> str: ...

    def read(self, index: int) -> Record: ...


class Lines:
    """Non-empty lines of a text file (LF or CRLF, a BOM at the start is skipped), found by byte offset."""

    def __init__(self, name: str, parse: Callable[[bytes], Record]):
        self.name = name
        self._parse = parse
        self._path = name
        self._file = None
        if name.endswith(".gz"):
            self._path = _temporary(self, suffix=".lines")
            _gunzip(name, self._path)
        self.fingerprint = _digest(name)
        self._starts, self._sizes, self._numbers = _index_lines(self._path)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        """FILE:LINE, lines counted from 1, empty ones too, as editors do."""
        return f"{self.name}:{self._numbers[index]}"

    def read(self, index: int) -> Record:
        """Record number index. Raises RowError."""
        if self._file is None:
            self._file = open(self._path, "rb", buffering=0)
        # pread has no file position, so that reading threads do not disturb each other.
        return self._parse(os.pread(self._file.fileno(), int(self._sizes[index]), int(self._starts[index])))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}


def jsonl_file(name: str) -> Lines:
    """One JSON object a line."""
    return Lines(name, parse_json)


def text_file(name: str) -> Lines:
    """One record {"text": line} a non-empty line."""
    return Lines(name, _text_record)


def _text_record(line: bytes) -> Record:
    return {"text": decode_utf8(line)}


class Parquet:
    """Rows of a parquet file. They are copied once to an uncompressed temporary file and memory-mapped from there:
    a shuffled order would otherwise decode a whole row group for every row."""

    def __init__(self, name: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name = name
        self._path = _temporary(self, suffix=".arrow")
        self._batches = None
        try:
            with pq.ParquetFile(name) as source, pa.OSFile(self._path, "wb") as sink:
                with pa.ipc.new_file(sink, source.schema_arrow) as writer:
                    sizes = []
                    # One thread: a damaged file was once seen to stall in the pool (one read of 60,000, not repeated).
                    for batch in source.iter_batches(batch_size=1024, use_threads=False):
                        writer.write_batch(batch)
                        sizes.append(batch.num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name is no UTF-8
            raise DataError(f"{name}: not a readable parquet file: {' '.join(str(error).split())[:300]}") from None
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.fingerprint = _digest(name)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, index: int) -> str:
        """FILE:ROW, rows counted from 1."""
        return f"{self.name}:{index + 1}"

    def read(self, index: int) -> Record:
        """Record number index. Raises RowError."""
        if self._batches is None:
            import pyarrow as pa

            self._batches = pa.ipc.open_file(pa.memory_map(self._path, "r"))
        block = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[block - 1]) if block else 0
        try:
            record = self._batches.get_batch(block).slice(index - start, 1).to_pylist()[0]
        except (UnicodeDecodeError, ValueError) as error:
            raise RowError(f"unreadable value: {error}") from None
        check_values(record)
        return record

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": None}


class Tfds:
    """A prepared TFDS data set in ArrayRecord format, read without TensorFlow: a registered name (its folder under
    TFDS_DATA_DIR or ~/tensorflow_datasets) or the folder of one version. Nothing is downloaded."""

    def __init__(self, name: str, split: str):
        self.name = name
        self.split = split
        self._source = None
        info = self._open().dataset_info
        try:
            self._size = len(self._open())
        except ValueError:  # of train[5:2]
            raise DataError(f"tfds:{name}: split {split} ends before it begins") from None
        # No content hash is stored beside the records: version, split and sizes stand in for one.
        text = f"{info.full_name} {split} {self._size} {info.splits[split.split('[')[0]].num_bytes}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _open(self) -> Any:
        if self._source is None:
            import tensorflow_datasets as tfds

            try:
                if os.path.isdir(self.name):
                    builder = tfds.builder_from_directory(self.name)
                else:
                    builder = tfds.builder(self.name)
                self._source = builder.as_data_source(split=self.split)
            except Exception as error:  # tfds raises a dozen unrelated types here
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DataError(
                    f"tfds:{self.name}: split {self.split} cannot be opened as ArrayRecord: {reason} "
                    "(prepare it with file_format='array_record', or give the folder of its version)"
                ) from None
        return self._source

    def __len__(self) -> int:
        return self._size

    def where(self, index: int) -> str:
        """NAME/SPLIT:ROW, rows counted from 1."""
        return f"{self.name}/{self.split}:{index + 1}"

    def read(self, index: int) -> Record:
        """Record number index as plain Python values. Raises RowError."""
        source = self._open()
        try:
            record = _plain(source[index], source.dataset_info.features)
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise RowError(f"does not fit its data set's features: {error}") from None
        check_values(record)
        return record

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}


def _plain(value: Any, feature: Any = None) -> Any:
    """numpy and bytes to Python values; TFDS stores a sequence of dicts as a dict of sequences: turned back here."""
    if isinstance(value, dict):
        inner = getattr(feature, "feature", None)  # of a Sequence: the feature of one element
        if inner is not None:
            return [_plain(_element(value, i), inner) for i in range(_length(value))]
        return {key: _plain(item, feature[key] if feature is not None else None) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _element(value: Any, index: int) -> Any:
    """Element index of a sequence that is stored as columns, of any depth."""
    return {key: _element(item, index) for key, item in value.items()} if isinstance(value, dict) else value[index]


def _length(value: Any) -> int:
    """How many elements such a sequence has. Raises ValueError where its columns differ."""
    if not isinstance(value, dict):
        return len(value)
    lengths = {_length(item) for item in value.values()}
    if len(lengths) > 1:
        raise ValueError(f"a sequence with columns of {sorted(lengths)} elements")
    return lengths.pop() if lengths else 0


def _index_lines(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Byte offset, byte count and line number of every line that is not blank."""
    starts, sizes, numbers = array.array("q"), array.array("q"), array.array("q")
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            size = len(line)
            skip = len(BOM) if number == 1 and line.startswith(BOM) else 0
            if not (line[skip:] if skip else line).isspace() and size > skip:
                starts.append(offset + skip)
                sizes.append(size - skip)
                numbers.append(number)
            offset += size
    return tuple(
        np.frombuffer(column, np.int64) if column else np.zeros(0, np.int64) for column in (starts, sizes, numbers)
    )


def _gunzip(name: str, path: str) -> None:
    try:
        with gzip.open(name, "rb") as source, open(path, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip file: {error}") from None


def _temporary(owner: object, suffix: str) -> str:
    """Path of a new temporary file, removed with its owner or when this process ends."""
    handle, path = tempfile.mkstemp(prefix="jaxpost-", suffix=suffix)
    os.close(handle)
    weakref.finalize(owner, _remove, path)
    return path


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
