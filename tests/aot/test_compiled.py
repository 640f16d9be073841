"""The real train step compiled ahead of time for 16 TPU v5e and 8 H100: it fits, it reuses the state, it moves what
docs/architecture.md says. bash launch/aot.sh makes the environment that this needs and runs it.

Each compilation is a process of its own (compile.py); -s prints a line of docs/accelerators.md for each.
"""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from jaxpost import aot
from jaxpost.models.loading import locate
from jaxpost.models.spec import abstract_layer, abstract_params, is_info, num_params

NEEDED = ("libtpu", "jax_cuda13_plugin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="libtpu and jax-cuda13-plugin are not installed: bash launch/aot.sh",
    ),
]

SMOLLM2 = (
    "init:llama,vocab_size=49152,d_model=576,num_layers=30,num_heads=9,num_kv_heads=3,head_dim=64,d_ff=1536,tied=true"
)
LLAMA_8B = (
    "init:llama,vocab_size=128256,d_model=4096,num_layers=32,num_heads=32,num_kv_heads=8,head_dim=128,d_ff=14336,"
    "rope_theta=500000"
)
PARAMS = {SMOLLM2: 134_515_008, LLAMA_8B: 8_030_261_248}  # as published
GIB = 2**30
SMALL = 1 << 20  # bytes: norms, counts, ids of tokens and segments


def compiled(devices: str, source: str, *words: str, rows: int, length: int, **mesh: int) -> aot.Report:
    """The report of one compilation; its line of the table is printed."""
    sizes = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    batch = [f"data.batch_size={rows}", f"data.seq_len={length}"]
    script = pathlib.Path(__file__).with_name("compile.py")
    root = script.parents[2]
    command = [sys.executable, str(script), devices, f"model.source={source}", *sizes, *batch, *words]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    fields = json.loads(done.stdout.splitlines()[-1])
    report = aot.Report(**fields | {"collectives": tuple(aot.Moved(**one) for one in fields["collectives"])})
    print("\n" + line(devices, source, rows, length, report))
    return report


