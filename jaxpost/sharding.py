"""Mesh axes and the table from logical axes to mesh axes: changing the parallelism never edits a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic.dataclasses import dataclass

from jaxpost.errors import ConfigError
from jaxpost.fields import SECTION, Bool, Int

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH = ("data", "fsdp")  # mesh axes over which the rows of a batch are split

# logical axis -> mesh axes. Weights first, then activations.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "norm": None,
    "rank": None,
    "batch": BATCH,
    "length": "context",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_ffn": "tensor",
    "act_vocab": "tensor",
}


@dataclass(frozen=True, config=SECTION)
class MeshConfig:
    """Devices along each mesh axis; one axis may be -1: all that are left."""

    data: Int = -1
    fsdp: Int = 1
    expert: Int = 1
    context: Int = 1
    tensor: Int = 1
    distributed: Bool = False  # join the other processes of a cluster first (Cloud TPU, GKE, SLURM, Open MPI)


def join_cluster(config: MeshConfig) -> None:
    """Before the first use of a device: connect to the other processes, which jax finds in the environment."""
    if config.distributed and not jax.distributed.is_initialized():
        jax.distributed.initialize(heartbeat_timeout_seconds=30)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh a config asks for over `devices` (default: all); ConfigError where the sizes do not multiply up."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if bad := [axis for axis, size in sizes.items() if size == 0 or size < -1]:
        raise ConfigError(f"mesh.{bad[0]}: {sizes[bad[0]]} devices; give a positive number, or -1 for the rest")
    fill = [axis for axis, size in sizes.items() if size == -1]
    if len(fill) > 1:
        raise ConfigError(f"mesh.{fill[1]}: only one axis may be -1, and mesh.{fill[0]} is")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if fill:
        if len(devices) % fixed:
            raise ConfigError(f"mesh.{fill[0]}: {len(devices)} devices do not divide by the other axes' {fixed}")
        sizes[fill[0]] = len(devices) // fixed
    elif fixed < len(devices) and jax.process_count() == 1:
        devices = devices[:fixed]  # a mesh of fewer devices than there are, as typed
    elif fixed != len(devices):
        raise ConfigError(f"mesh: the axes multiply to {fixed} devices, {len(devices)} are here; set mesh.data: -1")
    if sizes["expert"] > 1:
        raise ConfigError("mesh.expert: only mixture-of-experts models split over it; set it to 1")
    shape = tuple(sizes[axis] for axis in AXES)
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    else:
        from jax.experimental import mesh_utils

        try:
            grid = mesh_utils.create_device_mesh(shape, devices=devices)
        except NotImplementedError:  # no axis is a product of the torus's own, e.g. 8 x 2 on 4x4: cut one of those
            grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Rules:
    """A mesh with the logical-axis table that fits one model on it. Hashable: it is closed over by jitted programs."""

    mesh: Mesh
    replicated: frozenset[str] = frozenset()  # logical axes that stay whole although the table would split them

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes."""
        return PartitionSpec(*(None if a is None or a in self.replicated else RULES[a] for a in logical))

    def sharding(self, *logical: str | None) -> NamedSharding:
        """NamedSharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(*logical))

    def shard(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """Constrain an activation; free on a single device."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*logical))

    @property
    def batch_shards(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH)


def rules_for(mesh: Mesh, *, num_heads: int, num_kv_heads: int, d_model: int, d_ff: int, vocab_size: int) -> Rules:
    """The rules for one model on one mesh; ConfigError where an axis cannot split what it must.

    KV heads that `tensor` does not divide are replicated (grouped-query models with few KV heads). So are the embedding
    and the head where it does not divide the vocabulary; the logits are split all the same, padded where they are made.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for what, size in (("query heads", num_heads), ("ffn width", d_ff)):
        if size % tensor:
            raise ConfigError(f"mesh.tensor: {tensor} does not divide the model's {what} ({size})")
    if d_model % fsdp:
        raise ConfigError(f"mesh.fsdp: {fsdp} does not divide the model's width ({d_model})")
    replicated = {"kv_heads", "act_kv_heads"} if num_kv_heads % tensor else set()
    if vocab_size % tensor:
        replicated.add("vocab")
    return Rules(mesh, frozenset(replicated))


def tree_shardings(infos: Any, rules: Rules) -> Any:
    """NamedShardings of an abstract tree (leaves with `.axes`, e.g. models.spec.ParamInfo)."""
    return jax.tree.map(lambda info: rules.sharding(*info.axes), infos, is_leaf=lambda x: hasattr(x, "axes"))


def batch_sharding(rules: Rules, ndim: int, whole: bool = False) -> NamedSharding:
    """Rows over data and fsdp, positions over context; whole: the second dimension is not positions."""
    return rules.sharding("batch", *((None if whole else "length",) if ndim > 1 else ()), *(None,) * (ndim - 2))


def check_divides(rows: int, micro_batches: int, widths: tuple[int, ...], rules: Rules) -> None:
    """A batch that does not divide raises; nothing is silently replicated. widths: row lengths that occur."""
    context = rules.mesh.shape["context"]
    if odd := [width for width in widths if width % context]:
        raise ConfigError(f"data.seq_len: rows of {odd[0]} positions do not divide over mesh.context {context}")
    shards = rules.batch_shards
    if rows % (shards * micro_batches):
        raise ConfigError(
            f"data.batch_size: {rows} rows do not divide into {micro_batches} micro-batches over {shards} "
            f"batch shards; use a multiple of {shards * micro_batches}"
        )


def host_rows(mesh: Mesh) -> tuple[int, int]:
    """(part, parts): which part of every global batch this process reads; see row_parts."""
    grid = np.vectorize(lambda device: device.process_index)(mesh.devices)
    parts = row_parts(grid.reshape(math.prod(mesh.shape[axis] for axis in BATCH), -1))
    return parts[jax.process_index()], len(set(parts.values()))


def row_parts(processes: np.ndarray) -> dict[int, int]:
    """Process -> the part of a batch that it reads; processes int[batch shards, devices of each]: of every device.

    It follows from the batch coordinates of a process's devices, not from its index: processes that are joined by a
    context or tensor axis read the same rows. The coordinates of one process need not be neighbours: on a torus the
    mesh goes round the links, so its rows lie scattered in the global array, whose order nothing depends on. Raises
    ConfigError where two processes share some coordinates but not all.
    """
    own: dict[int, set[int]] = {}
    for row, owners in enumerate(processes):
        for process in owners:
            own.setdefault(int(process), set()).add(row)
    sets = sorted({tuple(sorted(rows)) for rows in own.values()})
    if sum(map(len, sets)) != len(processes) or len({len(rows) for rows in sets}) > 1:
        raise ConfigError("mesh: two hosts share only a part of their rows; order the axes so that each keeps its own")
    return {process: sets.index(tuple(sorted(rows))) for process, rows in own.items()}
