"""GGUF files as a source of weights (architecture llama): any of gguf's quantisations, dequantised tensor by tensor."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import assemble
from jaxpost.models.gguf_reader import GgufFile, read_gguf
from jaxpost.models.spec import DecoderSpec
from jaxpost.ops.rope import RopeSpec, frequencies

ROOT_NAMES = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    **{f"attn.{x}": f"attn_{y}.weight" for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    **{f"attn.{x}_bias": f"attn_{y}.bias" for x, y in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    **{f"mlp.{x}": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
    **{f"mlp.{x}_bias": f"ffn_{x}.bias" for x in ("gate", "up", "down")},
}
ROPE_FREQS = "rope_freqs.weight"  # per-pair divisors: how llama.cpp stores Llama 3's scaling
# The converter writes only the divisors; Meta's published constants give the rest, and are checked against them.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ORIGINAL = 8192

PREFIX = "llama."
MAX_LAYERS, MAX_SIZE = 10_000, 1 << 30  # above this a file is damaged or hostile
HARMLESS = frozenset(  # metadata under llama. that changes no weight and no logit, or that is read below
    "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count "
    "attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length attention.value_length "
    "rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scaling.original_context_length "
    "rope.scaling.attn_factor rope.scaling.finetuned rope.scale_linear expert_count expert_used_count "
    "tensor_data_layout".split()
)


def tensor_name(path: str, layer: int | None = None) -> str:
    """GGUF name of the tensor at a dotted path, e.g. ("attn.q", 3) -> "blk.3.attn_q.weight"."""
    return ROOT_NAMES[path] if layer is None else f"blk.{layer}.{LAYER_NAMES[path]}"


def read_spec(file: str | os.PathLike) -> DecoderSpec:
    """The DecoderSpec of a GGUF file's metadata; ConfigError for other architectures."""
    return spec_of(read_gguf(file), str(file))


