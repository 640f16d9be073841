"""Tokenizer and masks: equal to transformers on golden cases, round trips, every check, hostile templates."""

import copy
import datetime
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpost.data import masks, template
from jaxpost.data.chat import Tokenizer, load_tokenizer
from jaxpost.data.tokenizer_files import read_parts
from jaxpost.data.tokenizer_parts import TokenizerParts
from jaxpost.errors import DataError
from tests import tiny

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "chat_templates.json").read_text(encoding="utf-8"))
CASES = [(style, i) for style, entry in GOLDEN["styles"].items() for i in range(len(entry["cases"]))]
CHAT = [
    {"role": "user", "content": "Hi 12?"},
    {"role": "assistant", "content": "Yes 🦜."},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "fine"},
]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def styled() -> dict[str, Tokenizer]:
    """A tokenizer for each golden style; all share one backend, which holds the special tokens of every style."""
    parts = read_parts("smollm2-135m")
    parts.backend.add_special_tokens(GOLDEN["extra_tokens"])
    return {
        name: Tokenizer(TokenizerParts(parts.backend, style["specials"], {"default": style["template"]}))
        for name, style in GOLDEN["styles"].items()
    }


def with_template(tokenizer: Tokenizer, text: str, **specials: str) -> Tokenizer:
    return Tokenizer(TokenizerParts(tokenizer._backend, tokenizer.specials | specials, {"default": text}))


def trained(tokenizer: Tokenizer, ids: np.ndarray, trainable: np.ndarray) -> list[str]:
    """Decoded runs of trainable tokens."""
    runs, last = [], False
    for index, on in zip(ids, trainable, strict=True):
        if on:
            runs = [*runs[:-1], [*runs[-1], index]] if last else [*runs, [index]]
        last = on
    return [tokenizer.decode(run) for run in runs]


# ---------------------------------------------------------------------------------------- equal to transformers


@pytest.mark.parametrize(("style", "i"), CASES)
def test_renders_and_tokenises_as_transformers(styled, style, i):
    entry, case = GOLDEN["styles"][style], GOLDEN["styles"][style]["cases"][i]
    text = styled[style].render(
        case["messages"],
        tools=case["tools"],
        add_generation_prompt=case["add_generation_prompt"],
        **entry["variables"],
    )
    assert text == case["text"]
    assert styled[style].encode(text) == case["ids"]


# Prompts alone are no training rows, and the style "documents" ends with text behind the last turn.
TRAINED = [
    (style, i)
    for style, i in CASES
    if style != "documents" and not GOLDEN["styles"][style]["cases"][i]["add_generation_prompt"]
]


