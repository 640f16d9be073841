"""PEFT opens the adapters that jaxpost wrote, and computes the logits that it computes with its own."""

import pathlib

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parity
@pytest.mark.parametrize("case", ["qv", "rslora", "dora", "modules", "tied"])
def test_peft_loads_what_jaxpost_wrote(case):
    import torch
    from make_peft_golden import TIED, tiny_llama
    from peft import PeftModel
    from tiny_llama import TOKENS

    model = PeftModel.from_pretrained(tiny_llama(case in TIED), GOLDEN / f"jaxpost_peft_{case}").eval()
    logits = np.load(GOLDEN / "peft_logits.npz")
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(TOKENS)).logits, logits[case], atol=1e-5)
        merged = model.merge_and_unload()
        np.testing.assert_allclose(merged(torch.tensor(TOKENS)).logits, logits[case], atol=1e-4)
