"""python -m jaxpost.export on checkpoints of a tiny model, made without training."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost import cli, config, export, lora
from jaxpost.checkpoint import Checkpointer
from jaxpost.data.chat import load_tokenizer
from jaxpost.errors import CheckpointError
from jaxpost.models import hf, peft
from jaxpost.models.loading import content_hash, load_params, locate
from jaxpost.models.spec import abstract_params, is_info
from jaxpost.types import TrainState
from tests import tiny

BASE = locate(tiny.MODEL)
ADAPTER = {"rank": 2, "alpha": 4.0, "targets": ["q", "down"]}


def filled(infos: dict, seed: int) -> dict:
    random = np.random.RandomState(seed)
    draw = lambda info: jnp.asarray(random.uniform(-0.1, 0.1, info.shape), jnp.float32)
    return jax.tree.map(draw, infos, is_leaf=is_info)


def make_run(
    folder: pathlib.Path, adapter: dict | None, steps: tuple[int, ...] = (3, 5), averaged: bool = False
) -> tuple[str, dict]:
    """(run directory, trained weights of the newest step) of a run as train.py leaves it."""
    loaded = config.load(tiny.write_config(folder, **({"lora": adapter} if adapter else {})))
    run_dir = pathlib.Path(loaded.config.run_dir)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(loaded.dump())
    section = loaded.config.lora
    infos = lora.abstract_adapters(section, BASE.spec) if section else abstract_params(BASE.spec)
    for step in steps:
        trained = filled(infos, seed=step)
        slow = {"policy": filled(infos, seed=-step % 100)} if averaged else {}
        state = TrainState(step=jnp.int32(step), params={"policy": trained}, opt_state={}, slow=slow)
        with Checkpointer(run_dir, loaded.config.checkpoint) as checkpointer:
            meta = {"format": 1, "weights": content_hash(BASE), "averaged": ["policy"] if averaged else []}
            checkpointer.save(step, state, {}, meta)
    return str(run_dir), trained if steps else {}


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("adapter"), ADAPTER)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("full"), None)


def equal(a: dict, b: dict) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


def command(*argv: str) -> int:
    return cli.execute(export.main, ["export", *argv], doc=export.__doc__, flags=export.FLAGS)


def test_a_full_run_comes_back_to_the_bit(full_run, capsys):
    run_dir, trained = full_run
    assert command(run_dir) == 0
    folder = pathlib.Path(run_dir, "export", "hf")
    assert capsys.readouterr().out == f"written: {folder}\n"
    assert equal(hf.load_hf(folder, jnp.float32), trained)
    assert load_tokenizer(str(folder)).decode([40]) == load_tokenizer(str(folder.parents[2] / "tokenizer")).decode([40])
    assert command(run_dir) == 2  # nothing is overwritten
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_adapters_are_merged_for_hugging_face(adapter_run, tmp_path):
    run_dir, adapters = adapter_run
    folder = export.export(run_dir, "hf", out=tmp_path / "out")
    merged = lora.merge(load_params(BASE, jnp.float32), adapters, lora.LoraConfig(**ADAPTER))
    found = hf.load_hf(folder, jnp.float32)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_adapters_alone_and_an_older_step(adapter_run, tmp_path):
    run_dir, adapters = adapter_run
    assert command(run_dir, "--to=peft") == 0
    section, found = peft.load_peft(pathlib.Path(run_dir, "export", "peft"), BASE.spec)
    assert section.targets == ("q", "down") and section.scale == 2
    assert equal(found, adapters)
    assert pathlib.Path(run_dir, "export", "peft", "tokenizer.json").is_file()
    assert command(run_dir, "--to=peft", "--step=3", f"--out={tmp_path / 'three'}", "--dtype=bfloat16") == 0
    _, older = peft.load_peft(tmp_path / "three", BASE.spec)
    wanted = filled(lora.abstract_adapters(lora.LoraConfig(**ADAPTER), BASE.spec), seed=3)
    assert equal(older, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), wanted))


def test_averaged_weights(full_run, tmp_path, capsys):
    run_dir, _ = make_run(tmp_path / "full", None, averaged=True)
    assert command(run_dir, "--weights=ema") == 0
    folder = pathlib.Path(run_dir, "export", "hf-ema")
    assert capsys.readouterr().out == f"written: {folder}\n"
    assert equal(hf.load_hf(folder, jnp.float32), filled(abstract_params(BASE.spec), seed=95))
    run_dir, _ = make_run(tmp_path / "adapter", ADAPTER, averaged=True)
    section, found = peft.load_peft(export.export(run_dir, "peft", weights="ema", step=3), BASE.spec)
    assert equal(found, filled(lora.abstract_adapters(section, BASE.spec), seed=97))
    assert command(full_run[0], "--weights=ema") == 4
    assert "keeps no averaged weights; it was trained without algorithm.ema_decay" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(full_run, tmp_path, dtype):
    folder = export.export(full_run[0], "hf", out=tmp_path / "out", dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    wanted = jax.tree.map(lambda x: x.astype(dtype), full_run[1])
    assert equal(hf.load_hf(folder, jnp.dtype(dtype)), wanted)


def test_what_cannot_be_exported(full_run, adapter_run, tmp_path, capsys):
    empty, _ = make_run(tmp_path / "empty", None, steps=())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for argv, code, message in [
        ((), 2, "name one RUN"),
        ((str(tmp_path / "nowhere"),), 2, "not a run directory"),
        ((full_run[0], "--to=peft"), 2, "there is no adapter; use --to=hf"),
        ((adapter_run[0], "--to=gguf"), 2, "should be one of"),
        ((adapter_run[0], "--step=last"), 2, "not the number of a step"),
        ((adapter_run[0], "--step=4"), 4, "no checkpoint of step 4; there: 3, 5"),
        ((empty,), 4, "no checkpoint yet"),
        ((adapter_run[0], f"--out={tmp_path / 'full'}"), 2, "exists and is not an empty folder"),
        ((adapter_run[0], f"--out={tmp_path / 'full' / 'file'}"), 2, "exists and is not an empty folder"),
    ]:
        assert command(*argv) == code
        assert message in capsys.readouterr().err


def test_names_of_base_models(tmp_path):
    assert export.base_name("hf:org/name@main") == "org/name"
    assert export.base_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert export.base_name(str(tmp_path)) == str(tmp_path)
    assert export.base_name("gguf:some.gguf") is None


def test_adapters_of_other_weights_are_refused(tmp_path):
    run, _ = make_run(tmp_path, ADAPTER)
    file = pathlib.Path(run, "config.yaml")
    file.write_text(file.read_text().replace("d_ff=96", "d_ff=96,seed=7"))  # as if the base had been changed
    with pytest.raises(CheckpointError, match="were trained on other weights than init:"):
        export.export(run, "hf")
