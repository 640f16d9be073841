"""Preference rows as units of two examples: prompts told and found, what is refused, how a pair lies in a row."""

import numpy as np
import pytest

from jaxpost.data import kinds
from jaxpost.data.pack import pack_rows
from jaxpost.data.pairs import split_pair
from jaxpost.data.prompts import question_of
from jaxpost.errors import ConfigError, DataError
from tests import tiny


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return kinds.make_task("pairs", "auto", str(tiny.write_tokenizer(tmp_path_factory.mktemp("pairs"))))


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def texts(task, unit):
    """(whole text, trained text) of both sides."""
    return [(task.tokenizer.decode(e.tokens), task.tokenizer.decode(e.tokens[e.trainable])) for e in unit]


CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("hi")], "chosen": [says("yes")], "rejected": [says("no!")]},
        {"chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no!")]},
        {"prompt": "hi", "chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no!")]},
        {"prompt": [user("hi")], "chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no!")]},
    ],
    ids=["told", "found", "repeated text", "repeated messages"],
)
def test_a_conversation(task, row):
    unit = task(row, "f:1")
    assert [(whole, trained) for whole, trained in texts(task, unit)] == [
        (f"{CHAT}yes<|im_end|>\n", "yes<|im_end|>"),
        (f"{CHAT}no!<|im_end|>\n", "no!<|im_end|>"),
    ]
    assert [example.id for example in unit] == ["f:1", "f:1"]
    assert unit[0].extra == unit[1].extra == {"margin": 0.0, "agreement": 1.0}


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, ("2+2=", "4", "5")),
        ({"chosen": "the sky is blue", "rejected": "the sky is black"}, ("the sky is", " blue", " black")),
        ({"chosen": "a: yes", "rejected": "a: yes sir"}, ("a: yes", "", " sir")),
    ],
    ids=["told", "words stay whole", "one is the start of the other"],
)
def test_text(row, want):
    if "" in want:
        with pytest.raises(DataError, match="field 'chosen': an empty completion"):
            split_pair(row)
    else:
        assert split_pair(row) == want


def test_several_turns_are_all_trained_and_what_a_row_tells_is_kept(task):
    chosen = [says("one"), user("more"), says("two")]
    unit = task(
        {"prompt": [user("hi")], "chosen": chosen, "rejected": [says("x")], "margin": 2, "agreement": 0.75}, "f:1"
    )
    assert texts(task, unit)[0][1] == "one<|im_end|>two<|im_end|>"
    assert unit[0].extra == {"margin": 2.0, "agreement": 0.75}


BAD = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "field 'rejected': missing, found prompt, chosen"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "same chats": (
        {"chosen": [user("a"), says("b")], "rejected": [user("a"), says("b")]},
        "chosen and rejected are the",
    ),
    "empty": ({"prompt": "a", "chosen": " ", "rejected": "b"}, "field 'chosen': an empty completion"),
    "empty reply": (
        {"prompt": [user("a")], "chosen": [says("b")], "rejected": [says("")]},
        "field 'rejected': an empty completion",
    ),
    "other prompts": (
        {"chosen": [user("a"), says("b")], "rejected": [user("c"), says("d")]},
        "no field 'prompt', and chosen and rejected do not begin alike: their prompts differ",
    ),
    "mixed": ({"prompt": "a", "chosen": "b", "rejected": [says("c")]}, "field 'rejected': expected str as chosen is"),
    "text and chat": (
        {"prompt": "a", "chosen": [says("b")], "rejected": [says("c")]},
        "field 'prompt': str beside chosen as list, which does not begin with it",
    ),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"}, "field 'margin': expected int or float"),
    "agreement": ({"prompt": "a", "chosen": "b", "rejected": "c", "agreement": 1.5}, "no share between 0 and 1"),
    "no reply": ({"prompt": [user("a")], "chosen": [user("b")], "rejected": [says("c")]}, "'chosen': an empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_say_where_and_why(task, case):
    row, message = BAD[case]
    with pytest.raises(DataError) as caught:
        task(row, "rows.jsonl:7")
    assert str(caught.value).startswith("rows.jsonl:7: ") and message in str(caught.value)


def test_a_pair_lies_side_by_side_and_tells_its_columns(task):
    units = [
        task({"prompt": "a", "chosen": "bc", "rejected": "d", "margin": 3.0}, "f:1"),
        task({"prompt": "e", "chosen": "f", "rejected": "gh"}, "f:2"),
    ]
    batch = pack_rows([units, []], 32, kinds.COLUMNS["pairs"], 6)
    assert batch.segments.max() == 4 and batch.extra["margin"].shape == (2, 6)
    assert batch.extra["margin"][0].tolist() == [3, 3, 0, 0, 0, 0]
    assert batch.extra["agreement"].tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6]
    first = batch.tokens[0][np.isin(batch.segments[0], (1, 2))]
    assert task.tokenizer.decode(first) == "abcad"  # chosen, then rejected, each behind the prompt, ends as targets


def test_kinds_and_names_that_do_not_belong(tmp_path):
    with pytest.raises(ConfigError, match="task: 'chat' rows hold no preference"):
        kinds.make_task("pairs", "chat", str(tmp_path))
    with pytest.raises(ConfigError, match="task: pair rows are for methods that learn from preferences"):
        kinds.make_task("examples", "pair", str(tmp_path))
    with pytest.raises(ConfigError, match="columns.messages: a pair has no such field, only prompt, chosen"):
        kinds.make_task("pairs", "auto", str(tmp_path), columns={"messages": "m"})


@pytest.mark.parametrize("told", [True, False])
def test_the_question_of_a_pair(told):
    row = {"chosen": [user("hi"), says("yes")], "rejected": [user("hi"), says("no!")]}
    if told:
        row = {"prompt": [user("hi")], "chosen": [says("yes")], "rejected": [says("no!")]}
    question = question_of(row, "f:1")
    assert question.prompt == [user("hi")] and question.answer == "yes"
    assert question_of({"chosen": "2+2= 4", "rejected": "2+2= 5"}, "f:1").answer == " 4"
