"""The only file that turns a Config into objects."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost import flops, lora, manifest, rundir
from jaxpost.algos.base import Algorithm, Context
from jaxpost.checkpoint import Checkpointer
from jaxpost.compose import Origin, paths
from jaxpost.config import Config, Loaded, load_saved, to_tree
from jaxpost.data import tasks
from jaxpost.data.chat import Tokenizer, load_tokenizer
from jaxpost.data.feed import MeshSource, to_mesh
from jaxpost.data.pipeline import EvalRows, PackedSource
from jaxpost.data.prompts import question_of
from jaxpost.data.sources import SourceConfig, open_source
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.evals import metrics as task_metrics
from jaxpost.evals.run import Evaluator, Task, make_eval_step
from jaxpost.leaves import dotted
from jaxpost.loop import Job
from jaxpost.models import decoder, peft
from jaxpost.models.loading import Located, ModelConfig, content_hash, load_params, locate
from jaxpost.models.policy import Policy
from jaxpost.models.sampler import Sampler
from jaxpost.models.spec import FORMAT, abstract_params
from jaxpost.optim import make_optimizer, trainable_mask
from jaxpost.sharding import MeshConfig, Rules, check_divides, host_rows, make_mesh, rules_for, tree_shardings
from jaxpost.step import init_state, make_step
from jaxpost.types import Stream, TrainState


@dataclasses.dataclass(frozen=True)
class Model:
    """A located model on a mesh: everything but the weights."""

    located: Located
    tokenizer: Tokenizer
    policy: Policy
    rules: Rules
    param_dtype: Any

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
    tokenizer = load_tokenizer(located.tokenizer_path, config.chat_template, date)
    tokenizer.check_model(located.spec.vocab_size)
    spec, mesh = located.spec, make_mesh(mesh_config, devices)
    if adapters is not None:
        lora.full_names(adapters, spec)  # refuses what this model does not have
    rules = rules_for(
        mesh, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, d_model=spec.d_model, d_ff=spec.d_ff,
        vocab_size=spec.vocab_size,
    )  # fmt: skip
    dtype = config.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options = decoder.Options(
        dtype=jnp.dtype(dtype), remat=config.remat, attention=config.attention, rules=rules if mesh.size > 1 else None
    )
    return Model(located, tokenizer, Policy(spec, options, adapters), rules, jnp.dtype(config.param_dtype))


def open_model(source: str, weights: str = "policy") -> tuple[Model, Any, Any]:
    """(model, base weights, adapters or None) of a run directory or a model source, on one device: to sample from.

    weights: of a run, see load_run.
    """
    run = source.removeprefix("ckpt:")
    if source.startswith("ckpt:") or os.path.isfile(os.path.join(source, "config.yaml")):
        located = locate(f"ckpt:{run}")
        saved = load_saved(located.path)
        config = dataclasses.replace(saved.model, source=f"ckpt:{run}")
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
    wanted = {"policy": _structs(infos, model.rules)}
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


def build_job(
    config: Config,
    sinks: Any,
    *,
    allow_changed: Sequence[str] = (),
    allow_fallback: bool = False,
    devices: list | None = None,
) -> Job:
    """A run ready for loop.run, restored from its newest checkpoint where there is one. devices: default all."""
    config = adopt_adapters(Loaded(config, {})).config
    model = build_model(config.model, config.mesh, config.lora, devices, rundir.start_date(config.run_dir))
    algorithm, policy, rules = config.algorithm, model.policy, model.rules
    check_divides(config.data.batch_size, config.loop.micro_batches, config.data.widths, rules)
    shard_index, num_shards = host_rows(rules.mesh)

    def make_task(source: SourceConfig) -> tasks.Task:
        path, template, date = model.located.tokenizer_path, config.model.chat_template, model.tokenizer.date
        return tasks.make_task(source.task, path, config.data.loss_on, chat_template=template, date=date)

    identity = {"model.tokenizer": model.tokenizer.fingerprint}
    rows = PackedSource(
        config.data, make_task, seed=config.seed, shard_index=shard_index, num_shards=num_shards, identity=identity
    )
    total_steps = config.loop.steps or rows.count_batches(config.loop.epochs)

    base = load_weights(model)
    params, frozen = (
        ({"policy": base}, {}) if config.lora is None else (_adapters(config, model, base), {"policy": base})
    )
    tx, schedule = make_optimizer(config.optim, total_steps, params)
    checkpointer = Checkpointer(config.run_dir, config.checkpoint)
    fresh = partial(init_state, tx=tx, slow=algorithm.slow, skip_spikes=config.loop.skip_spikes)
    abstract = jax.eval_shape(fresh, params)
    shardings = _state_shardings(abstract, params, rules)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )
    checkpointer.preflight(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract)))

    meta = {"format": FORMAT, "num_tokens": 0, "weights": content_hash_of(model.located)}
    if config.lora is not None and config.lora.source is not None:
        meta["adapters"] = peft.hash_peft(config.lora.source)
    annotate = None
    if type(algorithm).annotate is not Algorithm.annotate:  # the base's adds nothing: not worth a program
        annotate = jax.jit(lambda batch: algorithm.annotate(policy, frozen, batch))
    ctx = Context(
        model.tokenizer, rules.mesh, policy, lambda _: MeshSource(rows, rules, annotate), config.seed,
        jax.process_index(), jax.process_count(),
    )  # fmt: skip
    source = algorithm.source(ctx)
    if (step := checkpointer.latest()) is None:
        state = jax.jit(fresh, out_shardings=shardings)(params)
        sinks.truncate(-1)  # lines of a start that was killed before its first save
    else:
        state, position, saved = checkpointer.restore(step, abstract, allow_fallback=allow_fallback)
        _same_weights(saved, meta, allow_changed)
        meta["num_tokens"] = saved["num_tokens"]
        source.restore(position, allow_changed)
        sinks.truncate(int(state.step))
        sinks.event(f"resumed at step {int(state.step)} of {total_steps}")
    stochastic = algorithm.stochastic or (config.lora is not None and config.lora.dropout > 0)
    train_step = make_step(
        algorithm,
        policy,
        tx,
        micro_batches=config.loop.micro_batches,
        schedule=schedule,
        clip_norm=config.optim.clip_norm,
        trainable=trainable_mask(config.optim, params),
        seed=config.seed,
        stochastic=stochastic,
        skip_spikes=config.loop.skip_spikes,
    )
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    adapter_params, full_params = (None, 0) if config.lora is None else lora.param_counts(config.lora, policy.spec)
    return Job(
        state=state,
        frozen=frozen,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
        source=source,
        evaluate=build_evaluator(config, model, make_task, sinks, shard_index, num_shards),
        checkpointer=checkpointer,
        sinks=sinks,
        total_steps=total_steps,
        meta=meta,
        flops_per_token=partial(
            flops.train_flops_per_token, policy.spec, adapter_params=adapter_params, full_params=full_params
        ),
        peak_flops=None if peak is None else peak * rules.mesh.size,
        num_programs=len(config.data.widths),
    )


def build_evaluator(
    config: Config, model: Model, make_task: Any, sinks: Any, shard_index: int = 0, num_shards: int = 1
) -> Evaluator:
    """Held-out loss, samples and task metrics, as the config asks for."""
    held_out = []
    if config.data.eval:
        rows = EvalRows(config.data, make_task, shard_index=shard_index, num_shards=num_shards)
        held_out = list(rows)  # tokenised once
    tokenizer = model.tokenizer
    eval_step = jax.jit(make_eval_step(config.algorithm, model.policy))
    return Evaluator(
        config.eval,
        batches=lambda: (to_mesh(batch, model.rules) for batch in held_out),
        eval_step=eval_step,
        sampler=Sampler(model.policy, tokenizer.stop_ids, batch_size=config.eval.batch_size),
        tasks=_eval_tasks(config, tokenizer),
        decode=lambda ids: tokenizer.decode(ids, skip_special=True),
        folder=pathlib.Path(config.run_dir) / "samples",
        report=sinks.event,
        writes=jax.process_index() == 0,
        seed=config.seed,
        averaged="policy" in config.algorithm.slow and config.algorithm.slow["policy"].decay is not None,
    )


def _eval_tasks(config: Config, tokenizer: Tokenizer) -> list[Task]:
    def build(name: str, sources: Sequence[SourceConfig], metric: Any, tokens: int, limit: int | None = None) -> Task:
        records = [open_source(source, f"eval task {name}") for source in sources]
        places = itertools.islice(((r, i) for r in records for i in range(len(r))), limit)
        rows = [(r[i], r.where(i)) for r, i in places]
        questions = [question_of(row, where) for row, where in rows]
        prompts = [question.encode(tokenizer) for question in questions]
        return Task(name, [row for row, _ in rows], questions, prompts, metric, tokens)

    built = [
        build(
            task.name,
            [SourceConfig(source=task.source, limit=task.limit)],
            task_metrics.find(task.metric, f"eval.tasks[{i}].metric"),
            task.max_new_tokens,
        )  # fmt: skip
        for i, task in enumerate(config.eval.tasks)
    ]
    if config.eval.metric is not None:
        if not config.data.eval:
            raise ConfigError("eval.metric: scores the prompts of data.eval, which is empty")
        metric = task_metrics.find(config.eval.metric, "eval.metric")
        name = config.eval.metric.rpartition(":")[2]
        built.append(build(name, config.data.eval, metric, config.eval.max_new_tokens))
    if config.eval.samples and not built and config.data.eval:
        built.append(build("samples", config.data.eval, None, config.eval.max_new_tokens, config.eval.samples))
    return built


def _adapters(config: Config, model: Model, base: Any) -> dict[str, Any]:
    """New adapters, or those of lora.source, on the mesh."""
    infos = lora.abstract_adapters(config.lora, model.located.spec)
    shardings = tree_shardings(infos, model.rules)
    if config.lora.source is not None:
        _, loaded = peft.load_peft(config.lora.source, model.located.spec)
        placed = jax.tree.map(
            lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index]), loaded, shardings
        )
        # Copied: on a CPU an array may lie in the host's memory, and could then not be donated.
        return {"policy": jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(placed)}
    key = jax.random.fold_in(jax.random.key(config.seed), Stream.LORA)
    init = jax.jit(
        lambda key, base: lora.init_adapters(config.lora, model.located.spec, key, base),
        out_shardings=shardings,
    )
    return {"policy": init(key, base)}


def _state_shardings(state: TrainState, params: Any, rules: Rules) -> TrainState:
    """Moments and slow copies lie as their parameters do, factored moments (updates.py) as far as they reach; counters
    are everywhere."""
    whole = NamedSharding(rules.mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: x.sharding, params)
    known = {dotted(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}

    def place(path: tuple, leaf: Any) -> NamedSharding:
        """A leaf whose path ends like a parameter's is a moment of it; a dimension that was averaged away is whole."""
        names = (dotted(path[i:]) for i in range(len(path)))
        param = next((known[name] for name in names if name in known), None)
        if param is None or leaf.shape == param.shape:
            return whole if param is None else param.sharding
        spec = (*param.sharding.spec, *(None,) * leaf.ndim)
        reaches = (axis if mine == its else None for axis, mine, its in zip(spec, leaf.shape, param.shape))
        return NamedSharding(rules.mesh, PartitionSpec(*reaches))

    return TrainState(
        step=whole,
        params=placed,
        opt_state=jax.tree_util.tree_map_with_path(place, state.opt_state),
        slow={role: placed[role] for role in state.slow},
        scalars=jax.tree.map(lambda _: whole, state.scalars),
    )


def _structs(infos: Any, rules: Rules) -> Any:
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


def _same_weights(saved: dict, now: dict, allow_changed: Sequence[str]) -> None:
    if saved["format"] != now["format"]:
        raise CheckpointError(f"the checkpoint has format {saved['format']}, this version writes {now['format']}")
    if saved["weights"] != now["weights"] and "model.source" not in allow_changed:
        raise CheckpointError(
            f"model.source: the weights changed since the run began (was {saved['weights'][:12]}, "
            f"is {now['weights'][:12]}); name a fixed step (ckpt:RUN/STEP), or accept with --allow_changed=model.source"
        )
    if saved.get("adapters") != now.get("adapters") and "lora.source" not in allow_changed:
        raise CheckpointError(
            "lora.source: the adapter there changed since the run began; bring the old one back, or go on from the "
            "checkpoint all the same with --allow_changed=lora.source"
        )
