"""transformers opens what we export and computes the same logits: plain, sharded, 16 bit, every kind of config.

Needs torch, transformers, jax and jaxpost in one environment: launch/test.sh --all runs it where that can be made.
"""

import json
import pathlib
import runpy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import save_file  # noqa: E402

from jaxpost.models import hf  # noqa: E402

pytestmark = pytest.mark.parity
PARITY = pathlib.Path(__file__).parent
LLAMAS = runpy.run_path(str(PARITY / "llama_cases.py"))
GOLDEN = PARITY.parent / "golden" / "models_llama.npz"


def export(tmp_path: pathlib.Path, case: str, **options) -> pathlib.Path:
    source = tmp_path / "in"
    source.mkdir()
    config = LLAMAS["config"](case)
    (source / "config.json").write_text(json.dumps(config))
    save_file(LLAMAS["weights"](config), source / "model.safetensors")
    return hf.save_hf(hf.load_hf(source, "float32"), hf.read_spec(source), tmp_path / "out", **options)


def load(folder: pathlib.Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("shard_bytes", [5e9, 9_000])
@pytest.mark.parametrize("case", LLAMAS["CASES"])
def test_logits_of_the_export(case, shard_bytes, tmp_path):
    model = load(export(tmp_path, case, max_shard_bytes=shard_bytes))
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(torch.from_numpy(LLAMAS["tokens"](case)).long()).logits.numpy()
    np.testing.assert_array_equal(logits, np.load(GOLDEN)[case])  # same weights, same config, same program


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_exports_open_in_their_dtype(dtype, tmp_path):
    model = load(export(tmp_path, "gqa_tied", dtype=dtype))
    assert model.dtype == getattr(torch, dtype)
    name = "model.layers.1.mlp.down_proj.weight"
    expected = torch.from_numpy(LLAMAS["weights"](LLAMAS["config"]("gqa_tied"))[name]).to(model.dtype)
    assert torch.equal(model.state_dict()[name], expected)


def test_special_ids_reach_generation(tmp_path):
    class Tokens:
        bos_id, pad_id, stop_ids = 1, 0, (2, 5)

        def save(self, folder):
            pass

    model = load(export(tmp_path, "gqa_tied", tokenizer=Tokens()))
    found = model.generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, [2, 5], 0)
