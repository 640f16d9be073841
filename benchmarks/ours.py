"""jaxpost's loops for train.py: the real one, and two jitted steps written by hand to compare it with.

    python benchmarks/ours.py '{"variant": "loop" | "bare" | "plain" | "part" | "gemm", ...}'      (started by train.py)

bare: the same model and head functions, gradient, clip and AdamW in one jit, on one batch that never changes: no rows,
no metrics, no guard, no loop. plain: as bare, with materialised logits and jax's log_softmax.
"""

from __future__ import annotations

import json
import pathlib
import random
import sys
import tempfile
from functools import partial

from turns import Turns

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the checkout, installed or not

import jax
import jax.numpy as jnp
import numpy as np


class Gate:
    """The job's source, stopping at the end of each turn; everything else of the loop is untouched."""

    def __init__(self, source, turns: Turns, positions: int):
        self._source, self._turns, self._positions = source, turns, positions
        self._state, self._useful, self._computed = None, 0, 0

    def __next__(self):
        self._turns.boundary(lambda: jax.block_until_ready(self._state), self._useful, self._computed)
        batch = next(self._source)
        self._useful += self._source.info["num_tokens"]
        self._computed += self._positions
        return batch

    def publish(self, state, version: int) -> None:
        self._state = state.step
        self._source.publish(state, version)

    def __getattr__(self, name: str):
        return getattr(self._source, name)


def write_words(file: pathlib.Path, rows: int, words: int) -> None:
    """Rows of random words, each longer than a training row."""
    rng = random.Random(0)
    vocabulary = "river stone green letter window seven market yellow under bridge paper night".split()
    with file.open("w") as out:
        for _ in range(rows):
            out.write(json.dumps({"text": " ".join(rng.choice(vocabulary) for _ in range(words))}) + "\n")


def run_loop(turns: Turns, given: dict, folder: pathlib.Path) -> None:
    """Training as a user's config starts it, until the driver has heard enough."""
    from jaxpost import config, loop
    from jaxpost.build import build_job
    from jaxpost.metrics import Sinks

    batch, length = given["shape"]
    data = {"batch_size": batch, "seq_len": length, "truncation": "right"}
    if "rows" in given:
        data |= {"train": [{"source": f"jsonl:{given['rows']}"}]}
    else:
        write_words(folder / "rows.jsonl", 512, 2 * length)
        data |= {"train": [{"source": f"jsonl:{folder / 'rows.jsonl'}"}], "packing": "none", "loss_on": "all"}
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"tokenizer": "smollm2-135m"} | given["model"],
        "data": data,
        "algorithm": {"name": "sft"},
        "lora": given.get("lora"),
        "optim": {"learning_rate": 1e-5, "schedule": "constant"},
        "loop": {"steps": 1_000_000},
        "mesh": {"data": 1},
        "metrics": {"console": "none"},
    }
    file = folder / "config.yaml"
    file.write_text(json.dumps(settings))
    run = config.load(file).config
    with Sinks(run.run_dir, run.metrics) as sinks:
        job = build_job(run, sinks, devices=jax.devices()[:1])
        job.source = Gate(job.source, turns, batch * length if "rows" in given else 0)
        loop.run(run.loop, job)


def run_bare(turns: Turns, given: dict, naive_head: bool) -> None:
    """The step that somebody would write for this one purpose."""
    import optax

    from jaxpost.build_model import build_model, load_weights
    from jaxpost.models import decoder
    from jaxpost.models.loading import ModelConfig
    from jaxpost.ops.logprobs import token_logprobs
    from jaxpost.sharding import MeshConfig

    model = build_model(ModelConfig(**given["model"]), MeshConfig(data=1), None, jax.devices()[:1])
    spec, options = model.policy.spec, model.policy.options
    batch, length = given["shape"]
    ids = jnp.asarray(np.random.default_rng(0).integers(3, spec.vocab_size, (batch, length + 1)), jnp.int32)
    positions, segments = jnp.tile(jnp.arange(length), (batch, 1)), jnp.ones((batch, length), jnp.int32)

    def loss_of(params, ids):
        tokens, targets = ids[:, :-1], ids[:, 1:]
        hidden = decoder.apply(spec, params, tokens, positions, segments, options=options)[0]
        if not naive_head:
            return -jnp.mean(token_logprobs(hidden, decoder.head(params), targets, mask=segments > 0)[0])
        logprobs = jax.nn.log_softmax(hidden @ decoder.head(params).T)
        return -jnp.mean(jnp.take_along_axis(logprobs, targets[..., None], axis=-1))

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.0))

    @partial(jax.jit, donate_argnums=0)
    def step(state, ids):
        params, moments = state
        loss, grads = jax.value_and_grad(loss_of)(params, ids)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = jax.tree.map(jnp.copy, load_weights(model))
    state, loss, done = (params, tx.init(params)), None, 0
    del params
    while True:
        turns.boundary(lambda: jax.block_until_ready(loss), done)
        state, loss = step(state, ids)
        done += batch * length


