"""The train step on one GPU or TPU: attention kernels, tokens/s and MFU, beside torch where it is installed.

    python benchmarks/accelerator.py [--only attention|step|torch] [--shapes smollm2-135m,llama-1b] [--steps 10]

Weights are random: only speed, memory and rounding are looked at. Prints markdown tables. jax and torch run in
processes of their own, because each wants the device's memory for itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {  # name: (layers, width, ffn, heads, kv heads, head width, vocabulary)
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49_152),
    "llama-1b": (16, 2048, 8192, 32, 8, 64, 128_256),
    "tiny": (2, 64, 128, 8, 4, 8, 512),
}
BATCHES = {"smollm2-135m": (32, 1024), "llama-1b": (4, 4096), "tiny": (2, 256)}  # rows, positions


def packed(rows: int, length: int, low: int = 100, high: int = 250):
    """Contiguous segments i32[rows, length] of random lengths, and the most in one row."""
    import numpy as np

    rng = np.random.default_rng(0)
    ends = [np.cumsum(rng.integers(low, high + 1, size=length // low + 1)) for _ in range(rows)]
    segments = np.stack([1 + np.searchsorted(e, np.arange(length), side="right") for e in ends]).astype(np.int32)
    return segments, int(segments.max())


def timed(call, steps: int, ready) -> float:
    """Median seconds of a call after two for warming up; `ready` waits for what it returned."""
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def attention_case(shape: str, kind: str, impl: str, places: int, steps: int) -> dict:
    """Value and gradient of one layer's attention in bf16; its error against the plain form in fp32.

    places: segments that a row may hold; 0: as many as it does.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpost.ops.attention import attention

    _, _, _, heads, kv_heads, width, _ = SHAPES[shape]
    rows, length = BATCHES[shape]
    segments, most = packed(rows, length) if kind == "packed" else (np.ones((rows, length), np.int32), 1)
    segments[-1, -37:] = 0  # padding
    most = places or most
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (
        jax.random.normal(key, (rows, length, n, width), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads))
    )

    def run(q, k, v, impl, part=slice(None)):
        def loss(q, k, v):
            out = attention(q, k, v, segments=segments[part], scale=width**-0.5, impl=impl, max_segments=most)
            return jnp.sum(out.astype(jnp.float32) * g[part]), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    program = jax.jit(lambda q, k, v: run(q, k, v, impl)).lower(q, k, v).compile()
    got = program(q, k, v)
    few = slice(-2, None)  # the plain form in fp32 holds [T,T]: two rows are enough
    with jax.default_matmul_precision("highest"):
        wide = [x[few].astype(jnp.float32) for x in (q, k, v)]
        exact = jax.jit(lambda *args: run(*args, "xla", few))(*wide)
    error = max(float(jnp.linalg.norm(x[few].astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in zip(got, exact))
    return {
        "ms": 1e3 * timed(lambda: program(q, k, v), steps, jax.block_until_ready),
        "error": error,
        "MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
    }


def step_case(shape: str, kind: str, impl: str, remat: str, steps: int) -> dict:
    """jaxpost's whole step (prepare, gradients, clip, AdamW, guard) on random tokens, every target trained."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpost import flops
    from jaxpost.algos.sft import SFT
    from jaxpost.models.decoder import Options
    from jaxpost.models.policy import Policy
    from jaxpost.models.spec import abstract_params, init_params
    from jaxpost.optim import OptimConfig, make_optimizer
    from jaxpost.step import init_state, make_step
    from jaxpost.types import Batch

    vocab = SHAPES[shape][-1]
    rows, length = BATCHES[shape]
    spec = spec_of(shape)
    segments, most = packed(rows, length) if kind == "packed" else (np.ones((rows, length), np.int32), 1)
    tokens = np.random.default_rng(1).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    batch = Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], mask=np.ones((rows, length), bool),
        positions=positions_of(segments), segments=segments,
    )  # fmt: skip
    policy = Policy(spec, Options(dtype=jnp.bfloat16, remat=remat, attention=impl, max_segments=most))
    params = {"policy": jax.jit(lambda key: init_params(abstract_params(spec), key))(jax.random.key(0))}
    tx, schedule = make_optimizer(OptimConfig(learning_rate=1e-5, schedule="constant"), 1000, params)
    state = jax.jit(lambda p: init_state(p, tx, {}))(params)
    del params
    step = make_step(SFT(), policy, tx, schedule=schedule, clip_norm=1.0)
    program = jax.jit(step, donate_argnums=0).lower(state, {}, batch).compile()
    batch = jax.device_put(batch)

    def once():
        nonlocal state
        state, metrics = program(state, {}, batch)
        return metrics

    seconds = timed(once, steps, jax.block_until_ready)
    memory = program.memory_analysis()
    per_token = flops.train_flops_per_token(spec, round(length / max(1, segments.max(1).mean())))
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    rate = rows * length / seconds
    return {
        "tokens/s": rate,
        "MFU": rate * per_token / peak if peak else float("nan"),
        "GiB": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
    }


def spec_of(shape: str):
    """The DecoderSpec of a named shape."""
    from jaxpost.models.loading import locate

    layers, width, ffn, heads, kv_heads, head, vocab = SHAPES[shape]
    text = (
        f"init:llama,vocab_size={vocab},d_model={width},num_layers={layers},num_heads={heads},"
        f"num_kv_heads={kv_heads},head_dim={head},d_ff={ffn},tied=true"
    )
    return locate(text).spec


def positions_of(segments):
    """i32[B,T]: 0, 1, 2, ... in each segment."""
    import numpy as np

    index = np.arange(segments.shape[1])[None]
    new = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return (index - np.maximum.accumulate(np.where(new, index, 0), axis=1)).astype(np.int32)


def torch_case(shape: str, compiled: bool, steps: int) -> dict:
    """transformers with sdpa under bf16 autocast, fp32 weights, fused AdamW, clipping: one segment a row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, ffn, heads, kv_heads, head, vocab = SHAPES[shape]
    rows, length = BATCHES[shape]
    torch.backends.cuda.matmul.allow_tf32 = True
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head, tie_word_embeddings=True, max_position_embeddings=length,
        use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(0, vocab, (rows, length), device="cuda")

    def once():
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(once, steps, lambda _: torch.cuda.synchronize())
    return {"tokens/s": rows * length / seconds, "GiB": torch.cuda.max_memory_allocated() / 2**30}


RUN = {"attention": attention_case, "step": step_case, "torch": torch_case}


def measure(kind: str, shape: str, variants: list[tuple], steps: int) -> Iterator[tuple[tuple, dict]]:
    """(variant, figures) of all variants of a shape, in a process of their own; {"failed": why} where none come."""
    command = [sys.executable, __file__, "--case", json.dumps([kind, shape, variants, steps])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        out, errors = process.communicate()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    last = (errors.strip().splitlines() or ["no output"])[-1]
    for number, variant in enumerate(variants):
        yield (shape, *map(str, variant)), found[number] if number < len(found) else {"failed": last[:120]}


def run_case(kind: str, shape: str, variants: list[list], steps: int) -> None:
    """In that process: one JSON line a variant."""
    for variant in variants:
        try:
            figures = RUN[kind](shape, *variant, steps)
        except (RuntimeError, ValueError) as error:  # out of memory, above all
            figures = {"failed": str(error).splitlines()[0][:120]}
        print(json.dumps(figures), flush=True)


def table(title: str, names: tuple[str, ...], rows: list[tuple[tuple[str, ...], dict]]) -> None:
    columns = list(dict.fromkeys(key for _, values in rows for key in values if key != "failed"))
    print(f"\n{title}\n\n| {' | '.join((*names, *columns))} |\n|{'---|' * len(names)}{'---:|' * len(columns)}")
    for case, values in rows:
        cells = [f"{values[key]:.4g}" for key in columns if key in values] or [values["failed"]]
        print(f"| {' | '.join((*case, *cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=list(RUN))
    parser.add_argument("--shapes", default="smollm2-135m,llama-1b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--attention", default="auto,xla")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--places", default="0", help="segments that a row may hold; 0: as many as it does")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        return run_case(*json.loads(args.case))
    kinds, impls, remats = ("packed", "one segment"), args.attention.split(","), args.remat.split(",")
    places = [int(number) for number in args.places.split(",")]
    tables = {
        "attention": (
            "Attention of one layer, value and gradient, bf16",
            ("rows hold", "attention", "places"),
            (kinds, impls, places),
        ),
        "step": ("Whole step, bf16", ("rows hold", "attention", "remat"), (kinds, impls, remats)),
        "torch": ("torch, one segment a row, bf16 autocast", ("torch.compile",), ((False, True),)),
    }
    for kind, (title, names, choices) in tables.items():
        if args.only in (None, kind):
            variants = list(itertools.product(*choices))
            rows = [row for shape in args.shapes.split(",") for row in measure(kind, shape, variants, args.steps)]
            table(title, ("shape", *names), rows)


if __name__ == "__main__":
    main()
