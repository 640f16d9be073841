"""Hugging Face folders: config.json and safetensors, in and out. Nothing else is read: no pickle, no remote code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import assemble, llama
from jaxpost.models.safetensors_reader import DTYPE_CODES, TensorInfo, read_header, strict_json
from jaxpost.models.spec import DecoderSpec

FAMILIES = {family.MODEL_TYPE: family for family in (llama,)}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 32 << 20
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# ------------------------------------------------------------------------------------------------ reading


def read_json(file: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file of at most 32 MiB, without repeated keys; CheckpointError otherwise."""
    file = pathlib.Path(file)
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_JSON_BYTES} bytes")
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    value = strict_json(data, str(file))
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return value


def family_of(config: Mapping[str, Any]) -> Any:
    """The family module of a config.json; ConfigError for code, quantised weights and unknown architectures."""
    if config.get("auto_map") or config.get("trust_remote_code"):
        raise ConfigError("config.json: auto_map asks for the author's own Python code, which is never run")
    if config.get("quantization_config"):
        raise ConfigError("config.json: quantization_config: quantised safetensors are not read; use the full weights")
    known = ", ".join(f.ARCHITECTURE for f in FAMILIES.values())
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError(f"config.json: model_type {config.get('model_type')!r} is not known; known: {known}")
    names = config.get("architectures") or [family.ARCHITECTURE]
    if names != [family.ARCHITECTURE]:
        raise ConfigError(f"config.json: architectures {names!r} is not known; known: {known}")
    return family


def read_spec(folder: str | os.PathLike) -> DecoderSpec:
    """The DecoderSpec of a folder's config.json."""
    return spec_from_config(read_config(folder), str(folder))


def spec_from_config(config: Mapping[str, Any], where: str) -> DecoderSpec:
    """DecoderSpec of a parsed config.json; errors begin with `where`."""
    try:
        return family_of(config).config_from_hf(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json as it stands; says what is wrong with folders that hold something else."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{folder}: a PEFT adapter, not a model; name its base model instead")
        raise ConfigError(f"{folder}: no config.json in it")
    return read_json(folder / "config.json")


def special_ids(folder: str | os.PathLike) -> list[tuple[str, str, int]]:
    """(file name, "bos_token_id" or "eos_token_id", id) of every such id in the configs of a folder."""
    found = []
    for file in (pathlib.Path(folder, "config.json"), pathlib.Path(folder, "generation_config.json")):
        config = read_json(file) if file.is_file() else {}
        for name in ("bos_token_id", "eos_token_id"):
            given = config.get(name)
            for index in given if isinstance(given, list) else [] if given is None else [given]:
                if type(index) is not int:
                    raise ConfigError(f"{file}: {name} {str(given)[:50]!r} is no token id")
                found.append((file.name, name, index))
    return found


def weight_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The safetensors files of a folder, one or the shards that its index names; only inside the folder."""
    folder = pathlib.Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}: remove the stale one")
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / shard for shard in sorted(set(_weight_map(index).values()))]
    pickles = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{folder}: holds only pickled weights ({pickles[0]}), which can run code when opened and are never read; "
            "convert them to safetensors"
        )
    raise ConfigError(f"{folder}: neither {SINGLE} nor {INDEX} in it")


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and pathlib.PurePosixPath(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors") or "\0" in shard:
            raise CheckpointError(f"{index}: shard name {str(shard)[:200]!r} is not a safetensors file of this folder")
    return weight_map


def read_headers(folder: str | os.PathLike) -> dict[str, TensorInfo]:
    """Name -> TensorInfo over all shards; a name in two shards or at odds with the index is an error."""
    folder = pathlib.Path(folder)
    found: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        header = read_header(file)
        if twice := sorted(found.keys() & header.keys()):
            raise CheckpointError(f"{file}: {_some(twice)} also in {found[twice[0]].file.name}")
        found |= header
    if (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX)
        wrong = sorted(n for n in listed.keys() | found.keys() if n not in found or listed.get(n) != found[n].file.name)
        if wrong:
            raise CheckpointError(f"{folder / INDEX}: at odds with its shards about {_some(wrong)}")
    return found


def load_hf(folder: str | os.PathLike, dtype: Any, shardings: Any = None, spec: DecoderSpec | None = None) -> dict:
    """The parameter tree of a folder in `dtype`, placed as `shardings` (a tree like it) says, leaf by leaf."""
    family = family_of(read_config(folder))
    spec = read_spec(folder) if spec is None else spec
    plan = assemble.leaves(spec, family.tensor_name)
    found = {n: t for n, t in read_headers(folder).items() if not n.endswith(family.IGNORED_SUFFIXES)}
    _check_tied_head(folder, found, spec, family)
    wanted = {name: leaf.tensor_shape for leaf in plan for name in leaf.names}
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{folder}: missing tensor(s): {_some(missing)}")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{folder}: unexpected tensor(s): {_some(extra)}")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise CheckpointError(f"{folder}: {name} is {list(found[name].shape)}, config.json says {list(shape)}")
    return assemble.build(plan, lambda name: found[name].view(name), spec, dtype, shardings)


def _check_tied_head(folder: Any, found: dict[str, TensorInfo], spec: DecoderSpec, family: Any) -> None:
    """A head stored beside a tied embedding must be its copy; then it is dropped."""
    name, embed = family.tensor_name("head"), family.tensor_name("embed")
    if not spec.tied or name not in found or embed not in found:
        return
    head = found.pop(name)
    ours, theirs = found[embed].view(embed), head.view(name)
    alike = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if not alike or not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):
        raise CheckpointError(
            f"{folder}: {name} differs from {embed} although config.json says tie_word_embeddings: true; "
            "set it to false if the head is the model's own"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(n[:100] for n in names[:5]) + more


def hash_files(files: list[pathlib.Path]) -> str:
    """SHA-256 over names and whole contents: any changed byte of a model shows."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ writing


