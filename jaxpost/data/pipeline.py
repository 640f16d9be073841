"""Packed batches of the global stream.

    sources -> order (seed, epoch) -> windows of records, tokenised by Grain -> plan (lengths) -> rows -> global batches

A batch is the next batch_size rows of an endless stream of rows: epoch after epoch, window after window; where an
epoch does not fill its last batch, rows of the next epoch complete it, so no example is lost and none comes twice in an
epoch. Everything up to the global batch is the same on every host; a host then builds the rows of its own slice. The
position is (epoch, window, row): restoring tokenises one window and counts rows; no record before that window is read.

Every host tokenises the whole window, not its part of it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpost.data.options import DataConfig
from jaxpost.data.order import Order, fold
from jaxpost.data.pack import (
    Row,
    Unit,
    best_fit_rows,
    bucket_rows,
    fit_unit,
    pack_rows,
    positions_of,
    shuffle_rows,
    single_rows,
)
from jaxpost.data.prefetch import Prefetch
from jaxpost.data.sources import SourceConfig, open_source
from jaxpost.data.stream import BadRow, Examples, Stream, Task, following, outcomes_in_file_order
from jaxpost.errors import CheckpointError, ConfigError, DataError
from jaxpost.types import Batch
from jaxpost.types import Stream as Tag

COUNTERS = ("rows_read", "truncated", "dropped/bad_row", "dropped/too_long", "dropped/too_short", "dropped/no_target")
SAMPLED = 1024  # records, about, whose lengths decide how many segments a row may hold
log = logging.getLogger(__name__)


class _Item(NamedTuple):
    batch: Batch  # numpy, this host's rows
    info: dict[str, Any]
    state: dict[str, Any]  # after this batch


class PackedSource:
    """Endless iterator over this host's rows of each global batch; implements the loop's Source protocol.

    make_task: a source's config to its task. identity: what else shapes the rows (tokenizer, template), compared on
    restore. shard_index of num_shards: this host's coordinate along the batch axes of the mesh.
    """

    def __init__(
        self,
        config: DataConfig,
        make_task: Callable[[SourceConfig], Task],
        *,
        seed: int,
        shard_index: int = 0,
        num_shards: int = 1,
        identity: Mapping[str, Any] | None = None,
    ):
        if config.batch_size % num_shards:
            raise ConfigError(f"data.batch_size: {config.batch_size} rows do not divide among {num_shards} hosts")
        rows = config.batch_size // num_shards
        self._slice = slice(shard_index * rows, (shard_index + 1) * rows)
        self._key = fold(seed, Tag.SHUFFLE)
        self._stream = open_stream(
            config.sources, make_task, key=self._key, shuffle=config.shuffle, window=config.window, name="data.train"
        )
        self.config = config = settle_segments(config, self._stream)
        self.fingerprint = _fingerprint(config, self._stream, seed) | dict(identity or {})
        self.info: dict[str, Any] = {}
        self.batches_per_epoch: int | None = None  # known after count_batches
        self._lengths: list[tuple[np.ndarray, np.ndarray]] | None = None
        self._state = {"batch": 0, "epoch": 0, "window": 0, "row": 0, "counters": dict.fromkeys(COUNTERS, 0)}
        self._items: Prefetch | None = None

    def __iter__(self) -> PackedSource:
        return self

    def __next__(self) -> Batch:
        """The next batch as numpy arrays. Raises DataError."""
        if self._items is None:
            self._items = Prefetch(self._batches(self._state))
        item = next(self._items)
        self._state, self.info = item.state, item.info
        return item.batch

    def state(self) -> dict[str, Any]:
        """Position after the batches handed out so far, and what they depend on; JSON."""
        return self._state | {"counters": dict(self._state["counters"]), "fingerprint": dict(self.fingerprint)}

    def restore(self, state: Mapping[str, Any], allow_changed: Collection[str] = ()) -> None:
        """Go to a saved position. Raises CheckpointError with every differing field that allow_changed does not name.

        A name stands for its parts, too: data.train for data.train[0].content. Where another order was allowed, reading
        goes on at the same epoch, window and row of it.
        """
        saved = state["fingerprint"]
        diff = [
            f"{key}: saved {saved.get(key, 'nothing')}, now {self.fingerprint.get(key, 'nothing')}"
            for key in sorted(saved.keys() | self.fingerprint.keys())
            if saved.get(key) != self.fingerprint.get(key) and not _covers(allow_changed, key)
        ]
        if diff:
            raise CheckpointError("the data differ from those of the checkpoint: " + "; ".join(diff))
        self.close()
        self._state = {key: state[key] for key in self._state}
        self.info = {}

    def publish(self, state: Any, version: int) -> None:
        """Nothing: rows on disk do not depend on the weights."""

    def close(self) -> None:
        """End reading and the workers; the next batch starts them again."""
        if self._items is not None:
            self._items.close()
            self._items = None

    def count_batches(self, epochs: float = 1.0) -> int:
        """Exact number of batches from the start until info["epoch"] reaches epochs.

        The first call tokenises every record once; later calls only plan.
        """
        if self._lengths is None:
            lengths = [measure(source, self.config) for source in self._stream.sources]
            if not any(positions.any() for positions, _ in lengths):
                raise DataError("no example is left to train on: every record is bad, too long or without a target")
            self._lengths = lengths
            self.batches_per_epoch = self._count(1.0)
        return self._count(epochs)

    def _count(self, epochs: float) -> int:
        stream, total, epoch, window = self._stream, 0, 0, 0
        while True:
            source, record = stream.order.locate(epoch, *stream.bounds(window))
            lengths, segments = np.zeros(len(source), np.int64), np.zeros(len(source), np.int64)
            for k, (all_lengths, all_segments) in enumerate(self._lengths):
                lengths[source == k] = all_lengths[record[source == k]]
                segments[source == k] = all_segments[record[source == k]]
            kept = lengths > 0
            rows = len(plan_rows(self.config, lengths[kept], segments[kept], filled=total, key=None))
            for row in range(1, rows + 1):
                if self._progress(epoch, window, row / rows) >= epochs:
                    return -(-(total + row) // self.config.batch_size)
            total += rows
            epoch, window = following(epoch, window, stream.windows_per_epoch)

    def _progress(self, epoch: int, window: int, share: float) -> float:
        """Epochs behind us when this share of a window's rows is used."""
        start, stop = self._stream.bounds(window)
        return epoch + (start + (stop - start) * share) / self._stream.order.records_per_epoch

    def _batches(self, state: Mapping[str, Any]) -> Generator[_Item, None, None]:
        config, stream = self.config, self._stream
        done, before, skip = state["batch"], dict(state["counters"]), state["row"]
        filled = -skip % config.batch_size  # rows of earlier windows in the batch that this window completed first
        pending: list[tuple[list[Unit], int]] = []  # units and width of the rows of the batch being filled
        empty = 0
        for epoch, window, outcomes in stream.windows(state["epoch"], state["window"], workers=config.workers):
            counters = dict(before)
            units = admit(outcomes, config, counters, report=epoch == 0)
            key = fold(self._key, epoch, window) if config.shuffle else None
            lengths, segments = [positions_of(unit) for unit in units], [len(unit) for unit in units]
            rows = plan_rows(config, lengths, segments, filled=filled, key=key)
            empty = 0 if rows else empty + 1
            if empty == stream.windows_per_epoch:
                raise DataError(f"no example is left to train on: {_counts(counters)}")
            for number in range(skip, len(rows)):
                row = rows[number]
                pending.append(([units[i] for i in row.units], row.width))
                if len(pending) == config.batch_size:
                    done += 1
                    last = number + 1 == len(rows)
                    place = following(epoch, window, stream.windows_per_epoch) if last else (epoch, window)
                    after = {
                        "batch": done,
                        "epoch": place[0],
                        "window": place[1],
                        "row": 0 if last else number + 1,
                        "counters": dict(counters if last else before),
                    }
                    info = {"epoch": self._progress(epoch, window, (number + 1) / len(rows))}
                    batch, described = build_batch(pending, self._slice, config.segments_per_row)
                    yield _Item(batch, info | described | counters, after)
                    pending = []
            before, skip, filled = counters, 0, len(pending)


