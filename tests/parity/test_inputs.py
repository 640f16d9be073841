"""The inputs of parity tests: rows that both environments make alike, and a SmolLM2 that speaks."""

import pytest
from rows import conversations, lora_a, prompt_completion


def test_rows_and_lora_start_are_the_same_everywhere():
    rows = conversations(20, 64)
    assert rows[0]["messages"][:3] == [
        {"role": "system", "content": "Use plain words."},
        {"role": "user", "content": "Is a kettle alive?"},
        {"role": "assistant", "content": "No."},
    ]
    assert rows[:5] == conversations(20, 5)
    parts = prompt_completion(rows[0])
    assert parts["prompt"] + parts["completion"] == rows[0]["messages"] and len(parts["completion"]) == 1
    start = lora_a(3, "up", 576, 8)
    assert start.shape == (576, 8) and abs(start).max() < 1 / 24
    assert [f"{value:.6f}" for value in start[0, :3]] == ["-0.030277", "0.031979", "0.033217"]


@pytest.mark.parity
def test_smollm2_from_its_gguf_speaks():
    # A wrong row order of q and k, or a wrong tokenizer, would end in babble.
    from smollm2 import load_model, load_tokenizer

    tokenizer = load_tokenizer()
    for text in ("naïve café – 2024!", "a\n\n  b\t<|im_end|>", "São Paulo 東京 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = load_model().eval().generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
