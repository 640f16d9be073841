"""Tiled logprobs against the plain loss, and blockwise against dense attention: time of value and gradient, and memory.

    python benchmarks/ops.py [--repeats 5] [--only logprobs|attention]

The variants of a case run in turn, `repeats` times; a ratio is the median over the turns, so that other load on the
machine hits all alike. "CPU" is processor time, which other processes disturb least. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost.ops.attention import attention
from jaxpost.ops.logprobs import token_logprobs

TOKENS, VOCAB, WIDTH = 2048, 49_152, 576  # SmolLM2's head
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def logprob_cases() -> dict[str, tuple[dict[str, Callable], tuple]]:
    """Case -> ({variant: loss}, arguments to differentiate by); the first variant is the yardstick."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH))
    head = jax.random.normal(keys[1], (VOCAB, WIDTH)) / WIDTH**0.5
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCAB)
    half = (jnp.arange(TOKENS) // 64) % 2 == 0  # completions between prompts
    weights = jnp.where(half, 2.0 / TOKENS, 0.0)

    def plain(hidden, head):
        logprobs = jax.nn.log_softmax(hidden @ head.T)
        return -jnp.mean(jnp.take_along_axis(logprobs, targets[:, None], axis=1))

    def tiled(hidden, head):
        return -jnp.mean(token_logprobs(hidden, head, targets)[0])

    def tiled_half(hidden, head):
        return -jnp.sum(weights * token_logprobs(hidden, head, targets, mask=half)[0])

    variants = {"plain": plain, "tiled": tiled, "tiled, half of the tokens masked": tiled_half}
    frozen = {name: lambda hidden, loss=loss: loss(hidden, head) for name, loss in variants.items()}
    shape = f"{TOKENS} x {VOCAB}, d {WIDTH}"
    return {f"logprobs {shape}": (variants, (hidden, head)), f"logprobs {shape}, frozen head": (frozen, (hidden,))}


def packed_segments(rows: int, length: int, low: int, high: int, seed: int = 0) -> jax.Array:
    """i32[rows, length]: segments of random lengths in [low, high], the last one cut."""
    rng = np.random.default_rng(seed)
    ends = [np.cumsum(rng.integers(low, high + 1, size=length // low + 1)) for _ in range(rows)]
    return jnp.asarray(np.stack([1 + np.searchsorted(e, np.arange(length), side="right") for e in ends]), jnp.int32)


def attention_cases() -> dict[str, tuple[dict[str, Callable], tuple]]:
    """As logprob_cases, for rows packed with segments of 100-250 tokens and for one segment a row."""
    cases = {}
    for rows, length in ((2, 512), (1, 1024), (1, 2048), (2, 2048)):
        keys = jax.random.split(jax.random.key(1), 3)
        heads = (HEADS, KV_HEADS, KV_HEADS)
        args = tuple(jax.random.normal(key, (rows, length, n, HEAD_DIM)) for key, n in zip(keys, heads, strict=True))
        for kind, low, high in (("packed", 100, 250), ("one segment", length, length)):
            segments = packed_segments(rows, length, low, high)

            def loss(q, k, v, impl, segments=segments):
                return jnp.sum(attention(q, k, v, segments=segments, scale=HEAD_DIM**-0.5, impl=impl) ** 2)

            variants = {impl: lambda q, k, v, f=loss, impl=impl: f(q, k, v, impl) for impl in ("xla", "blockwise")}
            cases[f"attention {rows} x {length}, {kind}"] = (variants, args)
    return cases


def measure(variants: dict[str, Callable], args: tuple, repeats: int) -> dict[str, dict[str, float]]:
    """Variant -> median wall seconds, ratios to the first variant, and temporary MiB of the compiled program."""
    numbers = tuple(range(len(args)))
    programs = {name: jax.jit(jax.value_and_grad(f, numbers)).lower(*args).compile() for name, f in variants.items()}
    wall, cpu = {name: [] for name in programs}, {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(program(*args))
            if turn:  # the first one warms up
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    base = next(iter(programs))

    def ratio(times, name):
        return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))

    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "time": ratio(wall, name),
            "CPU": ratio(cpu, name),
            "MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, program in programs.items()
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("logprobs", "attention"))
    flags = parser.parse_args()
    groups = {"logprobs": logprob_cases, "attention": attention_cases}
    print("| case | variant | seconds | time ratio | CPU ratio | temporary MiB |\n|---|---|---|---|---|---|")
    for group, cases in groups.items():
        if flags.only in (None, group):
            for case, (variants, args) in cases().items():
                for name, row in measure(variants, args, flags.repeats).items():
                    ratios = f"{row['seconds']:.3f} | {row['time']:.2f} | {row['CPU']:.2f}"
                    print(f"| {case} | {name} | {ratios} | {row['MiB']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
