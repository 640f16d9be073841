"""Central types: every array that crosses a module boundary is named here.

Legend: B rows, T positions, S segments a row, K teacher ranks, N prompts, G samples a prompt, V vocabulary, D width,
L layers, H query heads, KV key/value heads, P pairs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any


class Stream(enum.IntEnum):
    """Tags folded into the seed, so that no two uses of randomness share a key."""

    TRAIN = 0
    EVAL = 1
    DROPOUT = 2
    NOISE = 3
    SHUFFLE = 4
    INIT = 5
    LORA = 6


class Mean(NamedTuple):
    """A weighted mean in two additive parts: summed over micro-batches, divided once at the end of the step."""

    total: Array
    weight: Array

    @property
    def value(self) -> Array:
        """total / weight, and 0 where nothing was weighed."""
        return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1), 0.0)


Metrics = dict[str, "Array | Mean"]  # a plain scalar is a sum over the global batch, a Mean is a mean
Frozen = Mapping[str, Tree]  # role -> weights that are neither donated nor saved


def weighted_mean(values: Array, weights: Array) -> Mean:
    """Mean of values under weights; a value under weight 0 may be nan or inf."""
    return Mean(jnp.sum(jnp.where(weights != 0, values * weights, 0.0)), jnp.sum(weights))


@flax.struct.dataclass
class Batch:
    """Fixed shapes; every [B,T] column is aligned to *targets*: the shift happened once, in data/.

    mask says which targets are trainable; it never follows from a token id (pad may equal eos). Segment 0 is padding,
    the segments of a row are numbered 1..S from left to right and are contiguous; positions restart in each.
    """

    tokens: Array  # i32[B,T]
    targets: Array  # i32[B,T]
    mask: Array  # bool[B,T]
    positions: Array  # i32[B,T]
    segments: Array  # i32[B,T]
    weights: Array | None = None  # f32[B,T], filled by Algorithm.prepare
    unit_weights: Array | None = None  # f32[B,S], filled by Algorithm.prepare
    behaviour_logprobs: Array | None = None  # f32[B,T], tempered, full vocabulary: used in the ratio
    sampler_logprobs: Array | None = None  # f32[B,T], after filters and penalties: off-policy weights, reports
    ref_logprobs: Array | None = None  # f32[B,T]
    advantages: Array | None = None  # f32[B,T]
    values: Array | None = None  # f32[B,T]
    returns: Array | None = None  # f32[B,T]
    extra: dict[str, Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class TrainState:
    """All that a train step reads and writes. Trained roles only; donated to every step; saved whole."""

    step: Array  # i32[], batches consumed: advances also when an update is refused
    params: dict[str, Tree]  # role -> trained tree
    opt_state: Tree
    slow: dict[str, Tree] = flax.struct.field(default_factory=dict)  # EMA weights, moving references
    scalars: dict[str, Array] = flax.struct.field(default_factory=dict)  # skip counters, running means


class Completion(NamedTuple):
    """One sampled continuation on the host."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str  # "eos" | "stop" | "length"
    version: int  # of the weights that sampled it
