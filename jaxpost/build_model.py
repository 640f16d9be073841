"""From a Config to a located model, its mesh and its weights: the half of build.py that the other commands share."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxpost import lora, manifest
from jaxpost.checkpoint import Checkpointer
from jaxpost.compose import Origin, paths
from jaxpost.config import Config, Loaded, load_saved, to_tree
from jaxpost.data.chat import Tokenizer, load_tokenizer
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.models import decoder, hf, peft
from jaxpost.models.loading import Located, ModelConfig, content_hash, load_params, locate
from jaxpost.models.policy import Policy
from jaxpost.models.spec import DecoderSpec, abstract_params
from jaxpost.sharding import MeshConfig, Rules, make_mesh, rules_for, tree_shardings


@dataclasses.dataclass(frozen=True)
class Model:
    """A located model on a mesh: everything but the weights."""

    located: Located
    tokenizer: Tokenizer
    policy: Policy
    rules: Rules
    param_dtype: Any
    chat_template: str | None  # file to use in place of the tokenizer's own

    def with_segments(self, most: int) -> Model:
        """For packed rows of at most that many segments."""
        options = dataclasses.replace(self.policy.options, max_segments=most)
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, options=options))

    @property
    def base_shardings(self) -> Any:
        return tree_shardings(abstract_params(self.located.spec), self.rules)


def build_model(
    config: ModelConfig,
    mesh_config: MeshConfig,
    adapters: lora.LoraConfig | None = None,
    devices: list | None = None,
    date: str | None = None,
) -> Model:
    """Locate weights and tokenizer, lay out the mesh; raises ConfigError before anything large is read.

    date: ISO date for chat templates that write today's; None: today's.
    """
    located = locate(config.source, config.tokenizer)
    if located.tokenizer_path is None:
        raise ConfigError(f"model.tokenizer: {config.source} comes without one; name a folder or file")
    template = config.chat_template or located.chat_template
    tokenizer = load_tokenizer(located.tokenizer_path, template, date)
    check_tokenizer(located, tokenizer)
    policy, rules = lay_out(located.spec, config, mesh_config, adapters, devices)
    return Model(located, tokenizer, policy, rules, jnp.dtype(config.param_dtype), template)


def lay_out(
    spec: DecoderSpec,
    config: ModelConfig,
    mesh_config: MeshConfig,
    adapters: lora.LoraConfig | None = None,
    devices: list | None = None,
) -> tuple[Policy, Rules]:
    """The model as algorithms see it, and where its arrays lie; ConfigError where the mesh cannot split it."""
    mesh = make_mesh(mesh_config, devices)
    if adapters is not None:
        lora.full_names(adapters, spec)  # refuses what this model does not have
    rules = rules_for(
        mesh, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, d_model=spec.d_model, d_ff=spec.d_ff,
        vocab_size=spec.vocab_size,
    )  # fmt: skip
    platform = mesh.devices.flat[0].platform
    defaults = ("float32", "none") if platform == "cpu" else ("bfloat16", "dots")
    dtype, remat = (d if x == "auto" else x for x, d in zip((config.compute_dtype, config.remat), defaults))
    if (needs := {"splash": "tpu", "cudnn": "gpu"}.get(config.attention, platform)) != platform:
        raise ConfigError(f"model.attention: {config.attention} runs on a {needs}, this is a {platform}; use auto")
    options = decoder.Options(
        dtype=jnp.dtype(dtype), remat=remat, attention=config.attention, platform=platform,
        rules=rules if mesh.size > 1 else None,
    )  # fmt: skip
    return Policy(spec, options, adapters), rules


def check_tokenizer(located: Located, tokenizer: Tokenizer) -> str:
    """Raises DataError where weights and tokenizer cannot belong together, with the numbers of both.

    Returns "", or what is worth knowing: the weights learnt to end in another special token (a base model that gets the
    tokenizer of its chat model, say), which training changes.
    """
    tokenizer.check_model(located.spec.vocab_size)
    while located.base is not None:
        located = located.base
    named = hf.special_ids(located.path) if located.kind == "hf" else []
    for file, name, index in named:
        tokenizer.check_special(name, index, f"{located.source}/{file}")
    ends = sorted({index for _, name, index in named if name == "eos_token_id"})
    if tokenizer.eos_id is None or not ends or tokenizer.eos_id in ends:
        return ""
    theirs = " and ".join(f"{index} ({tokenizer.token(index)!r})" for index in ends)
    mine = f"{tokenizer.eos_id} ({tokenizer.token(tokenizer.eos_id)!r})"
    return f"eos_token: the model's configs name {theirs}, the tokenizer {mine}; training goes by the tokenizer"


def open_model(source: str, weights: str = "policy") -> tuple[Model, Any, Any]:
    """(model, base weights, adapters or None) of a run directory or a model source, on one device: to sample from.

    weights: of a run, see load_run.
    """
    run = source.removeprefix("ckpt:")
    if source.startswith("ckpt:") or os.path.isfile(os.path.join(source, "config.yaml")):
        located = locate(f"ckpt:{run}")
        saved = load_saved(located.path)
        # Where and how it was trained does not matter here: this may be another machine.
        config = dataclasses.replace(saved.model, source=f"ckpt:{run}", attention="auto", remat="auto")
        model = build_model(config, MeshConfig(data=1), saved.lora, jax.devices()[:1])
        base, trained = load_run(model, saved, located, weights)
        return (model, trained, None) if base is None else (model, base, trained)
    model = build_model(ModelConfig(source=source), MeshConfig(data=1), None, jax.devices()[:1])
    return model, load_weights(model), None


def load_weights(model: Model, located: Located | None = None) -> Any:
    """The plain weight tree of a source, placed on the mesh; a run's adapters come merged into their base."""
    located = located or model.located
    if located.kind != "ckpt":
        return load_params(located, model.param_dtype, model.base_shardings)
    saved = load_saved(located.path)
    base, trained = load_run(model, saved, located)
    weights = trained if base is None else jax.jit(lambda b, t: lora.merge(b, t, saved.lora))(base, trained)
    return jax.tree.map(lambda x: x.astype(model.param_dtype), weights)


