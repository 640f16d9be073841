"""Training speed beside the peers': markdown for docs/performance.md, see run.py.

    python benchmarks/train.py [--only gemm,full,overhead,parts,lora,packed,small] [--rounds 4]

The loops of a case take turns (turns.py), fp32, two threads, the first turn not counted. Peers run in environments of
their own and are left out, with the reason, where those are missing:
    torch, transformers, TRL, PEFT    PARITY_ENV, or .venv-parity as launch/parity.sh makes it
    Tunix                             TUNIX_ENV, or .venv-tunix as launch/tunix.sh makes it
The rows of the packed case are the GSM8K and chat files of JAXPOST_DATA.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile

from turns import Measured, Variant, play

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, installed or not

# XLA and torch ask the system for their large buffers anew in every step, and it hands them over page by page.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SMALL_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
SHAPE = (2, 256)  # rows, positions
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
LORA = {"rank": 8, "alpha": 16.0, "targets": ["q", "v"]}
PRODUCTS = {"512 x 576 @ 576 x 1,536": (512, 576, 1536), "512 x 576 @ 576 x 49,152": (512, 576, 49152)}
PRODUCTS["2,048 x 2,048 @ 2,048 x 2,048"] = (2048, 2048, 2048)
PACKED = {"GSM8K": ("sft_gsm8k.jsonl", 1024), "sft_multiturn": ("sft_multiturn.jsonl", 512)}  # file, most tokens a row
PADDED_BATCH, MOST_ROWS = 8, 1600


def interpreter(variable: str, folder: str) -> str | None:
    """The peer's python: of the environment that the variable names, or of the folder that a launch script makes."""
    python = pathlib.Path(os.environ.get(variable) or ROOT / folder) / "bin" / "python"
    return str(python) if python.exists() else None


def ours(label: str, variant: str = "loop", **arguments) -> Variant:
    steps = arguments.pop("steps", 2)
    environment = arguments.pop("environment", {})
    return Variant(label, sys.executable, "ours.py", {"variant": variant} | arguments, steps, environment=environment)


def torch(label: str, variant: str = "trl", **arguments) -> Variant:
    steps, missing = (
        arguments.pop("steps", 2),
        f"{label}: not measured, there is no environment (bash launch/parity.sh)",
    )
    python = interpreter("PARITY_ENV", ".venv-parity")
    return Variant(label, python, "torch_peers.py", {"variant": variant} | arguments, steps, missing)


def tunix(label: str, **arguments) -> Variant:
    missing = f"{label}: not measured, there is no environment (bash launch/tunix.sh)"
    return Variant(label, interpreter("TUNIX_ENV", ".venv-tunix"), "tunix_peer.py", arguments, 8, missing)


def init_source(llama: dict) -> str:
    """The init: source of jaxpost with these shapes."""
    return (
        f"init:llama,vocab_size={llama['vocab_size']},d_model={llama['hidden_size']},num_layers="
        f"{llama['num_hidden_layers']},num_heads={llama['num_attention_heads']},num_kv_heads="
        f"{llama['num_key_value_heads']},head_dim={llama['hidden_size'] // llama['num_attention_heads']},"
        f"d_ff={llama['intermediate_size']},tied={str(llama['tie_word_embeddings']).lower()}"
    )


def gflop_per_token(llama: dict, length: int, lora: dict | None = None) -> float:
    """Model GFLOP of forward and backward, see jaxpost/flops.py."""
    from jaxpost import flops
    from jaxpost import lora as adapters
    from jaxpost.models.loading import locate

    spec = locate(init_source(llama), "smollm2-135m").spec
    count = None if lora is None else adapters.param_counts(adapters.LoraConfig(**lora), spec)[0]
    return flops.train_flops_per_token(spec, length, adapter_params=count) / 1e9


