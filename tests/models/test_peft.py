"""PEFT's format: adapters that PEFT saved (parity/make_peft_golden.py), round trips, and refusals by name."""

import dataclasses
import functools
import json
import pathlib
import runpy
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpost import lora
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.lora import LoraConfig
from jaxpost.models import assemble, decoder, llama, peft
from jaxpost.models.spec import is_info

TESTS = pathlib.Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
TINY = runpy.run_path(str(TESTS / "parity" / "tiny_llama.py"))
SPEC = llama.config_from_hf(TINY["CONFIG"])
ALL = ("q", "k", "v", "o", "gate", "up", "down")
CONFIGS = {
    "all_linear": LoraConfig(rank=4, alpha=8.0, targets=ALL),
    "qv": LoraConfig(rank=2, alpha=16.0, dropout=0.1, targets=("q", "v")),
    "rslora": LoraConfig(rank=4, alpha=3.0, rslora=True, targets=("o", "up", "down"), layers="1:3"),
    "dora": LoraConfig(rank=4, alpha=6.0, rslora=True, dora=True, dropout=0.2, targets=("q", "down"), layers="1:3"),
    "modules": LoraConfig(
        rank=2, alpha=4.0, targets=("v",), also_train=("embed", "final_norm", "head", "attn_norm", "mlp_norm")
    ),
    "tied": LoraConfig(rank=2, alpha=4.0, dora=True, targets=("q",), also_train=("embed", "final_norm")),
}
SPECS = {case: dataclasses.replace(SPEC, tied=case == "tied") for case in CONFIGS}
OURS = (
    "qv",
    "rslora",
    "dora",
    "modules",
    "tied",
)  # python tests/models/test_peft.py writes their tests/golden/jaxpost_peft_<case>


@functools.cache
def base(tied: bool = False) -> dict:
    spec = dataclasses.replace(SPEC, tied=tied)
    return assemble.build(assemble.leaves(spec, llama.tensor_name), TINY["weights"]().__getitem__, spec, np.float32)


