"""Twenty-step losses of five tiny runs, which a refactor must match.

Written by `python -m tests.e2e.test_golden_curves`.
"""

import json
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from jaxpost import train
from tests import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "curves.json"
SMALL = "init:llama,vocab_size=264,d_model=16,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=8,d_ff=24,tied=true"
RUNS = {
    "full": {},
    "lora": {"lora": {"rank": 4, "alpha": 8.0, "dora": True, "also_train": ["norm"]}, "optim": {"weight_decay": 0.1}},
    "dft": {"algorithm": {"name": "sft", "kind": "dft", "normalise": "sequence"}, "loop": {"micro_batches": 2}},
    "muon": {"optim": {"name": "muon", "schedule": "wsd", "warmup_steps": 4, "decay_steps": 8}},
    "padded": {"data": {"packing": "bucketed", "buckets": [24, 64]}, "algorithm": {"name": "sft", "z_loss": 0.01}},
}


def losses(folder: pathlib.Path, name: str) -> list[float]:
    sections = RUNS[name]
    always = {
        "model": {"source": SMALL},
        "data": {"eval": []} | sections.get("data", {}),
        "loop": {"steps": 20, "save_every": 0} | sections.get("loop", {}),
    }
    config = tiny.load(folder, **(sections | always))
    train.run(config, devices=jax.devices()[:1])
    return tiny.metric(config.run_dir, "loss")


@pytest.mark.parametrize("name", RUNS)
def test_losses_match(tmp_path, name):
    got, want = losses(tmp_path, name), json.loads(GOLDEN.read_text())[name]
    # Rounding differs between jax versions and grows along a run.
    np.testing.assert_allclose(got[:5], want[:5], rtol=2e-6)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert len(got) == 20 and abs(want[-1] - want[0]) > 0.1  # it trains (the dft loss rises with the probabilities)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        curves = {name: losses(pathlib.Path(temporary) / name, name) for name in RUNS}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