def save_hf(
    params: dict,
    spec: DecoderSpec,
    folder: str | os.PathLike,
    dtype: str | None = None,
    tokenizer: Any = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    family: Any = llama,
) -> pathlib.Path:
    """Write a folder that transformers, vLLM, .. open (configs, weights, tokenizer), whole or not at all.

    dtype None keeps that of the embedding. tokenizer: has save(folder), bos_id, pad_id and stop_ids. In a run over
    several processes all must call it; process 0 writes. An existing folder is replaced only with `overwrite`, and only
    if it is a model folder. Host memory: one tensor at a time.
    """
    folder = pathlib.Path(folder)
    dtype = dtype or np.dtype(params["embed"].dtype).name
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} cannot be exported; one of {', '.join(DTYPES)}")
    config = family.config_to_hf(spec, dtype=dtype)
    ids = {} if tokenizer is None else _special_ids(tokenizer)
    writes = jax.process_index() == 0
    if writes:
        _check_target(folder, overwrite)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if writes:
            temporary.mkdir(parents=True)
            unset = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # absent would mean 1 and 2
            _write_json(temporary / "config.json", config | unset | ids)
            _write_json(temporary / "generation_config.json", ids)
            if tokenizer is not None:
                tokenizer.save(temporary)
        plan = assemble.leaves(spec, family.tensor_name)
        _write_weights(plan, params, temporary, np.dtype(DTYPES[dtype]), max_shard_bytes, writes)
        if writes:
            _replace(temporary, folder)
    finally:
        if writes:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_target(folder: pathlib.Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: exists and is not a folder")
    if not overwrite:
        raise ConfigError(f"{folder}: exists and is not empty; choose another folder or ask for overwriting")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: exists and is not a model folder; it is not overwritten")


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    stops = list(tokenizer.stop_ids)
    eos = stops[0] if len(stops) == 1 else stops or None
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}


def _write_weights(plan: list, params: dict, folder: pathlib.Path, dtype: np.dtype, limit: float, writes: bool) -> None:
    """One model.safetensors, or shards of at most `limit` bytes (or one tensor) and their index."""
    shards: list[list[tuple[assemble.Leaf, int]]] = [[]]
    size, total = 0, 0
    for leaf, row in assemble.in_layer_order(plan):
        need = math.prod(leaf.tensor_shape) * dtype.itemsize
        if shards[-1] and size + need > limit:
            shards.append([])
            size = 0
        shards[-1].append((leaf, row))
        size, total = size + need, total + need
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") if writes else contextlib.nullcontext() as stream:
            if writes:
                stream.write(_header({leaf.names[row]: leaf.tensor_shape for leaf, row in shard}, dtype))
            for leaf, row in shard:
                data = _to_host(assemble.tensor(params, leaf, row), leaf.names[row], dtype)
                if writes:
                    flat = np.ascontiguousarray(data.T if leaf.transposed else data).reshape(-1)
                    stream.write(flat.view(np.uint8).data)
            if writes:
                stream.flush()
                os.fsync(stream.fileno())
    if writes and count > 1:
        weight_map = {leaf.names[row]: file for file, shard in zip(files, shards, strict=True) for leaf, row in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this mark
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_CODES[dtype.name], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _to_host(value: Any, name: str, dtype: np.dtype) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    wide = np.asarray(value)
    with np.errstate(over="ignore"):
        out = wide.astype(dtype)
    if dtype == np.float16 and np.isinf(out).any() and np.isfinite(wide).all():
        raise ConfigError(f"{name} does not fit float16 (largest value {np.abs(wide).max():.3g}); export as bfloat16")
    return out


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _replace(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Move the finished folder into place; an old one is moved aside first and removed last."""
    old = None
    if folder.exists():
        old = folder.with_name(f"{temporary.name}.old")
        folder.rename(old)
    temporary.rename(folder)
    if old is not None:
        shutil.rmtree(old)
