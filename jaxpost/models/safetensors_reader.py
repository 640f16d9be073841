"""Read safetensors files from strangers: the header is checked in full before a byte of weights is touched.

Own parser, because the library's numpy API knows no bfloat16 and cannot hand out slices without copying. Files are
memory-mapped one tensor at a time, so what was read can be dropped again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from jaxpost.errors import CheckpointError

# A real header takes about 110 bytes a tensor. The cap keeps a hostile one from costing memory when it is parsed.
MAX_HEADER_BYTES = 4 << 20
MAX_DIMS = 8
MAX_ITEMS = 1 << 48  # of an empty tensor, counted without its dimensions of 0: numpy refuses larger shapes

ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8},
}
WEIGHT_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DTYPE_CODES = {dtype.name: code for code, dtype in WEIGHT_DTYPES.items()}  # numpy name -> safetensors code


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One entry of a header; offset counts from the start of the file."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only memory map; bytes are read when touched, released with the view."""
        if self.dtype not in WEIGHT_DTYPES:
            known = ", ".join(WEIGHT_DTYPES)
            raise CheckpointError(f"{self.file}: {name} has dtype {self.dtype}; weights may be {known}")
        dtype = WEIGHT_DTYPES[self.dtype]
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        return np.memmap(self.file, dtype=dtype, mode="r", offset=self.offset, shape=self.shape)


def strict_json(data: bytes, what: str) -> Any:
    """JSON without repeated keys; every way to be wrong is one CheckpointError that begins with `what`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{what}: the key {double[:200]!r} appears twice")
        return out

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in data:  # an escaped half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and absurd integers
        raise CheckpointError(f"{what}: not valid JSON ({str(error)[:200]})") from None


def read_header(file: str | os.PathLike) -> dict[str, TensorInfo]:
    """Name -> TensorInfo of one file. Raises CheckpointError unless the tensors tile the rest of the file exactly."""
    file = pathlib.Path(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{file}: header of {length} bytes in a file of {size}: truncated or damaged")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: header of {length} bytes, more than {MAX_HEADER_BYTES}")
            header = strict_json(stream.read(length), f"{file}: header")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise CheckpointError(f"{file}: __metadata__ is not an object of texts")
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(entry, f"{file}: {name[:200]!r}")
        spans.append((begin, end, name, dtype, shape))
    spans.sort(key=lambda span: span[:2])
    position, data = 0, size - 8 - length
    for begin, end, name, _, _ in spans:
        if begin != position:
            raise CheckpointError(f"{file}: {name[:200]!r} starts at byte {begin}, expected {position}")
        position = end
    if position != data:
        raise CheckpointError(f"{file}: header describes {position} bytes of weights, the file holds {data}")
    return {name: TensorInfo(file, dtype, shape, 8 + length + begin) for begin, _, name, dtype, shape in spans}


def _entry(entry: Any, what: str) -> tuple[str, tuple[int, ...], int, int]:
    """Check one header entry on its own: types, ranges, and that the byte span fits dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{what}: unknown dtype {str(dtype)[:50]!r}")
    if not _sizes(shape) or len(shape) > MAX_DIMS or (0 in shape and math.prod(filter(None, shape)) >= MAX_ITEMS):
        raise CheckpointError(f"{what}: bad shape {str(shape)[:100]}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what}: bad data_offsets {str(offsets)[:100]}")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        span = offsets[1] - offsets[0]
        raise CheckpointError(f"{what}: {dtype} {shape} takes {wanted} bytes, data_offsets span {span}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