def spec_of(content: GgufFile, where: str) -> DecoderSpec:
    """The DecoderSpec of a parsed file; errors begin with `where`."""
    name = content.metadata.get("general.architecture")
    if name != "llama":
        raise ConfigError(f"{where}: GGUF architecture {name!r} is not known; known: llama")
    given = {key.removeprefix(PREFIX): v for key, v in content.metadata.items() if key.startswith(PREFIX)}
    if unknown := sorted(set(given) - HARMLESS):
        raise ConfigError(f"{where}: unknown metadata {', '.join(PREFIX + key for key in unknown)}")
    if given.get("expert_count"):
        raise ConfigError(f"{where}: mixture-of-experts GGUF files are not supported")

    def size(key: str, default: int | None = None, high: int = MAX_SIZE) -> int:
        return _value(given, key, where, int, default, high)

    tensors = content.tensors
    if (embed := ROOT_NAMES["embed"]) not in tensors:
        raise CheckpointError(f"{where}: missing tensor {embed}")
    heads, width = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", width // heads)
    if size("attention.value_length", head_dim) != head_dim or size("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{where}: key, value and rotary dimensions differ; only one head_dim is supported")
    divisors = tensors[ROPE_FREQS].values() if ROPE_FREQS in tensors else None
    try:
        return DecoderSpec(
            vocab_size=tensors[embed].shape[0],
            d_model=width,
            num_layers=size("block_count", high=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=size("attention.head_count_kv", heads),
            head_dim=head_dim,
            d_ff=size("feed_forward_length"),
            norm_eps=_value(given, "attention.layer_norm_rms_epsilon", where, float),
            tied=ROOT_NAMES["head"] not in tensors,
            rope=(_rope(given, head_dim, divisors, where),),
            attention_bias=tensor_name("attn.q_bias", 0) in tensors,
            mlp_bias=tensor_name("mlp.gate_bias", 0) in tensors,
            max_positions=size("context_length"),
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _value(given: dict, key: str, where: str, kind: type, default: Any = None, high: float = MAX_SIZE) -> Any:
    """A positive number of the metadata. A float32 reads as its shortest decimal: 9.999999747378752e-06 means 1e-5."""
    if key not in given and default is None:
        raise ConfigError(f"{where}: metadata {PREFIX}{key} is missing")
    found = given.get(key, default)
    if type(found) not in (int, kind) or not 0 < found <= high:
        raise ConfigError(f"{where}: metadata {PREFIX}{key} is {str(found)[:50]!r}, expected one number in 0..{high:g}")
    return _short(found) if kind is float else found


def _short(value: float) -> float:
    return float(str(np.float32(value)))


def _rope(given: dict[str, Any], head_dim: int, divisors: np.ndarray | None, where: str) -> RopeSpec:
    theta = _value(given, "rope.freq_base", where, float, 10000.0)
    kind = given.get("rope.scaling.type", "none")
    if divisors is not None:
        if kind not in ("none", "llama3"):
            raise ConfigError(f"{where}: both {ROPE_FREQS} and rope scaling {kind!r}")
        original = _value(given, "rope.scaling.original_context_length", where, int, LLAMA3_ORIGINAL)
        return _llama3(theta, head_dim, divisors, original, where)
    if kind == "none":
        linear = _value(given, "rope.scale_linear", where, float, 1.0)
        return RopeSpec(theta) if linear == 1.0 else RopeSpec(theta, "linear", linear)
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"{where}: rope scaling {str(kind)[:50]!r} is not supported")
    factor = _value(given, "rope.scaling.factor", where, float)
    if kind == "linear":
        return RopeSpec(theta, "linear", factor)
    # llama.cpp multiplies attn_factor onto the paper's 0.1 ln(factor) + 1.
    if _value(given, "rope.scaling.attn_factor", where, float, 1.0) != 1.0:
        raise ConfigError(f"{where}: metadata {PREFIX}rope.scaling.attn_factor other than 1 is not supported")
    original = _value(given, "rope.scaling.original_context_length", where, int)
    return RopeSpec(theta, "yarn", factor, original_max_positions=original)


def _llama3(theta: float, head_dim: int, divisors: np.ndarray, original: int, where: str) -> RopeSpec:
    """Llama 3's scaling, recovered from the divisor of each frequency; refused where it gives back others."""
    found = RopeSpec(theta, "llama3", _short(divisors.max()), original_max_positions=original, **LLAMA3)
    ours = frequencies(RopeSpec(theta), head_dim)[0] / frequencies(found, head_dim)[0]
    if divisors.shape != ours.shape or not np.allclose(divisors, ours, rtol=1e-4):
        raise ConfigError(f"{where}: {ROPE_FREQS} does not follow Llama 3's published scaling; not supported")
    return found


def load_gguf(file: str | os.PathLike, dtype: Any, shardings: Any = None, spec: DecoderSpec | None = None) -> dict:
    """The parameter tree of a GGUF file in `dtype`, placed as `shardings` (a tree like it) says, leaf by leaf."""
    content = read_gguf(file)
    spec = spec_of(content, str(file)) if spec is None else spec
    plan = assemble.leaves(spec, tensor_name)
    found = {name: tensor for name, tensor in content.tensors.items() if name != ROPE_FREQS}
    wanted = {name: leaf for leaf in plan for name in leaf.names}
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{file}: missing tensor(s): {', '.join(missing[:5])}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{file}: unexpected tensor(s): {', '.join(extra[:5])}")
    for name, leaf in wanted.items():
        if found[name].shape != leaf.tensor_shape:
            shapes = f"{list(found[name].shape)}, the metadata says {list(leaf.tensor_shape)}"
            raise CheckpointError(f"{file}: {name} is {shapes}")
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "q_bias": spec.num_heads, "k_bias": spec.num_kv_heads}

    def read(name: str) -> np.ndarray:
        values, last = found[name].values(), wanted[name].path[-1]
        return unpermute(values, heads[last]) if last in heads else values

    # Every slice of a sharded leaf asks for the same tensors: dequantise each once.
    cached = read if shardings is None else functools.lru_cache(maxsize=spec.num_layers)(read)
    return assemble.build(plan, cached, spec, dtype, shardings)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the converter's reordering of q and k rows, from interleaved rotary pairs back to two halves a head."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
