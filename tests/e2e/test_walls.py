"""What later methods lean on, with a method of the user's own: frozen columns, scalars in the state, held-out rows."""

import json
import os
import subprocess
import sys

import pytest

from tests import tiny

METHOD = '''
from typing import Literal
import jax.numpy as jnp
from pydantic.dataclasses import dataclass
from jaxpost.algos.base import SlowRule
from jaxpost.algos.sft import SFT
from jaxpost.fields import SECTION
from jaxpost.types import weighted_mean

@dataclass(frozen=True, config=SECTION)
class Walls(SFT):
    """Loss over the distance to the base, and a running mean of the batch's trained tokens."""
    name: Literal["walls"] = "walls"
    slow = {"policy": SlowRule("policy", every=2)}

    def scalars(self):
        return {"running": jnp.zeros(())}

    def annotate(self, apply, frozen, batch):
        return batch.replace(ref_logprobs=apply.logprobs(frozen["policy"], batch)[0])

    def prepare(self, apply, state, frozen, batch):
        batch, scalars = super().prepare(apply, state, frozen, batch)
        count = jnp.sum(batch.mask).astype(jnp.float32)
        return batch, scalars | {"running": 0.5 * scalars["running"] + 0.5 * count}

    def loss(self, apply, params, frozen, batch, rng):
        loss, metrics = super().loss(apply, params, frozen, batch, rng)
        lp, _ = apply.logprobs(apply.join(params, frozen, "policy"), batch)
        ratio = weighted_mean(lp - batch.ref_logprobs, batch.weights)
        return loss + 0.1 * ratio.total, metrics | {"ratio": ratio}
'''


def train(config, *words: str) -> str:
    args = [
        sys.executable,
        "-m",
        "jaxpost.train",
        f"--config={config}",
        f"--import={config.parent / 'walls.py'}",
        *words,
    ]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(args, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_method_with_columns_and_scalars_trains_evaluates_and_resumes(tmp_path):
    from jaxpost import export
    from jaxpost.checkpoint import Checkpointer
    from jaxpost.errors import CheckpointError

    sections = {"algorithm": {"name": "walls"}, "lora": {"rank": 2}, "loop": {"steps": 4, "eval_first": True}}
    whole = tiny.write_config(tmp_path / "whole", **sections)
    halves = tiny.write_config(tmp_path / "halves", **sections)
    for config in (whole, halves):
        (config.parent / "walls.py").write_text(METHOD)
    train(whole)
    train(halves, "loop.steps=2")
    train(halves, "--allow_changed=loop.steps")
    first, last = tiny.metric(tmp_path / "whole/run", "eval/ratio")
    assert first == 0 and last > 0  # the adapters begin at the base; held-out rows were annotated
    assert tiny.metric(tmp_path / "halves/run", "loss") == tiny.metric(tmp_path / "whole/run", "loss")
    found = [Checkpointer(tmp_path / name / "run") for name in ("whole", "halves")]
    assert "scalars.running" in found[0].leaves(4)
    trees = [json.loads((c.folder / "4" / "tree.json").read_text()) for c in found]
    assert trees[0] == trees[1]

    # its moving copy of the policy is saved, and is no average
    assert any(name.startswith("slow.policy.") for name in found[0].leaves(4))
    with pytest.raises(CheckpointError, match="keeps no averaged weights"):
        export.export(tmp_path / "whole/run", weights="ema")

    # the run is sampled from, also by those who do not know the method; a raw prompt is not a chat turn
    asked = []
    for words in (["--raw"], []):
        args = [
            sys.executable,
            "-m",
            "jaxpost.generate",
            str(tmp_path / "whole/run"),
            "--prompt=ab",
            "--max_new_tokens=4",
        ]
        done = subprocess.run(args + words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        asked.append(done.stdout)
    assert asked[0] != asked[1]


def test_a_role_that_nobody_can_give_is_refused(tmp_path):
    config = tiny.write_config(tmp_path, algorithm={"name": "needy"})
    (tmp_path / "walls.py").write_text(
        METHOD.replace("class Walls(SFT):", 'class Walls(SFT):\n    needs = ("teacher",)').replace('"walls"', '"needy"')
    )
    with pytest.raises(AssertionError, match="algorithm.name: needy needs a frozen teacher model"):
        train(config)
