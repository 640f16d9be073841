"""Runs that start from a PEFT adapter: what they take from it, what they remember of it, what they refuse."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxpost import build_model, cli, config, export, lora, train
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.lora import LoraConfig
from jaxpost.models import hf, peft
from jaxpost.models.loading import locate
from jaxpost.models.spec import is_info
from tests import tiny

SPEC = locate(tiny.MODEL).spec
ADAPTER = LoraConfig(rank=2, alpha=3.0, rslora=True, targets=("q", "down"), layers="1:3")
RICH = dataclasses.replace(ADAPTER, dora=True, also_train=("final_norm",))
run = functools.partial(train.run, devices=jax.devices()[:1])


def filled(section: LoraConfig, seed: int) -> dict:
    """Random adapters; zeros in the layers that carry none."""
    random = np.random.RandomState(seed)
    draw = lambda info: random.uniform(-0.1, 0.1, info.shape).astype(np.float32)
    adapters = jax.tree.map(draw, lora.abstract_adapters(section, SPEC), is_leaf=is_info)
    for layer in set(range(SPEC.num_layers)) - set(lora.adapted_layers(section, SPEC)):
        for pair in lora.layer_pairs(adapters, SPEC, layer).values():
            for half in pair.values():
                half[...] = 0
    return adapters


@pytest.fixture
def folder(tmp_path):
    """A PEFT adapter of the tiny model at tmp_path/adapter."""
    return peft.save_peft(tmp_path / "adapter", filled(ADAPTER, 1), ADAPTER, SPEC)


def equal(a: dict, b: dict) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_a_run_from_an_adapter(tmp_path):
    folder = peft.save_peft(tmp_path / "adapter", filled(RICH, 1), RICH, SPEC)
    written = tiny.load(tmp_path, lora={"source": "adapter", "dropout": 0.25}, loop={"steps": 1}, data={"eval": []})
    assert written.lora.source == str(folder) and written.lora.rank == 16
    state = run(written)
    # It began there: Adam's first update moves nothing by more than the learning rate, and layer 0 not at all.
    moved = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y), state.params["policy"], filled(RICH, 1))
    assert all(0 < x.max() <= 0.01001 for x in jax.tree.leaves(moved))
    assert not any(np.any(part) for pair in lora.layer_pairs(moved, SPEC, 0).values() for part in pair.values())

    # the run stands for itself: readers do not look at the folder again
    away = folder.rename(tmp_path / "moved")
    saved = config.load_saved(written.run_dir)
    assert (saved.lora.rank, saved.lora.alpha, saved.lora.rslora, saved.lora.targets) == (2, 3.0, True, ("q", "down"))
    assert list(lora.adapted_layers(saved.lora, SPEC)) == [1, 2] and saved.lora.dropout == 0.25
    assert saved.lora.dora and saved.lora.also_train == ("final_norm",)
    _, base, adapters = build_model.open_model(written.run_dir)
    assert equal(adapters, state.params["policy"])
    section, again = peft.load_peft(export.export(written.run_dir, "peft"), SPEC)
    assert section.rank == 2 and equal(again, state.params["policy"])
    with pytest.raises(ConfigError, match=r"lora\.source: .*adapter is no PEFT adapter"):
        run(written)  # training is another matter: the adapter must be the one that the run began with

    # another adapter of the same form is another run
    away.rename(folder)
    shutil.rmtree(folder)
    peft.save_peft(folder, filled(RICH, 2), RICH, SPEC)
    with pytest.raises(CheckpointError, match=r"lora\.source: the adapter there changed.*--allow_changed=lora\.source"):
        run(written)
    resumed = run(written, allow_changed=["lora.source"])
    assert equal(resumed.params, state.params)


def test_dora_and_parameters_in_full_resume_bit_for_bit_and_export(tmp_path):
    sections = {
        "lora": {"rank": 2, "dora": True, "dropout": 0.1, "targets": ["q", "up"], "also_train": ["embed", "norm"]},
        "loop": {"steps": 4, "save_every": 2},
        "data": {"eval": []},
    }
    whole = tiny.load(tmp_path, **sections)
    final = run(whole)
    folder = pathlib.Path(whole.run_dir, "checkpoints")
    shutil.rmtree(folder / "4")
    (folder / "LATEST").write_text("2\n")
    resumed = run(whole)
    assert equal(final.params, resumed.params) and equal(final.opt_state, resumed.opt_state)

    model, base, adapters = build_model.open_model(whole.run_dir)
    assert equal(adapters, final.params["policy"])
    moved = np.abs(adapters["embed"] - base["embed"]).max(), np.abs(adapters["final_norm"] - base["final_norm"]).max()
    assert min(moved) > 0 and adapters["blocks"]["0"]["attn"]["q"]["magnitude"].shape == (3, 64)
    written = hf.load_hf(export.export(whole.run_dir, "hf"), np.float32)
    tokens = np.arange(24).reshape(2, 12)
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    hidden = jax.jit(lambda weights: model.policy(weights, tokens, positions, positions * 0 + 1)[0])
    np.testing.assert_allclose(hidden(written), hidden(lora.join(base, adapters, model.policy.adapters)), atol=2e-5)
    assert "head" not in written and equal(written["embed"], adapters["embed"])
    section, again = peft.load_peft(export.export(whole.run_dir, "peft"), SPEC)
    assert equal(again, adapters) and lora.full_names(section, SPEC) == {"embed", "final_norm", "attn_norm", "mlp_norm"}


def test_names_that_match_nothing_are_refused_before_anything_is_read(tmp_path):
    written = tiny.load(tmp_path, lora={"rank": 0, "also_train": ["lm_head"]})
    with pytest.raises(ConfigError, match=r"lora\.also_train: the model has no 'lm_head'"):
        build_model.build_model(written.model, written.mesh, written.lora, jax.devices()[:1])


def test_what_the_user_wrote_must_agree(folder, tmp_path):
    base = dict(lora={"source": "adapter", "rank": 16})  # a default, but typed
    loaded = config.load(tiny.write_config(tmp_path, **base))
    with pytest.raises(ConfigError, match=r"lora\.rank: 16 here, 2 in the adapter .*adapter; leave lora\.rank out"):
        build_model.adopt_adapters(loaded)
    for section, message in [
        ({"alpha": 4.0}, r"lora\.alpha: 4.0 here, 3.0 in"),
        ({"targets": ["q"]}, r"lora\.targets: \[q\] here, \[q, down\] in"),
        ({"layers": ":2"}, r"lora\.layers: :2 here, 1:3 in"),
        ({"layers": "5:"}, "holds none"),
        ({"dora": True}, r"lora\.dora: true here, false in"),
        ({"also_train": ["embed"]}, r"lora\.also_train: \[embed\] here, \[\] in"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_model.adopt_adapters(config.Loaded(tiny.load(tmp_path, lora={"source": "adapter"} | section), {}))
    # other words for the same
    words = {"source": "adapter", "rank": 2, "targets": ["down", "q"], "layers": "-2:", "dropout": 0.5}
    found = build_model.adopt_adapters(config.load(tiny.write_config(tmp_path, lora=words)))
    assert found.config.lora.alpha == 3.0 and found.config.lora.dropout == 0.5
    assert found.provenance(("lora", "alpha")) == f"{folder}/adapter_config.json"
    assert found.provenance(("lora", "rank")).startswith(f"{tmp_path}/config.yaml:")
    assert build_model.adopt_adapters(config.Loaded(found.config, {})).config == found.config


def test_print_config_shows_the_adapters_values(folder, tmp_path, capsys):
    file = tiny.write_config(tmp_path, lora={"source": "adapter"})
    argv = ["train", f"--config={file}", "--print_config"]
    assert cli.execute(train.main, argv, doc=train.__doc__, flags=train.FLAGS) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rank:", "2", "#", f"{folder}/adapter_config.json"] in lines


def test_a_path_belongs_to_its_file_or_to_the_working_directory(tmp_path, monkeypatch):
    file = tiny.write_config(tmp_path, lora={"source": "a/b"})
    monkeypatch.chdir("/")
    assert config.load(file).config.lora.source == str(tmp_path / "a/b")
    assert config.load(file, ["lora.source=a/b"]).config.lora.source == "/a/b"


def test_sources_that_do_not_fit(folder, tmp_path):
    def refused(message: str, error: type = ConfigError, **sections) -> None:
        sections = {"lora": {"source": "adapter"}} | sections
        with pytest.raises(error, match=message):
            build_model.adopt_adapters(config.load(tiny.write_config(tmp_path, **sections)))

    def model(change: str, value: str) -> dict:
        return {"source": tiny.MODEL.replace(change, value), "tokenizer": "tokenizer"}

    refused("lora.source: .*tokenizer is no PEFT adapter", lora={"source": "tokenizer"})
    (tmp_path / "config.yaml").touch()
    refused("no PEFT adapter .*jaxpost.export", lora={"source": "."})
    refused("lora.source: .*down_proj.lora_A.weight is", CheckpointError, model=model("d_ff=96", "d_ff=80"))
    refused("lora.source: .*unsupported tensor", model=model("num_layers=3", "num_layers=2"))
    options = json.loads((folder / peft.CONFIG_FILE).read_text())
    (folder / peft.CONFIG_FILE).write_text(json.dumps(options | {"peft_type": "LOHA"}))
    refused("lora.source: .*peft_type 'LOHA'")
    whole = LoraConfig(rank=2, targets=("q",))
    shutil.rmtree(folder)
    peft.save_peft(pathlib.Path(folder), filled(whole, 1), whole, SPEC)
    refused("adapters of a model with 3 layers, this one has 4", model=model("num_layers=3", "num_layers=4"))