def run_part(turns: Turns, given: dict) -> None:
    """One part of the train step as a program of its own; "useful" are steps. given["part"]: body, head, optimiser."""
    import optax

    from jaxpost.build_model import build_model, load_weights
    from jaxpost.models.loading import ModelConfig
    from jaxpost.ops.logprobs import token_stats
    from jaxpost.optim import OptimConfig, make_optimizer
    from jaxpost.sharding import MeshConfig

    model = build_model(ModelConfig(**given["model"]), MeshConfig(data=1), None, jax.devices()[:1])
    spec, (batch, length) = model.policy.spec, given["shape"]
    ids = jnp.asarray(np.random.default_rng(0).integers(3, spec.vocab_size, (batch, length + 1)), jnp.int32)
    positions, segments = jnp.tile(jnp.arange(length), (batch, 1)), jnp.ones((batch, length), jnp.int32)
    hidden = jax.random.normal(jax.random.key(0), (batch, length, spec.d_model))
    params = {"policy": load_weights(model)}

    def body(weights):
        return jnp.vdot(model.policy(weights["policy"], ids[:, :-1], positions, segments)[0], hidden)

    def head(hidden, matrix):
        stats = token_stats(hidden, matrix, ids[:, 1:], mask=segments > 0)
        return -jnp.mean(stats.logprobs), (jnp.mean(stats.entropy), jnp.mean(stats.correct))

    tx, _ = make_optimizer(OptimConfig(learning_rate=1e-5), 1_000, params)

    def optimise(state, grads):
        scale = jnp.minimum(1.0, 1 / optax.global_norm(grads))
        updates, moments = tx.update(jax.tree.map(lambda g: g * scale, grads), state[1], state[0])
        return optax.apply_updates(state[0], updates), moments

    body_grad, head_grad = jax.jit(jax.grad(body)), jax.jit(jax.value_and_grad(head, (0, 1), has_aux=True))
    optimise, out, done = jax.jit(optimise, donate_argnums=0), None, 0
    if given["part"] == "optimiser":
        grads = jax.tree.map(lambda x: 1e-3 * x, params)
        out = params, jax.jit(tx.init)(params)
    while True:
        turns.boundary(lambda: None, done)
        if given["part"] == "body":
            out = jax.block_until_ready(body_grad(params))
        elif given["part"] == "head":
            out = jax.block_until_ready(head_grad(hidden, params["policy"]["embed"]))
        else:
            out = jax.block_until_ready(optimise(out, grads))
        done += 1


def run_gemm(turns: Turns, given: dict) -> None:
    """[m, k] @ [k, n]; "useful" are GFLOP."""
    m, k, n = given["shape"]
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((m, k), (k, n))))
    multiply = jax.jit(jnp.matmul)
    done, out = 0.0, None
    while True:
        turns.boundary(lambda: None, done)
        out = jax.block_until_ready(multiply(a, b))
        done += 2e-9 * m * k * n
        del out


def main() -> None:
    given, turns = json.loads(sys.argv[1]), Turns()
    if given["variant"] == "gemm":
        run_gemm(turns, given)
    if given["variant"] == "part":
        run_part(turns, given)
    if given["variant"] in ("bare", "plain"):
        run_bare(turns, given, naive_head=given["variant"] == "plain")
    with tempfile.TemporaryDirectory() as folder:
        run_loop(turns, given, pathlib.Path(folder))


if __name__ == "__main__":
    main()