class Bench:
    """One run: where logs go, how many turns, and the measured peak."""

    def __init__(self, rounds: int, logs: pathlib.Path, peak: float = 0.0):
        self.rounds, self.logs, self.peak = rounds, logs, peak

    def play(self, variants: list[Variant], rounds: int | None = None) -> list[Measured]:
        """The variants' turns; what could not be measured says why."""
        return play(variants, rounds or self.rounds, self.logs, ENVIRONMENT)

    def table(self, entries: list[Measured], yardstick: int, gflop: float) -> list[str]:
        """A row for each loop: tokens/s, ratio to the yardstick's in the same turn, share of the peak, memory."""
        base = entries[yardstick]
        lines = [f"| loop | tokens/s, median (least to most) | against {base.variant.label} | share of GEMM peak | "]
        lines[0] += "tokens a second of processor time | peak memory, GiB |"
        lines.append("|---|---:|---:|---:|---:|---:|")
        for entry in entries:
            if entry.turns:
                ratio = f"{entry.ratio(base):.2f}" if base.turns else "-"
                share = f"{entry.rate * gflop / self.peak:.0%}" if self.peak else "-"
                spread = f"{entry.rate:.0f} ({min(entry.rates):.0f} to {max(entry.rates):.0f})"
                memory = max(turn["gib"] for turn in entry.turns)
                lines.append(
                    f"| {entry.variant.label} | {spread} | {ratio} | {share} | {entry.per_cpu:.0f} | {memory:.1f} |"
                )
        return lines + ["", *failures(entries)]


def failures(entries: list[Measured]) -> list[str]:
    return [f"{entry.failure}.\n" for entry in entries if entry.failure]


def gemm(bench: Bench) -> list[str]:
    """The yardstick: what a plain fp32 matrix product reaches here."""
    sides = {"jax": ours, "torch": torch}
    variants = [
        side(f"{name}, {shape}", "gemm", shape=sizes, steps=max(2, int(4e10 / (2 * sizes[0] * sizes[1] * sizes[2]))))
        for shape, sizes in PRODUCTS.items()
        for name, side in sides.items()
    ]
    entries = bench.play(variants, 2 * bench.rounds)
    bench.peak = max((entry.rate for entry in entries if entry.turns), default=0.0)
    lines = ["| product | GFLOP/s, median (least to most) |", "|---|---:|"]
    for entry in entries:
        if entry.turns:
            lines.append(
                f"| {entry.variant.label} | {entry.rate:.0f} ({min(entry.rates):.0f} to {max(entry.rates):.0f}) |"
            )
    return [*lines, "", *failures(entries), f"GEMM peak, the highest of these medians: {bench.peak:.0f} GFLOP/s."]


def full(bench: Bench) -> list[str]:
    """All weights of SmolLM2-135M at equal padded shapes."""
    entries = bench.play(
        [
            torch("TRL", llama=SMOLLM2, shape=SHAPE),
            torch("bare torch", "bare", llama=SMOLLM2, shape=SHAPE),
            ours("plain jax", "plain", model={"source": "smollm2-135m"}, shape=SHAPE),
            ours("jaxpost", model={"source": "smollm2-135m"}, shape=SHAPE),
        ]
    )
    return bench.table(entries, 0, gflop_per_token(SMOLLM2, SHAPE[1]))


def overhead(bench: Bench) -> list[str]:
    """The same training: what the loop costs over a bare step, and what keeping less for the backward pass does."""
    model = {"source": "smollm2-135m"}
    entries = bench.play(
        [
            ours("bare step", "bare", model=model, shape=SHAPE),
            ours("jaxpost", model=model, shape=SHAPE),
            ours("jaxpost, remat: dots", model=model | {"remat": "dots"}, shape=SHAPE),
            ours("jaxpost, pages of 4 KiB", model=model, shape=SHAPE, environment=SMALL_PAGES),
        ]
    )
    return bench.table(entries, 0, gflop_per_token(SMOLLM2, SHAPE[1]))


