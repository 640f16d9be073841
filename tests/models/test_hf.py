"""Hugging Face folders in and out: bit-equal round trips, placement on a mesh, and every way a folder can be wrong."""

import dataclasses
import json
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import assemble, hf, llama
from jaxpost.models.spec import DecoderSpec, LayerKind, abstract_params, is_info

TESTS = pathlib.Path(__file__).parents[1]
LLAMAS = runpy.run_path(str(TESTS / "parity" / "llama_cases.py"))
CONFIG = LLAMAS["config"]("biases")
SPEC = llama.config_from_hf(CONFIG)
INDEX = "model.safetensors.index.json"


def tensors(config: dict = CONFIG) -> dict[str, np.ndarray]:
    return LLAMAS["weights"](config)


def folder(path: pathlib.Path, config: dict = CONFIG, weights: dict | None = None) -> pathlib.Path:
    """A folder as another program would write it."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, path / "model.safetensors")
    return path


def params(dtype=np.float32) -> dict:
    return assemble.build(assemble.leaves(SPEC, llama.tensor_name), tensors().__getitem__, SPEC, dtype)


def random_tree(spec: DecoderSpec) -> dict:
    random = np.random.default_rng(0)
    draw = lambda info: random.standard_normal(info.shape, np.float32)
    return jax.tree.map(draw, abstract_params(spec), is_leaf=is_info)


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(bits, a), jax.tree.map(bits, b))


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_read_what_the_library_wrote(tmp_path, dtype):
    """Files of any float dtype are widened exactly."""
    stored = {name: value.astype(hf.DTYPES[dtype]) for name, value in tensors().items()}
    found = hf.load_hf(folder(tmp_path, weights=stored), "float32")
    q = np.asarray(found["blocks"]["0"]["attn"]["q"])
    np.testing.assert_array_equal(q[1], stored["model.layers.1.self_attn.q_proj.weight"].T.astype(np.float32))
    assert q.dtype == np.float32 and q.shape == (2, 32, 32)
    np.testing.assert_array_equal(found["embed"], stored["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "shard_bytes"),
    [("float32", 5e9), ("bfloat16", 5e9), ("float16", 9_000), ("float32", 9_000), ("bfloat16", 1)],
)
def test_round_trip_is_bit_equal(tmp_path, dtype, shard_bytes):
    ours = params(hf.DTYPES[dtype])
    out = hf.save_hf(ours, SPEC, tmp_path / "out", max_shard_bytes=shard_bytes)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    if shard_bytes == 5e9:
        assert files == ["model.safetensors"] and not (out / INDEX).exists()
    else:
        index = json.loads((out / INDEX).read_text())
        assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
        assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(ours))
        assert len(files) == len(index["weight_map"]) or shard_bytes > 1
    merged = {name: value for file in files for name, value in load_file(out / file).items()}
    for name, value in tensors().items():  # the library reads back what another program would have stored
        np.testing.assert_array_equal(bits(merged[name]), bits(value.astype(hf.DTYPES[dtype])))
    assert merged.keys() == tensors().keys()
    assert hf.read_spec(out) == SPEC
    assert_same_bits(hf.load_hf(out, dtype), ours)


def test_layers_anywhere_in_the_tree_survive_the_round_trip(tmp_path):
    """Prefix layers and a remainder after the repeats, from and to numpy trees too."""
    spec = dataclasses.replace(SPEC, num_layers=6, num_prefix=1, pattern=(LayerKind(), LayerKind()))
    tree = random_tree(spec)
    out = hf.save_hf(tree, spec, tmp_path / "out")
    assert_same_bits(hf.load_hf(out, "float32", spec=spec), tree)
    plain = hf.load_hf(out, "float32")["blocks"]["0"]["attn"]["q"]
    np.testing.assert_array_equal(plain[0], tree["prefix"][0]["attn"]["q"])
    np.testing.assert_array_equal(plain[4], tree["blocks"]["1"]["attn"]["q"][1])
    np.testing.assert_array_equal(plain[5], tree["tail"][0]["attn"]["q"])


def mesh_shardings(spec: DecoderSpec) -> dict:
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    axes = {"embed": "fsdp", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
    return jax.tree.map(
        lambda info: NamedSharding(mesh, PartitionSpec(*(axes.get(a) for a in info.axes))),
        abstract_params(spec),
        is_leaf=is_info,
    )


def test_weights_are_born_sharded_and_saved_from_shards(tmp_path, monkeypatch):
    shapes = []
    read_slice = assemble._read_slice

    def spy(leaf, *rest):
        out = read_slice(leaf, *rest)
        shapes.append((leaf.path, out.shape))
        return out

    monkeypatch.setattr(assemble, "_read_slice", spy)
    shardings = mesh_shardings(SPEC)
    source = folder(tmp_path / "in")
    placed = hf.load_hf(source, "float32", shardings)
    assert_same_bits(placed, params())
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), placed, shardings)
    gates = [shape for path, shape in shapes if path == ("blocks", "0", "mlp", "gate")]
    assert gates == [(2, 16, 12)] * 8 + [(2, 32, 48)]  # eight slices, then params() read it whole
    norms = [shape for path, shape in shapes if path == ("final_norm",)]
    assert norms == [(32,)] * 2  # held by all devices, read once
    assert_same_bits(hf.load_hf(hf.save_hf(placed, SPEC, tmp_path / "out"), "float32"), params())


@pytest.mark.parametrize("sharded", [False, True])
def test_loaded_weights_can_be_donated(tmp_path, sharded):
    """A buffer that aliased the host copy would be kept and silently copied instead."""
    found = hf.load_hf(folder(tmp_path), "float32", mesh_shardings(SPEC) if sharded else None)
    gate = found["blocks"]["0"]["mlp"]["gate"]
    before = gate.addressable_shards[0].data.unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(gate)
    assert gate.is_deleted() and after.addressable_shards[0].data.unsafe_buffer_pointer() == before


def test_host_memory_is_one_leaf_at_a_time(tmp_path):
    """numpy's share of the peak, in and out: about the largest stacked leaf (reading), a few tensors (writing)."""
    spec = DecoderSpec(
        vocab_size=256, d_model=64, num_layers=16, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=192, tied=True
    )
    tree = jax.tree.map(jnp.asarray, random_tree(spec))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(tree))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert total > 4 * largest
    hf.save_hf(tree, spec, tmp_path / "warm")  # compiles the row slices
    tracemalloc.start()
    hf.save_hf(tree, spec, tmp_path / "out")
    saving = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    hf.load_hf(tmp_path / "out", "float32")
    loading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert saving < 0.8 * largest and loading < 1.5 * largest, (saving, loading, largest)


