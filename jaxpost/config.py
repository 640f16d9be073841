"""The config of a run: composed from the sections' own classes, loaded from YAML and key=value, checked, and reported.

    loaded = load("configs/quickstart.yaml", ["optim.learning_rate=1e-4", "data.path=my.jsonl"])
    loaded.config.optim.learning_rate        # 0.0001
    print(loaded.dump())                     # resolved YAML; each leaf says default, FILE:LINE or command line

Rules of reading:
- key=value takes YAML 1.2 values and list positions (`data.train.0.weight=2`); the last one wins.
- `${NAME}` in a text is the environment variable NAME; `$${` is a plain `${`. Unset is an error, but JAXPOST_DATA is
  then ./data.
- A relative data, model, adapter or template path belongs to the folder of the config file that it is written in, or
  to the working directory when typed. Runs (run_dir, ckpt:RUN) always belong to the working directory: they are made
  there.
- A metric of the user's own, FILE.py:NAME, is taken from the command line alone: a config never brings code along.

Every mistake is a ConfigError of one line: FILE:LINE, dotted key, reason, nearest valid name. The JSON schema for
editors is made by `python -m jaxpost.config --schema > configs/schema.json`; a config file names it in a first line
`# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import pydantic
from annotated_types import Le
from pydantic.dataclasses import dataclass

import jaxpost.algos  # noqa: F401  registers the built-in algorithms
from jaxpost import cli, compose, problems, yaml_loader
from jaxpost.algos.base import Algorithm, registry
from jaxpost.checkpoint import CheckpointConfig
from jaxpost.data.pipeline import DataConfig
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.evals.metrics import is_path
from jaxpost.evals.run import EvalConfig
from jaxpost.fields import SECTION, NonEmptyStr, NonNegInt
from jaxpost.loop import LoopConfig
from jaxpost.lora import LoraConfig
from jaxpost.metrics import MetricsConfig
from jaxpost.models.loading import ModelConfig
from jaxpost.optim import OptimConfig
from jaxpost.problems import Problem
from jaxpost.redact import redact
from jaxpost.sharding import MeshConfig
from jaxpost.yaml_loader import Path, dotted


def _is_algorithm(value: Any) -> Algorithm:
    if not isinstance(value, Algorithm):
        raise ValueError("must be an algorithm object such as jaxpost.algos.sft.SFT()")
    return value


@dataclass(frozen=True, kw_only=True, config=SECTION)
class Config:
    """Everything that decides a run."""

    run_dir: NonEmptyStr  # where the run lives; the same command goes on with what is there
    seed: Annotated[NonNegInt, Le(2**32 - 1)] = 0
    model: ModelConfig
    lora: LoraConfig | None = None  # None: train all weights
    data: DataConfig
    algorithm: Annotated[Algorithm, pydantic.PlainValidator(_is_algorithm)]
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    loop: LoopConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @pydantic.model_validator(mode="after")
    def _sections_agree(self) -> Config:
        try:
            _ = self.data.sources
        except ConfigError as error:
            raise ValueError(str(error)) from None
        looks = {"loop.eval_every": self.loop.eval_every, "loop.eval_first": self.loop.eval_first}
        looks |= {"eval.samples": self.eval.samples}
        if (asked := [key for key, value in looks.items() if value]) and not (self.data.eval or self.eval.tasks):
            raise ValueError(f"{asked[0]}: there is nothing to evaluate; give data.eval or eval.tasks")
        if self.optim.lora_plus_ratio is not None and self.lora is None:
            raise ValueError("optim.lora_plus_ratio: it is for adapters; give a lora section or leave it out")
        if self.eval.metric is not None and not self.data.eval:
            raise ValueError("eval.metric: it scores answers to the prompts of data.eval, and there is none")
        if self.algorithm.whole_batch and self.loop.micro_batches > 1:
            raise ValueError("loop.micro_batches: this algorithm's loss sorts the whole batch, which cannot be split")
        if self.algorithm.rows == "pairs" and (self.data.max_segments or 2) % 2:
            raise ValueError("data.max_segments: a pair takes two segments; give an even number")
        if self.lora is not None and self.lora.source is not None and "ref" in self.algorithm.needs:
            raise ValueError(
                "lora.source: the reference would be the base without that adapter; merge it into the base (a run's: "
                "python -m jaxpost.export RUN --to hf) and start from the merged model"
            )
        if self.data.batch_size % self.loop.micro_batches:
            raise ValueError(
                f"loop.micro_batches: {self.loop.micro_batches} does not divide data.batch_size {self.data.batch_size}"
            )
        return self


# What may differ from the saved run without asking: it changes what is seen or how fast, not what is computed.
HARMLESS = (
    "run_dir",
    "mesh",
    "checkpoint",
    "metrics",
    "eval",
    "loop.log_every",
    "loop.eval_every",
    "loop.eval_first",
    "loop.save_every",
    "loop.max_skipped_in_a_row",
    "data.workers",
    "data.path",
    "data.train",  # by content, wherever it lies: the source compares fingerprints when it is restored
    "data.eval",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checked config, and where each of its values came from (nothing is known of one made in Python: {})."""

    config: Config
    origins: dict[Path, compose.Origin]

    def provenance(self, path: Path) -> str:
        """`default`, FILE:LINE or `command line`, of one leaf."""
        return str(self.origins.get(path, "default"))

    def dump(self) -> str:
        """The resolved config as YAML, with the provenance of every leaf if it was loaded; secrets show as ***."""
        return yaml_loader.dump(compose.escape(redact(to_tree(self.config))), self.provenance if self.origins else None)


