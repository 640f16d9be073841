"""Device reads of the loop: one batch of metrics a log step, none else. Every way to read an array is counted.

A transfer guard would not see them: on a CPU, numpy reads an array in place (tests/e2e/test_train.py has the programs).
"""

import collections

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from jaxpost import train
from jaxpost.checkpoint import Checkpointer
from jaxpost.data.feed import MeshSource
from tests import tiny

BAD = (float, bool, lambda x: x.item(), lambda x: x.tolist(), lambda x: np.asarray(x), lambda x: jax.device_get(x))


class Reads:
    """The reads from the first batch until the last save, by kind; what device_get reads inside counts once."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.seen: list[str] = []
        self._on = self._inside = False
        value = ArrayImpl._value
        patch.setattr(ArrayImpl, "_value", property(self.counted("value", value.fget)))  # float, bool, int, tolist
        patch.setattr(ArrayImpl, "item", self.counted("value", ArrayImpl.item))
        patch.setattr(jax, "device_get", self.counted("device_get", jax.device_get))
        for name in ("asarray", "array"):  # through the buffer protocol, which no method of the array sees
            patch.setattr(np, name, self.counted("numpy", getattr(np, name)))
        self._switch(patch, MeshSource, "__next__", True)
        self._switch(patch, Checkpointer, "save", False)

    def counted(self, kind: str, function):
        def call(*args, **kwargs):
            arrays = any(isinstance(x, jax.Array) for x in jax.tree.leaves(args))
            if not self._on or self._inside or not arrays:
                return function(*args, **kwargs)
            self.seen.append(kind)
            self._inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def _switch(self, patch: pytest.MonkeyPatch, owner: type, name: str, on: bool) -> None:
        function = getattr(owner, name)

        def call(*args, **kwargs):
            self._on = on
            return function(*args, **kwargs)

        patch.setattr(owner, name, call)


def reads_of(tmp_path, monkeypatch, publish=None) -> list[str]:
    """Of nine steps that log at 1, 3, 6 and 9."""
    if publish is not None:
        monkeypatch.setattr(MeshSource, "publish", lambda self, state, version: publish(state.step))
    reads = Reads(monkeypatch)
    config = tiny.load(tmp_path, loop={"steps": 9, "log_every": 3, "save_every": 0}, data={"eval": []})
    train.run(config, devices=jax.devices()[:1])
    return reads.seen


def test_one_batch_of_metrics_a_log_step_and_nothing_else(tmp_path, monkeypatch):
    assert reads_of(tmp_path, monkeypatch) == ["device_get"] * 4


def test_the_count_sees_every_way_to_read(tmp_path, monkeypatch):
    seen = reads_of(tmp_path, monkeypatch, lambda step: [read(step) for read in BAD])
    assert collections.Counter(seen) == {"value": 9 * 4, "numpy": 9, "device_get": 9 + 4}