@pytest.mark.parametrize(("style", "i"), TRAINED)
def test_ids_and_masks_of_chats_as_transformers(styled, style, i):
    entry, case = GOLDEN["styles"][style], GOLDEN["styles"][style]["cases"][i]
    ids, trainable = styled[style].encode_chat(case["messages"], tools=case["tools"], **entry["variables"])
    assert ids.tolist() == case["ids"] and ids.dtype == np.int32
    if "mask" in case:
        assert trainable.tolist() == [bool(x) for x in case["mask"]]
    spans = trained(styled[style], ids, trainable)
    assert len(spans) == sum(message["role"] == "assistant" for message in case["messages"])
    stop = entry["specials"]["eos_token"]
    for span, message in zip(spans, [m for m in case["messages"] if m["role"] == "assistant"], strict=True):
        assert span.endswith(stop)
        assert (message["content"] or "weather").strip() in span


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=range(len(GOLDEN["texts"])))
def test_smollm2_ids_and_round_trip(smollm2, case):
    assert smollm2.encode(case["text"]) == case["ids"]
    assert smollm2.decode(case["ids"]) == case["text"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"], include_characters="\n\t"), max_size=60))
def test_any_assigned_text_round_trips(text):  # the vocabulary lacks some bytes of control and unassigned characters
    tokenizer = load_tokenizer("smollm2-135m")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_smollm2_facts(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (49152, 1, 2, 2)
    assert smollm2.stop_ids == (2,) and not smollm2.adds_bos
    assert smollm2.decode([1, 28120, 2], skip_special=True) == smollm2.decode([28120])
    digits = smollm2.encode("12345")
    assert [smollm2.decode([index]) for index in digits] == list("12345")
    with pytest.raises(DataError, match="Unicode"):
        smollm2.encode("\ud800")


# ---------------------------------------------------------------------------------------- masks


def test_what_each_loss_on_trains(smollm2):
    ends = "<|im_end|>"
    for loss_on, expected in [
        ("assistant", ["Yes 🦜." + ends, "fine" + ends]),
        ("last", ["fine" + ends]),
        ("completion", ["fine" + ends]),
    ]:
        ids, trainable = smollm2.encode_chat(CHAT, loss_on=loss_on)
        assert trained(smollm2, ids, trainable) == expected
        assert smollm2.decode(ids) == smollm2.render(CHAT)
    ids, trainable = smollm2.encode_chat(CHAT, loss_on="all")
    assert trained(smollm2, ids, trainable) == [smollm2.render(CHAT).removeprefix("<|im_start|>").rstrip("\n")]
    assert smollm2.render(CHAT).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_prompt_messages_are_never_trained(smollm2):
    for loss_on in ("assistant", "completion", "last"):
        ids, trainable = smollm2.encode_chat(CHAT, loss_on=loss_on, prompt_messages=3)
        assert trained(smollm2, ids, trainable) == ["fine<|im_end|>"]
    # With two completion turns, completion trains all behind the prompt and assistant the replies alone.
    chat = [CHAT[0], CHAT[1], {"role": "tool", "content": "t"}, CHAT[3]]
    ids, trainable = smollm2.encode_chat(chat, loss_on="completion", prompt_messages=1)
    whole = ["Yes 🦜.<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>"]
    assert trained(smollm2, ids, trainable) == whole
    ids, trainable = smollm2.encode_chat(chat, loss_on="assistant", prompt_messages=1)
    assert trained(smollm2, ids, trainable) == ["Yes 🦜.<|im_end|>", "fine<|im_end|>"]
    with pytest.raises(DataError, match="not a prefix"):  # a prompt is rendered with the header of a reply behind it
        smollm2.encode_chat(CHAT, loss_on="completion", prompt_messages=2)


def test_marked_templates_train_by_their_marks(styled):
    tokenizer = styled["marked"]
    for loss_on, count in [("assistant", 2), ("last", 1)]:
        ids, trainable = tokenizer.encode_chat(CHAT, loss_on=loss_on)
        assert len(trained(tokenizer, ids, trainable)) == count
    ids, trainable = tokenizer.encode_chat(CHAT, loss_on="assistant", prompt_messages=3)
    assert trained(tokenizer, ids, trainable) == ["fine<|im_end|>"]


def test_marks_inside_macros_and_captures(smollm2):
    inside = """{%- macro turn(m) %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content }}<|im_end|>{% endif %}{% endmacro -%}
{% set whole %}{% for m in messages %}{{ turn(m) }}{% endfor %}{% endset %}{{ whole }}"""
    tokenizer = with_template(smollm2, inside)
    ids, trainable = tokenizer.encode_chat(CHAT)
    assert trained(tokenizer, ids, trainable) == ["Yes 🦜.<|im_end|>", "fine<|im_end|>"]


def test_plain_pairs_and_text(smollm2):
    ids, trainable = smollm2.encode_pair("2 + 2 =", " 4")
    assert trained(smollm2, ids, trainable) == [" 4<|im_end|>"]
    ids, trainable = smollm2.encode_pair("2 + 2 =", " 4<|im_end|>")
    assert smollm2.decode(ids) == "2 + 2 = 4<|im_end|>"
    ids, trainable = smollm2.encode_text("a b")
    assert smollm2.decode(ids) == "a b<|im_end|>" and trainable.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("source", "messages", "match"),
    [
        (None, CHAT[:1], "no trainable token"),
        (None, [CHAT[1]], "not a prefix of the chat"),
        (None, [CHAT[0], {"role": "assistant", "content": "\n\nx"}], r"one token covers its end.*>>\\n\\n<<"),
        (
            "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            CHAT,
            "doubled BOS",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            CHAT,
            r"not a stop token \('<\|im_end\|>'\)",
        ),
        (
            "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}{{ 'bye' if not add_generation_prompt }}",
            CHAT[:2],
            "not a stop",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
            CHAT,
            "first 1 messages",
        ),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}{{ eos_token }}", CHAT, "no trainable token"),
        ("{{ raise_exception('roles must alternate') }}", CHAT, "TemplateError: roles must alternate"),
        ("{% for %}", CHAT, "TemplateSyntaxError"),
        ("{{ messages[0].nothing.there }}", CHAT, "UndefinedError"),
    ],
)
def test_every_doubt_is_an_error(smollm2, source, messages, match):
    tokenizer = smollm2 if source is None else with_template(smollm2, source)
    with pytest.raises(DataError, match=match):
        tokenizer.encode_chat(messages)