def line(devices: str, source: str, rows: int, length: int, report: aot.Report) -> str:
    """One row of the table in docs/accelerators.md."""
    sizes = ("params", "optimizer", "frozen", "temporaries", "peak")
    cells = [
        "135M" if source == SMOLLM2 else "8B",
        devices,
        " ".join(f"{axis} {size}" for axis, size in report.mesh.items()),
        f"{rows} x {length:,}",
        *(f"{getattr(report, name) / GIB:.2f}" for name in sizes),
        "; ".join(
            f"{one.where}: {one.count} {one.kind} {one.dtype}{' ring' * one.ring} {one.bytes / 2**20:,.0f}"
            for one in report.collectives
            if one.bytes > SMALL
        ),
        f"{report.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def check_memory(report: aot.Report, devices: str, source: str, rows: int, length: int) -> None:
    """It fits; the state's memory holds the new state; nothing else is passed in."""
    assert report.peak < aot.memory_of(devices)
    assert report.donated == report.state_arrays
    padding = report.alias - report.state  # a TPU's tiles
    assert 0 <= padding <= (0 if devices.startswith("h") else 0.03 * report.state)
    shards = math.prod(report.mesh.get(axis, 1) for axis in ("data", "fsdp", "context"))
    assert report.batch == 17 * rows * length // shards  # four columns of int32, one of bool
    rest = report.arguments - report.alias - report.frozen
    assert report.batch <= rest <= 1.5 * report.batch + 4096
    assert not report.frozen or report.params < 0.1 * report.frozen
    split = math.prod(report.mesh.get(axis, 1) for axis in ("fsdp", "tensor"))
    weights = report.frozen // 2 if report.frozen else report.params // 4  # frozen in bf16, trained in fp32
    assert weights == pytest.approx(PARAMS[source] / split, rel=1e-3)  # norms lie whole
    assert report.optimizer == pytest.approx(2 * report.params, rel=1e-3)  # AdamW's two moments


def tables(source: str) -> tuple[int, int, int]:
    """Numbers of one layer's matrices, of those of its attention, of the head."""
    spec = locate(source).spec
    layer = abstract_layer(spec)
    count = lambda tree: sum(math.prod(x.shape) for x in _leaves(tree) if len(x.shape) == 2)
    assert num_params(abstract_params(spec)) == PARAMS[source]
    return count(layer), count(layer["attn"]), spec.vocab_size * spec.d_model


def _leaves(tree):
    return [tree] if is_info(tree) else [leaf for branch in tree.values() for leaf in _leaves(branch)]


def moves(report: aot.Report) -> dict[tuple[str, str], tuple[int, int, set[str]]]:
    """(where, kind) -> (arrays, bytes, dtypes), of what is larger than SMALL."""
    found: dict[tuple[str, str], tuple[int, int, set[str]]] = {}
    for one in report.collectives:
        if one.bytes > SMALL:
            count, size, dtypes = found.get((one.where, one.kind), (0, 0, set()))
            found[one.where, one.kind] = count + one.count, size + one.bytes, dtypes | {one.dtype}
    assert report.head_loops >= 2 and not any(
        one.where == "head" for one in report.collectives
    )  # nothing moves in them
    return found


@pytest.mark.parametrize(("devices", "count"), [("v5e:4x4", 16), ("h100:8", 8)], ids=["v5e:4x4", "h100:8"])
def test_135m_over_data(devices, count):
    rows, length = 64, 1024
    report = compiled(devices, SMOLLM2, rows=rows, length=length, data=count)
    check_memory(report, devices, SMOLLM2, rows, length)
    layer, _, head = tables(SMOLLM2)
    found = moves(report)
    assert found.keys() == {("loop", "all-reduce"), ("once", "all-reduce")}
    assert found["loop", "all-reduce"][1:] == (2 * layer, {"bf16"})  # every matrix's gradient once
    # The tied table's gradient comes as two sums: from the head and from the embedding.
    assert found["once", "all-reduce"][1] == pytest.approx(2 * 4 * head, abs=SMALL)


@pytest.mark.parametrize(("devices", "count"), [("v5e:4x4", 16), ("h100:8", 8)], ids=["v5e:4x4", "h100:8"])
def test_8b_over_fsdp(devices, count):
    rows, length = 16, 4096
    report = compiled(devices, LLAMA_8B, "model.remat=full", rows=rows, length=length, fsdp=count)
    check_memory(report, devices, LLAMA_8B, rows, length)
    layer, attention, head = tables(LLAMA_8B)
    found = moves(report)
    gathered, size, dtypes = found.pop(("loop", "all-gather"))
    # Forward and backward, in bf16: weights are cast before they are gathered. Remat costs no third pass, but a TPU
    # gathers the small matrices of attention again.
    assert dtypes == {"bf16"} and gathered >= 14
    assert 2 * 2 * layer <= size <= 2 * (2 * layer + (attention if devices.startswith("v") else 0))
    assert found.pop(("loop", "reduce-scatter")) == (7, 2 * layer // count, {"bf16"})
    assert found.pop(("once", "all-gather")) == (1, 2 * head, {"bf16"})
    if devices.startswith("v"):  # over all of a 4x4 torus this compiler has no reduce-scatter: summed whole, then cut
        assert found.pop(("once", "all-reduce"))[1] == pytest.approx(4 * head, abs=SMALL)  # and single numbers
    else:
        assert found.pop(("once", "reduce-scatter")) == (1, 4 * head // count, {"f32"})
    activations = rows // count * length * 4096
    assert found.pop(("once", "all-to-all"))[1] <= (2 + 4) * activations  # embedded tokens and their gradient
    assert not found


def test_8b_over_fsdp_and_tensor():
    devices, rows, length = "h100:8", 8, 4096
    report = compiled(devices, LLAMA_8B, "model.remat=full", rows=rows, length=length, fsdp=4, tensor=2)
    check_memory(report, devices, LLAMA_8B, rows, length)
    layer, _, head = tables(LLAMA_8B)
    activations = rows // 4 * length * 4096
    found = moves(report)
    assert found["loop", "all-gather"] == (14, 2 * 2 * layer // 2, {"bf16"})
    assert found["loop", "reduce-scatter"] == (7, 2 * layer // 8, {"bf16"})
    # o and down forward, o once more in remat, the inputs of q, k, v and of gate, up backward.
    assert found["loop", "all-reduce"] == (5, 5 * 2 * activations, {"bf16"})
    assert found["once", "all-gather"] == (1, 2 * head // 2, {"bf16"})
    assert found["once", "reduce-scatter"] == (1, 4 * head // 8, {"f32"})


def test_8b_lora():
    devices, rows, length = "h100:8", 8, 4096
    words = ["model.remat=full", "model.param_dtype=bfloat16", "lora.rank=16"]
    report = compiled(devices, LLAMA_8B, *words, rows=rows, length=length, fsdp=8)
    check_memory(report, devices, LLAMA_8B, rows, length)
    layer, _, head = tables(LLAMA_8B)
    found = moves(report)
    assert found["loop", "all-gather"][1] == pytest.approx(2 * 2 * layer, rel=0.01)  # and the adapters
    assert found["once", "all-gather"] == (1, 2 * head, {"bf16"})  # the head's backward pass needs it no second time
    assert not any(kind == "reduce-scatter" for _, kind in found)  # the base has no gradient


def test_a_tpu_that_is_too_small_refuses():
    """12 bytes a parameter are 22 GiB on each of four chips of 16."""
    with pytest.raises(AssertionError, match="does not fit these devices"):
        compiled("v5e:2x2", LLAMA_8B, "model.remat=full", rows=4, length=1024, fsdp=4)


def test_of_a_gpu_that_is_too_small_the_peak_says_so():
    """90 GiB of state on one of 80."""
    report = compiled("h100:1", LLAMA_8B, "model.remat=full", rows=1, length=1024)
    assert report.peak > report.state > aot.memory_of("h100:1")
    assert not report.collectives


def test_hosts_of_a_slice_read_whole_rows_on_every_mesh():
    """Four hosts of four chips; on a 4x4 torus a ring of all chips visits every host twice."""
    script = """
import sys
import numpy as np
from jaxpost import aot
from jaxpost.sharding import MeshConfig, make_mesh, row_parts
devices = aot.describe_devices("v5e:4x4")
sizes = [(d, f, c, t) for d in (1, 2, 4, 8, 16) for f in (1, 2, 4, 8, 16) for c in (1, 2) for t in (1, 2, 4)]
for d, f, c, t in sizes:
    if d * f * c * t == 16:
        mesh = make_mesh(MeshConfig(data=d, fsdp=f, context=c, tensor=t), devices)
        owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(d * f, -1)
        parts = row_parts(owners)
        assert set(parts) == {0, 1, 2, 3} and set(parts.values()) == set(range(len(set(parts.values()))))
        print(d, f, c, t, parts)
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) > 15
