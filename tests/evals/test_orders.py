"""The quickstart task: splits that cannot overlap, rows that never change, a strict score."""

import json
import subprocess
import sys
import zlib

import pytest

from jaxpost.evals import order_words
from jaxpost.evals.orders import KEYS, SENTENCES, SPLITS, generate_rows, main, score

CHECKSUM = 3876491390  # of 64 rows a split


def answer(row):
    return json.loads(row["completion"][0]["content"])


def sentence(row):
    return row["prompt"][1]["content"]


def test_rows_are_prompt_completion_chats_whose_answer_stands_in_the_sentence():
    for split in SPLITS:
        for row in generate_rows(3, 100, split):
            assert [m["role"] for m in row["prompt"] + row["completion"]] == ["system", "user", "assistant"]
            order = answer(row)
            assert tuple(order) == KEYS
            assert "\n" not in row["completion"][0]["content"]
            for key in ("item", "colour", "name", "city", "day"):
                assert order[key].lower() in sentence(row).lower()
            assert str(order["quantity"]) in sentence(row)
            assert all(key in row["prompt"][0]["content"] for key in KEYS)


def test_splits_never_overlap_for_any_seed():
    train = [row for seed in range(3) for row in generate_rows(seed, 3000, "train")]
    held = [row for seed in range(20) for row in generate_rows(seed, 64, "heldout")]
    unseen = generate_rows(0, 500, "unseen")
    assert not {sentence(r) for r in train} & {sentence(r) for r in held + unseen}
    assert not {r["completion"][0]["content"] for r in train} & {r["completion"][0]["content"] for r in held + unseen}
    for key in ("name", "city"):
        assert not {answer(r)[key] for r in train + held} & {answer(r)[key] for r in unseen}


def test_rows_of_one_call_differ_and_use_the_whole_lists():
    rows = generate_rows(0, 4000, "train")
    assert len({sentence(r) for r in rows}) == 4000
    assert {answer(r)["name"] for r in rows} == set(order_words.NAMES)
    assert {answer(r)["city"] for r in rows} == set(order_words.CITIES)


def test_word_lists_are_large_and_disjoint():
    seen_names, seen_cities = set(order_words.NAMES), set(order_words.CITIES)
    new_names, new_cities = set(order_words.UNSEEN_NAMES), set(order_words.UNSEEN_CITIES)
    assert len(seen_names) >= 150 and len(seen_cities) >= 120
    assert len(new_names) >= 50 and len(new_cities) >= 50
    assert not seen_names & new_names and not seen_cities & new_cities
    assert not (seen_names | new_names) & (seen_cities | new_cities)
    assert sum(" " in city for city in new_cities) >= 10
    assert len(set(SENTENCES)) == len(SENTENCES)
    for template in SENTENCES:
        assert all(field in template for field in ("{who}", "{what}", "{city}", "{day}"))


def test_rows_never_change():
    # A changed checksum means other rows: every published figure of the quickstart must then be measured again.
    text = "".join(json.dumps(row) for split in SPLITS for row in generate_rows(0, 64, split))
    assert zlib.crc32(text.encode()) == CHECKSUM
    assert generate_rows(1, 5, "train") != generate_rows(0, 5, "train")
    assert generate_rows(0, 5, "train") == generate_rows(0, 9, "train")[:5]


ROW = {
    "completion": [
        {
            "role": "assistant",
            "content": '{"item":"lamp","colour":"red","quantity":3,"name":"Zoë","city":"New York","day":"Monday"}',
        }
    ]
}
GOOD = ROW["completion"][0]["content"]


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        f"  {GOOD}\n",
        GOOD.replace(":", ": ").replace(",", ", "),
        '{"day":"Monday","item":"lamp","colour":"red","quantity":3,"name":"Zo\\u00eb","city":"New York"}',
    ],
)
def test_right_answers(completion):
    assert score(completion, ROW) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "Sure! " + GOOD,
        f"```json\n{GOOD}\n```",
        GOOD + GOOD,
        GOOD.replace(",", ",\n"),
        GOOD.replace("3", "4"),
        GOOD.replace("3", "3.0"),
        GOOD.replace("3", '"3"'),
        GOOD.replace("Monday", "monday"),
        GOOD.replace('"day"', '"Day"'),
        GOOD.replace(',"day":"Monday"', ""),
        GOOD.replace("}", ',"x":1}'),
        GOOD.replace("{", '{"item":"lamp",'),
        f"[{GOOD}]",
        "null",
        "NaN",
        "[" * 900,
        "9" * 900,
        "[" * 100_000,
    ],
)
def test_wrong_answers(completion):
    assert score(completion, ROW) == 0.0


def test_true_is_not_one():
    row = {"completion": [{"role": "assistant", "content": GOOD.replace("3", "1")}]}
    assert score(GOOD.replace("3", "true"), row) == 0.0


def test_unknown_split_and_count_are_refused():
    with pytest.raises(ValueError, match="train, heldout, unseen"):
        generate_rows(0, 1, "test")
    with pytest.raises(ValueError, match="negative"):
        generate_rows(0, -1, "train")


def test_command_writes_three_files(tmp_path):
    out = tmp_path / "a" / "b"
    command = [sys.executable, "-m", "jaxpost.evals.orders", "--out", str(out), "--train", "20", "--test", "7"]
    subprocess.run(command, check=True, timeout=60)
    for split, count in (("train", 20), ("heldout", 7), ("unseen", 7)):
        lines = (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == generate_rows(0, count, split)


def test_command_refuses_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for argv in (["--out", str(tmp_path), "--train", "0"], ["--out", str(tmp_path / "file")]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert "error: --" in capsys.readouterr().err
