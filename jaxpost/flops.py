"""Analytic model FLOPs and the peak of known chips: the two halves of MFU.

XLA's cost analysis counts a scanned body once, so the FLOPs are computed from the spec. They are *model* FLOPs: what
the mathematics needs, without rematerialisation, and with attention only over the keys a query may see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxpost.models.spec import DecoderSpec

# Dense bf16 FLOP/s of one jax device, by a lower-case piece of jax's device_kind; the first hit counts, so the narrow
# names come first. A TPU7x chip shows as two devices.
PEAKS = (
    ("v5 lite", 197e12),
    ("v5e", 197e12),
    ("v5p", 459e12),
    ("tpu v5", 459e12),
    ("v6 lite", 918e12),
    ("v6e", 918e12),
    ("tpu7x", 2307e12 / 2),
    ("tpu v4", 275e12),
    ("a100", 312e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("b200", 2250e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device of this `jax.Device.device_kind`; None where it is not known (CPUs)."""
    kind = device_kind.lower()
    return next((peak for name, peak in PEAKS if name in kind), None)


def mean_visible_keys(length: int, window: int | None = None) -> float:
    """Mean number of keys a causal query sees in a segment: mean over i < length of min(i + 1, window)."""
    reach = length if window is None else min(window, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def matmul_params(spec: DecoderSpec) -> int:
    """Weights that multiply every token: all projections and the head, not the embedding lookup, not norms."""
    return spec.num_layers * layer_params(spec) + spec.d_model * spec.vocab_size


def layer_params(spec: DecoderSpec) -> int:
    """Weights of one layer's projections."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return spec.d_model * (2 * heads + 2 * kv_heads) + 3 * spec.d_model * spec.d_ff


def train_flops_per_token(
    spec: DecoderSpec,
    length: int,
    *,
    adapter_params: int | None = None,
    full_params: int = 0,
    first_trained_layer: int = 0,
) -> float:
    """Model FLOPs of forward and backward for one token of a segment of this length.

    Full training 6 N + 12 H hd sum over layers of the visible keys: 2 N forward, 2 N for the gradient of activations,
    2 N for that of weights. With adapters (their parameter count A) the base needs no weight gradient but for the
    `full_params` F of its weights that are trained beside them: 4 N + 6 A + 2 F + the same attention. Layers below
    `first_trained_layer` have no backward pass: 2 N and 4 H hd keys of them. `length` is the mean segment length where
    rows are packed.
    """
    weights = matmul_params(spec)
    dense = 6 * weights if adapter_params is None else 4 * weights + 6 * adapter_params + 2 * full_params
    dense -= 2 * layer_params(spec) * first_trained_layer
    keys = [mean_visible_keys(length, spec.kind(layer).window) for layer in range(spec.num_layers)]
    passes = 3 * sum(keys[first_trained_layer:]) + sum(keys[:first_trained_layer])
    return dense + 4 * spec.num_heads * spec.head_dim * passes
