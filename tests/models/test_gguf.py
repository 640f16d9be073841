"""GGUF in: files written by the gguf package as llama.cpp's converter lays them out, against transformers' logits."""

import pathlib
import runpy

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import assemble, decoder, gguf, llama
from jaxpost.models.gguf_reader import read_gguf

TESTS = pathlib.Path(__file__).parents[1]
LLAMAS = runpy.run_path(str(TESTS / "parity" / "llama_cases.py"))
TYPES = library.GGMLQuantizationType
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The converter's order of q and k rows: pair j of a head is rows j and j + half, brought side by side."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + j + k * half for h in range(heads) for j in range(half) for k in (0, 1)]
    return rows[order]


def write(path, case="gqa_tied", kind=TYPES.F32, metadata=(), without=(), extra=None, arch="llama", **changed):
    """A GGUF file of a case. Rows that quantisation blocks do not divide stay F32, as do vectors."""
    config = LLAMAS["config"](case)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "rope.dimension_count": config.get("head_dim", config["hidden_size"] // heads),
        "vocab_size": config["vocab_size"],
    } | changed
    if "head_dim" in config:
        values |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    writer = library.GGUFWriter(path, arch)
    for key, value in values.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(50)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 50)
    for add, key, value in metadata:
        getattr(writer, f"add_{add}")(key, value)
    tensors = {}
    for name, value in LLAMAS["weights"](config).items():
        if "q_proj" in name or "k_proj" in name:
            value = interleave(value, heads if "q_proj" in name else kv_heads)
        stem, _, suffix = name.rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        stem = ".".join(stem.split(".")[3:]) if layer else stem
        tensors[(f"blk.{layer}." if layer else "") + f"{NAMES[stem]}.{suffix}"] = value
    for name, value in (tensors | (extra or {})).items():
        if name in without:
            continue
        block = library.GGML_QUANT_SIZES[kind][0]
        use = kind if value.ndim == 2 and value.shape[-1] % block == 0 else TYPES.F32
        writer.add_tensor(name, library.quantize(value, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(spec, params, case) -> np.ndarray:
    tokens = jnp.asarray(LLAMAS["tokens"](case))
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _, _ = jax.jit(lambda p: decoder.apply(spec, p, tokens, positions, jnp.ones_like(tokens)))(params)
    return np.asarray(hidden @ decoder.head(params).T)


def llama3_divisors(theta: float, factor: float, original: int, head_dim: int) -> np.ndarray:
    """As the converter computes them, frequency by frequency."""
    out = []
    for j in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * j / head_dim)
        if wavelength < original / 4.0:
            out.append(1.0)
        elif wavelength > original / 1.0:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


SCALED = {
    "linear_legacy_type": [
        ("string", "llama.rope.scaling.type", "linear"),
        ("float32", "llama.rope.scaling.factor", 2.5),
    ],
    "yarn": [
        ("string", "llama.rope.scaling.type", "yarn"),
        ("float32", "llama.rope.scaling.factor", 4.0),
        ("uint32", "llama.rope.scaling.original_context_length", 16),
    ],
    "llama3": [
        ("float32", "llama.rope.freq_base", 500000.0),
        ("uint32", "llama.rope.scaling.original_context_length", 64),
    ],
}


@pytest.mark.parametrize("case", ["gqa_tied", "odd_head_dim", "biases", "linear_legacy_type", "yarn", "llama3"])
def test_spec_and_weights_of_a_converted_model(case, tmp_path):
    """Every tensor equals the Hugging Face one bit for bit, and so does the spec: the golden logits follow."""
    extra = {}
    if case == "llama3":
        extra = {"rope_freqs.weight": llama3_divisors(500000.0, 8.0, 64, 8)}
    file = write(tmp_path / "x.gguf", case, metadata=SCALED.get(case, ()), extra=extra)
    spec = gguf.read_spec(file)
    assert spec == llama.config_from_hf(LLAMAS["config"](case))
    read = LLAMAS["weights"](LLAMAS["config"](case)).__getitem__
    expected = assemble.build(assemble.leaves(spec, llama.tensor_name), read, spec, np.float32)
    jax.tree.map(np.testing.assert_array_equal, gguf.load_gguf(file, "float32"), expected)


def test_logits_equal_transformers(tmp_path):
    golden = np.load(TESTS / "golden" / "models_llama.npz")["gqa_tied"]
    file = write(tmp_path / "x.gguf")
    params = gguf.load_gguf(file, "float32")
    np.testing.assert_allclose(logits(gguf.read_spec(file), params, "gqa_tied"), golden, atol=2e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_stored_types(kind, tmp_path):
    """What comes out is what the package says the blocks mean, reordered like the plain weights."""
    kind = TYPES[kind]
    found = gguf.load_gguf(write(tmp_path / "x.gguf", kind=kind), "float32")
    plain = gguf.load_gguf(write(tmp_path / "y.gguf"), "float32")
    q = np.asarray(plain["blocks"]["0"]["attn"]["q"][0]).T
    expected = library.dequantize(library.quantize(q, kind), kind).T  # rows are quantised one by one
    np.testing.assert_array_equal(found["blocks"]["0"]["attn"]["q"][0], expected)
    error = np.abs(np.asarray(found["embed"]) - np.asarray(plain["embed"])).max()
    assert 0 < error < {"F16": 2e-3, "BF16": 5e-3, "Q8_0": 1e-2}.get(kind.name, 0.1)
    np.testing.assert_array_equal(found["final_norm"], plain["final_norm"])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q2_K", "IQ4_XS"])
def test_k_quants_are_read(kind, tmp_path):
    """The package cannot write these: random blocks stand for them. A row of 256 is one block."""
    kind = TYPES[kind]
    block, size = library.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (4, size), np.uint8)  # small bytes: finite fp16 scales
    writer = library.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "x.gguf").tensors["w"]
    assert tensor.shape == (4, block)
    np.testing.assert_array_equal(tensor.values(), library.dequantize(data, kind))


