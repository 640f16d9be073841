"""Writes tests/golden/trl_sft.json: what TRL's SFTTrainer logs in ten steps on SmolLM2-135M, fp32, fixed order.

    launch/parity.sh            makes the environment and runs every make_*_golden.py
    python tests/parity/make_trl_golden.py [VARIANT ...]      in that environment; named variants are replaced

What TRL 1.16 logs, read in its source (trl/trainer/sft_trainer.py, transformers/trainer.py) and stored as "facts".
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy
import peft
import torch
import transformers
import trl
from peft import LoraConfig
from rows import conversations, lora_a, prompt_completion
from smollm2 import load_model, load_tokenizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_sft.json"
ROWS = {"seed": 20, "count": 64}
COMMON = {
    "steps": 10,
    "batch_size": 8,
    "micro_batches": 1,
    "loss_type": "nll",
    "schedule": "cosine",
    "warmup_steps": 2,
    "clip_norm": 1.0,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
}
FULL = {**COMMON, "learning_rate": 1e-4, "weight_decay": 0.01, "lora": None}
LORA = {**COMMON, "learning_rate": 1e-3, "weight_decay": 0.0, "lora": {"rank": 8, "alpha": 16.0}}
VARIANTS = {
    "full": {**FULL, "loss_on": "completion"},
    "lora": {**LORA, "loss_on": "completion"},
    "full_all_accumulated": {**FULL, "loss_on": "all", "micro_batches": 2},
    "lora_assistant_linear": {**LORA, "loss_on": "assistant", "schedule": "linear"},
    "lora_dft": {**LORA, "loss_on": "completion", "loss_type": "dft"},
}
FACTS = [
    "loss: negative log-likelihood summed over the trained tokens of the optimizer step, all its micro-batches "
    "together, divided by their number (num_items_in_batch); dft: each term times its own probability, held constant; "
    "measured before the update of that step",
    "grad_norm: global l2 norm before clipping; the clip multiplies by min(1, clip_norm / (norm + 1e-6))",
    "learning_rate: the one that the update of that step used; step 0 of the warm-up uses 0, step w the full rate; "
    "cosine: rate * (1 + cos(pi * (step - w) / (steps - w))) / 2; linear: rate * (steps - step) / (steps - w)",
    "num_tokens: running sum of attention_mask, that is every real token of every row read so far, trained or not",
    "mean_token_accuracy, entropy: over trained tokens, argmax and full-softmax Shannon entropy in nats; with several "
    "micro-batches TRL logs the plain mean of the micro-batches' means, so they are comparable only without them",
    "weight decay: decoupled, times the learning rate, on every matrix including the tied embedding, not on norms",
    "completion: completion_only_loss and assistant_only_loss together: the last assistant message and its <|im_end|>; "
    "assistant: every assistant message and its <|im_end|>; all: every token but the first of the row and the newline "
    "that the template puts behind the last <|im_end|> (labels are handed to TRL, which would train it)",
    "order: sequential, no shuffle; step s reads rows 8 s .. 8 s + 7 modulo 64, so steps 8 and 9 read "
    "rows a second time",
    "padding_idx: transformers gives the embedding padding_idx = pad_token_id, which is <|im_end|> in this model, so "
    "that the lookup of every <|im_end|> would get no gradient (here 0.1 in a grad_norm of 12.7); it is set to None",
    "lora: PEFT on q, k, v, o, gate, up, down of every layer, dropout 0; A from rows.lora_a (transposed), B zero",
]
# The GGUF's template with generation markers around what an assistant says: same text, plus the assistant mask.
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}"
)


class Log(TrainerCallback):
    """Keeps what TRL logs each step, unrounded."""

    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            names = ("loss", "grad_norm", "learning_rate", "num_tokens", "mean_token_accuracy", "entropy")
            self.steps.append({name: float(logs[name]) for name in names})


def main() -> None:
    transformers.set_seed(0)
    names = sys.argv[1:] or list(VARIANTS)
    tokenizer = load_tokenizer()
    plain = tokenizer.chat_template
    assert MESSAGE in plain, "the GGUF's chat template changed"
    tokenizer.chat_template = plain.replace(MESSAGE, MARKED)
    rows = conversations(**ROWS)
    for row in rows:
        assert tokenizer.apply_chat_template(row["messages"], chat_template=plain, tokenize=False) == (
            tokenizer.apply_chat_template(row["messages"], tokenize=False)
        )
    done = json.loads(GOLDEN.read_text())["variants"] if GOLDEN.exists() else {}
    golden = {"versions": versions(), "facts": FACTS, "rows": ROWS, "token_ids": None, "variants": done}
    GOLDEN.parent.mkdir(exist_ok=True)
    for name in names:
        config = VARIANTS[name]
        print(f"{name}: {config}", flush=True)
        steps, ids, spans = train(config, rows, tokenizer)
        assert golden["token_ids"] in (None, ids)
        golden["token_ids"] = ids
        golden["variants"][name] = {"config": config, "trained_spans": spans, "steps": steps}
        for step in steps:
            print("  " + "  ".join(f"{key} {value:.6g}" for key, value in step.items()), flush=True)
        GOLDEN.write_text(dump(golden))
        print(f"wrote {name} into {GOLDEN.name}", flush=True)


def train(config: dict, rows: list[dict], tokenizer) -> tuple[list[dict], list[list[int]], list]:
    """Ten steps of SFTTrainer: its log, and the ids and trained spans [start, end) of its prepared rows."""
    completion = config["loss_on"] == "completion"
    if completion:
        rows = [prompt_completion(row) for row in rows]
    if config["loss_on"] == "all":
        rows = [up_to_the_last_stop(tokenizer, row["messages"]) for row in rows]
    data = datasets.Dataset.from_list(rows)
    log = Log()
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=config["steps"],
            per_device_train_batch_size=config["batch_size"] // config["micro_batches"],
            gradient_accumulation_steps=config["micro_batches"],
            learning_rate=config["learning_rate"],
            lr_scheduler_type=config["schedule"],
            warmup_steps=config["warmup_steps"],
            weight_decay=config["weight_decay"],
            max_grad_norm=config["clip_norm"],
            optim="adamw_torch",
            adam_beta1=config["b1"],
            adam_beta2=config["b2"],
            adam_epsilon=config["eps"],
            loss_type=config["loss_type"],
            completion_only_loss=completion,
            assistant_only_loss=config["loss_on"] != "all",
            max_length=None,
            packing=False,
            train_sampling_strategy="sequential",
            shuffle_dataset=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            seed=0,
        )
        adapter = None
        if config["lora"]:
            adapter = LoraConfig(
                r=config["lora"]["rank"],
                lora_alpha=config["lora"]["alpha"],
                lora_dropout=0.0,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
        model = load_model()
        model.get_input_embeddings().padding_idx = None
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[log],
        )
        if adapter:
            set_lora(trainer.model)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        prepared = trainer.train_dataset
        ids = [list(map(int, row)) for row in prepared["input_ids"]]
        trainer.train()
    return log.steps, ids, [trained_spans(labels) for labels in prepared["labels"]]


def up_to_the_last_stop(tokenizer, messages: list[dict]) -> dict:
    """ids and labels of a chat, all trained but the newline that the template writes behind the last <|im_end|>."""
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return {"input_ids": ids, "labels": ids[:end] + [-100] * (len(ids) - end)}


def set_lora(model) -> None:
    """Overwrites PEFT's random A with ours; B stays zero."""
    count = 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        if "lora_A" in name:
            parts = name.split(".")
            layer, module = int(parts[parts.index("layers") + 1]), parts[parts.index("lora_A") - 1]
            start = lora_a(layer, module.removesuffix("_proj"), parameter.shape[1], parameter.shape[0])
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(start.T.copy()))
            count += 1
    assert count == 7 * model.config.num_hidden_layers


