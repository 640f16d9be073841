"""The packing plan, a function of lengths only, and rows of examples to columns: the shift by one happens here, once.

A *unit* is a tuple of examples that stay together as adjacent segments of one row (one example in supervised
fine-tuning, a pair in preference learning). An example of n tokens takes n - 1 positions.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from jaxpost.data.order import permutation
from jaxpost.errors import DataError
from jaxpost.types import Batch

if TYPE_CHECKING:
    from jaxpost.data.tasks import Example

Unit = tuple["Example", ...]
Truncation = Literal["drop", "right", "left", "error"]


class Row(NamedTuple):
    """Units of one row, from left to right, and the row's width in positions."""

    units: tuple[int, ...]
    width: int


def positions_of(unit: Unit) -> int:
    """Positions that a unit takes in a row."""
    return sum(len(example.tokens) - 1 for example in unit)


def best_fit_rows(lengths: Sequence[int], segments: Sequence[int], width: int, max_segments: int) -> list[Row]:
    """Best fit, longest unit first: each goes into the row with the least room that still holds it, else a new row.

    O(n log n). Ties: the earlier unit, the earlier row. Rows come in the order of their first unit.
    """
    lengths = np.asarray(lengths, np.int64)
    segments = np.asarray(segments, np.int64)
    rows: list[list[int]] = []
    used: list[int] = []  # segments a row
    open_rows: list[tuple[int, int]] = []  # sorted (room, row)
    for unit in np.argsort(-lengths, kind="stable").tolist():
        length, count = int(lengths[unit]), int(segments[unit])
        place = bisect.bisect_left(open_rows, (length, -1))
        # A row may have room for the tokens and yet no segment left: only possible for units of several segments,
        # a row without a free segment is not open.
        while place < len(open_rows) and used[open_rows[place][1]] + count > max_segments:
            place += 1
        if place < len(open_rows):
            room, row = open_rows.pop(place)
        else:
            room, row = width, len(rows)
            rows.append([])
            used.append(0)
        rows[row].append(unit)
        used[row] += count
        if room > length and used[row] < max_segments:
            bisect.insort(open_rows, (room - length, row))
    # Stream order inside rows and between them: the shuffle is then the caller's alone.
    return sorted(Row(tuple(sorted(row)), width) for row in rows)


def single_rows(count: int, width: int) -> list[Row]:
    """One unit a row."""
    return [Row((unit,), width) for unit in range(count)]


def bucket_rows(
    lengths: Sequence[int], buckets: Sequence[int], batch_size: int, *, filled: int, key: int | None
) -> list[Row]:
    """One unit a row, rows ordered so that every batch has one width, the smallest bucket that holds its units.

    What does not fill a batch moves to the next wider bucket; what is left at the widest comes last and shares its
    batch with the next window. filled: rows that the window before left in the current batch; it is completed with the
    widest units here, and the batch takes the width of its widest row. key shuffles the batches; None keeps narrow
    before wide.
    """
    by_bucket: list[list[int]] = [[] for _ in buckets]
    for unit, length in enumerate(lengths):
        by_bucket[bisect.bisect_left(buckets, length)].append(unit)
    head: list[Row] = []
    missing = -filled % batch_size
    for width, units in reversed(list(zip(buckets, by_bucket, strict=True))):
        while units and len(head) < missing:
            head.append(Row((units.pop(0),), width))
    batches: list[list[Row]] = []
    rest: list[int] = []
    for width, units in zip(buckets, by_bucket, strict=True):
        rest = sorted(rest + units)
        while len(rest) >= batch_size:
            batches.append([Row((unit,), width) for unit in rest[:batch_size]])
            rest = rest[batch_size:]
    widest = max((buckets[bisect.bisect_left(buckets, lengths[unit])] for unit in rest), default=0)
    if key is not None:
        batches = [batches[i] for i in permutation(len(batches), key)]
    return head + [row for batch in batches for row in batch] + [Row((unit,), widest) for unit in rest]


def shuffle_rows(rows: list[Row], key: int) -> list[Row]:
    """Rows in a seeded random order. Best fit puts short units together: unshuffled, a window would start with them."""
    return [rows[i] for i in permutation(len(rows), key)]


def fit_unit(unit: Unit, width: int, truncation: Truncation, max_segments: int) -> tuple[Unit | None, str]:
    """(the unit as it will be packed, or None if it is dropped; the counter that says why, or "").

    right keeps the first width + 1 tokens, left the last; both apply to units of one example (cutting one half of a
    pair would change what is compared: such a unit is dropped). Counters: truncated, dropped/{too_short, too_long,
    no_target}. Raises DataError on a unit that does not fit under truncation "error".
    """
    if any(len(example.tokens) < 2 for example in unit):
        return None, "dropped/too_short"
    reason = ""
    length = positions_of(unit)
    if length > width or len(unit) > max_segments:
        if truncation == "error":
            raise DataError(
                f"{unit[0].id}: {length} positions in {len(unit)} segments do not fit data.seq_len {width} and "
                f"{max_segments} segments: raise data.seq_len or set data.truncation to drop, right or left"
            )
        if truncation == "drop" or len(unit) > 1:
            return None, "dropped/too_long"
        kept = slice(0, width + 1) if truncation == "right" else slice(len(unit[0].tokens) - width - 1, None)
        unit = (dataclasses.replace(unit[0], tokens=unit[0].tokens[kept], trainable=unit[0].trainable[kept]),)
        reason = "truncated"
    if not all(example.trainable[1:].any() for example in unit):
        return None, "dropped/no_target"
    return unit, reason


def pack_rows(rows: Sequence[Sequence[Unit]], width: int, columns: Iterable[str] = (), max_segments: int = 0) -> Batch:
    """Columns [len(rows), width] as numpy arrays. A row without units is all padding.

    Padding has token 0, mask False, position 0, segment 0: a real token 0 differs from it by its segment. columns:
    names of what examples tell beside their tokens (Example.extra), in batch.extra as f32[len(rows), max_segments]:
    place s is that of segment s + 1, and 0 where there is none.
    """
    shape = (len(rows), width)
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    mask = np.zeros(shape, bool)
    extra = {name: np.zeros((len(rows), max_segments), np.float32) for name in columns}
    for b, row in enumerate(rows):
        start = 0
        examples = [example for unit in row for example in unit]
        for number, example in enumerate(examples, 1):
            stop = start + len(example.tokens) - 1
            tokens[b, start:stop] = example.tokens[:-1]
            targets[b, start:stop] = example.tokens[1:]
            mask[b, start:stop] = example.trainable[1:]
            positions[b, start:stop] = np.arange(stop - start)
            segments[b, start:stop] = number
            for name, values in extra.items():
                values[b, number - 1] = example.extra[name]
            start = stop
    return Batch(tokens=tokens, targets=targets, mask=mask, positions=positions, segments=segments, extra=extra)
