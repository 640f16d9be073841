"""Records in global order, tokenised by Grain, one window at a time.

Grain runs the reading and the tasks, in this process (one reading thread) or in worker processes. One in, one out: a
bad row becomes a BadRow, so that the number of workers changes nothing. Elements are chunks of records, because a
message between processes costs as much as tokenising a short row.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jaxpost.data.order import Order
from jaxpost.data.rows import Record
from jaxpost.data.sources import Records
from jaxpost.errors import DataError

if TYPE_CHECKING:
    from jaxpost.data.tasks import Example

CHUNK = 64  # records an element
_ENDLESS = 1 << 40  # chunks: Grain wants a length
_PASS = 4096  # records read ahead in a pass in file order
_KEPT = 1 << 23  # tokens kept in memory (5 bytes each) by every process that tokenises
_OVERHEAD = 64  # tokens' worth of objects around an example
_GRACE = 30.0  # seconds a worker outlives SIGTERM, for the save of the process that it feeds
_told_to_end = threading.Event()  # in a worker: no more rows are wanted

Task = Callable[[Record, str], "Example | tuple[Example, ...]"]  # (record, "FILE:LINE"); raises DataError


@dataclasses.dataclass(frozen=True)
class BadRow:
    """The outcome of a row that could not become an example: "FILE:LINE: field F: reason"."""

    message: str


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Outcomes of consecutive records; a class of its own, so that Grain takes it for one leaf."""

    outcomes: tuple[tuple[Example, ...] | BadRow, ...]
    pid: int  # of the process that made it


class Examples:
    """One source through its task. The first _KEPT tokens' worth of outcomes is kept for later epochs and counts."""

    def __init__(self, records: Records, task: Task):
        self.records = records
        self._task = task
        self._kept: dict[int, tuple[Example, ...] | BadRow] = {}
        self._room = _KEPT

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Example, ...] | BadRow:
        """The outcome of record index."""
        outcome = self._kept.get(index)
        if outcome is None:
            outcome = self._make(index)
            self._room -= _OVERHEAD if isinstance(outcome, BadRow) else sum(len(e.tokens) + _OVERHEAD for e in outcome)
            if self._room > 0:
                self._kept[index] = outcome
        return outcome

    def _make(self, index: int) -> tuple[Example, ...] | BadRow:
        try:
            made = self._task(self.records[index], self.records.where(index))
        except DataError as error:
            return BadRow(str(error))
        return made if isinstance(made, tuple) else (made,)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_room": _KEPT}


