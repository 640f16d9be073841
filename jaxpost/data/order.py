"""The global order of records: a pure function of (seed, epoch, position), so that any place is reached without replay.

Without weights an epoch holds every record once. With weights w it has as many records as all sources together, a
share w/sum(w) of them, rounded, drawn from each source; a source smaller than its share is read again, a larger one
goes on where the last epoch stopped. Either way no record of a source comes again before all its others came (a
*pass*), and every pass has its own shuffle. Sources are spread evenly over the epoch: after any prefix each of K is
within (K + 1)/2 records of its share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_LOW64 = (1 << 64) - 1


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of uint64 that looks random."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*values: int) -> int:
    """One 64-bit key from several integers; the order matters."""
    key = 0
    for value in values:
        key = int(mix64(np.array([(key * _GOLDEN + value + 1) & _LOW64], np.uint64))[0])
    return key


def permutation(size: int, key: int) -> np.ndarray:
    """i64[size], a random order. Plain integer arithmetic: the same on every version of numpy, without ties."""
    counter = np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    return np.argsort(mix64(counter))


def draws_per_epoch(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """Records drawn from each source in one epoch: its size, or its share by largest remainder.

    Raises ValueError if a weight is too small for a single record.
    """
    if weights is None:
        return tuple(sizes)
    total = sum(sizes)
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        raise ValueError(f"weight {weights[counts.index(0)]} gives not one record of an epoch of {total}")
    return tuple(counts)


def interleave(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(source i64[N], draw i64[N]): draw j of source k is put at time (j + 1/2) / counts[k]."""
    times = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    source = np.repeat(np.arange(len(counts)), counts)
    draw = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(times, kind="stable")  # ties go to the source named first
    return source[order], draw[order]


class Order:
    """Which record stands at which position of which epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, *, key: int, shuffle: bool):
        self.sizes = tuple(sizes)
        self.draws = draws_per_epoch(sizes, weights)
        self.key = key
        self.shuffle = shuffle
        self._mixture = interleave(self.draws) if len(self.sizes) > 1 else None
        self._passes: dict[tuple[int, int], np.ndarray] = {}

    @property
    def records_per_epoch(self) -> int:
        return sum(self.draws)

    def locate(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(source i64[n], record i64[n]) at positions start..stop-1 of an epoch."""
        if self._mixture is None:
            source, draw = np.zeros(stop - start, np.int64), np.arange(start, stop)
        else:
            source, draw = self._mixture[0][start:stop], self._mixture[1][start:stop]
        record = np.empty(len(draw), np.int64)
        for k in np.unique(source):
            chosen = source == k
            number, place = np.divmod(epoch * self.draws[k] + draw[chosen], self.sizes[k])
            part = np.empty(len(place), np.int64)
            for p in np.unique(number):
                inside = number == p
                part[inside] = self._pass(int(k), int(p))[place[inside]] if self.shuffle else place[inside]
            record[chosen] = part
        return source, record

    def _pass(self, source: int, number: int) -> np.ndarray:
        """Shuffled order of one pass over one source; the two latest passes of a source are kept."""
        found = self._passes.get((source, number))
        if found is None:
            found = permutation(self.sizes[source], fold(self.key, source, number))
            for old in [key for key in self._passes if key[0] == source][:-1]:
                self._passes.pop(old, None)
            self._passes[source, number] = found
        return found

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_passes": {}}