class EvalRows:
    """Held-out rows, the same on every pass: data.eval whole, in file order, packed like the training rows.

    Iterating yields numpy Batches of this host's rows; the last one is completed with rows of padding, whose mask is
    False. info and counters describe the batches of the pass so far.
    """

    def __init__(
        self,
        config: DataConfig,
        make_task: Callable[[SourceConfig], Task],
        *,
        sources: Sequence[SourceConfig] | None = None,
        shard_index: int = 0,
        num_shards: int = 1,
    ):
        if config.batch_size % num_shards:
            raise ConfigError(f"data.batch_size: {config.batch_size} rows do not divide among {num_shards} hosts")
        self.config = config
        rows = config.batch_size // num_shards
        self._slice = slice(shard_index * rows, (shard_index + 1) * rows)
        sources = config.eval if sources is None else sources
        if not sources:
            raise ConfigError("data.eval: no source")
        self._stream = open_stream(sources, make_task, key=0, shuffle=False, window=config.window, name="data.eval")
        self.info: dict[str, Any] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)

    def __iter__(self) -> Iterator[Batch]:
        """One pass. Raises DataError, also if no example is left."""
        config = self.config
        self.counters = counters = dict.fromkeys(COUNTERS, 0)
        pending: list[tuple[list[Unit], int]] = []
        batches = 0
        windows = self._stream.windows(0, 0, workers=0, epochs=1)
        try:
            for _, _, outcomes in windows:
                units = admit(outcomes, config, counters, report=True)
                lengths, segments = [positions_of(unit) for unit in units], [len(unit) for unit in units]
                for row in plan_rows(config, lengths, segments, filled=len(pending), key=None):
                    pending.append(([units[i] for i in row.units], row.width))
                    if len(pending) == config.batch_size:
                        batches += 1
                        yield self._take(pending)
                        pending = []
        finally:
            windows.close()
        if pending:
            missing = config.batch_size - len(pending)
            yield self._take(pending + [([], 0)] * missing)
        elif not batches:
            raise DataError(f"no held-out example is left: {_counts(counters)}")

    def _take(self, rows: list[tuple[list[Unit], int]]) -> Batch:
        batch, described = build_batch(rows, self._slice, self.config.segments_per_row)
        self.info = described | self.counters
        return batch


