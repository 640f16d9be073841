"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, out and in.

PEFT keeps lora_A as [r, in] and lora_B as [out, r], the transposes of our a and b, and DoRA's magnitudes as they are;
what is trained in full has the name that it has in the model, and its module is listed in modules_to_save.
What an adapter_config.json asks for beyond that is refused by name: the loaded adapter would compute something else
than it says.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pydantic

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.lora import TARGETS, LoraConfig, abstract_adapters, adapted_layers, full_names, layer_pairs
from jaxpost.models import assemble, hf, llama
from jaxpost.models.safetensors_reader import read_header
from jaxpost.models.spec import DecoderSpec, is_info

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

READ = {"r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "modules_to_save"}
# These say how training began or which software wrote the file; the saved adapter is the same function.
HARMLESS = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "ensure_weight_tying",
}
ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "use_dora": (False, True),
    # Others (pissa, olora, corda, ..) also change the base weights, which the adapter file does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_peft(
    folder: str | os.PathLike,
    adapters: Any,
    config: LoraConfig,
    spec: DecoderSpec,
    *,
    base: str | None = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    family: ModuleType = llama,
) -> pathlib.Path:
    """Write a folder that PEFT opens; whole or not at all, and never over another's files.

    base: hub name or path of the base model, for PEFT's AutoModels. tokenizer: has save(folder). dtype None keeps the
    adapters' fp32, so that loading gives back the same bits.
    """
    from safetensors.numpy import save_file

    if not config.rank:
        raise ConfigError("lora.rank: 0 means that there is no adapter to write")
    if dtype not in (None, *hf.DTYPES):
        raise ConfigError(f"dtype {dtype!r} cannot be exported; one of {', '.join(hf.DTYPES)}")
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: exists and is not empty; choose another folder")
    adapters = jax.device_get(adapters)
    tensors = {}
    for layer in adapted_layers(config, spec):
        for target, pair in layer_pairs(adapters, spec, layer).items():
            for part, name in _tensor_names(family, target, layer, config.dora).items():
                if part == "magnitude" and not pair[part].all():
                    raise ConfigError(f"{name}: has a column of length 0, by which PEFT divides; export with --to=hf")
                tensors[name] = np.ascontiguousarray(pair[part].T, hf.DTYPES[dtype or "float32"])
    whole = [leaf for leaf in assemble.leaves(spec, family.tensor_name) if leaf.path[-1] in full_names(config, spec)]
    for leaf, row in assemble.in_layer_order(whole):
        tensor = assemble.tensor(adapters, leaf, row)
        name = PREFIX + leaf.names[row]
        tensors[name] = np.ascontiguousarray(tensor.T if leaf.transposed else tensor, hf.DTYPES[dtype or "float32"])
        if spec.tied and leaf.path == ("embed",):  # as PEFT writes it with ensure_weight_tying
            tensors[PREFIX + family.tensor_name("head")] = tensors[name]
    partial = len(adapted_layers(config, spec)) < spec.num_layers
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": [_module(family, target, 0).rpartition(".")[2] for target in config.targets],
        "layers_to_transform": list(adapted_layers(config, spec)) if partial else None,
        "bias": "none",
        "modules_to_save": _modules_to_save(whole, config, spec, family),
        "use_dora": config.dora,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if spec.tied and any(leaf.path == ("embed",) for leaf in whole):
        described["ensure_weight_tying"] = True  # else PEFT would leave the head as the base has it
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_peft(
    folder: str | os.PathLike, spec: DecoderSpec, *, family: ModuleType = llama
) -> tuple[LoraConfig, dict[str, Any]]:
    """(config, adapter tree of host f32 arrays) of a PEFT folder; 16-bit files are widened.

    Targets and layers follow from the tensors in the file. Raises ConfigError for options and adapters that we do not
    compute, CheckpointError for missing or damaged files and for weights that do not fit the model.
    """
    config, placed, whole, infos = _plan(pathlib.Path(folder), spec, family)
    shapes = jax.tree.map(lambda info: info.struct, abstract_adapters(config, spec), is_leaf=is_info)
    adapters = jax.tree.map(lambda struct: np.zeros(struct.shape, np.float32), shapes)
    for (layer, target), names in placed.items():
        slot = spec.locate(layer)
        pair = adapters[slot.part][slot.key][TARGETS[target]][target]
        for part, name in names.items():
            tensor = infos[name].view(name).T
            if part == "magnitude" and not tensor.all():
                raise ConfigError(f"{folder}: {name} has zeros, which mean no adapter here")
            pair[part][... if slot.repeat is None else slot.repeat] = tensor
    for leaf in whole:
        array = assemble.follow(adapters, leaf.path)
        for row, name in enumerate(leaf.names):
            tensor = infos[PREFIX + name].view(PREFIX + name)
            array[row if leaf.stacked else ...] = tensor.T if leaf.transposed else tensor
    return config, adapters


