"""Row types, their detection, and errors that name the place, the field and the types."""

import json
import pickle

import numpy as np
import pytest

from jaxpost.data import tasks
from jaxpost.data.chat import load_tokenizer
from jaxpost.data.tasks import COLUMNS, ENCODERS, detect, make_task
from jaxpost.errors import ConfigError, DataError
from tests import tiny

CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "CD"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def trained(example, folder) -> str:
    return load_tokenizer(folder).decode(example.tokens[example.trainable])


def text(example, folder) -> str:
    return load_tokenizer(folder).decode(example.tokens)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": CHAT}, "CD<|im_end|>"),
        ({"messages": CHAT, "source": "x", "prompt": "ab"}, "CD<|im_end|>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "CD<|im_end|>"),
        ({"prompt": "ab", "completion": " CD"}, " CD<|im_end|>"),
        ({"text": "abc"}, "bc<|im_end|>"),
        ({"conversations": [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "CD"}]}, "CD<|im_end|>"),
        ({"conversations": CHAT}, "CD<|im_end|>"),
        ({"instruction": "a", "input": "b", "output": "CD"}, "CD<|im_end|>"),
        ({"instruction": "ab", "output": "CD", "input": None}, "CD<|im_end|>"),
    ],
)
def test_auto_finds_the_row_type(folder, record, expected):
    example = make_task("auto", folder)(record, "f:1")
    assert trained(example, folder) == expected and example.id == "f:1"
    assert example.tokens.dtype == np.int32 and example.trainable.dtype == bool
    assert example.tokens.shape == example.trainable.shape and not example.trainable[0]


def test_converted_rows_equal_chats(folder):
    task = make_task("auto", folder)
    system = {"role": "system", "content": "s"}
    chat = task({"messages": [system, {"role": "user", "content": "a\n\nb"}, CHAT[1]]}, "x")
    for record in (
        {"instruction": "a", "input": "b", "output": "CD", "system": "s"},
        {"conversations": [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "CD"}], "system": "s"},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a\n\nb"}, CHAT[1]]},
    ):
        np.testing.assert_array_equal(task(record, "x").tokens, chat.tokens)


@pytest.mark.parametrize(
    ("loss_on", "chat", "completion"),
    [
        ("assistant", "CD<|im_end|>EF<|im_end|>", "EF<|im_end|>"),
        ("last", "EF<|im_end|>", "EF<|im_end|>"),
        ("completion", "EF<|im_end|>", "EF<|im_end|>"),
    ],
)
def test_loss_on(folder, loss_on, chat, completion):
    task = make_task("auto", folder, loss_on)
    turns = [*CHAT, {"role": "user", "content": "x"}, {"role": "assistant", "content": "EF"}]
    assert trained(task({"messages": turns}, "f:1"), folder) == chat
    assert trained(task({"prompt": turns[:3], "completion": turns[3:]}, "f:1"), folder) == completion


