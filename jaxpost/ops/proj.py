"""The one linear projection of the house: plain weights, and weights with an adapter beside them."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Lora:
    """A frozen weight and its low-rank update (2106.09685): x @ base + scale * (x @ a) @ b.

    base [..., in, out]; a f32[..., in, r]; b f32[..., r, out]: leading (layer) dims are sliced together by a scan.
    magnitude f32[..., out] (DoRA, 2402.09353): column j of base + scale * a @ b is stretched to the length |m_j|.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    magnitude: jax.Array | None = None
    first: int = flax.struct.field(pytree_node=False, default=0)  # of a stack: rows below it have parts of zeros

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype


@jax.custom_vjp
def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out], with the weight's gradient made as x^T dy, in the weight's own layout.

    JAX's rule makes (dy^T x)^T; on a CPU XLA then transposes dy, and repeats in that slow order whatever made dy.
    """
    return x @ weight


def _matmul_fwd(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ weight, (x, weight)


def _matmul_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(dy, weight, (((x.ndim - 1,), (1,)), ((), ()))), jnp.tensordot(x, dy, (rows, rows))


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def proj(x: jax.Array, weight: jax.Array | Lora, rng: jax.Array | None = None) -> jax.Array:
    """x [..., in] @ weight [in, out] in x's dtype; rng: keys the adapter's dropout, None means deterministic.

    With DoRA and d = dropout(x), as PEFT computes it: x @ base + (g - 1) * (d @ base) + g * scale * (d @ a) @ b, where
    g is `stretch`. Only with dropout does this cost a second product with base.
    """
    if not isinstance(weight, Lora):
        return matmul(x, weight.astype(x.dtype))
    low = x
    if rng is not None and weight.dropout > 0:
        keep = jax.random.bernoulli(rng, 1 - weight.dropout, x.shape)
        low = jnp.where(keep, x / (1 - weight.dropout), 0).astype(x.dtype)
    base = weight.base.astype(x.dtype)
    plain = matmul(x, base)
    update = matmul(matmul(low, weight.a.astype(x.dtype)), weight.b.astype(x.dtype))
    update = update * jnp.asarray(weight.scale, x.dtype)
    if weight.magnitude is None:
        return plain + update
    seen = plain if low is x else matmul(low, base)
    gain = stretch(weight)
    return plain + (gain - 1).astype(x.dtype) * seen + gain.astype(x.dtype) * update


def merged(weight: Lora) -> jax.Array:
    """f32[..., in, out]: the plain matrix that a Lora leaf stands for."""
    whole = weight.base.astype(jnp.float32) + weight.scale * _exact(weight.a, weight.b)
    return whole if weight.magnitude is None else whole * stretch(weight)[..., None, :]


def stretch(weight: Lora) -> jax.Array:
    """DoRA's factor of each column, f32[..., out]: m_j / |column j of base + scale * a @ b|.

    The length is a constant for gradients (section 4.3 of 2402.09353). It is found once a layer for each pass over a
    micro-batch, never per token, as |w + s u|^2 = |w|^2 + s b . (2 a^T w + s (a^T a) b) for u = a b: no product of the
    size of base is made, so none is kept for the backward pass. Where m_j is 0 the factor is 1 and has no gradient: a
    layer that carries no adapter has a, b and m of zeros, and so has a column of zeros in base.
    """
    base, a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (weight.base, weight.a, weight.b))
    turned = jnp.swapaxes(a, -1, -2)
    moved = weight.scale * jnp.sum(b * (2 * _exact(turned, base) + weight.scale * _exact(_exact(turned, a), b)), -2)
    length = jnp.sqrt(jnp.maximum(jnp.sum(base * base, -2) + moved, jnp.finfo(jnp.float32).tiny))
    return jnp.where(weight.magnitude == 0, 1.0, weight.magnitude / length)


def column_lengths(weight: jax.Array) -> jax.Array:
    """Euclidean length of each column, f32[..., out] of [..., in, out]."""
    wide = weight.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(wide * wide, axis=-2))


def _exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """x @ y in full fp32, also where the default is less."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
