"""One shard of the tiled head: its tokens in chunks, its rows of the head in tiles; see logprobs.py.

Legend: N tokens, C chunks of R rows, V local vocabulary, D width. Logits, sums and gradients accumulate in fp32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array

TILE = 4096  # columns of the local vocabulary at a time, on a CPU
CHUNK_BYTES = 8 * 2**20  # most fp32 logits at a time: 512 rows of a tile; more rows would skip less
WIDE_TILE = 16_384  # the same two on a TPU or GPU, which small products would leave idle: 4,096 rows of a tile
WIDE_CHUNK_BYTES = 256 * 2**20
KEPT_BYTES = 256 * 2**20  # most fp32 logits that the forward pass leaves for the backward pass, on each device
MASKED = -1e30  # a logit that does not count; finite, because 0 * -inf is nan


class Plan(NamedTuple):
    """What is static in one call: tiling, soft cap and where the arrays lie on the mesh."""

    tile: int
    chunk_bytes: int
    softcap: float | None
    vocab: int  # rows of the head; what it was padded to beyond them counts for nothing
    mesh: Mesh | None = None
    hidden: PartitionSpec = PartitionSpec()
    head: PartitionSpec = PartitionSpec()
    targets: PartitionSpec = PartitionSpec()

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the head's rows are split."""
        return self._split(self.head, 0)

    @property
    def gather_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the head's columns are split: gathered before the loop."""
        return self._split(self.head, 1)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the tokens are split."""
        return tuple(axis for dim in range(len(self.targets)) for axis in self._split(self.targets, dim))

    def _split(self, spec: PartitionSpec, dim: int) -> tuple[str, ...]:
        """Axes of one device split nothing, but a collective over them would still copy."""
        return tuple(axis for axis in axes_of(spec, dim) if self.mesh and self.mesh.shape[axis] > 1)


def axes_of(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """Mesh axes over which one dimension is split."""
    entry = spec[dim] if dim < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


class Rows:
    """The tokens of a shard in chunks of R rows; with a mask, those that count come first, in the first `chunks`."""

    def __init__(self, shape: tuple[int, ...], mask: Array | None, tile: int, chunk_bytes: int):
        self.shape, self.num_tokens = shape, math.prod(shape)
        self.num_chunks = max(1, -(-self.num_tokens * tile * 4 // chunk_bytes))
        self.rows = -(-self.num_tokens // self.num_chunks)
        self.order = None if mask is None else jnp.argsort(~mask.reshape(-1), stable=True)
        self.count = self.num_tokens if mask is None else jnp.sum(mask, dtype=jnp.int32)
        self.chunks = self.num_chunks if mask is None else (self.count + self.rows - 1) // self.rows

    def pack(self, values: Array) -> Array:
        """[..., *rest] -> [C, R, *rest]; rows that do not count become 0."""
        values = values.reshape(self.num_tokens, *values.shape[len(self.shape) :])
        if self.order is not None:
            valid = jnp.arange(self.num_tokens) < self.count
            values = jnp.where(valid.reshape(-1, *[1] * (values.ndim - 1)), values[self.order], 0)
        missing = self.num_chunks * self.rows - self.num_tokens
        if missing:
            values = jnp.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))
        return values.reshape(self.num_chunks, self.rows, *values.shape[1:])

    def unpack(self, values: Array) -> Array:
        """[C, R, *rest] -> [..., *rest]; rows that do not count become 0."""
        values = values.reshape(-1, *values.shape[2:])[: self.num_tokens]
        if self.order is not None:
            valid = jnp.arange(self.num_tokens) < self.count
            values = jnp.where(valid.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
            values = jnp.zeros_like(values).at[self.order].set(values, unique_indices=True)
        return values.reshape(*self.shape, *values.shape[1:])


class Head:
    """The local rows of the head, all columns, in tiles of equal size; the last one overlaps its neighbour."""

    def __init__(self, plan: Plan, head: Array):
        self.plan = plan
        self.matrix = lax.all_gather(head, plan.gather_axes, axis=1, tiled=True) if plan.gather_axes else head
        self.size = head.shape[0]
        self.num_tiles = -(-self.size // plan.tile)
        even = -(-self.size // self.num_tiles)
        self.tile = min(self.size, even if even <= 128 else -(-even // 128) * 128)  # whole lanes
        self.first = lax.axis_index(plan.vocab_axes) * self.size if plan.vocab_axes else 0
        shards = math.prod(plan.mesh.shape[axis] for axis in plan.vocab_axes) if plan.mesh else 1
        self.padded = plan.vocab < self.size * shards

    def start(self, i: Array) -> Array:
        """First row of tile i."""
        return jnp.minimum(i * self.tile, self.size - self.tile)

    def logits(self, x: Array, i: Array, weight: Array, inverse: Array) -> Array:
        """f32[R, tile], soft-capped, over the temperature."""
        z = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        if (cap := self.plan.softcap) is not None:
            z = cap * jnp.tanh(z / cap)
        z = z * inverse
        column = jnp.arange(self.tile)
        if self.size % self.tile:
            z = jnp.where(column >= i * self.tile - self.start(i), z, MASKED)
        if self.padded:
            z = jnp.where(column < self.plan.vocab - self.first - self.start(i), z, MASKED)
        return z

    def slope(self, logits: Array, temperature: Array) -> Array | float:
        """Derivative of the soft cap where it gave these logits."""
        if self.plan.softcap is None:
            return 1.0
        return 1 - jnp.clip(logits * temperature / self.plan.softcap, -1, 1) ** 2

    def column(self, targets: Array, i: Array) -> Array:
        """Column of the target within tile i, -1 where it is not among the tile's new columns."""
        column = targets - self.first - self.start(i)
        return jnp.where((column >= i * self.tile - self.start(i)) & (column < self.tile), column, -1)


