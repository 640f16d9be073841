"""Folders that Tokenizer.save writes, as transformers reads them."""

import pytest

pytestmark = pytest.mark.parity

CHAT = [
    {"role": "user", "content": "How many 🦜 in 1234?"},
    {"role": "assistant", "content": "None,\n\n  naïve!"},
    {"role": "user", "content": " <b>&</b> "},
]


def test_transformers_loads_what_save_writes(tmp_path):
    from transformers import AutoTokenizer

    from jaxpost.data.chat import load_tokenizer

    ours = load_tokenizer("smollm2-135m")
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (49152, 1, 2, 2)
    for prompt in (False, True):
        text = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, tokenize=False)
        assert text == ours.render(CHAT, add_generation_prompt=prompt)
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt)["input_ids"]
        assert ids == ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special=True)
