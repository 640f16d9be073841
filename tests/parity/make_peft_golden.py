"""Adapters saved by PEFT and the logits of transformers + PEFT with them, for tests/models/test_peft.py.

Runs in the parity environment, which launch/parity.sh makes: python tests/parity/make_peft_golden.py
Writes tests/golden/peft_<case>/ (PEFT's own two files) and tests/golden/peft_logits.npz.
"""

import json
import pathlib
import shutil

import numpy as np
import peft
import torch
import transformers
from tiny_llama import CONFIG, TOKENS, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = {
    "all_linear": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "qv": dict(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    "rslora": dict(
        r=4,
        lora_alpha=3,
        target_modules=["o_proj", "up_proj", "down_proj"],
        use_rslora=True,
        layers_to_transform=[1, 2],
    ),
    "dora": dict(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        use_dora=True,
        use_rslora=True,
        layers_to_transform=[1, 2],
        lora_dropout=0.2,
    ),
    "modules": dict(r=2, lora_alpha=4, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
    "tied": dict(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        use_dora=True,
        modules_to_save=["embed_tokens", "model.norm"],
        ensure_weight_tying=True,
    ),
}
TIED = ("tied",)  # cases on the tiny model without a head of its own


def tiny_llama(tied: bool = False) -> transformers.LlamaForCausalLM:
    """transformers' Llama with the formula's weights."""
    options = CONFIG | {"tie_word_embeddings": tied}
    config = transformers.LlamaConfig(**{k: v for k, v in options.items() if k not in ("model_type", "torch_dtype")})
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights(tied).items()}, strict=not tied)
    return model


def disturb(model: peft.PeftModel) -> None:
    """Random values where PEFT starts as the base."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
            elif "lora_magnitude_vector" in name:
                value *= 1 + 0.3 * torch.randn_like(value)
            elif "modules_to_save" in name:
                value += 0.3 * torch.randn_like(value)


def main() -> None:
    tokens = torch.tensor(TOKENS)
    logits = {name: tiny_llama(name == "tied_base")(tokens).logits.detach().numpy() for name in ("base", "tied_base")}
    for seed, (case, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_llama(case in TIED), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        disturb(model)
        folder = GOLDEN / f"peft_{case}"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        file = folder / "adapter_config.json"
        options = json.loads(file.read_text())
        for name in ("target_modules", "modules_to_save"):
            options[name] = options[name] and sorted(options[name])  # sets in PEFT
        file.write_text(json.dumps(options, indent=2) + "\n")
        logits[case] = model(tokens).logits.detach().numpy()
        print(case, "moves the logits by", np.abs(logits[case] - logits["tied_base" if case in TIED else "base"]).max())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    np.savez_compressed(GOLDEN / "peft_logits.npz", versions=versions, **logits)
    print(versions)


if __name__ == "__main__":
    main()
