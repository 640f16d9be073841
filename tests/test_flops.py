"""Hand-computed FLOPs and the chip table."""

import pytest

from jaxpost.flops import matmul_params, mean_visible_keys, peak_flops, train_flops_per_token
from jaxpost.models.spec import DecoderSpec, LayerKind

SPEC = DecoderSpec(vocab_size=10, d_model=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2, d_ff=8, tied=True)


def test_matmul_params_by_hand():
    layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q k v o, gate up down
    assert matmul_params(SPEC) == 2 * layer + 10 * 4 == 328


def test_visible_keys_equal_the_counted_mean():
    for length in (1, 5, 8):
        for window in (None, 1, 3, 20):
            counted = sum(min(i + 1, window or length) for i in range(length)) / length
            assert mean_visible_keys(length, window) == pytest.approx(counted)


def test_train_flops_by_hand():
    attention = 12 * 2 * 2 * 2 * 3.0  # heads * head_dim * layers * mean keys of 5 positions
    assert train_flops_per_token(SPEC, 5) == 6 * 328 + attention
    assert train_flops_per_token(SPEC, 5, adapter_params=7) == 4 * 328 + 6 * 7 + attention
    assert train_flops_per_token(SPEC, 5, adapter_params=7, full_params=40) == 4 * 328 + 6 * 7 + 2 * 40 + attention
    # the lower of the two layers, of 144 weights, only forward: 2 N, and a third of its attention
    upper = train_flops_per_token(SPEC, 5, adapter_params=7, first_trained_layer=1)
    assert upper == 4 * (328 - 144) + 2 * 144 + 6 * 7 + attention / 2 + attention / 6


def test_window_layers_see_fewer_keys():
    from dataclasses import replace

    mixed = replace(SPEC, pattern=(LayerKind(), LayerKind(window=1)))
    assert train_flops_per_token(mixed, 5) == 6 * 328 + 12 * 2 * 2 * (3.0 + 1.0)


@pytest.mark.parametrize(
    "kind,tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA B200", 2250),
        ("cpu", None),
    ],
)
def test_chip_table(kind, tera):
    assert peak_flops(kind) == (None if tera is None else tera * 1e12)
