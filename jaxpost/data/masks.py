"""Which tokens of a rendered chat are trained: pure functions over character spans and token offsets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def token_spans(offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) i64[n]: the offsets with gaps closed, non-decreasing.

    Some tokenizers report offsets without the space that a token begins with; the gap belongs to the token after it.
    The tokens of one character (bytes of an emoji) all have that character's span.
    """
    pairs = np.asarray(offsets, np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1])
    before = np.concatenate([[0], ends])[: len(pairs)]
    return np.minimum(pairs[:, 0], before), ends


def tokens_between(starts: np.ndarray, ends: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """[first, last) of the tokens that share a character with [low, high)."""
    if high <= low:
        first = int(np.searchsorted(starts, low, "left"))
        return first, first
    return int(np.searchsorted(ends, low, "right")), int(np.searchsorted(starts, high, "left"))


def straddling(starts: np.ndarray, ends: np.ndarray, at: int) -> int | None:
    """Index of a token that begins before character `at` and ends behind it, or None."""
    index = int(np.searchsorted(ends, at, "right"))
    return index if index < len(ends) and starts[index] < at else None


def last_stop(ids: np.ndarray, stop_ids: Sequence[int], first: int, last: int) -> int | None:
    """Index of the last stop token in ids[first:last], or None."""
    found = np.flatnonzero(np.isin(ids[first:last], np.asarray(stop_ids, ids.dtype)))
    return first + int(found[-1]) if len(found) else None
