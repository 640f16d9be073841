"""The torch side of train.py: transformers with a step written by hand, TRL's SFTTrainer, PEFT, matrix products.

    PEER/bin/python benchmarks/torch_peers.py '{"variant": "trl" | "bare" | "gemm", ...}'      (started by train.py)

fp32, two threads, fused AdamW, no gradient checkpointing. Weights are random: only speed is measured.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

from turns import THREADS, Turns

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests" / "parity"))

import torch

torch.set_num_threads(THREADS)


def make_model(given: dict):
    """A Llama of the given shape in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**given["llama"], pad_token_id=2, bos_token_id=1, eos_token_id=2, use_cache=False)
    config._attn_implementation = given.get("attention", "sdpa")
    return LlamaForCausalLM(config).train()


def run_bare(turns: Turns, given: dict) -> None:
    """forward, backward, clip, fused AdamW."""
    model = make_model(given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch, length = given["shape"]
    ids = torch.randint(3, model.config.vocab_size, (batch, length))
    done = 0
    while True:
        turns.boundary(lambda: None, done)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += batch * length


def run_trl(turns: Turns, given: dict, folder: str) -> None:
    """SFTTrainer as it comes, on rows of one length or on the chats of a file, padded to the longest of a batch."""
    import datasets
    from peft import LoraConfig
    from smollm2 import load_tokenizer
    from trl import SFTConfig, SFTTrainer

    class Gated(SFTTrainer):
        """Counts tokens and stops at the end of each turn."""

        useful = computed = 0

        def training_step(self, model, inputs, *args, **kwargs):
            turns.boundary(lambda: None, Gated.useful, Gated.computed)
            real = inputs.get("attention_mask")
            Gated.useful += inputs["input_ids"].numel() if real is None else int(real.sum())
            Gated.computed += inputs["input_ids"].numel() if "rows" in given else 0
            return super().training_step(model, inputs, *args, **kwargs)

    tokenizer = load_tokenizer()
    batch, length = given["shape"]
    if "rows" in given:
        from make_trl_golden import MARKED, MESSAGE

        tokenizer.chat_template = tokenizer.chat_template.replace(MESSAGE, MARKED)
        rows = [{"messages": json.loads(line)["messages"]} for line in open(given["rows"])]
    else:
        rows = [{"input_ids": row.tolist()} for row in torch.randint(3, given["llama"]["vocab_size"], (512, length))]
    arguments = SFTConfig(
        output_dir=folder,
        max_steps=1_000_000,
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        assistant_only_loss="rows" in given,
        max_length=length,
        packing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        seed=0,
    )
    adapter = None
    if lora := given.get("lora"):
        modules = [f"{name}_proj" for name in lora["targets"]]
        adapter = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=modules, task_type="CAUSAL_LM")
    trainer = Gated(
        model=make_model(given),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()


def run_gemm(turns: Turns, given: dict) -> None:
    """[m, k] @ [k, n]; "useful" are GFLOP."""
    m, k, n = given["shape"]
    a, b = torch.randn(m, k), torch.randn(k, n)
    done = 0.0
    while True:
        turns.boundary(lambda: None, done)
        a @ b
        done += 2e-9 * m * k * n


def main() -> None:
    given, turns = json.loads(sys.argv[1]), Turns()
    if given["variant"] == "gemm":
        run_gemm(turns, given)
    if given["variant"] == "bare":
        run_bare(turns, given)
    with tempfile.TemporaryDirectory() as folder:
        run_trl(turns, given, folder)


if __name__ == "__main__":
    main()