def test_loss_on_all(folder):
    task = make_task("auto", folder, "all")
    whole = text(task({"messages": CHAT}, "f:1"), folder)
    assert trained(task({"messages": CHAT}, "f:1"), folder) == whole.removeprefix("<|im_start|>").rstrip("\n")
    assert trained(task({"prompt": "ab", "completion": "CD"}, "f:1"), folder) == "bCD<|im_end|>"


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"f:7: a preference pair \(chosen, rejected\) row"),
        ({"prompt": "a", "completion": "b", "label": True}, r"unpaired preference \(prompt, completion, label\)"),
        ({"prompt": "a", "answer": "4"}, "a prompt row without a completion.*prompt, answer"),
        ({"messages": CHAT, "text": "x"}, r"ambiguous row, it could be text \(text\), chat \(messages\)"),
        ({"question": "a", "answer": "4"}, "no known row type: it has question, answer"),
        ({}, "it has nothing"),
        ([1], "^f:7: row: expected dict, got list"),
        ({"messages": "x"}, r"^f:7: field 'messages': expected list, got str$"),
        ({"messages": []}, r"field 'messages': empty"),
        ({"messages": [CHAT[0], 3]}, r"field 'messages\[1\]': expected dict, got int"),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": 5}]},
            r"^f:7: field 'messages\[1\].content': expected str or list, got int$",
        ),
        ({"messages": [{"content": "x"}]}, r"field 'messages\[0\].role': missing, found content"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"field 'messages\[0\].content': missing"),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            r"field 'messages\[0\].content\[0\]': expected dict, got str",
        ),
        (
            {"messages": [CHAT[0], {**CHAT[1], "tool_calls": "f(x)"}]},
            r"'messages\[1\].tool_calls': expected list, got str",
        ),
        ({"messages": [CHAT[0], CALL]}, r"messages\[1\].tool_calls: the chat template never writes tool calls"),
        ({"messages": CHAT, "tools": "{"}, "field 'tools': not JSON"),
        ({"messages": CHAT, "tools": [1]}, r"field 'tools\[0\]': expected dict, got int"),
        ({"messages": CHAT[:1]}, "^f:7: no trainable token: no assistant turn"),
        ({"prompt": "a", "completion": CHAT}, "field 'completion': expected str as prompt is, got list"),
        ({"prompt": "a", "completion": 3}, "field 'completion': expected str or list, got int"),
        ({"text": ""}, "field 'text': empty"),
        ({"text": 3}, "field 'text': expected str, got int"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"field 'conversations\[0\].from': unknown 'alien'"),
        ({"conversations": [{"from": "human", "value": None}]}, r"field 'conversations\[0\].value': missing"),
        ({"instruction": "x", "output": 3}, "field 'output': expected str, got int"),
    ],
)
def test_errors_name_the_place(folder, record, match):
    with pytest.raises(DataError, match=match) as caught:
        make_task("auto", folder)(record, "f:7")
    assert str(caught.value).startswith("f:7: ") and "\n" not in str(caught.value)


def test_task_by_name_settles_ambiguity(folder):
    record = {"messages": CHAT, "text": "abc"}
    assert trained(make_task("text", folder)(record, "f:1"), folder) == "bc<|im_end|>"
    assert trained(make_task("chat", folder)(record, "f:1"), folder) == "CD<|im_end|>"
    with pytest.raises(DataError, match="f:1: field 'messages': missing, found text"):
        make_task("chat", folder)({"text": "x"}, "f:1")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"task": "dpo"}, "task: 'dpo' is unknown, expected auto, text, chat"),
        ({"task": "chat", "columns": {"text": "body"}}, "columns.text: task 'chat' reads no such field"),
        ({"task": "auto", "loss_on": "user"}, "loss_on 'user'"),
    ],
)
def test_wrong_options(arguments, match):
    with pytest.raises(ConfigError, match=match):
        make_task(tokenizer_path="x", **arguments)


def test_tasks_pickle_without_their_tokenizer(folder):
    task = make_task("auto", folder, columns={"prompt": "question"})
    assert len(pickle.dumps(task)) < 500
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(task))({"text": "a"}, "f:1").tokens, task({"text": "a"}, "f:1").tokens
    )


def test_tools_and_template_variables_of_a_row(folder, tmp_path):
    file = tmp_path / "tools.jinja"
    file.write_text(
        "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{{ style | default('') }}"
        "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    task = make_task("auto", folder, chat_template=str(file))
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        record = {"messages": [CHAT[0], CALL], "tools": given, "chat_template_kwargs": {"style": "!"}}
        example = task(record, "f:1")
        assert text(example, folder).startswith("<f>!user:ab<|im_end|>")
        assert trained(example, folder) == '{"name": "f", "arguments": {"x": 1}}<|im_end|>'


def test_every_task_has_an_encoder():
    assert set(COLUMNS) == set(ENCODERS)
    for task, (needed, _) in COLUMNS.items():
        assert detect(dict.fromkeys(needed, "x")) == task
    assert set(tasks.TaskName.__args__) == {"auto", "pair", *COLUMNS}  # pairs: data/pairs.py
