"""The Llama family against transformers: logits of every kind of small config, configs in both spellings, refusals."""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models import assemble, decoder, hf, llama
from jaxpost.models.spec import DecoderSpec, LayerKind
from jaxpost.ops.rope import RopeSpec

TESTS = pathlib.Path(__file__).parents[1]
LLAMAS = runpy.run_path(str(TESTS / "parity" / "llama_cases.py"))
CASES = tuple(LLAMAS["CASES"])
SAVED = json.loads((TESTS / "golden" / "models_llama.json").read_text())
BASE = LLAMAS["config"]("llama2_mha_untied")
CONFIG = BASE | {"rope_theta": 10000.0}


@pytest.fixture(scope="module")
def golden() -> dict:
    return dict(np.load(TESTS / "golden" / "models_llama.npz"))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, golden):
    spec = llama.config_from_hf(LLAMAS["config"](case))
    read = LLAMAS["weights"](LLAMAS["config"](case)).__getitem__
    params = assemble.build(assemble.leaves(spec, llama.tensor_name), read, spec, np.float32)
    tokens = jnp.asarray(LLAMAS["tokens"](case))
    positions = jnp.arange(tokens.shape[1])[None]

    @jax.jit
    def logits(params, tokens, positions):
        hidden, _, _ = decoder.apply(spec, params, tokens, positions, jnp.ones_like(tokens))
        return hidden @ decoder.head(params).T

    np.testing.assert_allclose(logits(params, tokens, positions), golden[case], atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_config_saved_by_transformers_reads_as_the_same_spec(case):
    assert hf.spec_from_config(SAVED[case], "saved") == llama.config_from_hf(LLAMAS["config"](case))


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    spec = llama.config_from_hf(LLAMAS["config"](case))
    assert llama.config_from_hf(llama.config_to_hf(spec, dtype="bfloat16")) == spec


def test_published_configs():
    """Attributes as the hub's config.json files spell them."""
    llama31 = llama.config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
        }
    )  # fmt: skip
    assert (llama31.head_dim, llama31.num_kv_heads, llama31.tied) == (128, 8, False)
    assert llama31.rope == (RopeSpec(500000.0, "llama3", 8.0, original_max_positions=8192),)
    smollm2 = llama.config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
            "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
            "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers.js_config": {"dtype": "q4"},
            "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 49152,
        }
    )  # fmt: skip
    assert (smollm2.head_dim, smollm2.tied, smollm2.rope) == (64, True, (RopeSpec(100000.0),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 512, "logit_scale": 2.0}, "logit_scale, sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": "32"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": 33}, "not a multiple of num_attention_heads"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be an integer in 1..10000"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "depend on a row's length"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "depend on a row's length"),
        ({"rope_scaling": {"rope_type": "magic"}}, "unknown rope_type 'magic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "unknown attribute.* mscale"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor must be a positive number"),
        ({"rope_scaling": "linear"}, "must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "disagree"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta 5.0 here, 10000.0 outside"),
    ],
)
def test_refusals_name_the_attribute(change, message):
    with pytest.raises(ConfigError, match=message):
        llama.config_from_hf(CONFIG | change)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_missing_attribute(key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        llama.config_from_hf({k: v for k, v in CONFIG.items() if k != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "never run"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not known; known: LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "known: LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(ConfigError, match=f"somewhere: .*{message}"):
        hf.spec_from_config(CONFIG | change, "somewhere")


def test_a_model_that_is_no_llama_is_not_written_as_one():
    spec = llama.config_from_hf(CONFIG)
    for change, name in (
        ({"final_softcap": 30.0}, "final_softcap"),
        ({"pattern": (LayerKind(window=8),)}, "pattern"),
        ({"rope": (RopeSpec(), RopeSpec(theta=1e6)), "attn_softcap": 50.0}, "rope, attn_softcap"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be written as LlamaForCausalLM: .*{name}"):
            llama.config_to_hf(dataclasses.replace(spec, **change), dtype="float32")


def test_layout_of_equal_layers_does_not_matter_for_export():
    """Prefix layers and a pattern of equal kinds are our layout, not the model's."""
    spec = llama.config_from_hf(CONFIG | {"num_hidden_layers": 6})
    other = dataclasses.replace(spec, num_prefix=1, pattern=(LayerKind(), LayerKind()))
    assert llama.config_to_hf(other, dtype="float32") == llama.config_to_hf(spec, dtype="float32")


def test_every_tensor_has_one_place():
    spec = DecoderSpec(
        vocab_size=16, d_model=8, num_layers=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8,
        pattern=(LayerKind(window=4), LayerKind(), LayerKind()), num_prefix=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    plan = assemble.leaves(spec, llama.tensor_name)
    names = [name for leaf in plan for name in leaf.names]
    assert len(names) == len(set(names)) == 3 + 8 * 16
    leaf = next(leaf for leaf in plan if leaf.path == ("blocks", "1", "attn", "k"))
    assert leaf.names == tuple(f"model.layers.{i}.self_attn.k_proj.weight" for i in (3, 6))
    assert (leaf.shape, leaf.tensor_shape) == ((2, 8, 4), (4, 8))
