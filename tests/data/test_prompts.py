"""Rows of every type to the question that they ask and the answer that they hold."""

import pytest

from jaxpost.data.chat import load_tokenizer
from jaxpost.data.prompts import Question, question_of
from jaxpost.data.tasks import make_task
from jaxpost.errors import ConfigError, DataError
from jaxpost.evals.metrics import exact_match
from tests import tiny

ASK, REPLY = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "CD"}
SYSTEM = {"role": "system", "content": "s"}
TURNS = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "CD"}]
CHATS = [
    {"messages": [SYSTEM, ASK, REPLY]},
    {"messages": [SYSTEM, ASK, REPLY], "instruction": "other", "output": None},
    {"prompt": [SYSTEM, ASK], "completion": [REPLY]},
    {"conversations": TURNS, "system": "s"},
    {"instruction": "ab", "output": "CD", "system": "s"},
]


@pytest.mark.parametrize("row", CHATS)
def test_every_chat_row_asks_the_same(row, tmp_path):
    question = question_of(row, "f:1")
    assert question == Question([SYSTEM, ASK], {"tools": None}, "CD")
    assert question.last == "ab"
    assert exact_match(" CD\n", row) == 1 and exact_match("C", row) == 0
    tokenizer = load_tokenizer(str(tiny.write_tokenizer(tmp_path)))
    prompt = question.encode(tokenizer)  # what is asked is what training saw before the answer
    known = {name: value for name, value in row.items() if "messages" not in row or name == "messages"}
    example = make_task("auto", str(tmp_path))(known, "f:1")
    assert example.tokens[: len(prompt)].tolist() == prompt and not example.trainable[: len(prompt)].any()
    assert example.trainable[len(prompt)]


def test_texts_parts_and_rows_without_an_answer():
    assert question_of({"prompt": "2+2=", "completion": "4"}, "f") == Question("2+2=", {"tools": None}, "4")
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert question_of({"messages": [parts]}, "f").last == "ab"
    assert question_of({"instruction": "a", "input": "b"}, "f").prompt == [{"role": "user", "content": "a\n\nb"}]
    for row in ({"messages": [ASK]}, {"prompt": "x"}, {"instruction": "a"}):
        assert question_of(row, "f").answer is None
        with pytest.raises(ConfigError, match="has no answer to compare with"):
            exact_match("x", row)


def test_template_variables_of_a_row_reach_its_template(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "t.jinja").write_text("{{ name }}|{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(str(folder), str(tmp_path / "t.jinja"))
    ids = question_of({"messages": [ASK], "chat_template_kwargs": {"name": "N"}}, "f").encode(tokenizer)
    assert tokenizer.decode(ids) == "N|ab"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "f:7: no field prompt, messages, conversations or instruction .* it has text"),
        ({"prompt": ""}, "f:7: field 'prompt': empty"),
        ({"prompt": 5}, "f:7: field 'prompt': expected list, got int"),
        ({"messages": []}, "f:7: field 'messages': empty"),
        ({"messages": [{"content": "x"}]}, r"f:7: field 'messages\[0\].role': missing"),
        ({"conversations": [{"from": "bird", "value": "x"}]}, "f:7: .* unknown 'bird'"),
        ({"instruction": 3}, "f:7: field 'instruction': expected str, got int"),
        ({"prompt": "x", "chat_template_kwargs": 1}, "f:7: field 'chat_template_kwargs': expected dict"),
    ],
)
def test_bad_rows_name_place_and_field(row, message):
    with pytest.raises(DataError, match=message):
        question_of(row, "f:7")