@jax.jit
def logits(params: dict) -> jax.Array:
    tokens = jnp.asarray(TINY["TOKENS"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _, _ = decoder.apply(SPEC, params, tokens, positions, jnp.ones_like(tokens))
    return hidden @ decoder.head(params).T


@pytest.fixture(scope="module")
def golden() -> dict:
    return dict(np.load(GOLDEN / "peft_logits.npz"))


def test_the_tiny_model_is_the_same_on_both_sides(golden):
    np.testing.assert_allclose(logits(base()), golden["base"], atol=1e-5)
    np.testing.assert_allclose(logits(base(tied=True)), golden["tied_base"], atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_adapters_that_peft_saved(case, golden):
    config, adapters = peft.load_peft(GOLDEN / f"peft_{case}", SPECS[case])
    assert config == CONFIGS[case]
    for weigh in (lora.join, lora.merge):
        weights = weigh(base(SPECS[case].tied), adapters, config)
        np.testing.assert_allclose(logits(weights), golden[case], atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_what_we_write_is_what_peft_wrote(case, tmp_path):
    theirs = GOLDEN / f"peft_{case}"
    config, adapters = peft.load_peft(theirs, SPECS[case])
    peft.save_peft(tmp_path / "a", adapters, config, SPECS[case])
    ours, wanted = (load_file(folder / peft.WEIGHTS_FILE) for folder in (tmp_path / "a", theirs))
    assert ours.keys() == wanted.keys()
    assert all(ours[name].dtype == wanted[name].dtype and np.array_equal(ours[name], wanted[name]) for name in wanted)
    ours, wanted = (json.loads((folder / peft.CONFIG_FILE).read_text()) for folder in (tmp_path / "a", theirs))
    for options in (ours, wanted):
        options["target_modules"] = sorted(options["target_modules"])
    if case == "tied":  # PEFT adds the embedding's full name to what it was given
        wanted["modules_to_save"].remove("model.embed_tokens")
    assert ours.items() <= wanted.items()


@pytest.mark.parametrize("case", OURS)
def test_what_peft_was_shown_is_what_we_write(case, tmp_path):
    """tests/parity/test_peft_loads.py opens the committed folders in an environment without jaxpost."""
    write_ours(case, tmp_path / "a")
    shown = GOLDEN / f"jaxpost_peft_{case}"
    ours, wanted = (load_file(folder / peft.WEIGHTS_FILE) for folder in (tmp_path / "a", shown))
    assert ours.keys() == wanted.keys() and all(np.array_equal(ours[name], wanted[name]) for name in wanted)
    assert (tmp_path / "a" / peft.CONFIG_FILE).read_text() == (shown / peft.CONFIG_FILE).read_text()


def write_ours(case: str, folder: pathlib.Path) -> None:
    config, adapters = peft.load_peft(GOLDEN / f"peft_{case}", SPECS[case])
    peft.save_peft(folder, adapters, config, SPECS[case])


@pytest.mark.parametrize("case", CONFIGS)
def test_round_trip_to_the_bit(case, tmp_path):
    config, spec = CONFIGS[case], SPECS[case]
    adapters = lora.init_adapters(config, spec, jax.random.key(0), base(spec.tied))
    adapters = jax.tree.map(lambda x: x + 1 / 3, adapters)
    for layer in set(range(3)) - set(lora.adapted_layers(config, spec)):  # idle layers hold zeros in a real run
        adapters["blocks"] = jax.tree.map(lambda x, layer=layer: x.at[layer].set(0), adapters["blocks"])
    peft.save_peft(tmp_path / "a", adapters, config, spec, base="some/model")
    config_again, again = peft.load_peft(tmp_path / "a", spec)
    assert config_again == config
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True))
    assert json.loads((tmp_path / "a" / peft.CONFIG_FILE).read_text())["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_files_are_widened(dtype, tmp_path):
    config, adapters = peft.load_peft(GOLDEN / "peft_qv", SPEC)
    peft.save_peft(tmp_path / "a", adapters, config, SPEC, dtype=dtype)
    _, again = peft.load_peft(tmp_path / "a", SPEC)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, y.astype(getattr(ml_dtypes, dtype, np.float16)).astype(np.float32))


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    config, adapters = peft.load_peft(GOLDEN / "peft_qv", SPEC)
    with pytest.raises(ConfigError, match="not empty"):
        peft.save_peft(tmp_path, adapters, config, SPEC)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_rank_zero_has_nothing_to_write(tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        peft.save_peft(tmp_path / "a", {}, LoraConfig(rank=0), SPEC)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported, only 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"use_dora": "yes"}, "dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": "lm_head"}, "modules_to_save 'lm_head' is not a list"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 16}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow"),
        ({"r": "4"}, "rank"),
        ({"lora_dropout": 2}, "dropout"),
        ({"lora_alpha": 0}, "alpha"),
    ],
)
def test_options_beyond_plain_lora_are_refused_by_name(changes, message, tmp_path):
    folder = copied("all_linear", tmp_path)
    edit(folder, changes)
    with pytest.raises(ConfigError, match=message):
        peft.load_peft(folder, SPEC)


def test_options_that_change_nothing_are_accepted(tmp_path):
    folder = copied("all_linear", tmp_path)
    edit(folder, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}, "init_lora_weights": "gaussian"})
    config, _ = peft.load_peft(folder, SPEC)
    assert config == CONFIGS["all_linear"]


@pytest.mark.parametrize(
    "case, drop, tied, message",
    [
        ("modules", ["layers.1.input_layernorm"], False, r"layers.1.input_layernorm.weight is missing though other"),
        ("modules", [], True, "trains the embedding and the head apart"),
        ("modules", ["embed_tokens"], True, "trains the embedding and the head apart"),
        ("modules", ["lm_head"], True, "trains the embedding and the head apart"),
    ],
)
def test_whole_parameters_that_we_cannot_place(case, drop, tied, message, tmp_path):
    folder = copied(case, tmp_path)
    tensors = {k: v for k, v in load_file(folder / peft.WEIGHTS_FILE).items() if not any(d in k for d in drop)}
    save_file(tensors, folder / peft.WEIGHTS_FILE)
    with pytest.raises(ConfigError, match=message):
        peft.load_peft(folder, dataclasses.replace(SPEC, tied=tied))