# ------------------------------------------------------------------------------------------------ wrong folders


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    good = tensors()
    q = "model.layers.1.self_attn.q_proj.weight"
    for change, message in (
        ({k: v for k, v in good.items() if k != q}, f"missing tensor.*{q}"),
        (good | {"model.layers.2.extra.weight": good[q]}, "unexpected tensor.*model.layers.2.extra.weight"),
        (good | {q: good[q][:8]}, rf"{q} is \[8, 32\], config.json says \[32, 32\]"),
        (good | {q: good[q].astype(np.int8)}, f"{q} has dtype I8"),
        ({}, "missing tensor.* and 3. more"),
    ):
        with pytest.raises(CheckpointError, match=message):
            hf.load_hf(folder(tmp_path, weights=change), "float32")


def test_old_rotary_buffers_are_ignored(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same_bits(hf.load_hf(folder(tmp_path, weights=tensors() | extra), "float32"), params())


def test_a_head_beside_a_tied_embedding_must_be_its_copy(tmp_path):
    tied = LLAMAS["config"]("gqa_tied")
    weights = LLAMAS["weights"](tied)
    embed = weights["model.embed_tokens.weight"]
    found = hf.load_hf(folder(tmp_path, tied, weights | {"lm_head.weight": embed}), "float32")
    assert "head" not in found
    for head in (embed + 1, embed.astype(np.float16), embed[:-1]):
        with pytest.raises(CheckpointError, match="lm_head.weight differs .* tie_word_embeddings"):
            hf.load_hf(folder(tmp_path, tied, weights | {"lm_head.weight": head}), "float32")
    untied = {k: v for k, v in tensors().items() if k != "lm_head.weight"}
    with pytest.raises(CheckpointError, match="missing tensor.*lm_head.weight"):
        hf.load_hf(folder(tmp_path, weights=untied), "float32")


def sharded(path: pathlib.Path) -> tuple[pathlib.Path, dict]:
    hf.save_hf(params(), SPEC, path, max_shard_bytes=9_000)
    return path, json.loads((path / INDEX).read_text())


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "..", "", 7, "model.bin", "a\\b.safetensors"],
)
def test_shard_names_stay_in_the_folder(tmp_path, name):
    path, index = sharded(tmp_path / "out")
    save_file(tensors(), tmp_path / "evil.safetensors")
    index["weight_map"]["lm_head.weight"] = name
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a safetensors file of this folder"):
        hf.load_hf(path, "float32")


def test_index_and_shards_must_agree(tmp_path):
    path, index = sharded(tmp_path / "out")
    name, shard = next(iter(index["weight_map"].items()))
    other = next(s for s in index["weight_map"].values() if s != shard)

    def expect(message: str):
        with pytest.raises(CheckpointError, match=message):
            hf.load_hf(path, "float32")

    def write(weight_map):
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    write(index["weight_map"] | {name: other})
    expect(f"at odds with its shards about {name}")
    write({k: v for k, v in index["weight_map"].items() if k != name})
    expect(f"at odds with its shards about {name}")
    write(index["weight_map"] | {"ghost": other})
    expect("at odds with its shards about ghost")
    write(index["weight_map"] | {name: "gone.safetensors"})
    expect("gone.safetensors: cannot be read")
    write({})
    expect("weight_map is missing or empty")
    (path / INDEX).write_text(f'{{"weight_map": {{"{name}": "{shard}", "{name}": "{other}"}}}}')
    expect(f"'{name}' appears twice")
    write(index["weight_map"])
    save_file(load_file(path / other) | {name: tensors()[name]}, path / other)
    expect(f"{name} also in {shard}")
    save_file(tensors(), path / "model.safetensors")
    expect("holds both")