def load(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> Loaded:
    """Reads a config file (or none), applies key=value overrides, checks. Raises ConfigError of one line."""
    draft = compose.read(path)
    for text in overrides:
        draft.override(text)
    draft.resolve()
    _refuse_code_in_files(draft)
    return Loaded(_check(draft), draft.origins)


def from_arguments(args: cli.Arguments) -> Loaded:
    """load() for a command line with cli.CONFIG_FLAGS; imports what --import names first."""
    for file in args.flags["import"]:
        import_file(file)
    if args.config is None and not args.overrides:
        raise ConfigError("no config: type --config=FILE; configs/ holds one for every kind of run")
    return load(args.config, args.overrides)


def load_saved(run_dir: str | os.PathLike) -> Config:
    """The config that a run was started with, to read its model, adapters and checkpoints.

    Code of the user's own is only typed, so metrics from files are left out, and an algorithm that is not known here
    stands as sft: what a run was trained with does not matter to those who read its weights.
    """
    file = os.path.join(run_dir, "config.yaml")
    if not os.path.isfile(file):
        raise ConfigError(f"{run_dir}: not a run directory (it has no config.yaml)")
    draft = compose.read(file)
    draft.tree = compose.unescape(draft.tree)
    method = draft.tree.get("algorithm")
    if isinstance(method, dict) and isinstance(method.get("name"), str) and method["name"] not in registry():
        draft.tree["algorithm"] = {"name": "sft"}
    section = draft.tree.get("eval")
    if isinstance(section, dict):
        if _is_code(section.get("metric")):
            section["metric"] = None
        if isinstance(section.get("tasks"), list):
            section["tasks"] = [t for t in section["tasks"] if not (isinstance(t, dict) and _is_code(t.get("metric")))]
    return _check(draft)


def to_tree(value: Any) -> Any:
    """A config, or a part of one, as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_tree(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_tree(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_tree(child) for child in value]
    return value


def diff(saved: Any, current: Any, path: Path = ()) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every difference between two trees; a key that one lacks counts as null there."""
    if isinstance(saved, dict) and isinstance(current, dict):
        keys = [*current, *(key for key in saved if key not in current)]
        return [d for key in keys for d in diff(saved.get(key), current.get(key), (*path, key))]
    if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        return [d for i, (old, new) in enumerate(zip(saved, current, strict=True)) for d in diff(old, new, (*path, i))]
    same = saved == current and isinstance(saved, bool) == isinstance(current, bool)
    return [] if same else [(dotted(path), saved, current)]


def check_resume(saved_file: str | os.PathLike, config: Config, allow_changed: Sequence[str] = ()) -> None:
    """Refuses to go on with a run under another config: CheckpointError with every changed field, old and new.

    allow_changed: dotted keys (a section stands for all below it) that may differ; HARMLESS ones always may.
    """
    current = redact(to_tree(config))
    for name in allow_changed:
        _known_key(name, current)
    saved = _with_defaults(compose.unescape(compose.read(saved_file).tree), config)
    allowed = (*HARMLESS, *allow_changed)
    changed = [d for d in diff(saved, current) if not any(d[0] == a or d[0].startswith(f"{a}.") for a in allowed)]
    if changed:
        lines = [f"{k}: {_inline(old)} -> {_inline(new)}" for k, old, new in changed]
        names = ",".join(k for k, _, _ in changed)
        raise CheckpointError(
            f"{os.path.dirname(saved_file) or '.'}: the run there was started with another config: {'; '.join(lines)}. "
            f"Change it back, choose another run_dir, or accept with --allow_changed={names}"
        )


def _with_defaults(tree: Any, section: Any) -> Any:
    """A saved tree plus the defaults of fields that its sections did not have yet when it was saved."""
    if isinstance(tree, list) and isinstance(section, tuple) and len(tree) == len(section):
        return [_with_defaults(child, part) for child, part in zip(tree, section, strict=True)]
    if not (isinstance(tree, dict) and dataclasses.is_dataclass(section)):
        return tree
    tree = dict(tree)
    for field in dataclasses.fields(section):
        if field.name in tree:
            tree[field.name] = _with_defaults(tree[field.name], getattr(section, field.name))
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = to_tree(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = to_tree(field.default_factory())
    return tree


def import_file(file: str) -> None:
    """Runs a user's Python file, so that the algorithms in it are known. Raises ConfigError where that fails."""
    if not os.path.isfile(file) or not file.endswith(".py"):
        raise ConfigError(f"--import={file}: there is no such Python file")
    name = "jaxpost_user_" + re.sub(r"\W", "_", os.path.splitext(os.path.basename(file))[0])
    spec = importlib.util.spec_from_file_location(name, os.path.abspath(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"--import={file}: {type(error).__name__}: {error}") from error


def schema() -> dict[str, Any]:
    """JSON schema of a config file; the comments behind the fields become descriptions."""
    out = pydantic.TypeAdapter(Config).json_schema()
    for cls in registry().values():
        part = pydantic.TypeAdapter(cls).json_schema()
        out["$defs"] |= part.pop("$defs", {}) | {cls.__name__: part | {"required": ["name"]}}
    out["properties"]["algorithm"] = {"oneOf": [{"$ref": f"#/$defs/{cls.__name__}"} for cls in registry().values()]}
    for cls in {*dict(problems.walk_sections(Config)).values(), *registry().values()}:
        part = out if cls is Config else out["$defs"][cls.__name__]
        comments = _field_comments(cls)
        for name, field in part["properties"].items():
            field.pop("title", None)
            if name in comments:
                field["description"] = comments[name]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | out


def _field_comments(cls: type) -> dict[str, str]:
    """Field name -> the comment at the end of its line."""
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(cls), re.MULTILINE))


def _is_code(metric: Any) -> bool:
    return isinstance(metric, str) and is_path(metric)


def _refuse_code_in_files(draft: compose.Draft) -> None:
    def look(path: Path, text: str) -> str:
        if compose.is_metric(path) and is_path(text) and draft.origins[path].file is not None:
            reason = f"code is only taken from the command line; type {dotted(path)}=FILE.py:NAME there"
            raise draft.error(Problem(path, reason))
        return text

    compose.map_text(draft.tree, look)


def _check(draft: compose.Draft) -> Config:
    """The Config of a resolved tree. Absent sections are read as empty ones, so that errors name the missing key."""
    places = dict(problems.walk_sections(Config))
    algorithm, found = _algorithm(draft.tree.get("algorithm", {}), places)
    sections = {field.name: {} for field in dataclasses.fields(Config) if field.name not in ("run_dir", "seed", "lora")}
    try:
        config = _CONFIG.validate_python(sections | draft.tree | {"algorithm": algorithm})
    except pydantic.ValidationError as error:
        others = problems.explain(error, Config, places)
        found = [p for p in others if p.path != ("algorithm",)] + found
        raise draft.error(*found) from None
    return config


def _algorithm(tree: Any, places: dict[Path, type]) -> tuple[Algorithm | None, list[Problem]]:
    """The algorithm of its section, by name; its class is added to places, where names are looked for."""
    known, at = registry(), ("algorithm", "name")
    if not isinstance(tree, dict):
        return None, [Problem(at[:1], f"must be a section (key: value), not {problems.show_value(tree)}")]
    name = tree.get("name")
    if name is None:
        return None, [Problem(at, f"is required; known: {', '.join(known)}")]
    if not isinstance(name, str) or name not in known:
        near = problems.nearest(name, list(known)) if isinstance(name, str) else None
        hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        return None, [Problem(at, f"no algorithm is called {problems.show_value(name)}; {hint}")]
    places[at[:1]] = known[name]
    try:
        return pydantic.TypeAdapter(known[name]).validate_python(tree), []
    except pydantic.ValidationError as error:
        return None, problems.explain(error, known[name], places, at[:1])


def _known_key(name: str, tree: dict[str, Any]) -> None:
    """Refuses a name in --allow_changed that no key or section has."""
    names = [dotted(path) for path in compose.paths(tree)]
    if name not in names:
        near = problems.nearest(name, names)
        raise ConfigError(f"--allow_changed={name}: no such config key" + (f"; did you mean {near}?" if near else ""))


def _inline(value: Any) -> str:
    text = yaml_loader.inline(value)
    return text if len(text) <= 80 else text[:77] + "..."


_CONFIG = pydantic.TypeAdapter(Config)


def _print_schema(args: cli.Arguments) -> None:
    if not args.flags["schema"]:
        raise ConfigError("nothing to do; --schema prints the JSON schema")
    print(json.dumps(schema(), indent=1, sort_keys=True))


if __name__ == "__main__":
    cli.main(_print_schema, doc=__doc__, flags=[cli.Flag("schema", False, "print the JSON schema of a config file")])