@dataclasses.dataclass(frozen=True)
class Stream:
    """All records of some sources in their global order, cut into windows that never cross an epoch."""

    sources: tuple[Examples, ...]
    order: Order
    window: int  # records

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.order.records_per_epoch // self.window)

    def bounds(self, window: int) -> tuple[int, int]:
        """Positions [start, stop) of a window within its epoch."""
        start = window * self.window
        return start, min(start + self.window, self.order.records_per_epoch)

    def num_chunks(self, window: int) -> int:
        start, stop = self.bounds(window)
        return -(-(stop - start) // CHUNK)

    def first_chunk(self, epoch: int, window: int) -> int:
        """Number of the first chunk of a window, counted over all epochs. Only the last window is shorter."""
        return epoch * self.chunks_per_epoch + window * self.num_chunks(0)

    @property
    def chunks_per_epoch(self) -> int:
        last = self.windows_per_epoch - 1
        return last * self.num_chunks(0) + self.num_chunks(last)

    def chunk(self, number: int) -> tuple[tuple[Example, ...] | BadRow, ...]:
        """Read and tokenise one chunk."""
        epoch, inside = divmod(number, self.chunks_per_epoch)
        window, part = divmod(inside, self.num_chunks(0))
        start, stop = self.bounds(window)
        start += part * CHUNK
        where = zip(*self.order.locate(epoch, start, min(start + CHUNK, stop)), strict=True)
        return tuple(self.sources[source][int(record)] for source, record in where)

    def sample(self, count: int) -> Iterator[tuple[Example, ...] | BadRow]:
        """Outcomes of about that many records, in chunks from all over the first epoch, made here and now."""
        chunks = min(-(-count // CHUNK), self.chunks_per_epoch)
        for k in range(chunks):
            yield from self.chunk(k * self.chunks_per_epoch // chunks)

    def first(self, count: int) -> Iterator[tuple[Example, ...] | BadRow]:
        """Outcomes of the first records of the first epoch, made here and now."""
        left = min(count, self.order.records_per_epoch)
        for number in range(self.chunks_per_epoch):
            outcomes = self.chunk(number)[:left]
            yield from outcomes
            left -= len(outcomes)
            if not left:
                return

    def windows(
        self, epoch: int, window: int, *, workers: int, epochs: int | None = None
    ) -> Iterator[tuple[int, int, list[tuple[Example, ...] | BadRow]]]:
        """(epoch, window, outcomes), from the given window on, while Grain reads one window ahead.

        epochs: end before that epoch; None: never end. Close the generator to end the workers.
        """
        first = self.first_chunk(epoch, window)
        stop = first + _ENDLESS if epochs is None else self.first_chunk(epochs, 0)
        chunks = _Chunks(self, first, stop, workers=workers, ahead=self.num_chunks(0))
        try:
            while epochs is None or epoch < epochs:
                outcomes: list[tuple[Example, ...] | BadRow] = []
                for _ in range(self.num_chunks(window)):
                    outcomes.extend(next(chunks).outcomes)
                yield epoch, window, outcomes
                epoch, window = following(epoch, window, self.windows_per_epoch)
        finally:
            chunks.close()


def following(epoch: int, window: int, windows_per_epoch: int) -> tuple[int, int]:
    """The window after this one."""
    return (epoch, window + 1) if window + 1 < windows_per_epoch else (epoch + 1, 0)


@dataclasses.dataclass(frozen=True)
class _Elements:
    """Chunks first..stop-1 as a Grain random-access source."""

    stream: Stream
    first: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, index: int) -> Chunk:
        outcomes = () if _told_to_end.is_set() else self.stream.chunk(self.first + int(index))
        return Chunk(outcomes, os.getpid())


class _Chunks:
    """Chunks of a stream through Grain, read ahead."""

    def __init__(self, stream: Stream, first: int, stop: int, *, workers: int, ahead: int):
        import grain
        from absl import flags

        # Grain reads its own absl flags, and nobody has parsed any when we are used as a library.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        self._workers = workers
        self._told: set[int] = set()  # workers that were told to end
        data = grain.MapDataset.source(_Elements(stream, first, stop))
        if workers == 0:
            data = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead))
        else:
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-ahead // workers))
            data = data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            data = data.mp_prefetch(options, worker_init_fn=_start_worker)
        self._iterator = iter(data)

    def __next__(self) -> Chunk:
        chunk = next(self._iterator)
        if not chunk.outcomes:
            raise RuntimeError(f"data worker {chunk.pid} was told to end by a signal that we did not send")
        return chunk

    def close(self) -> None:
        """End reading and the workers.

        A worker whose queue still holds more than a pipe takes cannot end, and Grain waits 25 s before it kills it. So:
        told by a signal, workers send empty chunks, and the full ones are taken out of their queues first.
        """
        empty = 0
        try:
            while empty < self._workers:
                chunk = next(self._iterator)
                empty = 0 if chunk.outcomes else empty + 1
                if chunk.pid not in self._told:
                    self._told.add(chunk.pid)
                    os.kill(chunk.pid, signal.SIGUSR2)
        except (StopIteration, RuntimeError, ValueError, ProcessLookupError):
            pass  # the end, a worker that died, or Python's exit was here before us
        self._iterator.close()


def _start_worker(index: int, count: int) -> None:
    """Runs first in a worker: no device, no say in signals meant for the main process, no life after it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # Grain imports it
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A scheduler may signal the whole group: the main process still wants rows until it has saved.
    signal.signal(signal.SIGTERM, lambda *_: _end_in(_GRACE))
    signal.signal(signal.SIGUSR2, lambda *_: _told_to_end.set())
    parent = multiprocessing.parent_process().pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end_in(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def outcomes_in_file_order(source: Examples, *, workers: int) -> Iterator[tuple[Example, ...] | BadRow]:
    """Every record of one source once, in file order: for counting and for looking at data."""
    stream = Stream((source,), Order((len(source),), None, key=0, shuffle=False), window=_PASS)
    if len(source) <= 2 * _PASS:
        workers = 0  # done before workers have started, and the outcomes are kept
    for _, _, outcomes in stream.windows(0, 0, workers=workers, epochs=1):
        yield from outcomes
