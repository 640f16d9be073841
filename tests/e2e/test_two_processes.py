"""Two processes on one machine, each with one device, train what one process with two devices trains."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny

WORKER = """
import sys
import jax
address, index, config_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
from jaxpost import config, train
loaded = config.load(config_file)
order = [int(place) for place in sys.argv[4].split(",")] if sys.argv[4] else range(jax.device_count())
state = train.run(loaded.config, dump=loaded.dump(), devices=[jax.devices()[place] for place in order])
print("steps", int(state.step))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(config_file, address: str, index: int, devices: int = 1, order: str = "") -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    args = [sys.executable, "-c", WORKER, address, str(index), str(config_file), order]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run_both(config_file, devices: int = 1, order: str = "") -> None:
    address = f"localhost:{free_port()}"
    processes = [launch(config_file, address, index, devices, order) for index in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and "steps 4" in out, out[-3000:]


MESHES = [
    {"data": 2},
    {"data": 1, "fsdp": 2},
    {"data": 1, "context": 2},
    {"data": 1, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_two_processes_equal_one(tmp_path, mesh):
    import jax

    from jaxpost import config, train

    devices = math.prod(mesh.values())
    sections = {"mesh": mesh, "loop": {"steps": 4, "save_every": 2}, "eval": {"samples": 2, "max_new_tokens": 4}}
    alone = config.load(tiny.write_config(tmp_path / "one", **sections)).config
    train.run(alone, devices=jax.devices()[:devices])
    run_both(tiny.write_config(tmp_path / "two", **sections), devices // 2)
    for name in ("loss", "grad_norm", "eval/loss"):
        np.testing.assert_allclose(tiny.metric(tmp_path / "two/run", name), tiny.metric(alone.run_dir, name), rtol=2e-5)
    # the checkpoint of two processes goes on in one, on another mesh
    file = tmp_path / "two" / "config.yaml"
    text = json.loads(file.read_text())
    text["loop"]["steps"] = 6
    text["mesh"] = {"data": 1}
    file.write_text(json.dumps(text))
    longer = config.load(file).config
    state = train.run(longer, allow_changed=["loop.steps"], devices=jax.devices()[:1])
    assert int(state.step) == 6


@pytest.mark.slow
def test_rows_of_a_process_need_not_be_neighbours(tmp_path):
    """As on a torus, where the mesh goes round the links and not from host to host."""
    import jax

    from jaxpost import config, train

    sections = {"mesh": {"data": 1, "fsdp": 4}, "loop": {"steps": 4, "save_every": 2}, "eval": {"samples": 0}}
    alone = config.load(tiny.write_config(tmp_path / "one", **sections)).config
    train.run(alone, devices=jax.devices()[:4])
    run_both(tiny.write_config(tmp_path / "two", **sections), devices=2, order="0,2,3,1")
    for name in ("loss", "grad_norm", "eval/loss"):
        np.testing.assert_allclose(tiny.metric(tmp_path / "two/run", name), tiny.metric(alone.run_dir, name), rtol=2e-5)


@pytest.mark.slow
def test_two_processes_start_from_an_adapter(tmp_path):
    """lora.source, with DoRA and Muon: one process makes the adapter, two go on with it as one does."""
    import jax

    from jaxpost import config, export, train

    adapter = {"rank": 4, "alpha": 8.0, "targets": ["q", "down"], "dora": True}
    first = tiny.load(tmp_path / "first", lora=adapter, loop={"steps": 2, "save_every": 0}, mesh={"data": 1})
    train.run(first, devices=jax.devices()[:1])
    source = str(export.export(first.run_dir, "peft"))
    sections = {
        "lora": {"source": source},
        "loop": {"steps": 4, "save_every": 2},
        "optim": {"name": "muon", "learning_rate": 0.02},
        "mesh": {"data": 1, "fsdp": 2},
    }
    alone = config.load(tiny.write_config(tmp_path / "one", **sections)).config
    train.run(alone, devices=jax.devices()[:2])
    run_both(tiny.write_config(tmp_path / "two", **sections))
    for name in ("loss", "grad_norm", "eval/loss"):
        ours, theirs = tiny.metric(tmp_path / "two/run", name), tiny.metric(alone.run_dir, name)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert tiny.metric(alone.run_dir, "loss")[0] != tiny.metric(first.run_dir, "loss")[0]  # it begins with the adapter


@pytest.mark.slow
def test_a_stop_signal_to_one_process_saves_and_ends_both_at_one_step(tmp_path):
    file = tiny.write_config(tmp_path, mesh={"data": 2}, loop={"steps": 100_000, "save_every": 0})
    address = f"localhost:{free_port()}"
    processes = [launch(file, address, index) for index in range(2)]
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (lines.is_file() and len(lines.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    ends = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out[-3000:]
        ends.append(int(out.rpartition("steps ")[2]))
    assert ends[0] == ends[1]
    names = {entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {str(ends[0]), "LATEST"}
    assert len(tiny.metric(tmp_path / "run", "loss")) == ends[0]  # every step's line was written