def test_prompt_that_changes_ids_without_a_straddling_token(smollm2):
    with pytest.raises(DataError, match="not a prefix"):
        smollm2.encode_pair("The answer is ", "four")  # the space belongs to the word behind it


def test_every_turn_is_checked_for_its_prompt(smollm2):
    # Two line ends are one token before a digit and two before a letter: only the second turn is affected.
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = with_template(smollm2, source + "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}")
    chat = [CHAT[0], {"role": "assistant", "content": "1"}, CHAT[2]]
    tokenizer.encode_chat(chat)
    with pytest.raises(DataError, match=r"not a prefix: alone it is .*>>\\n\\n<<'.*in the whole .*>>\\n<<\\nfine"):
        tokenizer.encode_chat([*chat, CHAT[3]])


def test_chat_without_template():
    parts = read_parts("smollm2-135m")
    parts.templates = {}
    with pytest.raises(DataError, match="no chat template"):
        Tokenizer(parts).encode_chat(CHAT)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_token_spans_cover_and_select(sizes, data):
    ends = np.cumsum(sizes)
    offsets = [(int(e - s), int(e)) for e, s in zip(ends, sizes, strict=True)]
    starts, stops = masks.token_spans(offsets)
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == offsets
    low = data.draw(st.integers(0, int(ends[-1]) - 1))
    high = data.draw(st.integers(low + 1, int(ends[-1])))
    first, last = masks.tokens_between(starts, stops, low, high)
    touched = [i for i, (a, b) in enumerate(offsets) if a < high and b > low]
    assert list(range(first, last)) == touched
    crossing = [i for i, (a, b) in enumerate(offsets) if a < low < b]
    assert masks.straddling(starts, stops, low) == (crossing[0] if crossing else None)


def test_token_spans_close_gaps_and_share_characters():
    starts, ends = masks.token_spans([(0, 1), (2, 5), (5, 6), (5, 6), (6, 6)])
    assert starts.tolist() == [0, 1, 5, 5, 6] and ends.tolist() == [1, 5, 6, 6, 6]
    assert masks.tokens_between(starts, ends, 5, 6) == (2, 4)
    assert masks.tokens_between(starts, ends, 1, 3) == (1, 2)


# ---------------------------------------------------------------------------------------- hostile templates

