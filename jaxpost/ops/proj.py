"""The one linear projection of the house: plain weights, and weights with an adapter beside them."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Lora:
    """A frozen weight and its low-rank update (2106.09685): x @ base + scale * (x @ a) @ b.

    base [..., in, out]; a f32[..., in, r]; b f32[..., r, out]: leading (layer) dims are sliced together by a scan.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype


def proj(x: jax.Array, weight: jax.Array | Lora, rng: jax.Array | None = None) -> jax.Array:
    """x [..., in] @ weight [in, out] in x's dtype; rng: keys the adapter's dropout, None means deterministic."""
    if not isinstance(weight, Lora):
        return x @ weight.astype(x.dtype)
    low = x
    if rng is not None and weight.dropout > 0:
        keep = jax.random.bernoulli(rng, 1 - weight.dropout, x.shape)
        low = jnp.where(keep, x / (1 - weight.dropout), 0).astype(x.dtype)
    update = (low @ weight.a.astype(x.dtype)) @ weight.b.astype(x.dtype)
    return x @ weight.base.astype(x.dtype) + update * jnp.asarray(weight.scale, x.dtype)
