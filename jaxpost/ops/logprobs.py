"""Log-probabilities and entropies of tokens from hidden states and the head, without the [tokens, vocab] logits.

The vocabulary is walked in tiles and, inside a tile, the tokens in chunks, so that at most [chunk, tile] logits exist
at a time, forward and backward. Four things keep it as quick as the plain loss:

- the logits of the first tiles, as many as fit in KEPT_BYTES, wait for the backward pass; only others are made twice;
- rows that the mask leaves out are moved behind the others and never multiplied (the number of chunks is dynamic);
- a gradient that nobody asked for (a frozen head under LoRA) is not computed;
- with a frozen head the gradient of the logprob by the hidden state, head[target] - E_p[head], is gathered on the way
  forward, where the probabilities are at hand: the backward pass is then one multiplication.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from jaxpost.ops import logprobs_shard as shard
from jaxpost.ops.logprobs_shard import Plan, axes_of, backward, forward

Array = jax.Array


class TokenStats(NamedTuple):
    """f32[...] each, of the tempered and capped logits; 0 where the mask is False."""

    logprobs: Array  # of the target
    entropy: Array
    correct: Array  # 1 where the target is the most likely token; no gradient
    lse: Array  # log-sum-exp of the logits


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
    platform: str | None = None,
) -> TokenStats:
    """What token_logprobs returns and more, see TokenStats. platform: what the program is for; None: jax's own."""
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
    wide = (platform or jax.default_backend()) != "cpu"
    columns, chunk = (shard.WIDE_TILE, shard.WIDE_CHUNK_BYTES) if wide else (shard.TILE, shard.CHUNK_BYTES)
    plan = Plan(tile or columns, chunk, softcap, head.shape[0])
    if mesh is not None and mesh.size > 1:
        plan = _plan_on_mesh(plan, mesh, specs, hidden.ndim, head.shape)
        shards = math.prod(mesh.shape[axis] for axis in plan.vocab_axes)
        head = jnp.pad(head, ((0, -head.shape[0] % shards), (0, 0)))
    mask = None if mask is None else mask.astype(bool)
    with jax.named_scope("head"):
        return TokenStats(*_stats(plan, hidden, head, targets, mask, jnp.asarray(temperature, jnp.float32)))


def _plan_on_mesh(plan: Plan, mesh: Mesh, specs, ndim: int, head_shape: tuple[int, int]) -> Plan:
    if specs is None:
        raise ValueError("a mesh needs specs=(hidden, head, targets)")
    hidden, head, targets = specs
    if head_shape[1] % math.prod(mesh.shape[axis] for axis in axes_of(head, 1)):  # it lies whole on every device anyway
        head = PartitionSpec(head[0])
    plan = plan._replace(mesh=mesh, hidden=hidden, head=head, targets=targets)
    if any(axes_of(hidden, dim) != axes_of(targets, dim) for dim in range(ndim - 1)) or axes_of(hidden, ndim - 1):
        raise ValueError(f"hidden must be split like targets, its width whole: got {hidden} and {targets}")
    if set(plan.vocab_axes) & set(plan.token_axes) or not set(plan.gather_axes) <= set(plan.token_axes):
        rule = "the head's rows must lie on axes that hold no tokens and its columns on axes that do"
        raise ValueError(f"{rule}: head {head}, targets {targets}")
    return plan


# ---------------------------------------------------------------- the differentiable function


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stats(plan, hidden, head, targets, mask, temperature):
    function = functools.partial(forward, plan, "nothing")
    return _on_mesh(plan, function, hidden, head, targets, mask, temperature)[:4]


def _stats_fwd(plan, hidden, head, targets, mask, temperature):
    wanted = {name: () for name, x in (("hidden", hidden), ("head", head)) if x.perturbed}  # only its keys count
    primals = (hidden, head, targets, mask, temperature)
    args = jax.tree.map(lambda x: x.value, primals, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    function = functools.partial(forward, plan, "logits" if "head" in wanted else "direction")
    logprobs, entropy, correct, lse, direction, kept = _on_mesh(plan, function, *args)
    return (logprobs, entropy, correct, lse), (args, lse, entropy, direction, kept, wanted)


def _stats_bwd(plan, saved, cotangents):
    args, lse, entropy, direction, kept, wanted = saved
    hidden, head, targets, mask, temperature = args
    asked = cotangents[0], cotangents[1], cotangents[3]  # by logprob, entropy and lse
    plain = isinstance(asked[1], SymbolicZero) and isinstance(asked[2], SymbolicZero)
    asked = [jnp.zeros(targets.shape, jnp.float32) if isinstance(g, SymbolicZero) else g for g in asked]
    by_logprob, by_entropy, by_lse = asked if mask is None else [jnp.where(mask, g, 0) for g in asked]
    if direction is not None and plain:
        return (by_logprob[..., None] * direction).astype(hidden.dtype), None, None, None, None
    function = functools.partial(backward, plan, "hidden" in wanted, "head" in wanted)
    d_hidden, d_head = _on_mesh(plan, function, *args, (lse, entropy, by_logprob, by_entropy, by_lse), kept)
    return d_hidden, d_head, None, None, None


_stats.defvjp(_stats_fwd, _stats_bwd, symbolic_zeros=True)


def _on_mesh(plan: Plan, function, *args):
    """Calls forward or, where there are more than its five arguments, backward on every shard."""
    if plan.mesh is None:
        return function(*args)
    token, kept = plan.targets, PartitionSpec((*plan.vocab_axes, *plan.token_axes))  # chunks, each shard's own
    in_specs = (plan.hidden, plan.head, token, token, PartitionSpec(), (token,) * 5, kept)[: len(args)]
    out_specs = (plan.hidden, plan.head) if len(args) > 5 else (token, token, token, token, plan.hidden, kept)
    return jax.shard_map(function, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)
