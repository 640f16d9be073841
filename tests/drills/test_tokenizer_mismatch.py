"""Drill 17: a tokenizer that is not the model's is refused with the numbers of both, before anything is compiled.

What only looks like one trains as it should: no pad token, pad that is eos, an embedding with spare rows, a base model
that gets the special tokens of its chat model.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from jaxpost import config, train
from jaxpost.errors import ConfigError, DataError
from jaxpost.models import hf
from jaxpost.models.loading import load_params, locate
from tests import tiny

run = functools.partial(train.run, devices=jax.devices()[:1])
SMALL = "init:llama,vocab_size=264,d_model=16,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=8,d_ff=24,tied=true"
START, END, PAD = 256, 257, 258  # of the byte tokenizer's 259 ids; 65 is plain text
LOOP = {"steps": 2, "save_every": 0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model folder without tokenizer, whose configs name no special ids."""
    located = locate(SMALL)
    return hf.save_hf(load_params(located, "float32"), located.spec, tmp_path_factory.mktemp("weights") / "model")


@pytest.fixture
def compiled(monkeypatch):
    """Events of jax's tracer and compiler since the test began."""
    seen, listen = [], lambda event, seconds, **kwargs: seen.append(event) if "/compile/" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def change(file: pathlib.Path, **values) -> None:
    """Keys of a JSON file, new or replaced; None removes one."""
    tree = (json.loads(file.read_text()) if file.exists() else {}) | values
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def settings(folder: pathlib.Path, weights: pathlib.Path, **ids) -> pathlib.Path:
    """A config of a model folder with these ids in its config.json; the tokenizer lies in a folder of its own."""
    model = folder / "model"
    model.mkdir(parents=True)
    for file in weights.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    change(model / "config.json", **ids)
    return tiny.write_config(folder, model={"source": str(model)}, loop=LOOP, data={"eval": []})


def refused(file: pathlib.Path, *says: str, error=DataError) -> None:
    with pytest.raises(error) as caught:
        run(config.load(file).config)
    assert all(text in str(caught.value) for text in says), caught.value


def test_a_vocabulary_that_is_larger_than_the_embedding(tmp_path, compiled):
    small = SMALL.replace("vocab_size=264", "vocab_size=258")
    file = tiny.write_config(tmp_path, model={"source": small}, loop=LOOP)
    refused(file, "the tokenizer has 259 tokens, the model's embedding only 258 rows")
    assert not compiled
    run(config.load(tiny.write_config(tmp_path / "fits", model={"source": SMALL}, loop=LOOP)).config)
    assert compiled  # the listener hears a run that starts


@pytest.mark.parametrize("name", ["eos", "bos"])
@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_special_ids_that_are_plain_text_to_the_tokenizer(tmp_path, weights, compiled, name, where):
    file = settings(tmp_path, weights)
    change(tmp_path / "model" / where, **{f"{name}_token_id": [END, 65] if name == "eos" else 65})
    own = "its own eos_token is 257, '<|im_end|>'" if name == "eos" else "it names no bos_token"
    refused(file, f"model/{where}: {name}_token_id 65 is plain text to it", own, "do not belong together")
    assert not compiled


def test_special_ids_that_the_tokenizer_does_not_have(tmp_path, weights, compiled):
    refused(settings(tmp_path, weights, eos_token_id=262), "eos_token_id 262 is outside its vocabulary of 259", "257")
    refused(settings(tmp_path / "b", weights, eos_token_id="2"), "eos_token_id '2' is no token id", error=ConfigError)
    assert not compiled


def test_the_configs_beside_the_tokenizer(tmp_path, compiled):
    """Their end tokens stop samples, so a wrong one would cut every answer."""
    file = tiny.write_config(tmp_path, model={"source": SMALL}, loop=LOOP)
    change(tmp_path / "tokenizer" / "generation_config.json", eos_token_id=[END, 65])
    refused(file, "eos_token_id 65 is plain text to it", "its own eos_token is 257, '<|im_end|>'")
    assert not compiled


def test_special_tokens_of_the_tokenizers_own_vocabulary_are_checked(tmp_path, compiled):
    file = tiny.write_config(tmp_path, model={"source": SMALL}, loop=LOOP)
    change(tmp_path / "tokenizer" / "tokenizer_config.json", eos_token="<|endoftext|>")
    refused(file, "eos_token '<|endoftext|>' is not in its vocabulary")
    assert not compiled


def outcome(file: pathlib.Path) -> tuple[list, str]:
    """(losses and weights of a run, what it said)."""
    state = run(config.load(file).config)
    leaves = [np.asarray(x) for x in jax.tree.leaves(state.params)]
    return [tiny.metric(file.parent / "run", "loss"), *leaves], (file.parent / "run/logs/events.log").read_text()


def test_what_only_looks_like_a_mismatch_trains_to_the_same_bits(tmp_path, weights):
    want, said = outcome(settings(tmp_path / "as it is", weights, bos_token_id=START, eos_token_id=END))
    assert "eos_token" not in said
    cases = {"no pad": {"pad_token": None}, "pad is eos": {"pad_token": "<|im_end|>"}, "bos": {"bos_token": "<|pad|>"}}
    for name, specials in cases.items():
        file = settings(tmp_path / name, weights, pad_token_id=-1, bos_token_id=START, eos_token_id=[PAD, END])
        change(tmp_path / name / "tokenizer/tokenizer_config.json", **specials)
        got, said = outcome(file)
        assert "eos_token" not in said
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
    # the model learnt to end elsewhere, in a token that is special here too: the tokenizer's is trained, and it is said
    got, said = outcome(settings(tmp_path / "base", weights, eos_token_id=PAD))
    assert "the model's configs name 258 ('<|pad|>'), the tokenizer 257 ('<|im_end|>')" in said
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
