"""What `python -m jaxpost.data` prints: a survey of each list of sources, and packed rows as text."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxpost.data.chat import Tokenizer, load_tokenizer
from jaxpost.data.kinds import make_task
from jaxpost.data.options import DataConfig
from jaxpost.data.order import fold
from jaxpost.data.pack import Unit, fit_unit, positions_of
from jaxpost.data.pipeline import build_batch, open_stream, plan_rows, settle_segments
from jaxpost.data.sources import SourceConfig
from jaxpost.data.stream import BadRow, Stream
from jaxpost.data.tasks import Task
from jaxpost.errors import ConfigError, DataError
from jaxpost.types import Batch
from jaxpost.types import Stream as Tag

SHOWN_PROBLEMS = 20
BINS = 10
BAR = 40  # characters
TRAINED, PLAIN, DIM = "\x1b[30;42m", "\x1b[0m", "\x1b[2m"
FATES = {
    "truncated": "longer than data.seq_len: cut",
    "dropped/too_long": "longer than data.seq_len: dropped",
    "dropped/too_short": "of one token: dropped",
    "dropped/no_target": "without a trained token after the cut: dropped",
}


@dataclasses.dataclass
class Survey:
    """What a scan found. lengths are positions before truncation; fates are counters of pack.fit_unit."""

    read: int = 0
    units: list[Unit] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    fates: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # counter -> ids
    stopping: list[str] = dataclasses.field(default_factory=list)  # rows at which training would stop
    bad: list[str] = dataclasses.field(default_factory=list)


def inspect(config: Any, *, rows: int, scan: int, color: bool) -> None:
    """Prints the survey of a Config's data and `rows` packed rows. Raises DataError if training would stop at a row."""
    from jaxpost.models.loading import locate

    sys.stdout.reconfigure(errors="backslashreplace")
    located = locate(config.model.source, config.model.tokenizer)
    path, template, data = located.tokenizer_path, config.model.chat_template, config.data
    if path is None:
        raise ConfigError(f"model.tokenizer: {config.model.source} comes without one; name a folder or file")
    tokenizer = load_tokenizer(path, template)
    tokenizer.check_model(located.spec.vocab_size)

    def task(source: SourceConfig) -> Task:
        return make_task(config.algorithm.rows, source.task, path, data.loss_on, source.columns, chat_template=template)

    color = color and "NO_COLOR" not in os.environ and sys.stdout.isatty()
    key = fold(config.seed, Tag.SHUFFLE)
    stopping = []
    train = open_stream(data.sources, task, key=key, shuffle=data.shuffle, window=data.window, name="data.train")
    data = settle_segments(data, train)
    streams = {"data.train": train}
    if data.eval:
        streams["data.eval"] = open_stream(data.eval, task, key=0, shuffle=False, window=data.window, name="data.eval")
    for name, stream in streams.items():
        found = survey(stream, data, scan)
        stopping += found.stopping
        print("\n".join(describe(name, stream, found, data)), end="\n\n")
        if name == "data.train":
            window_key = fold(key, 0, 0) if data.shuffle else None
            if rows and found.read < stream.bounds(0)[1]:
                print(
                    f"rows of the {found.read} records read; a run plans its rows over {stream.bounds(0)[1]}",
                    end="\n\n",
                )
            for number, (batch, ids) in enumerate(first_rows(found.units, data, window_key, rows)):
                print(f"row {number + 1}, {'trained tokens in colour' if color else 'trained tokens in [[ ]]'}:")
                print(row_text(batch, ids, tokenizer, color), end="\n\n")
    if stopping:
        raise DataError(f"training would stop at {len(stopping)} of the rows read, first at {stopping[0]}")


def survey(stream: Stream, config: DataConfig, scan: int) -> Survey:
    """Reads and tokenises the first `scan` records of the run's own order (0: all of an epoch)."""
    found = Survey()
    for outcome in stream.first(scan or stream.order.records_per_epoch):
        found.read += 1
        if isinstance(outcome, BadRow):
            (found.stopping if config.on_bad_row == "error" else found.bad).append(outcome.message)
            continue
        found.lengths.append(positions_of(outcome))
        try:
            unit, fate = fit_unit(outcome, config.seq_len, config.truncation, config.segments_per_row)
        except DataError as error:
            found.stopping.append(str(error))
            continue
        if fate:
            found.fates.setdefault(fate, []).append(outcome[0].id)
        if unit is not None:
            found.units.append(unit)
    if found.bad and len(found.bad) > config.max_bad_fraction * found.read:
        found.stopping.append(
            f"{len(found.bad)} bad rows of {found.read}, more than data.max_bad_fraction {config.max_bad_fraction}"
        )
    return found


