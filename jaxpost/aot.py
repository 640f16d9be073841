"""A run's train step compiled for devices that are not there: what it asks of each device, and what moves between them.

    devices = describe_devices("v5e:4x4")  # or "h100:8"
    report = compile_job(abstract_job(config, devices))

No weight is read and no array made: the true step of build.py is traced on shapes. It needs a jax that sits on its CPU
(JAX_PLATFORMS=cpu) and the compiler of the target: the `libtpu` package, or `jax-cuda13-plugin` and `jax-cuda13-pjrt`
without CUDA itself. A compiled program tells bytes, not seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
import time
from typing import Any

import jax

from jaxpost import hlo, lora
from jaxpost.algos.base import Algorithm
from jaxpost.build import check_needs, make_program
from jaxpost.build_model import adopt_adapters, lay_out, structs
from jaxpost.config import Config, Loaded
from jaxpost.data.feed import column_shardings
from jaxpost.data.kinds import COLUMNS
from jaxpost.data.pack import pack_rows
from jaxpost.errors import ConfigError
from jaxpost.models.loading import locate
from jaxpost.models.spec import abstract_params
from jaxpost.sharding import Rules, check_divides
from jaxpost.types import Batch, TrainState

GIB = 2**30
# Bytes that a program may use on one device. TPU: what libtpu's compiler says when it refuses a larger program.
TPU_MEMORY = {"v5e": 15.75 * GIB, "v5p": 95.74 * GIB, "v6e": 31.25 * GIB, "tpu7x": 94.75 * GIB}
# GPU: memory and its bytes a second; of the nominal 80 and 141 GB a process sees about this much.
GPU_MEMORY = {"h100": (79 * GIB, 3352), "h200": (139 * GIB, 4800)}
TPU_ENVIRONMENT = {  # libtpu reads these when it is loaded; without them it looks for a TPU and a lock of its own
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA's description of a Hopper GPU, by NVIDIA's public figures (compute capability 9.0, SXM5).
HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  l2_cache_size: 52428800  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def describe_devices(name: str) -> list:
    """Devices to compile for: "v5e:4x4" (chip:topology, as Cloud TPU names it) or "h100:8" (one host of GPUs).

    Raises ConfigError for a name that is not known and where the target's compiler is not installed.
    """
    chip, colon, size = name.partition(":")
    if not colon or chip not in TPU_MEMORY | GPU_MEMORY:
        known = ", ".join(f"{c}:NxN" for c in TPU_MEMORY) + ", " + ", ".join(f"{c}:N" for c in GPU_MEMORY)
        raise ConfigError(f"devices {name!r}: not known; give one of {known}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}" if chip in TPU_MEMORY else r"[1-9]\d*", size):
        wanted = "a topology such as 4x4" if chip in TPU_MEMORY else "a number of GPUs"
        raise ConfigError(f"devices {name!r}: {size!r} is not {wanted}")
    from jax.experimental import topologies

    try:
        if chip in TPU_MEMORY:
            os.environ.update({key: os.environ.get(key, value) for key, value in TPU_ENVIRONMENT.items()})
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        memory, bandwidth = GPU_MEMORY[chip]
        target = HOPPER.format(memory=memory, bandwidth=bandwidth * 10**9, name=chip.upper())
        shape = {"target_config": target, "topology": f"1x1x{size}"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name=name, **shape).devices)
    except Exception as error:  # jax raises what its plugins raise
        wheels = "libtpu" if chip in TPU_MEMORY else "jax-cuda13-plugin and jax-cuda13-pjrt (--no-deps)"
        raise ConfigError(
            f"devices {name!r}: {str(error).splitlines()[0][:200]}; it needs {wheels} of the version that belongs to "
            f"jax {jax.__version__}, and JAX_PLATFORMS=cpu"
        ) from error


def memory_of(name: str) -> int:
    """Bytes that a program may use on one device of describe_devices(name)."""
    chip = name.partition(":")[0]
    return int(TPU_MEMORY[chip] if chip in TPU_MEMORY else GPU_MEMORY[chip][0])


@dataclasses.dataclass(frozen=True)
class AbstractJob:
    """The train step of a run with the shapes that it takes; every leaf is a ShapeDtypeStruct with its sharding."""

    step: Any
    state: TrainState
    frozen: dict[str, Any]
    batch: Batch
    rules: Rules


def abstract_job(config: Config, devices: list) -> AbstractJob:
    """What build_job would run on these devices, of its widest batch; ConfigError where the mesh does not fit.

    Data and tokenizer are not looked at. Of the model's source only its config is read.
    """
    config = adopt_adapters(Loaded(config, {})).config
    spec = locate(config.model.source).spec
    policy, rules = lay_out(spec, config.model, config.mesh, config.lora, devices)
    check_divides(config.data.batch_size, config.loop.micro_batches, config.data.widths, rules)
    base = abstract_params(spec, config.model.param_dtype)
    frozen = {} if config.lora is None else {"policy": structs(base, rules)}
    if "ref" in config.algorithm.needs and not frozen:
        frozen["ref"] = structs(base, rules)
    infos = base if config.lora is None else lora.abstract_adapters(config.lora, spec)
    check_needs(config.algorithm, frozen)
    steps = config.loop.steps or config.optim.warmup_steps + config.optim.decay_steps + 1  # only a constant in it
    program = make_program(config, policy, rules, {"policy": structs(infos, rules)}, steps)
    columns, most = COLUMNS[config.algorithm.rows], config.data.segments_per_row
    batch = pack_rows([[]] * config.data.batch_size, max(config.data.widths), columns, most)
    batch = _placed(batch, rules)
    if type(config.algorithm).annotate is not Algorithm.annotate:
        annotate = lambda frozen, batch: config.algorithm.annotate(policy, frozen, batch)
        batch = _placed(jax.eval_shape(annotate, frozen, batch), rules)
    return AbstractJob(program.step, program.state, frozen, batch, rules)


def _placed(batch: Batch, rules: Rules) -> Batch:
    """Shapes of a batch's columns, laid out as the feed does."""
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, batch, column_shardings(batch, rules))


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind at one place: together, for one pass of the loops around them."""

    where: str  # "once" a step | "loop" (the layers) | "head" (a loop of the tiled head)
    kind: str
    dtype: str
    count: int  # arrays
    bytes: int  # that they yield on a device
    ring: bool  # hop by hop, overlapped with the product that uses them


@dataclasses.dataclass(frozen=True)
class Report:
    """Bytes of one device. By kind as the shapes say; temporaries, peak and alias as the compiler does."""

    mesh: dict[str, int]  # axes of more than one device
    params: int
    optimizer: int
    other: int  # the rest of the state: slow copies, counters
    frozen: int
    batch: int
    arguments: int  # all of the above as the compiler lays them out: tiles may pad them
    alias: int  # arguments whose memory holds results afterwards
    donated: int  # how many arrays these are
    state_arrays: int  # how many there are in the state
    temporaries: int  # may be more than the peak: not all of them live at once
    peak: int
    collectives: tuple[Moved, ...]
    head_loops: int  # loops of the tiled head that were looked at for collectives
    seconds: float  # of compilation

    @property
    def state(self) -> int:
        """Bytes of all that the step moves on."""
        return self.params + self.optimizer + self.other


def compile_job(job: AbstractJob) -> Report:
    """Compiles the step for its devices. ConfigError where a TPU's compiler finds it too large; others never say so:
    compare peak with memory_of."""
    gpu = job.rules.mesh.devices.flat[0].platform == "gpu"
    options = {"xla_gpu_autotune_level": "0"} if gpu else None  # there is no GPU to try kernels on
    begin = time.perf_counter()
    try:
        compiled = job.step.trace(job.state, job.frozen, job.batch).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(f"the step does not fit these devices: {str(error).splitlines()[0][:300]}") from error
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    state_arrays = len(jax.tree.leaves(job.state))
    return Report(
        mesh={axis: size for axis, size in job.rules.mesh.shape.items() if size > 1},
        params=bytes_on_device(job.state.params),
        optimizer=bytes_on_device(job.state.opt_state),
        other=bytes_on_device((job.state.step, job.state.slow, job.state.scalars)),
        frozen=bytes_on_device(job.frozen),
        batch=bytes_on_device(job.batch),
        arguments=memory.argument_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        donated=len([number for number in hlo.donated(text) if number < state_arrays]),
        state_arrays=state_arrays,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=moved(hlo.collectives(text)),
        head_loops=sum(map(_in_head, hlo.loops(text))),
        seconds=seconds,
    )


def _in_head(name: str) -> bool:
    """Whether a loop is the tiled head's: models/policy.py names that scope."""
    return re.search(r"\bhead\b", name) is not None


def bytes_on_device(tree: Any) -> int:
    """Of all leaves (with shardings), the part that lies on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def moved(found: list[hlo.Collective]) -> tuple[Moved, ...]:
    """Collectives by place, kind and dtype."""
    counts, sizes = collections.Counter(), collections.Counter()
    for one in found:
        where = "head" if any(map(_in_head, one.within)) else "loop" if one.within else "once"
        for (dtype, _), size in zip(one.arrays, one.sizes, strict=True):
            counts[where, one.kind, dtype, one.ring] += 1
            sizes[where, one.kind, dtype, one.ring] += size
    return tuple(
        Moved(where, kind, dtype, counts[where, kind, dtype, ring], sizes[where, kind, dtype, ring], ring)
        for where, kind, dtype, ring in sorted(counts)
    )
