"""Layers are scanned: the program of the train step is as long for 32 of them as for 4."""

import pytest

from benchmarks import compile_time


@pytest.mark.parametrize("kind", compile_time.KINDS)
def test_the_step_does_not_grow_with_the_layers(tmp_path, kind):
    sizes = []
    for layers in (4, 32):
        step, args = compile_time.step_of(tmp_path / str(layers), layers, kind)
        text = step.lower(*args).as_text()
        assert f"tensor<{layers}x64x64xf32>" in text  # q of all layers in one stack
        sizes.append(len(text))
    assert sizes[0] > 50_000 and abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]
