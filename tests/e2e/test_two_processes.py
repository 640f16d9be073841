"""Two processes on one machine, each with one device, train what one process with two devices trains."""

import json
import os
import socket
import subprocess
import sys

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
state = train.run(loaded.config, dump=loaded.dump())
print("steps", int(state.step))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(config_file, address: str, index: int) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    args = [sys.executable, "-c", WORKER, address, str(index), str(config_file)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run_both(config_file) -> None:
    address = f"localhost:{free_port()}"
    processes = [launch(config_file, address, index) for index in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0 and "steps 4" in out, out[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 1, "fsdp": 2}, {"data": 1, "tensor": 2}], ids=str)
def test_two_processes_equal_one(tmp_path, mesh):
    import jax

    from jaxpost import config, train

    sections = {"mesh": mesh, "loop": {"steps": 4, "save_every": 2}, "eval": {"samples": 2, "max_new_tokens": 4}}
    alone = config.load(tiny.write_config(tmp_path / "one", **sections)).config
    train.run(alone, devices=jax.devices()[:2])
    run_both(tiny.write_config(tmp_path / "two", **sections))
    for name in ("loss", "grad_norm", "eval/loss"):
        np.testing.assert_allclose(tiny.metric(tmp_path / "two/run", name), tiny.metric(alone.run_dir, name), rtol=2e-5)
    # the checkpoint of two processes goes on in one
    file = tmp_path / "two" / "config.yaml"
    text = json.loads(file.read_text())
    text["loop"]["steps"] = 6
    file.write_text(json.dumps(text))
    longer = config.load(file).config
    state = train.run(longer, allow_changed=["loop.steps"], devices=jax.devices()[:2])
    assert int(state.step) == 6