def open_stream(
    sources: Sequence[SourceConfig],
    make_task: Callable[[SourceConfig], Task],
    *,
    key: int,
    shuffle: bool,
    window: int,
    name: str,
) -> Stream:
    """Open and index sources, and fix their global order. name is the config key of the list, for messages."""
    examples = tuple(
        Examples(open_source(source, f"{name}[{i}].source"), make_task(source)) for i, source in enumerate(sources)
    )
    weights = [source.weight for source in sources]
    try:
        order = Order([len(part) for part in examples], None if None in weights else weights, key=key, shuffle=shuffle)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None
    return Stream(examples, order, window)


def settle_segments(config: DataConfig, stream: Stream) -> DataConfig:
    """The config with data.max_segments as a number: the fewest that fill rows about as well as the bound would.

    Kernels on accelerators take memory and time for as many segments as a row may hold. It follows from records all
    over the first epoch, so it is the same on every host; a run that goes on keeps that of its checkpoint (build.py).
    """
    if config.max_segments is not None:
        return config
    units = [unit for unit in stream.sample(SAMPLED) if not isinstance(unit, BadRow)]
    units = [unit for unit in units if positions_of(unit) <= config.seq_len]
    lengths, segments = [positions_of(unit) for unit in units], [len(unit) for unit in units]
    largest = max(segments, default=1)
    if config.packing != "best_fit":  # a row holds one unit
        return dataclasses.replace(config, max_segments=largest)
    most = max(config.segments_per_row, largest)
    few = min(most, max(8, largest))
    allowed = 1.01 * len(best_fit_rows(lengths, segments, config.seq_len, most))
    while few < most and len(best_fit_rows(lengths, segments, config.seq_len, few)) > allowed:
        few = min(2 * few, most)
    return dataclasses.replace(config, max_segments=few)