HOSTILE = {
    "class chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ (messages | attr('__class__')).mro() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__x = 1 %}",
    "long range": "{% for i in range(1000000000) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 7 ** (10 ** 9) }}",
    "long string": "{{ 'x' * 10 ** 12 }}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "capture": "{% set a = 'x' * 999999 %}{% set b %}{% for i in range(9999) %}{{ a }}{% endfor %}{% endset %}{{ b }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "macro bomb": "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "include": "{% include '/etc/passwd' %}",
}


def spent() -> float:
    """Processor seconds of this process, the template process of now, and those that ended."""
    worker = template._worker.process
    if worker is None:
        return sum(os.times()[:4])
    user, system = pathlib.Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return sum(os.times()[:4]) + (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name):
    template.render("{{ messages[0].content }}", CHAT, {})  # the process is up: its start is not part of the cap
    start, cpu = time.monotonic(), spent()
    try:
        text = template.render(HOSTILE[name], CHAT, {}).text
        assert name in ("format", "attr filter") and len(text) < 100 and "class" not in text
    except DataError as error:
        assert "chat template" in str(error) and len(str(error)) < 800
    # On a busy machine the wall clock runs on while the template waits: then its processor time must be within the cap.
    assert time.monotonic() - start < 2.0 or spent() - cpu < 1.5
    assert template.render("{{ messages[0].content }}", CHAT, {}).text == "Hi 12?"


def test_worker_survives_ctrl_c_and_the_death_of_its_parent():
    code = (
        "from jaxpost.data import template as t; import os, signal\n"
        "print(t.render('a', [], {}).text, t._worker.process.pid, flush=True)\n"
        "os.kill(t._worker.process.pid, signal.SIGINT); os.kill(t._worker.process.pid, signal.SIGTERM)\n"
        "print(t.render('b', [], {}).text, t._worker.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    a, first, b, second = done.stdout.split()
    assert (a, b) == ("a", "b") and first == second
    for _ in range(100):
        try:
            os.kill(int(first), 0)
        except ProcessLookupError:
            return
        if (
            f"{pathlib.Path(f'/proc/{first}/stat').read_text().split()[2]}" == "Z"
        ):  # dead, its new parent did not look yet
            return
        time.sleep(0.05)
    pytest.fail("the template process outlived its parent")


def test_an_interrupted_request_leaves_no_stale_reply(monkeypatch):
    class Interrupted:
        def read(self, size):
            raise KeyboardInterrupt

        def close(self):
            pass

    template.render("a", [], {})
    monkeypatch.setattr(template._worker.process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        template.render("b", [], {})
    assert template.render("c", [], {}).text == "c"


def test_a_forked_process_has_its_own_worker():
    code = (
        "import os; from jaxpost.data import template as t\n"
        "t.render('a', [], {}); parent = t._worker.process.pid\n"
        "if os.fork() == 0:\n"
        "    assert t.render('b', [], {}).text == 'b' and t._worker.process.pid != parent; os._exit(0)\n"
        "assert os.wait()[1] == 0 and t.render('c', [], {}).text == 'c' and t._worker.process.pid == parent\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------- files


def test_save_and_load_are_equal(smollm2, tmp_path):
    smollm2.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == smollm2.fingerprint and again.stop_ids == smollm2.stop_ids
    assert again.specials == smollm2.specials and again.chat_template == smollm2.chat_template
    assert pickle.loads(pickle.dumps(again)) is again
    for mine, theirs in zip(smollm2.encode_chat(CHAT), again.encode_chat(CHAT), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # other templates by name, a template file, more stop tokens
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    other = tmp_path / "other"
    smollm2.save(other)
    (other / "chat_template.jinja").unlink()
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": {"content": "<|endoftext|>"}}))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    loaded = load_tokenizer(other)
    assert loaded.render(CHAT) == "d" and loaded.render(CHAT, tools=[{"type": "function"}]) == "t"
    assert loaded.stop_ids == (2, 0) and loaded.pad_id == 0
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_tokenizer(other, tmp_path / "mine.jinja").render(CHAT) == "mine"


def test_damaged_and_foreign_files(smollm2, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither tokenizer.json"):
        load_tokenizer(tmp_path / "empty")
    for name, content in [
        ("a.gguf", b"GGUF\3\0\0"),
        ("b.gguf", b"nope" * 20),
        ("c.model", b"\xff\xff"),
        ("d.txt", b"x"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError):
            load_tokenizer(tmp_path / name)
    broken = tmp_path / "broken"
    smollm2.save(broken)
    (broken / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(DataError, match="'<nowhere>' is not in its vocabulary"):
        load_tokenizer(broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer.json"):
        load_tokenizer(broken)


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ({"tokenizer.ggml.model": "llama"}, "'llama' is not supported"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}, "'qwen2' is not supported.*model.tokenizer"),
    ],
)
def test_gguf_pre_tokenizers_are_refused_by_name(tmp_path, pairs, match):
    def string(text: str) -> bytes:
        return len(text).to_bytes(8, "little") + text.encode()

    body = b"".join(string(key) + (8).to_bytes(4, "little") + string(value) for key, value in pairs.items())
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + len(pairs).to_bytes(8, "little")
    file = tmp_path / "x.gguf"
    file.write_bytes(head + body)
    with pytest.raises(DataError, match=match):
        load_tokenizer(file)
    file.write_bytes((head + body)[:-3])
    with pytest.raises(DataError):
        load_tokenizer(file)


def test_model_with_too_few_rows(smollm2):
    smollm2.check_model(49152)
    with pytest.raises(DataError, match="49152 tokens.*only 1000 rows"):
        smollm2.check_model(1000)


def test_golden_cases_are_not_mutated_by_rendering(smollm2):
    before = copy.deepcopy(CHAT)
    smollm2.encode_chat(CHAT)
    assert before == CHAT


def test_a_dated_template_writes_the_date_it_is_given(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    chat = [{"role": "user", "content": "hi"}]
    given = load_tokenizer(folder, tmp_path / "dated.jinja", "2024-07-26")
    assert given.render(chat) == "26 Jul 2024: hi"
    assert pickle.loads(pickle.dumps(given)).render(chat) == "26 Jul 2024: hi"
    today = load_tokenizer(folder, tmp_path / "dated.jinja").render(chat)  # the child process is the same one
    assert today == f"{datetime.date.today():%d %b %Y}: hi"