def test_what_peft_has_no_words_for(tmp_path):
    config = LoraConfig(rank=2, targets=("q",), also_train=("q_bias",))
    spec = dataclasses.replace(SPEC, attention_bias=True)
    adapters = jax.tree.map(lambda i: np.ones(i.shape), lora.abstract_adapters(config, spec), is_leaf=is_info)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: PEFT has no name for a bias"):
        peft.save_peft(tmp_path / "a", adapters, config, spec)
    config, adapters = peft.load_peft(GOLDEN / "peft_dora", SPEC)
    adapters["blocks"]["0"]["attn"]["q"]["magnitude"][2, 1] = 0
    with pytest.raises(ConfigError, match="lora_magnitude_vector: has a column of length 0"):
        peft.save_peft(tmp_path / "a", adapters, config, SPEC)


def test_damaged_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        peft.load_peft(tmp_path, SPEC)
    folder = copied("qv", tmp_path)
    edit(folder, {"r": 8})
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \(2, 16\), the model and r need \(8, 16\)"):
        peft.load_peft(folder, SPEC)
    edit(folder, {"r": 2, "use_dora": True})
    with pytest.raises(CheckpointError, match=r"lora_A.weight has no partner .*lora_magnitude_vector"):
        peft.load_peft(folder, SPEC)
    edit(folder, {"use_dora": False, "modules_to_save": ["lm_head"]})
    with pytest.raises(CheckpointError, match="modules_to_save names lm_head"):
        peft.load_peft(folder, SPEC)
    edit(folder, {"r": 0, "modules_to_save": None})
    with pytest.raises(CheckpointError, match="r: 0"):
        peft.load_peft(folder, SPEC)
    options = json.loads((GOLDEN / "peft_qv" / peft.CONFIG_FILE).read_text())
    del options["lora_alpha"]
    (folder / peft.CONFIG_FILE).write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match="lora_alpha is missing"):
        peft.load_peft(folder, SPEC)
    (folder / peft.CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        peft.load_peft(folder, SPEC)


@pytest.mark.parametrize(
    "drop, rename, message",
    [
        (["layers.1.self_attn.q_proj.lora_A"], {}, "no partner"),
        (["layers.1.self_attn.q_proj"], {}, "layers.1.self_attn.q_proj has no adapter"),
        (["layers.1."], {}, r"layers \[0, 2\]"),
        (["q_proj"], {}, "target_modules names q_proj"),
        (["proj"], {}, "holds no adapter"),
        ([], {"model.layers.0.self_attn.q_proj": "lm_head"}, "unsupported tensor 'base_model.model.lm_head.lora_A"),
        ([], {"layers.2": "layers.3"}, "unsupported tensor"),
    ],
)
def test_adapters_that_we_cannot_describe(drop, rename, message, tmp_path):
    folder = copied("qv", tmp_path)
    tensors = {k: v for k, v in load_file(folder / peft.WEIGHTS_FILE).items() if not any(d in k for d in drop)}
    for old, new in rename.items():
        tensors = {k.replace(old, new): v for k, v in tensors.items()}
    save_file(tensors, folder / peft.WEIGHTS_FILE)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        peft.load_peft(folder, SPEC)


def copied(case: str, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(GOLDEN / f"peft_{case}", tmp_path / "adapter"))


def edit(folder: pathlib.Path, changes: dict) -> None:
    file = folder / peft.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


if __name__ == "__main__":
    for name in OURS:
        shutil.rmtree(GOLDEN / f"jaxpost_peft_{name}", ignore_errors=True)
        write_ours(name, GOLDEN / f"jaxpost_peft_{name}")
