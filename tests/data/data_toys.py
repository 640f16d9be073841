"""A tokenizer-free task and generated files: a byte is a token. A module, so that worker processes can import it."""

import dataclasses
import json
import os

import numpy as np

from jaxpost.data.tasks import Example
from jaxpost.errors import DataError


@dataclasses.dataclass(frozen=True)
class ByteTask:
    """{"text": str, "prompt": int (tokens that are not trained)} -> Example."""

    def __call__(self, record, where):
        text = record.get("text")
        if not isinstance(text, str):
            raise DataError(f"{where}: field 'text': expected str, got {type(text).__name__}")
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return Example(tokens, np.arange(len(tokens)) >= max(1, record.get("prompt", 0)), where)


class CountingTask(ByteTask):
    """Appends every place that it tokenises to a list."""

    made = []

    def __call__(self, record, where):
        self.made.append(where)
        return super().__call__(record, where)


class PidTask(ByteTask):
    """The process that made an example, and its JAX_PLATFORMS, as the example's id."""

    def __call__(self, record, where):
        example = super().__call__(record, where)
        return dataclasses.replace(example, id=f"{os.getpid()} {os.environ.get('JAX_PLATFORMS')}")


def byte_task(source):
    return ByteTask()


def pid_task(source):
    return PidTask()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(count, seed=0, longest=60, tag="w"):
    """Rows of 2..longest bytes, each different."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [{"text": f"{tag}{i}.".ljust(length, "x")[: max(length, 2)]} for i, length in enumerate(lengths)]