def trained_spans(labels: list[int]) -> list[list[int]]:
    """[start, end) of every run of trained tokens; token 0 is never predicted."""
    trained = [i > 0 and label != -100 for i, label in enumerate(labels)] + [False]
    edges = [i for i, now in enumerate(trained) if now != (i > 0 and trained[i - 1])]
    return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def versions() -> dict[str, str]:
    modules = (torch, transformers, trl, peft, datasets, numpy)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def dump(golden: dict) -> str:
    """Indented JSON with each row of ids, list of spans and logged step on one line."""
    text = json.dumps(golden | {"token_ids": None, "variants": None}, indent=1, ensure_ascii=False)
    head, tail = text.split('"token_ids": null')
    ids = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in golden["token_ids"])
    variants = []
    for name, variant in golden["variants"].items():
        steps = ",\n    ".join(json.dumps(step) for step in variant["steps"])
        spans = json.dumps(variant["trained_spans"], separators=(",", ":"))
        variants.append(
            f'  "{name}": {{\n   "config": {json.dumps(variant["config"])},\n   "trained_spans": {spans},\n'
            f'   "steps": [\n    {steps}\n   ]\n  }}'
        )
    tail = tail.replace('"variants": null', '"variants": {\n' + ",\n".join(variants) + "\n }")
    text = f'{head}"token_ids": [\n  {ids}\n ]{tail}\n'
    assert json.loads(text) == golden
    return text


if __name__ == "__main__":
    main()
