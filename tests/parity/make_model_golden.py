"""Logits and greedy text of transformers, for tests/models: small Llamas of every kind and the real SmolLM2-135M.

Run in the parity environment: HF_HUB_OFFLINE=1 python tests/parity/make_model_golden.py
Writes tests/golden/models_llama.npz (logits), models_llama.json (config.json as transformers saves it),
models_smollm2.npz (per position: logsumexp, logprob of the next token, five best) and models_smollm2_greedy.json.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from llama_cases import CASES, config, tokens, weights
from smollm2 import load_model, load_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
VERSIONS = f"torch {torch.__version__}, transformers {transformers.__version__}"
TEXTS = [
    "The Kīlauea volcano, on the island of Hawaiʻi, erupted 61 times between 1823 and 2024; its lava reaches 1,170 °C. "
    "Geologists measure the gases that leave the vent, because sulphur dioxide rises some hours before the magma does.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
    "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n",
    [
        {"role": "user", "content": "What is 17 + 25? Answer with one number."},
        {"role": "assistant", "content": "17 + 25 = 42, so the answer is 42."},
        {"role": "user", "content": "And twice that?"},
        {"role": "assistant", "content": "84."},
    ],
]
# Chosen so that no step is a near tie: another order of summation must not change the text.
PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about a cat.",
    "Explain what a prime number is.",
    "List the days of the week.",
]
NEW_TOKENS = 40
BEST = 5


@torch.no_grad()
def small() -> None:
    logits, saved = {}, {}
    for case in CASES:
        settings = transformers.LlamaConfig.from_dict(config(case))
        model = transformers.LlamaForCausalLM(settings).eval()
        state = {name: torch.from_numpy(value) for name, value in weights(config(case)).items()}
        if settings.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True)
        logits[case] = model(torch.from_numpy(tokens(case)).long()).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved[case] = json.loads((pathlib.Path(folder) / "config.json").read_text())
        print(f"{case:22} |logit| up to {np.abs(logits[case]).max():.2f}")
    np.savez_compressed(GOLDEN / "models_llama.npz", versions=VERSIONS, **logits)
    (GOLDEN / "models_llama.json").write_text(json.dumps(saved, indent=1) + "\n")


@torch.no_grad()
def real() -> None:
    model, tokenizer = load_model().eval(), load_tokenizer()
    arrays = {}
    for number, text in enumerate(TEXTS):
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(ids).logits[0]
        best = torch.topk(logits, BEST)
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        arrays |= {
            f"{number}.ids": ids[0].numpy().astype(np.int32),
            f"{number}.logsumexp": torch.logsumexp(logits, -1).numpy(),
            f"{number}.next_logprob": logprobs.numpy(),
            f"{number}.best_ids": best.indices.numpy().astype(np.int32),
            f"{number}.best_logits": best.values.numpy(),
        }
        print(f"text {number}: {ids.shape[1]} tokens, mean logprob {logprobs.mean():.3f}")
    np.savez_compressed(GOLDEN / "models_smollm2.npz", versions=VERSIONS, **arrays)

    rows = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=2)
        new = out[0, ids.shape[1] :]
        top = torch.topk(model(out).logits[0, ids.shape[1] - 1 : -1], 2).values
        rows.append(
            {
                "prompt": prompt,
                "text": tokenizer.decode(new),
                "prompt_ids": ids[0].tolist(),
                "new_ids": new.tolist(),  # ends with eos (2) where the model stopped by itself
                "smallest_gap": round(float((top[:, 0] - top[:, 1]).min()), 4),  # between the two best logits
            }
        )
        print(rows[-1]["text"], rows[-1]["smallest_gap"])
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps({"versions": VERSIONS, "eos_id": 2, "max_new_tokens": NEW_TOKENS})[:-1]
    (GOLDEN / "models_smollm2_greedy.json").write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    small()
    real()
    print(VERSIONS)