def describe(name: str, stream: Stream, found: Survey, config: DataConfig) -> list[str]:
    """Lines of the report on one list of sources."""
    total = stream.order.records_per_epoch
    lines = [f"{name}: {found.read} of {total} records read, {len(found.units)} to train on"]
    if found.lengths:
        lengths = np.asarray(found.lengths)
        p50, p95 = np.percentile(lengths, (50, 95))
        lines.append(
            f"positions an example: min {lengths.min()}, median {p50:.0f}, mean {lengths.mean():.0f}, 95% {p95:.0f}, "
            f"max {lengths.max()}"
        )
        lines += histogram(found.lengths, config.seq_len)
    if found.units:
        lines += packing(found.units, config, found.read / total)
    for fate, ids in found.fates.items():
        lines.append(f"{len(ids)} {FATES[fate]}, first {_line(ids[0])}")
    for title, messages in (("bad rows", found.bad), ("training would stop", found.stopping)):
        if messages:
            lines.append(f"{title} ({len(messages)}):")
            lines += [f"  {_line(message)}" for message in messages[:SHOWN_PROBLEMS]]
            if len(messages) > SHOWN_PROBLEMS:
                lines.append(f"  and {len(messages) - SHOWN_PROBLEMS} more")
    return lines


def histogram(lengths: Sequence[int], seq_len: int) -> list[str]:
    """One line a bin: range of lengths, count, bar, and a note where the bin passes seq_len."""
    step = max(1, -(-(max(lengths) + 1) // BINS))
    counts = np.bincount(np.asarray(lengths) // step)
    width = len(str(step * len(counts)))
    lines = []
    for number, count in enumerate(counts.tolist()):
        low, high = number * step, (number + 1) * step - 1
        note = "  > data.seq_len" if low > seq_len else ""
        bar = "#" * -(-count * BAR // max(counts))
        lines.append(f"  {low:>{width}}-{high:<{width}} {count:>7} {bar}{note}")
    return lines


def packing(units: Sequence[Unit], config: DataConfig, share: float) -> list[str]:
    """How full the rows are, what is trained, and the batches of an epoch if the rest is like the scanned share."""
    lengths = [positions_of(unit) for unit in units]
    num_rows, room = 0, 0
    for start in range(0, len(units), config.window):
        part = slice(start, start + config.window)
        planned = plan_rows(config, lengths[part], [len(unit) for unit in units[part]], filled=num_rows, key=None)
        num_rows += len(planned)
        room += sum(row.width for row in planned)
    trained = sum(int(example.trainable[1:].sum()) for unit in units for example in unit)
    alone = sum(lengths) / len(units) / config.seq_len
    epoch = num_rows / share / config.batch_size
    return [
        f"packing {config.packing!r} into rows of {config.seq_len}, at most {config.segments_per_row} examples each: "
        f"{num_rows} rows, {sum(lengths) / room:.1%} full, "
        f"{len(units) / num_rows:.1f} examples a row (one a row: {alone:.1%} full)",
        f"trained: {trained} of {sum(lengths)} positions ({trained / sum(lengths):.1%})",
        f"an epoch: about {epoch:.0f} batches of {config.batch_size} rows",
    ]


def first_rows(
    units: Sequence[Unit], config: DataConfig, key: int | None, count: int
) -> Iterator[tuple[Batch, list[str]]]:
    """The first rows of the first window as (Batch of one row, ids of its examples).

    They are a run's first rows, if all records of the window were read.
    """
    part = units[: config.window]
    lengths = [positions_of(unit) for unit in part]
    for row in plan_rows(config, lengths, [len(unit) for unit in part], filled=0, key=key)[:count]:
        batch, facts = build_batch([([part[i] for i in row.units], row.width)], slice(None), config.segments_per_row)
        yield batch, facts["example_ids"]


def row_text(batch: Batch, ids: Sequence[str], tokenizer: Tokenizer, color: bool) -> str:
    """The one row of a Batch as text, a line of facts before each segment; decoded from the batch's own columns."""
    parts = []
    segments = batch.segments[0]
    for segment, where in enumerate(ids, 1):
        inside = segments == segment
        tokens = np.concatenate([batch.tokens[0][inside][:1], batch.targets[0][inside]])
        trained = np.concatenate([[False], batch.mask[0][inside]])
        head = f"-- segment {segment}: {_line(where)}, {len(tokens)} tokens, {int(trained.sum())} trained --"
        parts.append((f"{DIM}{head}{PLAIN}" if color else head) + "\n" + marked(tokens, trained, tokenizer, color))
    padding = int((segments == 0).sum())
    return "\n".join([*parts, f"-- padding: {padding} of {len(segments)} positions --"])


def marked(ids: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer, color: bool) -> str:
    """Decoded ids with the trained runs marked; control characters are escaped, so data cannot steer a terminal."""
    edges = np.flatnonzero(np.diff(trained)) + 1
    opening, closing = (TRAINED, PLAIN) if color else ("[[", "]]")
    text = ""
    for run, on in zip(np.split(ids, edges), np.split(trained, edges), strict=True):
        piece = _line(tokenizer.decode(run), keep="\n")
        if on[0] and color:  # a background colour must not run to the edge of the terminal
            piece = piece.replace("\n", f"{closing}\n{opening}")
        text += f"{opening}{piece}{closing}" if on[0] else piece
    return text


def _line(text: str, keep: str = "") -> str:
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
