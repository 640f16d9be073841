"""Per-segment sums for packed rows."""

import jax


def segment_sums(values: jax.Array, segments: jax.Array, num_segments: int) -> jax.Array:
    """Sum values [B,T] over each segment of a row: [B, num_segments + 1], column 0 is padding.

    segments: i32[B,T] with 0 <= segments <= num_segments.
    """
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments + 1))(values, segments)
