"""Noise on embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpost.ops.segments import segment_sums


def neftune_noise(key: jax.Array, segments: jax.Array, width: int, alpha: float) -> jax.Array:
    """f32[B,T,D] to add to embeddings in training (NEFTune, 2310.05914):

        u * alpha / sqrt(n D),   u uniform in [-1, 1]

    segments: i32[B,T], 0 is padding and gets no noise; D is `width`. n is the length of the token's own sequence, which
    under packing is its segment, never the row: packed or not, padded or not, an example's noise is equally strong (its
    values follow from the place in the batch). transformers and TRL take the length of the padded row.
    """
    B, T = segments.shape
    counts = segment_sums(jnp.ones((B, T), jnp.float32), segments, T)
    own = jnp.take_along_axis(counts, segments, axis=1)
    strength = jnp.where(segments > 0, alpha / jnp.sqrt(own * width), 0.0)
    return strength[..., None] * jax.random.uniform(key, (B, T, width), jnp.float32, -1.0, 1.0)
