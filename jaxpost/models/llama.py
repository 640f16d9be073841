"""The Llama family (2, 3, 3.1, 3.2, SmolLM2): Hugging Face config <-> DecoderSpec, and the names of its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxpost.errors import ConfigError
from jaxpost.models.spec import DecoderSpec, LayerKind
from jaxpost.ops.rope import RopeSpec

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"

# Path in our tree -> name in the file. Matrices of a layer are transposed: [in, out] here, [out, in] there.
ROOT_NAMES = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    **{f"attn.{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    **{f"attn.{x}_bias": f"self_attn.{x}_proj.bias" for x in "qkvo"},
    **{f"mlp.{x}": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    **{f"mlp.{x}_bias": f"mlp.{x}_proj.bias" for x in ("gate", "up", "down")},
}
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer that old exports carry; follows from the config


def tensor_name(path: str, layer: int | None = None) -> str:
    """File name of the tensor at a dotted path, e.g. ("attn.q", 3) -> "model.layers.3.self_attn.q_proj.weight"."""
    return ROOT_NAMES[path] if layer is None else f"model.layers.{layer}.{LAYER_NAMES[path]}"


# Attributes that change neither weights nor logits. Everything else that is not read below is refused by name.
HARMLESS = frozenset(
    "architectures model_type dtype torch_dtype transformers_version use_cache initializer_range pretraining_tp "
    "bos_token_id eos_token_id pad_token_id unk_token_id tokenizer_class is_llama_config transformers.js_config "
    "unsloth_fixed unsloth_version id2label label2id num_labels problem_type output_attentions output_hidden_states "
    "return_dict torchscript use_bfloat16 chunk_size_feed_forward is_decoder finetuning_task task_specific_params "
    "tie_last_hidden_states attn_implementation max_length min_length do_sample temperature top_p top_k num_beams "
    "repetition_penalty length_penalty no_repeat_ngram_size num_return_sequences early_stopping".split()
)
# Attributes that must have this value (or be absent or null): the model below computes exactly that.
FIXED = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
READ = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias mlp_bias rope_theta "
    "rope_scaling rope_parameters".split()
)
MAX_LAYERS, MAX_SIZE = 10_000, 1 << 30  # above this a config is damaged or hostile


def config_from_hf(config: Mapping[str, Any]) -> DecoderSpec:
    """The DecoderSpec of a Llama config.json; ConfigError on anything that would not be computed as it says."""
    given = {key: value for key, value in config.items() if value is not None}
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise ConfigError(f"config.json: {key} {given[key]!r} is not supported, only {value!r}")
    unknown = [k for k in given if k not in HARMLESS | READ and k not in FIXED and not k.startswith("_")]
    if unknown:
        raise ConfigError(f"config.json: unknown attribute(s) for {MODEL_TYPE}: {', '.join(sorted(unknown))}")
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"config.json: hidden_act {given['hidden_act']!r} is not supported, only 'silu'")
    heads, width = _int(given, "num_attention_heads"), _int(given, "hidden_size")
    if "head_dim" not in given and width % heads:
        raise ConfigError(f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    positions = _int(given, "max_position_embeddings", 2048)
    try:
        return DecoderSpec(
            vocab_size=_int(given, "vocab_size"),
            d_model=width,
            num_layers=_int(given, "num_hidden_layers", high=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=_int(given, "num_key_value_heads", heads),
            head_dim=_int(given, "head_dim", width // heads),
            d_ff=_int(given, "intermediate_size"),
            norm_eps=_number(given, "rms_norm_eps", 1e-6),
            tied=_bool(given, "tie_word_embeddings", False),
            rope=(rope_from_hf(given, positions),),
            attention_bias=_bool(given, "attention_bias", False),
            mlp_bias=_bool(given, "mlp_bias", False),
            max_positions=positions,
        )
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from None


def rope_from_hf(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """RopeSpec from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before); both must agree."""
    theta = _number(config, "rope_theta", None)
    spellings = [key for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    found = {_rope(config[key], key, theta, max_positions) for key in spellings}
    if not found:
        return RopeSpec(theta=theta or 10000.0)
    if len(found) > 1:
        raise ConfigError("config.json: rope_parameters and rope_scaling disagree; remove one")
    return found.pop()


ROPE_KEYS = {  # kind -> what may stand beside rope_type, rope_theta and partial_rotary_factor
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
    + ("mscale", "mscale_all_dim", "truncate"),
}


def _rope(scaling: Any, key: str, theta: float | None, max_positions: int) -> RopeSpec:
    what = f"config.json: {key}"
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{what} must be an object, not {scaling!r}")
    given = {k: v for k, v in scaling.items() if v is not None}
    kind = given.pop("rope_type", None) or given.get("type", "default")  # "type": the spelling before 4.45
    given.pop("type", None)
    if kind in ("dynamic", "longrope", "su"):
        raise ConfigError(
            f"{what}: {kind!r} frequencies depend on a row's length, so packing and caches would change results; "
            "not supported"
        )
    if kind not in ROPE_KEYS:
        raise ConfigError(f"{what}: unknown rope_type {kind!r}; known: {', '.join(ROPE_KEYS)}")
    inner = _number(given, "rope_theta", None, what)
    if theta is not None and inner is not None and theta != inner:
        raise ConfigError(f"{what}: rope_theta {inner} here, {theta} outside")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{what}: partial_rotary_factor is not supported, only 1.0")
    given.pop("rope_theta", None)
    if unknown := sorted(set(given) - set(ROPE_KEYS[kind])):
        raise ConfigError(f"{what}: unknown attribute(s) for rope_type {kind!r}: {', '.join(unknown)}")
    base = {"theta": inner or theta or 10000.0, "kind": kind}
    if kind == "default":
        return RopeSpec(**base)
    base["factor"] = _number(given, "factor", what=what)
    if kind == "linear":
        return RopeSpec(**base)
    if kind == "llama3":
        low, high = (_number(given, name, what=what) for name in ("low_freq_factor", "high_freq_factor"))
        if low >= high:
            raise ConfigError(f"{what}: low_freq_factor {low} must be below high_freq_factor {high}")
        original = _int(given, "original_max_position_embeddings", what=what)
        return RopeSpec(**base, low_freq_factor=low, high_freq_factor=high, original_max_positions=original)
    return RopeSpec(
        **base,
        original_max_positions=_int(given, "original_max_position_embeddings", max_positions, what=what),
        attention_factor=_yarn_attention_factor(given, base["factor"], what),
        beta_fast=_number(given, "beta_fast", 32.0, what),
        beta_slow=_number(given, "beta_slow", 1.0, what),
        truncate=_bool(given, "truncate", True, what),
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float, what: str) -> float | None:
    """Explicit, or the ratio of the two mscale terms where both are given and non-zero, else None (the paper's)."""
    if "attention_factor" in given:
        return _number(given, "attention_factor", what=what)
    top, bottom = given.get("mscale"), given.get("mscale_all_dim")
    if not (top and bottom):
        return None
    scale = math.log(factor) if factor > 1 else 0.0
    top, bottom = _number(given, "mscale", what=what), _number(given, "mscale_all_dim", what=what)
    return (0.1 * top * scale + 1.0) / (0.1 * bottom * scale + 1.0)


def config_to_hf(spec: DecoderSpec, *, dtype: str) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 load; ConfigError where the spec is no Llama. dtype: "bfloat16", .."""
    rope = spec.rope[0]
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta} | _rope_fields(rope)
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_positions or 2048,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied,
        "attention_bias": spec.attention_bias,
        "mlp_bias": spec.mlp_bias,
        "attention_dropout": 0.0,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,  # read by transformers 4
        "rope_parameters": parameters,  # read by transformers 5
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    # The inverse of the reader is the definition of what can be written: a field it does not give back is no Llama's.
    plain = set(spec.pattern) == {LayerKind()}
    wanted = dataclasses.replace(spec, num_prefix=0, max_positions=config["max_position_embeddings"])
    wanted = dataclasses.replace(wanted, pattern=(LayerKind(),)) if plain else wanted
    found = config_from_hf(config)
    names = [f.name for f in dataclasses.fields(spec) if getattr(found, f.name) != getattr(wanted, f.name)]
    if names:
        raise ConfigError(f"this model cannot be written as {ARCHITECTURE}: {', '.join(names)}")
    return config


def _rope_fields(rope: RopeSpec) -> dict[str, Any]:
    values = {
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
        "truncate": rope.truncate,
    }
    return {k: values[k] for k in ROPE_KEYS[rope.kind] if values.get(k) is not None}


_REQUIRED = object()


def _int(config: Mapping, key: str, default: Any = _REQUIRED, what: str = "config.json", high: int = MAX_SIZE) -> int:
    value = config.get(key, default)
    if value is _REQUIRED:
        raise ConfigError(f"{what}: {key} is missing")
    if type(value) is not int or not 1 <= value <= high:
        raise ConfigError(f"{what}: {key} must be an integer in 1..{high}, not {str(value)[:50]!r}")
    return value


def _number(config: Mapping, key: str, default: Any = _REQUIRED, what: str = "config.json") -> Any:
    value = config.get(key, default)
    if value is _REQUIRED:
        raise ConfigError(f"{what}: {key} is missing")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{what}: {key} must be a positive number, not {str(value)[:50]!r}")
    return float(value)


def _bool(config: Mapping, key: str, default: bool, what: str = "config.json") -> bool:
    value = config.get(key, default)
    if type(value) is not bool:
        raise ConfigError(f"{what}: {key} must be true or false, not {str(value)[:50]!r}")
    return value