def test_placed_on_a_mesh(tmp_path):
    file = write(tmp_path / "x.gguf", kind=TYPES.Q8_0)
    plain = gguf.load_gguf(file, "bfloat16")
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    place = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "tensor" if x.ndim > 1 else None))
    placed = gguf.load_gguf(file, "bfloat16", jax.tree.map(place, plain))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), placed, plain)
    assert placed["embed"].addressable_shards[0].data.shape == (64, 4)


def test_metadata_reads_like_the_packages_reader(tmp_path):
    values = [("bool", "x.flag", True), ("string", "x.name", "naïve"), ("int64", "x.n", -7)]
    file = write(tmp_path / "x.gguf", metadata=values)
    found = read_gguf(file).metadata
    for key, field in library.GGUFReader(file).fields.items():
        if not key.startswith("GGUF."):
            np.testing.assert_array_equal(found[key], field.contents())
    assert (found["x.flag"], found["x.name"], found["x.n"]) == (True, "naïve", -7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "gemma3"}, "architecture 'gemma3' is not known; known: llama"),
        ({"metadata": [("float32", "llama.logit_scale", 2.0)]}, "unknown metadata llama.logit_scale"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"rope.dimension_count": 4}, "dimensions differ"),
        ({"attention.head_count": 0}, "head_count is '0', expected one number"),
        ({"block_count": 1_000_000}, "block_count is '1000000'"),
        ({"metadata": [("string", "llama.rope.scaling.type", "longrope")]}, "rope scaling 'longrope'"),
        ({"metadata": [("string", "llama.rope.scaling.type", "yarn")]}, "rope.scaling.factor is missing"),
        ({"extra": {"rope_freqs.weight": np.full(4, 3.0, np.float32)}}, "does not follow Llama 3's"),
        ({"metadata": [("string", "llama.rope.freq_base", "many")]}, "freq_base is 'many'"),
    ],
)
def test_refused_metadata(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gguf.load_gguf(write(tmp_path / "x.gguf", **change), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": ("blk.1.ffn_up.weight",)}, "missing tensor.*blk.1.ffn_up.weight"),
        ({"without": ("token_embd.weight",)}, "missing tensor token_embd.weight"),
        ({"extra": {"blk.9.x": np.ones(4, np.float32)}}, "unexpected tensor.*blk.9.x"),
        ({"feed_forward_length": 40}, r"ffn_down.weight is \[32, 48\], the metadata says \[32, 40\]"),
    ],
)
def test_wrong_tensors(change, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        gguf.load_gguf(write(tmp_path / "x.gguf", **change), "float32")


def test_not_a_gguf_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        gguf.read_spec(tmp_path / "none.gguf")
    (tmp_path / "x.gguf").write_bytes(b"PK\3\4 something else")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        gguf.read_spec(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\0\0\0\3" + bytes(16))
    with pytest.raises(CheckpointError, match="GGUF version .*little-endian"):
        gguf.read_spec(tmp_path / "x.gguf")


def test_random_damage_is_an_error_or_harmless(tmp_path):
    """Cut or flip bytes of the header: only ever our errors, never a crash or a hang."""
    file = write(tmp_path / "x.gguf", "odd_sizes")
    good = file.read_bytes()
    header = min(t.offset for t in read_gguf(file).tensors.values())
    random = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        if random.random() < 0.2:
            del bad[random.integers(len(bad)) :]
        else:
            for _ in range(random.integers(1, 4)):
                bad[random.integers(header)] = random.integers(256)
        file.write_bytes(bad)
        try:
            content = read_gguf(file)
            gguf.spec_of(content, "x")
            for tensor in content.tensors.values():
                tensor.values()
        except (ConfigError, CheckpointError) as error:
            assert len(str(error)) < 1000
