"""A tiny Llama whose weights follow from a formula, so that both sides of a golden file can make it. Numpy alone."""

import numpy as np

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}
TOKENS = [[5, 1, 44, 3, 17, 29, 2, 8, 40, 11], [7, 7, 23, 0, 31, 46, 12, 9, 1, 20]]


def weights(tied: bool = False) -> dict[str, np.ndarray]:
    """HF name -> f32 array as HF stores it, [out, in]. RandomState's stream is frozen by numpy's policy.

    tied: the same model without a head of its own.
    """
    random = np.random.RandomState(20)
    d, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    q = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return 1 + random.uniform(-0.2, 0.2, shape).astype(np.float32)
        return (random.uniform(-1, 1, shape) * np.sqrt(3 / shape[-1])).astype(np.float32)

    values = {name: draw(shape) for name, shape in shapes.items()}
    return {name: value for name, value in values.items() if not (tied and name == "lm_head.weight")}
