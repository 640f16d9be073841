"""Writes tests/golden/sentencepiece_llama.json: what transformers' LlamaTokenizer makes of texts.

    python tests/parity/make_sentencepiece_golden.py            # needs transformers, sentencepiece, protobuf
    python tests/parity/make_sentencepiece_golden.py --train    # makes the model file anew, too

The model file is tiny and has Llama 2's settings: BPE, byte fallback, dummy prefix, no normaliser, digits one by one.
"""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
OUT = HERE.parent / "golden" / "sentencepiece_llama.json"
MODEL = HERE / "sentencepiece_llama.model"
WORDS = "the quick brown fox jumps over a lazy dog while 12 birds watch; naïve café ünder Straße".split()
TEXTS = [
    *("", " ", "  ", "   ", "a", " a", "  a", "a ", "a  ", " a ", "a b", "a  b", "a   b  "),
    *("\n", "a\n", "\na", "a\nb", "a\n\n b", "\t", "a\tb", "\r\n", "a\r\nb", " \n "),
    *("the quick", " the quick", "the  quick", "12", "1234567890", "3.14", "-12 birds"),
    *("naïve café", "nai\u0308ve", "Straße", "Ünseen", "e\u0301\u0301", "ﬁne", "Ⅳ", "½"),
    *("漢字", "漢字とカナ", "漢字 漢字", " 漢字", "안녕", "мир", "مرحبا", "🦜", "a🦜b", "👩‍👩‍👧", "🦜 🦜"),
    *("\u00a0", "a\u00a0b", "\u200b", "a\u200bb", "\u3000", "\u2581", "\u2581a", "a\u2581b", "a \u2581b"),
    *("\x01", "a\x7fb", "\ufffd", "\ufeffa", "\U0010ffff", "fox\0dog"),
    *("<s>", "</s>", "<s>a", "a</s>", "a</s>b", "<unk>", "<pad>", "<0x41>", "<0x0A>", "a<0xE2>"),
    *("zzzqqq", "foxfoxfox", "THE QUICK", "def f(x):\n    return x", "  indented\n    more\n"),
    *("a" * 50, " ".join(["fox"] * 30)),
]


def train(folder: pathlib.Path) -> None:
    import sentencepiece

    rng = random.Random(0)
    corpus = [" ".join(rng.choices(WORDS, k=8)) for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(folder / "llama"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    shutil.copy(folder / "llama.model", MODEL)


def main() -> None:
    from transformers import LlamaTokenizer

    with tempfile.TemporaryDirectory() as folder:
        if "--train" in sys.argv[1:]:
            train(pathlib.Path(folder))
        shutil.copy(MODEL, pathlib.Path(folder, "tokenizer.model"))
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        cases = []
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    OUT.write_text(json.dumps(cases, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size} bytes, {len(cases)} texts")


if __name__ == "__main__":
    main()
