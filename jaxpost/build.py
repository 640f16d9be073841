"""The only file, with build_model.py, that turns a Config into objects."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpost import flops, lora, rundir
from jaxpost.algos.base import Algorithm, Context
from jaxpost.build_model import (
    Model,
    adopt_adapters,
    build_model,
    check_tokenizer,
    content_hash_of,
    load_weights,
    structs,
)
from jaxpost.checkpoint import Checkpointer
from jaxpost.config import Config, Loaded
from jaxpost.data import kinds, tasks
from jaxpost.data.chat import Tokenizer
from jaxpost.data.feed import MeshSource, to_mesh
from jaxpost.data.pipeline import EvalRows, PackedSource
from jaxpost.data.prompts import question_of
from jaxpost.data.sources import SourceConfig, open_source
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.evals import metrics as task_metrics
from jaxpost.evals.run import Evaluator, Task, make_eval_step
from jaxpost.leaves import dotted
from jaxpost.loop import Job
from jaxpost.models import peft
from jaxpost.models.policy import Policy
from jaxpost.models.sampler import Sampler
from jaxpost.models.spec import FORMAT, abstract_params
from jaxpost.optim import make_optimizer, trainable_mask
from jaxpost.sharding import Rules, check_divides, host_rows, tree_shardings
from jaxpost.step import init_state, make_step
from jaxpost.types import Batch, Stream, TrainState


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
    checkpointer = Checkpointer(config.run_dir, config.checkpoint)
    step = _agreed_step(checkpointer)
    config = _with_saved_segments(config, checkpointer, step)
    model = build_model(config.model, config.mesh, config.lora, devices, rundir.start_date(config.run_dir))
    algorithm, rules = config.algorithm, model.rules
    check_divides(config.data.batch_size, config.loop.micro_batches, config.data.widths, rules)
    shard_index, num_shards = host_rows(rules.mesh)

    def make_task(source: SourceConfig) -> tasks.Task:
        path, loss_on = model.located.tokenizer_path, config.data.loss_on
        options = {"chat_template": model.chat_template, "date": model.tokenizer.date}
        return kinds.make_task(algorithm.rows, source.task, path, loss_on, source.columns, **options)

    identity = {"model.tokenizer": model.tokenizer.fingerprint}
    rows = PackedSource(
        config.data, make_task, seed=config.seed, shard_index=shard_index, num_shards=num_shards, identity=identity
    )
    if note := check_tokenizer(model.located, model.tokenizer):
        sinks.event(note)
    config = dataclasses.replace(config, data=rows.config)
    model = model.with_segments(config.data.segments_per_row)
    policy = model.policy
    total_steps = config.loop.steps or rows.count_batches(config.loop.epochs)
    if 0 < policy.spec.max_positions < config.data.seq_len:
        sinks.event(
            f"data.seq_len {config.data.seq_len} is more than the {policy.spec.max_positions} positions that the model "
            "was trained on: longer examples ask for positions that it has never seen"
        )

    params, frozen = _weights(config, model, begins=step is None)
    check_needs(algorithm, frozen)
    program = make_program(config, policy, rules, params, total_steps)
    checkpointer.preflight(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state)))

    averaged = sorted(role for role, rule in algorithm.slow.items() if rule.decay is not None)
    meta = {"format": FORMAT, "num_tokens": 0, "weights": content_hash_of(model.located), "averaged": averaged}
    if config.lora is not None and config.lora.source is not None:
        meta["adapters"] = peft.hash_peft(config.lora.source)
    annotate = _annotator(algorithm, policy, frozen)
    ctx = Context(
        model.tokenizer, rules.mesh, policy, lambda: MeshSource(rows, rules, annotate), config.seed,
        jax.process_index(), jax.process_count(),
    )  # fmt: skip
    source = algorithm.source(ctx)
    if step is None:
        state = program.init(params)
        sinks.truncate(-1)  # lines of a start that was killed before its first save
    else:
        state, position, saved = checkpointer.restore(step, program.state, allow_fallback=allow_fallback)
        _same_weights(saved, meta, allow_changed)
        meta["num_tokens"] = saved["num_tokens"]
        source.restore(position, allow_changed)
        sinks.truncate(int(state.step))
        sinks.event(f"resumed at step {int(state.step)} of {total_steps}")
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    adapter_params, full_params = (None, 0) if config.lora is None else lora.param_counts(config.lora, policy.spec)
    first_trained = 0 if config.lora is None else lora.first_trained_layer(config.lora, policy.spec)
    return Job(
        state=state,
        frozen=frozen,
        train_step=program.step,
        source=source,
        evaluate=build_evaluator(config, model, make_task, annotate, sinks, shard_index, num_shards),
        checkpointer=checkpointer,
        sinks=sinks,
        total_steps=total_steps,
        meta=meta,
        flops_per_token=partial(
            flops.train_flops_per_token,
            policy.spec,
            adapter_params=adapter_params,
            full_params=full_params,
            first_trained_layer=first_trained,
        ),  # fmt: skip
        peak_flops=None if peak is None else peak * rules.mesh.size,
        num_programs=len(config.data.widths),
    )


def check_needs(algorithm: Algorithm, frozen: dict[str, Any]) -> None:
    """ConfigError where an algorithm reads a frozen model that is not there."""
    given = set(frozen) | ({"ref"} if "policy" in frozen else set())  # a base without its adapters is the reference
    if missing := sorted(set(algorithm.needs) - given):
        raise ConfigError(f"algorithm.name: {algorithm.name} needs a frozen {missing[0]} model; none can be given yet")


@dataclasses.dataclass(frozen=True)
class Program:
    """The train step of a run and the state that it moves on."""

    init: Callable[[dict], TrainState]  # params by role -> the state at step 0; jitted
    state: TrainState  # of ShapeDtypeStructs with shardings
    step: Any  # jitted (state, frozen, batch) -> (state, metrics); the state is donated


def make_program(config: Config, policy: Policy, rules: Rules, params: dict, total_steps: int) -> Program:
    """Nothing is computed or allocated. params: by role, arrays or ShapeDtypeStructs with shardings."""
    algorithm = config.algorithm
    tx, schedule = make_optimizer(config.optim, total_steps, params)
    fresh = partial(
        init_state, tx=tx, slow=algorithm.slow, scalars=algorithm.scalars(), skip_spikes=config.loop.skip_spikes
    )
    abstract = jax.eval_shape(fresh, params)
    shardings = _state_shardings(abstract, params, rules)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, shardings
    )
    train_step = make_step(
        algorithm,
        policy,
        tx,
        micro_batches=config.loop.micro_batches,
        schedule=schedule,
        clip_norm=config.optim.clip_norm,
        trainable=trainable_mask(config.optim, params),
        seed=config.seed,
        stochastic=algorithm.stochastic or (config.lora is not None and config.lora.dropout > 0),
        skip_spikes=config.loop.skip_spikes,
    )
    return Program(
        init=jax.jit(fresh, out_shardings=shardings),
        state=abstract,
        step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None)),
    )


def build_evaluator(
    config: Config, model: Model, make_task: Any, annotate: Any, sinks: Any, shard_index: int = 0, num_shards: int = 1
) -> Evaluator:
    """Held-out loss, samples and task metrics, as the config asks for."""
    held_out = []
    if config.data.eval:
        rows = EvalRows(config.data, make_task, shard_index=shard_index, num_shards=num_shards)
        held_out = list(rows)  # tokenised once
        lost = [f"{name} {count}" for name, count in rows.counters.items() if count and name != "rows_read"]
        if lost:
            sinks.event(f"of {rows.counters['rows_read']} held-out rows: {', '.join(lost)}")
    tokenizer = model.tokenizer
    eval_step = jax.jit(make_eval_step(config.algorithm, model.policy))
    return Evaluator(
        config.eval,
        batches=lambda: (annotate(to_mesh(batch, model.rules)) for batch in held_out),
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


def _annotator(algorithm: Algorithm, policy: Any, frozen: Any) -> Callable[[Batch], Batch]:
    """The algorithm's annotate as a program of its own; nothing at all where it only has the base's."""
    if type(algorithm).annotate is Algorithm.annotate:
        return lambda batch: batch
    annotate = jax.jit(lambda frozen, batch: algorithm.annotate(policy, frozen, batch))
    return lambda batch: annotate(frozen, batch)


def _agreed_step(checkpointer: Checkpointer) -> int | None:
    """The newest checkpoint as process 0 sees it; CheckpointError where another process does not see it."""
    step = checkpointer.latest()
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    first = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    seen = first < 0 or first in checkpointer.steps()
    if not np.all(multihost_utils.process_allgather(np.int32(seen))):
        raise CheckpointError(
            f"{checkpointer.folder}: process 0 goes on from step {first}, which another process does not see: run_dir "
            "must be a folder that all hosts share"
        )
    return None if first < 0 else first


def _with_saved_segments(config: Config, checkpointer: Checkpointer, step: int | None) -> Config:
    """A run that goes on keeps the data.max_segments that it began with, where the config leaves it to the data."""
    if step is None or config.data.max_segments is not None:
        return config
    try:
        saved = checkpointer.source_state(step)["fingerprint"].get("data.max_segments")
    except CheckpointError:
        return config  # damaged: restore says so, or falls back
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_segments=saved))


def _weights(config: Config, model: Model, begins: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, frozen) by role. Where a checkpoint holds the trained ones they are shapes only: nothing is loaded."""
    spec, frozen = model.located.spec, {} if config.lora is None else {"policy": load_weights(model)}
    if "ref" in config.algorithm.needs and not frozen:
        frozen["ref"] = load_weights(model)
    if not begins:
        infos = lora.abstract_adapters(config.lora, spec) if config.lora else abstract_params(spec, model.param_dtype)
        return {"policy": structs(infos, model.rules)}, frozen
    return (_adapters(config, model, frozen["policy"]) if config.lora else {"policy": load_weights(model)}), frozen


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