def load_run(model: Model, saved: Config, located: Located, weights: str = "policy") -> tuple[Any, Any]:
    """(base, adapters) of a run trained with LoRA, (None, weights) of one trained in full.

    weights: "policy", or "ema" for their average, in the dtype of the policy; CheckpointError where the run has none.
    """
    checkpointer = Checkpointer(located.path, saved.checkpoint)
    step = checkpointer.latest() if located.step is None else located.step
    if step is None:
        raise CheckpointError(f"{located.path}: no checkpoint yet; the run has not saved")
    if saved.lora is not None and checkpointer.meta(step)["weights"] != content_hash_of(located.base):
        raise CheckpointError(
            f"{located.path}: its adapters were trained on other weights than {located.base.source} holds now"
        )
    if saved.lora is None:
        infos = abstract_params(located.spec, jnp.dtype(saved.model.param_dtype))
    else:
        infos = lora.abstract_adapters(saved.lora, located.spec)
    wanted = {"policy": structs(infos, model.rules)}
    if weights == "policy":
        trained = checkpointer.restore_params(step, wanted)["policy"]
    else:
        wide = jax.tree.map(lambda x: x.update(dtype=jnp.float32), wanted)
        slow = checkpointer.restore_params(step, wide, part="slow")
        trained = jax.tree.map(lambda x, as_trained: x.astype(as_trained.dtype), slow, wanted)["policy"]
    return (None if saved.lora is None else load_weights(model, located.base)), trained


def adopt_adapters(loaded: Loaded) -> Loaded:
    """The config with the `lora` section as the PEFT adapter in lora.source has it, and its provenance with it.

    Without lora.source nothing changes. Raises ConfigError for a folder that is no PEFT adapter of this model and for
    written values that contradict it. What comes back passes through unchanged.
    """
    section = loaded.config.lora
    if section is None or section.source is None:
        return loaded
    folder = pathlib.Path(section.source)
    file = folder / peft.CONFIG_FILE
    if not file.is_file():
        hint = "; --to=peft of jaxpost.export writes a run's" if (folder / "config.yaml").is_file() else ""
        raise ConfigError(f"lora.source: {folder} is no PEFT adapter (it has no {peft.CONFIG_FILE}){hint}")
    spec = locate(loaded.config.model.source, loaded.config.model.tokenizer).spec
    try:
        found = peft.peft_config(folder, spec)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"lora.source: {error}") from None
    written = {path[1] for path in loaded.origins if path[:1] == ("lora",) and len(path) == 2}
    adopted = lora.adopt(section, found, spec, written if loaded.origins else None)
    config = dataclasses.replace(loaded.config, lora=adopted)
    if not loaded.origins:
        return Loaded(config, {})
    taken = {field.name: getattr(adopted, field.name) for field in dataclasses.fields(adopted)}
    taken = {name: value for name, value in taken.items() if name not in (*written, "source", "dropout")}
    return Loaded(config, loaded.origins | {("lora", *at): Origin(str(file)) for at in paths(to_tree(taken)) if at})


def structs(infos: Any, rules: Rules) -> Any:
    """ShapeDtypeStructs with shardings of an abstract tree."""
    return jax.tree.map(
        lambda info: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=rules.sharding(*info.axes)),
        infos, is_leaf=lambda x: hasattr(x, "axes"),
    )  # fmt: skip


def content_hash_of(located: Located) -> str:
    """What identifies the weights that a run started from: the bytes, or the manifest of another run's step."""
    if located.kind != "ckpt":
        return content_hash(located)
    step = located.step or Checkpointer(located.path).latest()
    file = pathlib.Path(located.path) / "checkpoints" / str(step) / manifest.NAME
    if not file.is_file():
        raise CheckpointError(f"{located.path}: no checkpoint of step {step}")
    return hashlib.sha256(file.read_bytes()).hexdigest()
