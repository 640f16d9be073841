"""A byte tokenizer, rows and configs small enough that a real run takes seconds."""

from __future__ import annotations

import json
import pathlib
import random

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = "init:llama,vocab_size=264,d_model=64,num_layers=3,num_heads=8,num_kv_heads=4,head_dim=8,d_ff=96,tied=true"


def write_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A byte-level tokenizer with ChatML turns, as a Hugging Face folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rows(count: int, seed: int = 0) -> list[dict]:
    """Chats: a word, and the word in capitals. Lengths vary."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        word = "".join(rng.choice("abcdefgh") for _ in range(rng.randrange(2, 9)))
        turn = [{"role": "user", "content": word}, {"role": "assistant", "content": word.upper()}]
        out.append({"messages": turn})
    return out


def pairs(count: int, seed: int = 0, swapped: bool = False) -> list[dict]:
    """Preferences: a word, and it in capitals rather than turned round. swapped: the other way."""
    out = []
    for row in rows(count, seed):
        asked, answered = row["messages"]
        turned = answered | {"content": asked["content"][::-1] + "."}
        chosen, rejected = (turned, answered) if swapped else (answered, turned)
        out.append({"prompt": [asked], "chosen": [chosen], "rejected": [rejected]})
    return out


def write_rows(file: pathlib.Path, count: int, seed: int = 0, make=rows, **options) -> pathlib.Path:
    """rows(), or what else makes rows, as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in make(count, seed, **options)))
    return file


def write_config(folder: pathlib.Path, **sections) -> pathlib.Path:
    """A runnable config file with its data and tokenizer beside it; `sections` replace keys or update sections."""
    write_tokenizer(folder / "tokenizer")
    write_rows(folder / "train.jsonl", 120, seed=1)
    write_rows(folder / "heldout.jsonl", 12, seed=2)
    config = {
        "run_dir": str(folder / "run"),
        "model": {"source": MODEL, "tokenizer": "tokenizer"},
        "data": {
            "train": [{"source": "jsonl:train.jsonl"}],
            "eval": [{"source": "jsonl:heldout.jsonl"}],
            "batch_size": 8,
            "seq_len": 64,
        },
        "algorithm": {"name": "sft"},
        "optim": {"learning_rate": 0.01, "schedule": "constant"},
        "loop": {"steps": 8, "save_every": 4},
        "metrics": {"tensorboard": False, "console": "none"},
    }
    for key, value in sections.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    file = folder / "config.yaml"
    file.write_text(json.dumps(config, indent=1))  # JSON is YAML
    return file


def load(folder: pathlib.Path, overrides=(), **sections):
    """The loaded Config of write_config."""
    from jaxpost import config

    return config.load(write_config(folder, **sections), list(overrides)).config


def metric(run_dir, name: str) -> list:
    """All values of one metric of a run, in the order they were written."""
    lines = pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]
