"""Cached, batched, greedy generation of the real model equals transformers token for token."""

import json
import pathlib

import pytest

from jaxpost.build_model import open_model
from jaxpost.models.sampler import Sampler, Sampling

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "models_smollm2_greedy.json").read_text())


@pytest.fixture(scope="module")
def sampler():
    model, params, adapters = open_model("smollm2-135m")
    sampler = Sampler(model.policy, [GOLDEN["eos_id"]], batch_size=len(GOLDEN["rows"]))
    sampler.load(params, adapters)
    return sampler


def test_greedy_tokens(sampler):
    prompts = [row["prompt_ids"] for row in GOLDEN["rows"]]
    outs = sampler.generate(prompts, Sampling(max_new_tokens=GOLDEN["max_new_tokens"]))
    assert [out.tokens for out in outs] == [row["new_ids"] for row in GOLDEN["rows"]]