def peft_config(folder: str | os.PathLike, spec: DecoderSpec, *, family: ModuleType = llama) -> LoraConfig:
    """The LoraConfig of load_peft, without reading the weights; refuses what load_peft refuses."""
    return _plan(pathlib.Path(folder), spec, family)[0]


def hash_peft(folder: str | os.PathLike) -> str:
    """SHA-256 of an adapter's two files."""
    return hf.hash_files([_existing(pathlib.Path(folder) / name) for name in (CONFIG_FILE, WEIGHTS_FILE)])


def _plan(
    folder: pathlib.Path, spec: DecoderSpec, family: ModuleType
) -> tuple[LoraConfig, dict[tuple[int, str], dict[str, str]], list[assemble.Leaf], dict[str, Any]]:
    """(config, (layer, target) -> part -> tensor name, what is there in full, the file's header), all checked."""
    options = read_config(folder / CONFIG_FILE)
    infos = read_header(_existing(folder / WEIGHTS_FILE))
    placed: dict[tuple[int, str], dict[str, str]] = {}  # (layer, target) -> part -> tensor name
    remaining = dict(infos)
    for layer in range(spec.num_layers):
        for target in TARGETS:
            names = _tensor_names(family, target, layer, bool(options.get("use_dora")))
            found = {part: name for part, name in names.items() if remaining.pop(name, None) is not None}
            if missing := [name for part, name in names.items() if found and part not in found]:
                raise CheckpointError(f"{folder}: {next(iter(found.values()))} has no partner {missing[0]}")
            if found:
                placed[layer, target] = found
    whole = _whole(folder, options, remaining, spec, family)
    if remaining:
        raise ConfigError(f"{folder}: unsupported tensor {min(remaining)!r}: no adapted projection of this model")
    config = _config(folder, options, placed, whole, spec, family)
    shapes = jax.tree.map(lambda info: info.struct, abstract_adapters(config, spec), is_leaf=is_info)
    for (layer, target), names in placed.items():  # before anything is allocated
        slot = spec.locate(layer)
        for part, name in names.items():
            shape = shapes[slot.part][slot.key][TARGETS[target]][target][part].shape
            wanted = (shape if slot.repeat is None else shape[1:])[::-1]  # transposed, no stack
            if infos[name].shape != wanted:
                raise CheckpointError(f"{folder}: {name} is {infos[name].shape}, the model and r need {wanted}")
    for leaf in whole:
        for name in (PREFIX + name for name in leaf.names):
            if infos[name].shape != leaf.tensor_shape:
                raise CheckpointError(f"{folder}: {name} is {infos[name].shape}, the model needs {leaf.tensor_shape}")
    return config, placed, whole, infos


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """The options of an adapter_config.json; ConfigError names the first one that is not plain LoRA."""
    options = hf.read_json(_existing(file))
    if "peft_type" not in options:
        raise CheckpointError(f"{file}: no PEFT config (peft_type is missing)")
    modules = options.get("modules_to_save")
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        raise ConfigError(f"{file}: modules_to_save {modules!r} is not a list of modules")
    for name, value in sorted(options.items()):
        if name in ALLOWED:
            # By type too: 1 equals True.
            if not any(value == good and type(value) is type(good) for good in ALLOWED[name]):
                raise ConfigError(f"{file}: {name} {value!r} is not supported, only {ALLOWED[name][0]!r}")
        elif name in ("rank_pattern", "alpha_pattern"):
            usual = options.get("r" if name == "rank_pattern" else "lora_alpha")
            if value and (not isinstance(value, Mapping) or any(v != usual for v in value.values())):
                raise ConfigError(
                    f"{file}: {name} {value!r} is not supported: every projection has the same value here"
                )
        elif name not in READ | HARMLESS and value not in (None, False, {}, []):
            raise ConfigError(f"{file}: {name} {repr(value)[:100]} is not supported")
    return options


def _whole(
    folder: pathlib.Path, options: dict, remaining: dict[str, Any], spec: DecoderSpec, family: ModuleType
) -> list[assemble.Leaf]:
    """The parameters that the file holds in full, taken out of `remaining`; of a kind all layers' or none."""
    present = set(remaining)
    plan = assemble.leaves(spec, family.tensor_name)
    kinds = {leaf.path[-1] for leaf in plan if any(PREFIX + name in present for name in leaf.names)}
    found = [leaf for leaf in plan if leaf.path[-1] in kinds]
    if spec.tied:
        _check_tied(folder, options, remaining, family)
    for name in (PREFIX + name for leaf in found for name in leaf.names):
        if name not in present:
            raise ConfigError(f"{folder}: {name} is missing though other layers' are there: not supported")
        del remaining[name]
    for module in options.get("modules_to_save") or ():
        if not any(_module_of(name).endswith(module) for name in present):
            raise CheckpointError(f"{folder}: modules_to_save names {module}, {WEIGHTS_FILE} holds none")
    return found


