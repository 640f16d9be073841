"""From host batches to arrays on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpost.sharding import Rules, batch_sharding, host_rows
from jaxpost.types import Batch, TrainState


def column_shardings(batch: Batch, rules: Rules) -> Batch:
    """Where columns lie: rows over data and fsdp, positions over context; those of segments [B,S] are not split."""
    length = batch.tokens.shape[1]
    return jax.tree.map(lambda x: batch_sharding(rules, x.ndim, whole=x.ndim > 1 and x.shape[1] != length), batch)


def to_mesh(batch: Batch, rules: Rules) -> Batch:
    """This host's rows of a batch as global arrays, laid out as column_shardings says."""
    shards = host_rows(rules.mesh)[1]

    def place(x: Any, where: jax.sharding.NamedSharding) -> jax.Array:
        shape = (x.shape[0] * shards, *x.shape[1:])  # said, because hosts along context hold whole rows
        return jax.make_array_from_process_local_data(where, x, shape)

    return jax.tree.map(place, batch, column_shardings(batch, rules))


class MeshSource:
    """A host source whose batches come as global arrays, annotated once. Implements the loop's Source protocol."""

    def __init__(self, source: Any, rules: Rules, annotate: Callable[[Batch], Batch]):
        self._source, self._rules, self._annotate = source, rules, annotate

    def __next__(self) -> Batch:
        return self._annotate(to_mesh(next(self._source), self._rules))

    @property
    def info(self) -> dict[str, Any]:
        """Host facts of the last batch."""
        return self._source.info

    def state(self) -> dict:
        """Position after the batches handed out so far; JSON."""
        return self._source.state()

    def restore(self, state: dict, allow_changed: tuple[str, ...] = ()) -> None:
        """Go to a saved position."""
        self._source.restore(state, allow_changed)

    def publish(self, state: TrainState, version: int) -> None:
        """Hand newer weights to the source."""
        self._source.publish(state, version)

    def close(self) -> None:
        """End its workers."""
        self._source.close()
