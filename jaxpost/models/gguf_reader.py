"""Read GGUF files: metadata in a tenth of a second, tensors as lazy views, every length checked against the file.

Own parser for the container (the package gguf takes seconds for a vocabulary); the package's tables and kernels turn
quantised blocks into numbers.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from jaxpost.errors import CheckpointError, ConfigError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 22  # of an array: the largest vocabularies have a sixteenth of it
MAX_DIMS = 4


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape as numpy has it (rows first), type as in ggml's numbering, offset from the file's start."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    def values(self) -> np.ndarray:
        """The tensor as f32, dequantised where it is quantised."""
        try:
            import gguf
        except ImportError:
            raise ConfigError("reading GGUF weights needs the package gguf: pip install gguf") from None
        try:
            kind = gguf.GGMLQuantizationType(self.kind)
        except ValueError:
            raise ConfigError(f"{self.file}: {self.name} has the unknown type {self.kind}") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if self.shape[-1] % block:
            raise CheckpointError(f"{self.file}: {self.name}: rows of {self.shape[-1]} in blocks of {block}")
        shape = (*self.shape[:-1], self.shape[-1] // block * size)
        if self.offset + math.prod(shape) > self.file.stat().st_size:
            raise CheckpointError(f"{self.file}: {self.name} reaches past the end of the file: truncated or damaged")
        data = np.asarray(np.memmap(self.file, np.uint8, "r", self.offset, shape))
        try:
            return gguf.dequantize(data, kind)
        except NotImplementedError:
            raise ConfigError(f"{self.file}: {self.name} is {kind.name}, which gguf cannot dequantise") from None


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Metadata (arrays of numbers as numpy arrays, of strings as lists) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(file: str | os.PathLike) -> GgufFile:
    """Metadata and tensor table; ConfigError where there is no such file, CheckpointError where it is damaged."""
    file = pathlib.Path(file)
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise CheckpointError(f"{file}: not a GGUF file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, file))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def _parse(at: _Cursor) -> GgufFile:
    version, num_tensors, num_pairs = at.scalar("<I"), at.scalar("<Q"), at.scalar("<Q")
    if version not in (2, 3):
        raise CheckpointError(f"{at.file}: GGUF version {version}, expected 2 or 3 (little-endian)")
    metadata: dict[str, Any] = {}
    for _ in range(at.count(num_pairs)):
        key = at.string()
        if key in metadata:
            raise CheckpointError(f"{at.file}: metadata {key[:100]!r} appears twice")
        metadata[key] = at.value(at.scalar("<I"))
    table = []
    for _ in range(at.count(num_tensors)):
        name, dims = at.string(), at.scalar("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise CheckpointError(f"{at.file}: {name[:100]!r} has {dims} dimensions")
        shape = tuple(at.scalar("<Q") for _ in range(dims))[::-1]  # the file has the fastest dimension first
        table.append((name, shape, at.scalar("<I"), at.scalar("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
        raise CheckpointError(f"{at.file}: general.alignment {str(alignment)[:50]!r}")
    start = -(-at.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        if name in tensors or math.prod(shape) >= 1 << 40 or start + offset > at.size:
            raise CheckpointError(f"{at.file}: tensor {name[:100]!r} is repeated, too large or out of range")
        tensors[name] = GgufTensor(at.file, name, shape, kind, start + offset)
    return GgufFile(metadata, tensors)


class _Cursor:
    """A position in the mapped file that cannot leave it."""

    def __init__(self, data: mmap.mmap, file: pathlib.Path):
        self.data, self.file, self.position, self.size = data, file, 4, len(data)

    def take(self, size: int) -> bytes:
        if size > self.size - self.position:
            raise CheckpointError(f"{self.file}: {size} bytes wanted at byte {self.position}: truncated or damaged")
        self.position += size
        return self.data[self.position - size : self.position]

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def count(self, items: int) -> int:
        if items > min(MAX_ITEMS, self.size):
            raise CheckpointError(f"{self.file}: a list of {items} items: damaged")
        return items

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise CheckpointError(f"{self.file}: unknown metadata type {kind}")
        inner, items = self.scalar("<I"), self.count(self.scalar("<Q"))
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner])
            return np.frombuffer(self.take(items * dtype.itemsize), dtype)
        if inner != STRING:
            raise CheckpointError(f"{self.file}: a metadata list of type {inner}")
        return [self.string() for _ in range(items)]