def _check_tied(folder: pathlib.Path, options: dict, remaining: dict[str, Any], family: ModuleType) -> None:
    """Drops the head that repeats the embedding; refuses an adapter that parts the two."""
    embed, head = (PREFIX + family.tensor_name(path) for path in ("embed", "head"))
    named = any(_module_of(embed).endswith(module) for module in options.get("modules_to_save") or ())
    if embed in remaining and head in remaining:
        parted = not np.array_equal(remaining[embed].view(embed), remaining.pop(head).view(head))
    else:
        parted = head in remaining or (embed in remaining and named and not options.get("ensure_weight_tying"))
    if parted:
        raise ConfigError(
            f"{folder}: trains the embedding and the head apart, and this model has one matrix for both; PEFT's "
            "ensure_weight_tying keeps them equal"
        )


def _modules_to_save(
    whole: list[assemble.Leaf], config: LoraConfig, spec: DecoderSpec, family: ModuleType
) -> list[str] | None:
    """Names of the modules, as short as PEFT's matching of endings allows; ConfigError for a part of an adapted one."""
    every = {_module_of(name) for leaf in assemble.leaves(spec, family.tensor_name) for name in leaf.names}
    mine = {_module_of(name) for leaf in whole for name in leaf.names}
    adapted = {_module(family, target, layer) for target in config.targets for layer in range(spec.num_layers)}
    if both := sorted(mine & adapted):
        raise ConfigError(f"{both[0]}: PEFT has no name for a bias that is trained beside an adapter; use --to=hf")
    names = set()
    for module in mine:
        short = module.rpartition(".")[2]
        names.add(short if all(other in mine for other in every if other.endswith(short)) else module)
    return sorted(name for name in names if not any(name.endswith(other) for other in names - {name})) or None


def _config(
    folder: pathlib.Path, options: dict, placed: dict, whole: list, spec: DecoderSpec, family: ModuleType
) -> LoraConfig:
    """The LoraConfig that names exactly what is in the file; refused where no LoraConfig does."""
    targets = tuple(t for t in TARGETS if any(target == t for _, target in placed))
    layers = sorted({layer for layer, _ in placed})
    if not placed:
        raise CheckpointError(f"{folder}: {WEIGHTS_FILE} holds no adapter")
    for layer in layers:
        for target in targets:
            if (layer, target) not in placed:
                raise ConfigError(
                    f"{folder}: {_module(family, target, layer)} has no adapter though other layers' have: "
                    "adapters that differ between layers are not supported"
                )
    if options.get("r") == 0:
        raise CheckpointError(f"{folder}/{CONFIG_FILE}: r: 0 beside a file with adapters")
    wanted = options.get("target_modules") or ()
    for target in TARGETS:
        name = _module(family, target, 0).rpartition(".")[2]
        if isinstance(wanted, list) and name in wanted and target not in targets:
            raise CheckpointError(f"{folder}: target_modules names {name}, {WEIGHTS_FILE} holds none")
    first, last = layers[0], layers[-1]
    if last - first + 1 != len(layers):
        raise ConfigError(f"{folder}: adapters on layers {layers} are not supported, only on one range of layers")
    everywhere = isinstance(wanted, list) and not any("." in name for name in wanted)
    everywhere = everywhere and not options.get("layers_to_transform") and not options.get("exclude_modules")
    if everywhere and len(layers) < spec.num_layers:
        raise ConfigError(f"{folder}: adapters of a model with {len(layers)} layers, this one has {spec.num_layers}")
    try:
        return LoraConfig(
            rank=options["r"],
            alpha=options["lora_alpha"],
            rslora=options.get("use_rslora", False),
            dora=options.get("use_dora", False),
            dropout=options.get("lora_dropout", 0.0),
            targets=targets,
            also_train=tuple(dict.fromkeys(leaf.path[-1] for leaf in whole)),
            layers=None if len(layers) == spec.num_layers else f"{first}:{last + 1}",
        )
    except KeyError as error:
        raise CheckpointError(f"{folder}/{CONFIG_FILE}: {error.args[0]} is missing") from None
    except pydantic.ValidationError as error:
        first_error = error.errors()[0]
        where = ".".join(map(str, first_error["loc"])) or "lora"
        raise ConfigError(f"{folder}/{CONFIG_FILE}: {where}: {first_error['msg']}") from None


def _module(family: ModuleType, target: str, layer: int) -> str:
    """Name of a projection's module in transformers, e.g. model.layers.3.self_attn.q_proj."""
    return family.tensor_name(f"{TARGETS[target]}.{target}", layer).removesuffix(".weight")


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _tensor_names(family: ModuleType, target: str, layer: int, dora: bool) -> dict[str, str]:
    module = PREFIX + _module(family, target, layer)
    names = {"a": f"{module}.lora_A.weight", "b": f"{module}.lora_B.weight"}
    return names | {"magnitude": f"{module}.lora_magnitude_vector"} if dora else names


def _existing(file: pathlib.Path) -> pathlib.Path:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a PEFT adapter is {CONFIG_FILE} and {WEIGHTS_FILE}")
    return file
