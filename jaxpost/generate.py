"""Chat with a model, or answer a file of prompts.

  python -m jaxpost.generate MODEL                                  chat in the terminal
  python -m jaxpost.generate MODEL --prompt="Hello"                 one answer
  python -m jaxpost.generate MODEL --input=IN.jsonl --output=OUT.jsonl   a batch: rows with prompt or messages

MODEL is a run directory, a model folder, gguf:FILE, hf:org/name or smollm2-135m.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from jaxpost import cli
from jaxpost.errors import ConfigError

FLAGS = (
    cli.Flag("prompt", None, "one question; the answer goes to standard output"),
    cli.Flag("input", None, "rows to answer: KIND:GLOB, or a path that ends in .jsonl, .parquet or .txt"),
    cli.Flag("output", None, "file that the answered rows are written to"),
    cli.Flag("raw", False, "--prompt is the text itself, not a chat turn: for base models and text rows"),
    cli.Flag("system", None, "system message of the chat or the prompt"),
    cli.Flag("max_new_tokens", 256, "longest answer"),
    cli.Flag("temperature", 0.0, "0 is greedy"),
    cli.Flag("top_k", 0, "0 is off"),
    cli.Flag("top_p", 1.0, "1 is off"),
    cli.Flag("seed", 0, "of the sampling"),
    cli.Flag("batch_size", 32, "rows generated at once"),
)


def main(args: cli.Arguments) -> None:
    """The command."""
    if len(args.positional) != 1 or args.overrides:
        raise ConfigError("name one MODEL; --help shows what it may be")
    if (args.flags["input"] is None) != (args.flags["output"] is None):
        raise ConfigError("--input and --output go together")
    if args.flags["raw"] and (args.flags["prompt"] is None or args.flags["system"]):
        raise ConfigError("--raw goes with --prompt and without --system")
    if args.flags["input"] and args.flags["prompt"]:
        raise ConfigError("--prompt and --input contradict each other")
    from jaxpost.build_model import open_model
    from jaxpost.data.prompts import Question
    from jaxpost.models.sampler import Sampler, Sampling
    from jaxpost.train import compilation_cache

    flags = args.flags
    try:
        sampling = Sampling(flags["max_new_tokens"], flags["temperature"], flags["top_k"], flags["top_p"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not 0 <= flags["seed"] < 2**32:
        raise ConfigError(f"--seed={flags['seed']}: must be in 0 to {2**32 - 1}")
    if flags["batch_size"] < 1:
        raise ConfigError(f"--batch_size={flags['batch_size']}: must be at least 1")
    records = _read(flags["input"], flags["output"]) if flags["input"] else []
    compilation_cache()
    model, params, adapters = open_model(args.positional[0])
    batch = flags["batch_size"] if flags["input"] else 1
    sampler = Sampler(model.policy, model.tokenizer.stop_ids, batch_size=batch)
    sampler.load(params, adapters)
    answer = Answerer(model.tokenizer, sampler, sampling, flags["seed"])
    system = [{"role": "system", "content": flags["system"]}] if flags["system"] else []
    if flags["input"]:
        _batch(answer, records, pathlib.Path(flags["output"]))
    elif flags["prompt"] is not None:
        prompt = flags["prompt"] if flags["raw"] else [*system, {"role": "user", "content": flags["prompt"]}]
        print(answer([Question(prompt)])[0][0])
    else:
        _chat(answer, system)


class Answerer:
    """Questions to (text, stop reason)."""

    def __init__(self, tokenizer: Any, sampler: Any, sampling: Any, seed: int):
        self._tokenizer, self._sampler, self._sampling, self._seed = tokenizer, sampler, sampling, seed

    def __call__(self, questions: list) -> list[tuple[str, str]]:
        ids = [question.encode(self._tokenizer) for question in questions]
        outs = self._sampler.generate(ids, self._sampling, seed=self._seed)
        return [(self._tokenizer.decode(out.tokens, skip_special=True), out.stop_reason) for out in outs]


def _read(source: str, output: str) -> list[tuple[dict, Any]]:
    from jaxpost.data.prompts import Question, question_of
    from jaxpost.data.sources import SourceConfig, open_source, split_source

    if pathlib.Path(output).exists():
        raise ConfigError(f"--output={output}: the file exists; choose another name or remove it")
    kind, pattern = split_source(source)
    if kind not in ("jsonl", "parquet", "text", "tfds"):
        raise ConfigError(f"--input={source}: of no known kind; write jsonl:FILE, parquet:FILE or text:FILE")
    records = open_source(SourceConfig(source=f"{kind}:{pattern}"), "--input")
    rows = [(records[i], records.where(i)) for i in range(len(records))]
    if kind == "text":
        return [(row, Question(row["text"])) for row, _ in rows]
    return [(row, question_of(row, where)) for row, where in rows]


def _batch(answer: Answerer, records: list[tuple[dict, Any]], output: pathlib.Path) -> None:
    answers = answer([question for _, question in records])
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".part")
    with partial.open("w", encoding="utf-8") as file:
        for (row, _), (text, reason) in zip(records, answers, strict=True):
            file.write(json.dumps(row | {"generated": text, "stop_reason": reason}, ensure_ascii=False) + "\n")
    os.replace(partial, output)
    print(f"{len(answers)} rows written to {output}")


def _chat(answer: Answerer, system: list[dict]) -> None:
    from jaxpost.data.prompts import Question

    print("An empty line ends the chat; /new begins another one.")
    messages = list(system)
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            messages = list(system)
            continue
        messages.append({"role": "user", "content": text})
        reply, _ = answer([Question(messages)])[0]
        messages.append({"role": "assistant", "content": reply})
        print(reply)


if __name__ == "__main__":
    cli.main(main, doc=__doc__, flags=FLAGS)
