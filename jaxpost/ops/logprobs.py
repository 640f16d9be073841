"""Log-probabilities and entropies of tokens from hidden states and the head, without the [tokens, vocab] logits.

The vocabulary is walked in tiles and, inside a tile, the tokens in chunks, so that at most [chunk, tile] logits exist
at a time, forward and backward. Four things keep it as quick as the plain loss:

- the logits of the first tiles, as many as fit in KEPT_BYTES, wait for the backward pass; only others are made twice;
- rows that the mask leaves out are moved behind the others and never multiplied (the number of chunks is dynamic);
- a gradient that nobody asked for (a frozen head under LoRA) is not computed;
- with a frozen head the gradient of the logprob by the hidden state, head[target] - E_p[head], is gathered on the way
  forward, where the probabilities are at hand: the backward pass is then one multiplication.

Legend: N tokens, C chunks of R rows, V local vocabulary, D width. Logits, sums and gradients accumulate in fp32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh, PartitionSpec

Array = jax.Array

TILE = 4096  # columns of the local vocabulary at a time
CHUNK_BYTES = 8 * 2**20  # most fp32 logits at a time: 512 rows of a tile; more rows would skip less
KEPT_BYTES = 256 * 2**20  # most fp32 logits that the forward pass leaves for the backward pass, on each device
MASKED = -1e30  # a logit that does not count; finite, because 0 * -inf is nan


class Plan(NamedTuple):
    """What is static in one call: tiling, soft cap and where the arrays lie on the mesh."""

    tile: int
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
        return tuple(axis for axis in _axes(spec, dim) if self.mesh and self.mesh.shape[axis] > 1)


def token_logprobs(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    tile: int | None = None,
    softcap: float | None = None,
    temperature: float | Array = 1.0,
    mask: Array | None = None,
    mesh: Mesh | None = None,
    specs: tuple[PartitionSpec, PartitionSpec, PartitionSpec] | None = None,
) -> tuple[Array, Array]:
    """Per token log p(target) and entropy of p = softmax(cap(hidden @ head^T) / temperature), in nats.

    Args:
      hidden: float[..., D]. head: float[V, D]. targets: int[...], in [0, V) wherever the mask is True (a target out of
        range there gives -inf).
      tile: most columns of the (local) vocabulary at a time.
      softcap: c for cap(z) = c tanh(z / c); None for none.
      temperature: positive scalar, may be traced; it gets no gradient.
      mask: bool[...]; where False the results and all gradients are 0, whatever hidden holds there (nan too).
      mesh, specs: PartitionSpecs of hidden, head and targets, e.g. P(("data", "fsdp"), None, None),
        P("tensor", "fsdp"), P(("data", "fsdp"), None): the head is gathered over its second axis once, the vocabulary
        stays split over its first one (padded where that does not divide it), and the head's gradient is reduced once,
        in fp32, after the loop.

    Returns:
      (logprobs, entropy), f32[...] each; both have gradients by hidden and head.

    Raises:
      ValueError: shapes or specs that do not fit.
    """
    return token_stats(
        hidden, head, targets, tile=tile, softcap=softcap, temperature=temperature, mask=mask, mesh=mesh, specs=specs
    )[:2]


def token_stats(
    hidden: Array,
    head: Array,
    targets: Array,
    *,
    tile: int | None = None,
    softcap: float | None = None,
    temperature: float | Array = 1.0,
    mask: Array | None = None,
    mesh: Mesh | None = None,
    specs: tuple[PartitionSpec, PartitionSpec, PartitionSpec] | None = None,
) -> tuple[Array, Array, Array]:
    """What token_logprobs returns, and f32[...] 1 where the target is the most likely token, which has no gradient."""
    hidden, head, targets, mask = jax.tree.map(jnp.asarray, (hidden, head, targets, mask))
    if hidden.ndim < 1 or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(f"hidden [..., D] and head [V, D] do not fit: {hidden.shape} and {head.shape}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be {hidden.shape[:-1]} like hidden {hidden.shape}, got {targets.shape}")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"mask must have the targets' shape {targets.shape}, got {mask.shape}")
    if jnp.ndim(temperature) != 0:
        raise ValueError(f"temperature must be a scalar, got shape {jnp.shape(temperature)}")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be positive, got {tile}")
    plan = Plan(tile or TILE, softcap, head.shape[0])
    if mesh is not None and mesh.size > 1:
        plan = _plan_on_mesh(plan, mesh, specs, hidden.ndim, head.shape)
        shards = math.prod(mesh.shape[axis] for axis in plan.vocab_axes)
        head = jnp.pad(head, ((0, -head.shape[0] % shards), (0, 0)))
    mask = None if mask is None else mask.astype(bool)
    return _stats(plan, hidden, head, targets, mask, jnp.asarray(temperature, jnp.float32))


def _axes(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    entry = spec[dim] if dim < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _plan_on_mesh(plan: Plan, mesh: Mesh, specs, ndim: int, head_shape: tuple[int, int]) -> Plan:
    if specs is None:
        raise ValueError("a mesh needs specs=(hidden, head, targets)")
    hidden, head, targets = specs
    if head_shape[1] % math.prod(mesh.shape[axis] for axis in _axes(head, 1)):  # it lies whole on every device anyway
        head = PartitionSpec(head[0])
    plan = plan._replace(mesh=mesh, hidden=hidden, head=head, targets=targets)
    if any(_axes(hidden, dim) != _axes(targets, dim) for dim in range(ndim - 1)) or _axes(hidden, ndim - 1):
        raise ValueError(f"hidden must be split like targets, its width whole: got {hidden} and {targets}")
    if set(plan.vocab_axes) & set(plan.token_axes) or not set(plan.gather_axes) <= set(plan.token_axes):
        rule = "the head's rows must lie on axes that hold no tokens and its columns on axes that do"
        raise ValueError(f"{rule}: head {head}, targets {targets}")
    return plan


# ---------------------------------------------------------------- the differentiable function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(plan, hidden, head, targets, mask, temperature):
    forward = functools.partial(_forward, plan, "nothing")
    return _on_mesh(plan, forward, hidden, head, targets, mask, temperature)[:3]


def _stats_fwd(plan, hidden, head, targets, mask, temperature):
    wanted = {name: () for name, x in (("hidden", hidden), ("head", head)) if x.perturbed}  # only its keys count
    primals = (hidden, head, targets, mask, temperature)
    args = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    forward = functools.partial(_forward, plan, "logits" if "head" in wanted else "direction")
    logprobs, entropy, correct, lse, direction, kept = _on_mesh(plan, forward, *args)
    return (logprobs, entropy, correct), (args, lse, entropy, direction, kept, wanted)


def _stats_bwd(plan, saved, cotangents):
    args, lse, entropy, direction, kept, wanted = saved
    hidden, head, targets, mask, temperature = args
    by_logprob, by_entropy = (
        jnp.zeros(targets.shape, jnp.float32) if isinstance(g, SymbolicZero) else g for g in cotangents[:2]
    )
    if mask is not None:
        by_logprob, by_entropy = jnp.where(mask, by_logprob, 0), jnp.where(mask, by_entropy, 0)
    if direction is not None and isinstance(cotangents[1], SymbolicZero):
        return (by_logprob[..., None] * direction).astype(hidden.dtype), None, None, None, None
    backward = functools.partial(_backward, plan, "hidden" in wanted, "head" in wanted)
    d_hidden, d_head = _on_mesh(plan, backward, *args, (lse, entropy, by_logprob, by_entropy), kept)
    return d_hidden, d_head, None, None, None


_stats.defvjp(_stats_fwd, _stats_bwd, symbolic_zeros=True)


def _on_mesh(plan: Plan, function, *args):
    """Calls _forward or, where there are more than its five arguments, _backward on every shard."""
    if plan.mesh is None:
        return function(*args)
    token, kept = plan.targets, PartitionSpec((*plan.vocab_axes, *plan.token_axes))  # chunks, each shard's own
    in_specs = (plan.hidden, plan.head, token, token, PartitionSpec(), (token,) * 4, kept)[: len(args)]
    out_specs = (plan.hidden, plan.head) if len(args) > 5 else (token, token, token, token, plan.hidden, kept)
    return jax.shard_map(function, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


# ---------------------------------------------------------------- one shard


class Rows:
    """The tokens of a shard in chunks of R rows; with a mask, those that count come first, in the first `chunks`."""

    def __init__(self, shape: tuple[int, ...], mask: Array | None, tile: int):
        self.shape, self.num_tokens = shape, math.prod(shape)
        self.num_chunks = max(1, -(-self.num_tokens * tile * 4 // CHUNK_BYTES))
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


def _forward(plan: Plan, leave: str, hidden, head, targets, mask, temperature):
    """(logprobs, entropy, correct, log-sum-exp, d logprob / d hidden, kept logits): an online softmax over the tiles.

    leave: "nothing", "direction" or "logits" for the backward pass; what is not left is None.
    """
    with_direction = leave == "direction"
    dtype = hidden.dtype
    head = Head(plan, head.astype(dtype))
    rows = Rows(targets.shape, mask, head.tile)
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


def _backward(plan, want_hidden, want_head, hidden, head, targets, mask, temperature, per_token, kept):
    """(d_hidden, d_head), None where not wanted. With p the probabilities and h the entropy,

    d logprob / d logit_v = [v = target] - p_v and d h / d logit_v = -p_v (log p_v + h).
    """
    dtype, head_dtype = hidden.dtype, head.dtype
    head = Head(plan, head.astype(dtype))
    rows = Rows(targets.shape, mask, head.tile)
    x, y, inverse = rows.pack(hidden), rows.pack(targets), 1 / temperature
    per_token = tuple(map(rows.pack, per_token))  # lse, entropy, by_logprob, by_entropy
    num_kept = 0 if kept is None else kept.shape[1]

    def tile_step(first, stop, step, carry):
        i = stop - 1 - (step - first)  # backwards: what the last tile writes where it overlaps is written over
        d_hidden, d_head = carry
        weight = lax.dynamic_slice_in_dim(head.matrix, head.start(i), head.tile).astype(dtype)

        def chunk_step(j, carry):
            d_hidden, d_weight = carry
            rows_j = x[j].astype(dtype)
            lse, entropy, by_logprob, by_entropy = (a[j][:, None] for a in per_token)
            if stop <= num_kept:
                logits = lax.dynamic_slice(kept, (j, i, 0, 0), (1, 1, *kept.shape[2:]))[0, 0]
            else:
                logits = head.logits(rows_j, i, weight, inverse)
            logp = logits - lse
            hit = jnp.arange(head.tile) == head.column(y[j], i)[:, None]
            d_logits = jnp.where(hit, by_logprob, 0) - jnp.exp(logp) * (by_logprob + by_entropy * (logp + entropy))
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
