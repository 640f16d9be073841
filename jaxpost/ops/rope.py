"""Rotary position embedding (2104.09864) with the frequency scalings that do not depend on a row's length."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """One kind of rotary embedding; scalings are functions of the position alone, so packing and caches are exact."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the correction range


def frequencies(rope: RopeSpec, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies f32[head_dim/2] and the factor that multiplies cos and sin (1 but for yarn, 2309.00071)."""
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        return inverse.astype(np.float32), 1.0
    if rope.kind == "linear":
        return (inverse / rope.factor).astype(np.float32), 1.0
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: long waves, divided by the factor; 1: short waves, kept
        return ((1 - smooth) * inverse / rope.factor + smooth * inverse).astype(np.float32), 1.0

    def correction_dim(rotations: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    scaled = inverse / rope.factor * ramp + inverse * (1 - ramp)
    attention_factor = rope.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return scaled.astype(np.float32), attention_factor


def cos_sin(rope: RopeSpec, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin f32[..., head_dim/2] of positions i32[...]; computed once a step, outside the layer scan."""
    inverse, factor = frequencies(rope, head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B,T,H,hd] by cos, sin f32[B,T,hd/2]; the two halves of the head dimension form the pairs."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