def admit_one(outcome: Unit | BadRow, config: DataConfig, counters: dict[str, int], *, report: bool) -> Unit | None:
    """The unit to pack, or None; counts what happened. Raises DataError on a bad row unless they are skipped."""
    counters["rows_read"] += 1
    if isinstance(outcome, BadRow):
        if config.on_bad_row == "error":
            raise DataError(outcome.message)
        counters["dropped/bad_row"] += 1
        if report:
            log.warning("skipped %s", outcome.message)
        return None
    unit, reason = fit_unit(outcome, config.seq_len, config.truncation, config.segments_per_row)
    if reason:
        counters[reason] += 1
    return unit


def admit(
    outcomes: Sequence[Unit | BadRow], config: DataConfig, counters: dict[str, int], *, report: bool
) -> list[Unit]:
    """The units of a window, in order. Raises DataError as admit_one, and if too many rows so far were bad."""
    admitted = [admit_one(outcome, config, counters, report=report) for outcome in outcomes]
    _check_bad(config, counters)
    return [unit for unit in admitted if unit is not None]


def measure(source: Examples, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """(positions i64[n], segments i64[n]) of every record of a source in file order; 0 where it is dropped."""
    lengths, segments = np.zeros(len(source), np.int64), np.zeros(len(source), np.int64)
    counters = dict.fromkeys(COUNTERS, 0)
    for i, outcome in enumerate(outcomes_in_file_order(source, workers=config.workers)):
        unit = admit_one(outcome, config, counters, report=False)
        if unit is not None:
            lengths[i], segments[i] = positions_of(unit), len(unit)
    _check_bad(config, counters)
    return lengths, segments


def plan_rows(
    config: DataConfig, lengths: Sequence[int], segments: Sequence[int], *, filled: int, key: int | None
) -> list[Row]:
    """Rows of one window. filled: rows that earlier windows left in the current batch; key: of the rows' shuffle."""
    if config.packing == "bucketed":
        return bucket_rows(lengths, config.buckets, config.batch_size, filled=filled % config.batch_size, key=key)
    if config.packing == "none":
        return single_rows(len(lengths), config.seq_len)
    rows = best_fit_rows(lengths, segments, config.seq_len, config.segments_per_row)
    return rows if key is None else shuffle_rows(rows, key)


def build_batch(rows: Sequence[tuple[list[Unit], int]], part: slice, max_segments: int) -> tuple[Batch, dict[str, Any]]:
    """(this host's rows as columns, description of the whole global batch). max_segments: S of its unit columns."""
    width = max(width for _, width in rows)
    used = sum(positions_of(unit) for units, _ in rows for unit in units)
    ids = [example.id for units, _ in rows for unit in units for example in unit]
    columns = next((unit[0].extra for units, _ in rows for unit in units), ())  # this host's part may be all padding
    batch = pack_rows([units for units, _ in rows[part]], width, columns, max_segments)
    return batch, {"example_ids": ids, "num_tokens": used, "padding_fraction": 1.0 - used / (width * len(rows))}


def _check_bad(config: DataConfig, counters: Mapping[str, int]) -> None:
    bad, read = counters["dropped/bad_row"], counters["rows_read"]
    if bad > config.max_bad_fraction * read:
        raise DataError(
            f"{bad} of {read} rows are bad, more than data.max_bad_fraction {config.max_bad_fraction} allows"
        )


def _covers(names: Collection[str], key: str) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}[")) for name in names)


def _counts(counters: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counters.items() if count)


def _fingerprint(config: DataConfig, stream: Stream, seed: int) -> dict[str, Any]:
    """Everything that decides which example stands where, by config key. JSON."""
    plain = ("batch_size", "seq_len", "packing", "shuffle", "loss_on", "truncation", "window")
    found: dict[str, Any] = {"seed": seed} | {f"data.{name}": getattr(config, name) for name in plain}
    found |= {"data.buckets": list(config.buckets), "data.max_segments": config.segments_per_row}
    for i, (source, examples) in enumerate(zip(config.sources, stream.sources, strict=True)):
        fields = examples.records.fingerprint | {"task": source.task, "weight": source.weight}
        found |= {f"data.train[{i}].{name}": value for name, value in fields.items()}
    return found