def parts(bench: Bench) -> list[str]:
    """Where the time of that step goes: its parts as programs of their own."""
    model = {"source": "smollm2-135m"}
    names = {"body": "30 layers, forward and backward", "head": "head, loss and metrics, forward and backward"}
    names["optimiser"] = "clip and AdamW"
    entries = bench.play([ours(names[part], "part", part=part, model=model, shape=SHAPE, steps=3) for part in names])
    tokens = SHAPE[0] * SHAPE[1]
    head = 6e-9 * SMOLLM2["hidden_size"] * SMOLLM2["vocab_size"] * tokens
    gflop = (gflop_per_token(SMOLLM2, SHAPE[1]) * tokens - head, head, 0.0)
    lines = ["| part | seconds, median (least to most) | model GFLOP/s | share of GEMM peak |", "|---|---:|---:|---:|"]
    for entry, work in zip(entries, gflop, strict=True):
        if entry.turns:
            times = [1 / rate for rate in entry.rates]
            speed = f"{work * entry.rate:.0f}" if work else "-"
            share = f"{work * entry.rate / bench.peak:.0%}" if work and bench.peak else "-"
            seconds = f"{1 / entry.rate:.2f} ({min(times):.2f} to {max(times):.2f})"
            lines.append(f"| {entry.variant.label} | {seconds} | {speed} | {share} |")
    return [*lines, "", *failures(entries)]


def lora(bench: Bench) -> list[str]:
    """LoRA r8 on q and v, same rows."""
    entries = bench.play(
        [
            torch("TRL with PEFT", llama=SMOLLM2, shape=SHAPE, lora=LORA),
            ours("jaxpost", model={"source": "smollm2-135m"}, shape=SHAPE, lora=LORA),
        ]
    )
    return bench.table(entries, 0, gflop_per_token(SMOLLM2, SHAPE[1], LORA))


def packed(bench: Bench) -> list[str]:
    """Tokens of real rows a second: ours packed, TRL's padded to the longest of eight."""
    lines = ["| rows | TRL, padded: useful tokens/s | useful share | jaxpost, packed | useful share | ratio | bound |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    reasons = []
    for name, (file, most) in PACKED.items():
        source = pathlib.Path(os.environ.get("JAXPOST_DATA", ROOT / "data")) / "converted" / file
        if not source.exists():
            reasons.append(f"{name}: not measured, {file} is not in JAXPOST_DATA.\n")
            continue
        rows = bench.logs / file
        rows.write_text("".join(source.read_text().splitlines(keepends=True)[:MOST_ROWS]))
        common = {"rows": str(rows)}
        entries = bench.play(
            [
                torch("TRL", llama=SMOLLM2, shape=(PADDED_BATCH, most), steps=1, **common),
                ours("jaxpost", model={"source": "smollm2-135m"}, shape=(1024 // most, most), steps=2, **common),
            ],
            min(3, bench.rounds),  # a turn of TRL takes a minute
        )
        reasons += failures(entries)
        if all(entry.turns for entry in entries):
            trl, packs = entries
            lines.append(
                f"| {name} | {trl.whole:.0f} | {trl.useful_share:.2f} | {packs.whole:.0f} | {packs.useful_share:.2f} | "
                f"{packs.ratio(trl):.2f} | {1 / trl.useful_share:.2f} |"
            )
    return [*lines, "", *reasons]


def small(bench: Bench) -> list[str]:
    """A Llama that is nearly all head: 4 layers, d 256, vocabulary 49,152."""
    entries = bench.play(
        [
            tunix("Tunix", llama=SMALL, shape=SHAPE),
            torch("TRL", llama=SMALL, shape=SHAPE, steps=8),
            ours("jaxpost", model={"source": init_source(SMALL)}, shape=SHAPE, steps=8),
        ]
    )
    return bench.table(entries, 0, gflop_per_token(SMALL, SHAPE[1]))


CASES = {case.__name__: case for case in (gemm, full, overhead, parts, lora, packed, small)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each loop")
    parser.add_argument("--logs", type=pathlib.Path, help="keep what the loops print here")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logs = flags.logs or pathlib.Path(folder)
        logs.mkdir(exist_ok=True)
        bench, only = Bench(flags.rounds, logs), flags.only.split(",")
        for name, case in CASES.items():
            if name in only:  # without gemm the tables have no shares of its peak
                text = "\n".join(case(bench))
                print(f"## {name}\n\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