def forward(plan: Plan, leave: str, hidden, head, targets, mask, temperature):
    """(logprobs, entropy, correct, log-sum-exp, d logprob / d hidden, kept logits): an online softmax over the tiles.

    leave: "nothing", "direction" or "logits" for the backward pass; what is not left is None.
    """
    with_direction = leave == "direction"
    dtype = hidden.dtype
    head = Head(plan, head.astype(dtype))
    rows = Rows(targets.shape, mask, head.tile, plan.chunk_bytes)
    x, y, inverse = rows.pack(hidden), rows.pack(targets), 1 / temperature

    def tile_step(keep, i, carry):
        weight = lax.dynamic_slice_in_dim(head.matrix, head.start(i), head.tile).astype(dtype)

        def chunk_step(j, carry):
            carry, kept = carry
            top, total, moment, chosen, mean = jax.tree.map(lambda a: a[j], carry)
            logits = head.logits(x[j].astype(dtype), i, weight, inverse)
            column = head.column(y[j], i)
            picked = jnp.take_along_axis(logits, jnp.maximum(column, 0)[:, None], axis=1)[:, 0]
            chosen = jnp.where(column >= 0, picked, chosen)
            new_top = jnp.maximum(top, jnp.max(logits, axis=1))
            scale, shift = jnp.exp(top - new_top), top - new_top
            gap = logits - new_top[:, None]
            weights = jnp.exp(gap)
            moment = scale * (moment + shift * total) + jnp.sum(weights * gap, axis=1)
            total = scale * total + jnp.sum(weights, axis=1)
            if with_direction:
                mean = scale[:, None] * mean + _matmul(
                    (weights * head.slope(logits, temperature)).astype(dtype), weight
                )
            new = (new_top, total, moment, chosen, mean)
            if keep:
                kept = lax.dynamic_update_slice(kept, logits[None, None], (j, i, 0, 0))
            return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, j, 0), carry, new), kept

        return lax.fori_loop(0, rows.chunks, chunk_step, carry)

    shape = (rows.num_chunks, rows.rows)
    zeros = jnp.zeros(shape, jnp.float32)
    mean = jnp.zeros((*shape, hidden.shape[-1]), jnp.float32) if with_direction else None
    carry = (jnp.full(shape, MASKED), zeros, zeros, jnp.full(shape, -jnp.inf), mean)
    num_kept = min(head.num_tiles, KEPT_BYTES // (math.prod(shape) * head.tile * 4)) if leave == "logits" else 0
    kept = jnp.zeros((rows.num_chunks, num_kept, rows.rows, head.tile), jnp.float32) if num_kept else None
    carry = _loop(0, num_kept, functools.partial(tile_step, True), (carry, kept))
    carry, kept = _loop(num_kept, head.num_tiles, functools.partial(tile_step, False), carry)
    top, total, moment, chosen, mean = carry

    local_top, axes = top, plan.vocab_axes
    if axes:
        top, chosen = lax.pmax((top, chosen), axes)
        scale, shift = jnp.exp(local_top - top), local_top - top
        total, moment = lax.psum((scale * total, scale * (moment + shift * total)), axes)
    total = jnp.where(total > 0, total, 1)  # chunks that were skipped
    lse = top + jnp.log(total)
    entropy = jnp.log(total) - moment / total
    direction = None
    if with_direction:
        own = (y >= head.first) & (y < head.first + head.size)
        row = head.matrix[jnp.clip(y - head.first, 0, head.size - 1)].astype(jnp.float32)
        direction = (
            jnp.where(own, head.slope(chosen, temperature), 0)[..., None] * row
            - (jnp.exp(local_top - top) / total)[..., None] * mean
        )
        direction = rows.unpack(lax.psum(direction, axes) * inverse).astype(hidden.dtype)
    correct = (chosen >= top).astype(jnp.float32)
    return *map(rows.unpack, (chosen - lse, entropy, correct, lse)), direction, kept


def backward(plan, want_hidden, want_head, hidden, head, targets, mask, temperature, per_token, kept):
    """(d_hidden, d_head), None where not wanted. With p the probabilities and h the entropy,

    d logprob / d logit_v = [v = target] - p_v, d h / d logit_v = -p_v (log p_v + h) and d lse / d logit_v = p_v.
    """
    dtype, head_dtype = hidden.dtype, head.dtype
    head = Head(plan, head.astype(dtype))
    rows = Rows(targets.shape, mask, head.tile, plan.chunk_bytes)
    x, y, inverse = rows.pack(hidden), rows.pack(targets), 1 / temperature
    per_token = tuple(map(rows.pack, per_token))  # lse, entropy, by_logprob, by_entropy, by_lse
    num_kept = 0 if kept is None else kept.shape[1]

    def tile_step(first, stop, step, carry):
        i = stop - 1 - (step - first)  # backwards: what the last tile writes where it overlaps is written over
        d_hidden, d_head = carry
        weight = lax.dynamic_slice_in_dim(head.matrix, head.start(i), head.tile).astype(dtype)

        def chunk_step(j, carry):
            d_hidden, d_weight = carry
            rows_j = x[j].astype(dtype)
            lse, entropy, by_logprob, by_entropy, by_lse = (a[j][:, None] for a in per_token)
            if stop <= num_kept:
                logits = lax.dynamic_slice(kept, (j, i, 0, 0), (1, 1, *kept.shape[2:]))[0, 0]
            else:
                logits = head.logits(rows_j, i, weight, inverse)
            logp = logits - lse
            hit = jnp.arange(head.tile) == head.column(y[j], i)[:, None]
            by_p = by_logprob - by_lse + by_entropy * (logp + entropy)
            d_logits = jnp.where(hit, by_logprob, 0) - jnp.exp(logp) * by_p
            d_logits = (d_logits * head.slope(logits, temperature) * inverse).astype(dtype)
            if want_hidden:
                d_hidden = lax.dynamic_update_index_in_dim(d_hidden, d_hidden[j] + _matmul(d_logits, weight), j, 0)
            if want_head:
                d_weight = d_weight + _matmul(d_logits.T, rows_j)
            return d_hidden, d_weight

        d_weight = jnp.zeros(weight.shape, jnp.float32) if want_head else None
        d_hidden, d_weight = lax.fori_loop(0, rows.chunks, chunk_step, (d_hidden, d_weight))
        if want_head:
            d_head = lax.dynamic_update_slice_in_dim(d_head, d_weight, head.start(i), 0)
        return d_hidden, d_head

    d_hidden = jnp.zeros(x.shape, jnp.float32) if want_hidden else None
    d_head = jnp.zeros(head.matrix.shape, jnp.float32) if want_head else None
    carry = (d_hidden, d_head)
    for first, stop in ((num_kept, head.num_tiles), (0, num_kept)):
        carry = _loop(first, stop, functools.partial(tile_step, first, stop), carry)
    d_hidden, d_head = carry
    if want_hidden:
        d_hidden = rows.unpack(lax.psum(d_hidden, plan.vocab_axes)).astype(hidden.dtype)
    if want_head:
        if plan.gather_axes:
            d_head = lax.psum_scatter(d_head, plan.gather_axes, scatter_dimension=1, tiled=True)
        rest = tuple(axis for axis in plan.token_axes if axis not in plan.gather_axes)
        d_head = lax.psum(d_head, rest).astype(head_dtype)
    return d_hidden, d_head


def _loop(first: int, stop: int, body, carry):
    """fori_loop whose body is not even traced where there is nothing to do."""
    return carry if first == stop else lax.fori_loop(first, stop, body, carry)


def _matmul(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