def test_folders_that_hold_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        hf.load_hf(tmp_path, "float32")
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(ConfigError, match="a PEFT adapter, not a model"):
        hf.read_spec(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        hf.read_spec(tmp_path / "none")
    broken = {b"[]": "not a JSON object", b"{": "not valid JSON", b'{"a":1,"a":2}': "'a' appears twice"}
    for content, message in broken.items():
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            hf.read_spec(tmp_path)


PICKLE_DRILL = """
import sys
from jaxpost.errors import ConfigError
from jaxpost.models import hf, loading
seen = []
def watch(event, args):
    if event.split(".")[0] in ("pickle", "exec", "import", "socket", "subprocess", "os.system"):
        seen.append(event)
    if event == "open" and isinstance(args[0], str) and args[0].endswith((".bin", ".py", ".pyc")):
        seen.append(args[0])
sys.addaudithook(watch)
for folder in sys.argv[1:]:
    for call in (loading.locate, lambda f: hf.load_hf(f, "float32")):
        try:
            call(folder)
            print("accepted", folder)
        except ConfigError as error:
            assert "never" in str(error), error
print(seen)
"""


def test_pickles_and_custom_code_are_refused_without_a_look(tmp_path):
    """Drill 18: an audit hook sees no unpickling, no import, no exec, no socket, and nobody opens the files."""
    for name, config in (("pickle", CONFIG), ("code", CONFIG | {"auto_map": {"AutoModel": "modeling_x.Model"}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo pwned'\ntR.")
        (tmp_path / name / "modeling_x.py").write_text("raise SystemExit('ran')")
    save_file(tensors(), tmp_path / "code" / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PICKLE_DRILL, tmp_path / "pickle", tmp_path / "code"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ writing


class Tokens:
    """What save_hf needs of a tokenizer."""

    bos_id, pad_id, stop_ids = 1, 2, (2,)

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_config_files_carry_the_special_ids(tmp_path):
    out = hf.save_hf(params(), SPEC, tmp_path / "a" / "out", tokenizer=Tokens())
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert config["eos_token_id"] == 2 and config["dtype"] == config["torch_dtype"] == "float32"
    assert (out / "tokenizer.json").exists()
    several = Tokens()
    several.stop_ids = (5, 7)
    out = hf.save_hf(params(), SPEC, tmp_path / "b", dtype="bfloat16", tokenizer=several)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [5, 7]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((hf.save_hf(params(), SPEC, tmp_path / "c") / "config.json").read_text())["eos_token_id"] is None


def test_a_failed_export_leaves_nothing(tmp_path):
    class Broken(Tokens):
        def save(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        hf.save_hf(params(), SPEC, tmp_path / "out", tokenizer=Broken())
    big = params()
    big["final_norm"] = big["final_norm"] * 1e6
    with pytest.raises(ConfigError, match="model.norm.weight does not fit float16"):
        hf.save_hf(big, SPEC, tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigError, match="dtype 'int8' cannot be exported"):
        hf.save_hf(big, SPEC, tmp_path / "out", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_only_a_model_folder_is_overwritten_and_only_when_asked(tmp_path):
    out = hf.save_hf(params(), SPEC, tmp_path / "out", max_shard_bytes=9_000)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        hf.save_hf(params(), SPEC, out)
    hf.save_hf(params(), SPEC, out, overwrite=True)
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a model folder"):
        hf.save_hf(params(), SPEC, tmp_path / "home", overwrite=True)
    with pytest.raises(ConfigError, match="not a folder"):
        hf.save_hf(params(), SPEC, tmp_path / "home" / "thesis.tex", overwrite=True)
    (tmp_path / "empty").mkdir()
    hf.save_hf(params(), SPEC, tmp_path / "empty")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "home", "out"]


def test_bfloat16_params_are_exported_as_they_are(tmp_path):
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    out = hf.save_hf(tree, SPEC, tmp_path / "out")
    assert_same_bits(hf.load_hf(out, jnp.bfloat16), tree)


TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxpost.models import hf
from jaxpost.models.spec import abstract_params, is_info
source, out = sys.argv[3:]
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
axes = {"embed": "fsdp"}
place = lambda info: NamedSharding(mesh, PartitionSpec(*(axes.get(a) for a in info.axes)))
spec = hf.read_spec(source)
params = hf.load_hf(source, "float32", jax.tree.map(place, abstract_params(spec), is_leaf=is_info))
assert not params["embed"].is_fully_addressable
hf.save_hf(params, spec, out, max_shard_bytes=9_000)
"""


def test_two_processes_load_and_save_one_model(tmp_path):
    """Each reads its slices, process 0 writes the whole."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    source, out = folder(tmp_path / "in"), tmp_path / "out"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    arguments = lambda rank: [sys.executable, "-c", TWO_PROCESSES, str(port), str(rank), source, out]
    both = [
        subprocess.Popen(arguments(rank), cwd=TESTS.parent, env=os.environ | flags, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert_same_bits(hf.load_hf(out, "float32"), params())
