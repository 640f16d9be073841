"""A generator run a few items ahead in a thread."""

from __future__ import annotations

import atexit
import multiprocessing.util  # noqa: F401  its exit hook must be older than ours, see Prefetch
import queue
import threading
import weakref
from collections.abc import Generator, Iterator
from typing import Any


class _Failed:
    def __init__(self, error: BaseException):
        self.error = error


class Prefetch(Iterator[Any]):
    """Items of a generator, in order; an exception comes where it happened, and again on every later call."""

    def __init__(self, generator: Generator[Any, None, None], depth: int = 2):
        self._items: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._over: _Failed | None = None
        self._thread = threading.Thread(target=_fill, args=(generator, self._items, self._stop), daemon=True)
        self._thread.start()
        self._finish = weakref.finalize(self, _end, self._thread, self._stop)
        # Exit hooks run newest first: ours, then multiprocessing's, which would wait for workers that still have rows.
        self._finish.atexit = False
        atexit.register(self._finish)

    def __next__(self) -> Any:
        if self._over is None:
            item = self._items.get()
            if not isinstance(item, _Failed):
                return item
            self._over = item
        raise self._over.error

    def close(self) -> None:
        """End the thread and what the generator holds; returns when both are gone."""
        self._over = _Failed(RuntimeError("the data source is closed"))
        self._finish()
        atexit.unregister(self._finish)


def _fill(generator: Generator[Any, None, None], items: queue.Queue[Any], stop: threading.Event) -> None:
    last: Any = _Failed(StopIteration())
    try:
        for item in generator:
            if not _put(items, item, stop):
                return
    except BaseException as error:  # handed to the thread that asks
        last = _Failed(error)
    finally:
        generator.close()
    _put(items, last, stop)


def _put(items: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            items.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    thread.join(timeout=30.0)
