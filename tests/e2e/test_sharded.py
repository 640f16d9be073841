"""The same tiny run on 1 and on 8 devices: equal losses and gradient norms. Each axis alone: tests/properties."""

import jax
import numpy as np
import pytest

from jaxpost import loop
from jaxpost.build import build_job
from jaxpost.metrics import MetricsConfig, Sinks
from tests import tiny

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
ODD_VOCABULARY = {"source": tiny.MODEL.replace("vocab_size=264", "vocab_size=261")}


def curve(folder, mesh, devices, **sections):
    config = tiny.load(folder, mesh=mesh, loop={"steps": 2}, **sections)
    with Sinks(config.run_dir, MetricsConfig(tensorboard=False, console="none")) as sinks:
        job = build_job(config, sinks, devices=devices)
        with job.checkpointer:
            loop.run(config.loop, job)
            job.source.close()
    return {name: tiny.metric(config.run_dir, name) for name in ("loss", "grad_norm", "eval/loss")}


@pytest.mark.parametrize(
    ("sections", "mesh"),
    [
        ({}, MESH),
        ({"lora": {"rank": 4, "alpha": 8.0}, "algorithm": {"neftune_alpha": 5.0}}, MESH),
        ({"lora": {"rank": 4, "alpha": 8.0, "dora": True, "also_train": ["embed", "norm"]}}, MESH),
        ({"model": ODD_VOCABULARY}, {"data": 2, "tensor": 4}),
    ],
    ids=["full", "lora and noise", "dora", "odd vocabulary"],
)
def test_one_device_equals_eight(tmp_path, sections, mesh):
    alone = curve(tmp_path / "one", {"data": 1}, jax.devices()[:1], **sections)
    shared = curve(tmp_path / "eight", mesh, jax.devices(), **sections)
    for name, values in alone.items():
        np.testing.assert_allclose(shared[name], values, rtol=2e-5, err_msg=name)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    from jaxpost.errors import ConfigError

    with pytest.raises(ConfigError, match="data.batch_size: 6 rows do not divide into 1 micro-batches over 8"):
        curve(tmp_path, {"data": 8}, jax.devices(), data={"batch_size": 6})
