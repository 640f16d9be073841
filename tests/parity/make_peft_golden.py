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
}


def tiny_llama() -> transformers.LlamaForCausalLM:
    """transformers' Llama with the formula's weights."""
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("model_type", "torch_dtype")})
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights().items()}, strict=True)
    return model


def main() -> None:
    tokens = torch.tensor(TOKENS)
    logits = {"base": tiny_llama()(tokens).logits.detach().numpy()}
    for seed, (case, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for name, value in model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero
                torch.nn.init.normal_(value, std=0.3)
        folder = GOLDEN / f"peft_{case}"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        file = folder / "adapter_config.json"
        options = json.loads(file.read_text())
        options["target_modules"].sort()  # a set in PEFT
        file.write_text(json.dumps(options, indent=2) + "\n")
        logits[case] = model(tokens).logits.detach().numpy()
        print(case, "moves the logits by", np.abs(logits[case] - logits["base"]).max())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    np.savez_compressed(GOLDEN / "peft_logits.npz", versions=versions, **logits)
    print(versions)


if __name__ == "__main__":
    main()
