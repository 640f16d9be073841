"""Small Llamas of every kind, with weights from a formula that both sides of a golden file compute. Numpy alone."""

from __future__ import annotations

import zlib

import numpy as np

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama2_mha_untied": {"rms_norm_eps": 1e-6},
    "gqa_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama3": {
        "num_key_value_heads": 2,
        "rope_theta": None,
        "rope_parameters": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 64},
    },
    "llama3_old_spelling": {"rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "linear_legacy_type": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "yarn": {"max_position_embeddings": 64, "rope_scaling": YARN},
    "yarn_mscale": {
        "max_position_embeddings": 64,
        "rope_parameters": YARN
        | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    },
    "odd_head_dim": {"hidden_size": 48, "head_dim": 20, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "odd_sizes": {
        "vocab_size": 37,
        "hidden_size": 30,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 41,
        "num_hidden_layers": 3,
    },
}
LENGTH = 40


def config(case: str) -> dict:
    """config.json of a case, in the spelling under test."""
    return {k: v for k, v in (BASE | CASES[case]).items() if v is not None}


def tokens(case: str) -> np.ndarray:
    """i32[1, LENGTH], every case its own."""
    return (_hash(LENGTH, case + ".tokens") % config(case)["vocab_size"]).astype(np.int32)[None]


def weights(config: dict) -> dict[str, np.ndarray]:
    """HF name -> f32 array as HF stores it, [out, in]; uniform, from integer arithmetic, so equal everywhere."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or d // heads
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        for group, parts, biased in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
            shapes |= {f"{layer}{group}.{name}.weight": shape for name, shape in parts.items()}
            if config.get(biased):
                shapes |= {f"{layer}{group}.{name}.bias": shape[:1] for name, shape in parts.items()}
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    unit = (_hash(int(np.prod(shape)), name) / 2.0**31 - 1).reshape(shape)  # in [-1, 1)
    if len(shape) == 1:
        return (0.5 * unit if name.endswith("bias") else 1 + 0.2 * unit).astype(np.float32)
    return (unit * np.sqrt(3 / shape[-1])).astype(np.float32)


def _hash(count: int, name: str) -> np.ndarray:
    """u32[count] from a counter and a name, mixed by multiply and shift."""
    x = (np.arange(count, dtype=np.uint64) + zlib.crc32(name.encode())) * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return (x >> np.uint64(32)).astype(np.uint32)
