import dataclasses
import json
import os
import pathlib
import re

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpost import compose, config, problems, yaml_loader
from jaxpost.algos.sft import SFT
from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.redact import redact, redact_text

ROOT = pathlib.Path(__file__).parents[1]
FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck))

TEXT = """\
run_dir: runs/x
model: {source: smollm2-135m}
lora:
  rank: 8
data:
  train:
    - source: jsonl:rows/*.jsonl
      columns: {prompt: q}
  batch_size: 4
algorithm: {name: sft}
optim:
  learning_rate: 2e-3
loop:
  steps: 20
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "x.yaml"
    path.write_text(TEXT)
    return path


def message(file, *overrides):
    with pytest.raises(ConfigError) as caught:
        config.load(file, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(file), "x.yaml")


def edited(tmp_path, old, new):
    path = tmp_path / "x.yaml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new))
    return path


def test_values_and_provenance(file):
    loaded = config.load(file, ["loop.steps=7", "data.train.0.limit=3", "lora.targets=[q, v]"])
    assert loaded.config.optim.learning_rate == 2e-3
    assert loaded.config.loop.steps == 7
    assert loaded.config.lora.targets == ("q", "v")
    assert loaded.config.algorithm == SFT()
    assert loaded.provenance(("optim", "learning_rate")) == f"{file}:12"
    assert loaded.provenance(("loop", "steps")) == "command line"
    assert loaded.provenance(("optim", "b1")) == "default"
    lines = loaded.dump().splitlines()
    assert any(line.startswith("  steps: 7 ") and line.endswith("# command line") for line in lines)
    assert any(line.startswith("  rank: 8 ") and line.endswith("x.yaml:4") for line in lines)
    leaves = [line for line in lines if not re.fullmatch(r"\s*[\w-]*:|\s*- \w+:", line.rstrip())]
    assert all("  # " in line for line in leaves)


def test_dump_then_load_is_the_identity(file, tmp_path):
    strange = "data.train.0.columns={'a b': 'true', c: '1e-4'}"
    loaded = config.load(file, ["run_dir=a $${b} \u00e9: #", strange, "lora=null"])
    saved = tmp_path / "config.yaml"
    saved.write_text(loaded.dump())
    again = config.load(saved)
    assert again.config == loaded.config
    assert config.load_saved(tmp_path) == loaded.config
    assert again.config.run_dir.endswith("a ${b} é: #")
    config.check_resume(saved, loaded.config)


def test_sections_and_list_items_are_made_on_the_way():
    typed = ["run_dir=r", "model.source=smollm2-135m", "data.train.0.source=jsonl:a", "data.train.1.source=text:b"]
    made = config.load(None, [*typed, "algorithm.name=sft", "loop.epochs=2", "lora.rank=4", "loop.epochs=3"]).config
    assert [s.source for s in made.data.train] == [f"jsonl:{os.getcwd()}/a", f"text:{os.getcwd()}/b"]
    assert made.lora.rank == 4 and made.loop.epochs == 3 and made.optim.name == "adamw"


def test_python_users_build_the_same_object(file):
    loaded = config.load(file).config
    sections = {f.name: getattr(loaded, f.name) for f in dataclasses.fields(config.Config)}
    assert config.Config(**sections) == loaded
    with pytest.raises(pydantic.ValidationError, match="algorithm object"):
        config.Config(**sections | {"algorithm": "sft"})


CASES = [
    ("optim.lerning_rate=3", "optim.lerning_rate: unknown key; did you mean optim.learning_rate? (command line)"),
    ("lr=3", "lr: unknown key; did you mean optim.learning_rate? (command line)"),
    ("optim.lr=1", "optim.lr: unknown key; did you mean optim.learning_rate? (command line)"),
    ("output_dir=1", "output_dir: unknown key; did you mean run_dir? (command line)"),
    ("data.train.0.sorce=x", "data.train.0.sorce: unknown key; did you mean data.train.0.source? (command line)"),
    ("algorithm.knd=x", "algorithm.knd: unknown key; did you mean algorithm.kind? (command line)"),
    ("algorithm.zzz=1", "algorithm.zzz: unknown key; known here: name, kind, normalise, constant, "),
    ("optim.momentum=0.9", "optim.momentum: used by lion, muon, sgd, not by adamw (command line)"),
    ("optim.groups.0.match=(", "optim.groups.0.match: '(' is not a regular expression"),
    ("optim.groups=[{match: q, layers: '3'}]", "optim.groups.0.layers: '3' is not a range of layers such as '15:'"),
    ("algorithm.ema_decay=1.0", "algorithm.ema_decay: must be below 1"),
    ("model.source=", "model.source: must be text, not null (command line)"),
    ("loop.steps=abc", "loop.steps: must be an integer, not 'abc' (command line)"),
    ("loop.steps=1.0", "loop.steps: must be an integer, not 1.0 (command line)"),
    ("loop.steps=true", "loop.steps: must be an integer, not true (command line)"),
    ("loop.steps='5'", "loop.steps: must be an integer, not '5' (command line)"),
    ("loop.steps=-1", "loop.steps: must be greater than 0, not -1 (command line)"),
    ("loop.steps=0", "loop.steps: must be greater than 0, not 0 (command line)"),
    ("data.shuffle=yes", "data.shuffle: must be true or false, not 'yes' (command line)"),
    ("optim.learning_rate=.inf", "optim.learning_rate: must be a finite number, not .inf (command line)"),
    ("optim.learning_rate=.nan", "optim.learning_rate: must be a finite number, not .nan (command line)"),
    ("optim.learning_rate=1e999", "optim.learning_rate: must be a finite number, not .inf (command line)"),
    ("lora.dropout=1.5", "lora.dropout: must be at most 1.0, not 1.5 (command line)"),
    ("lora.targets=q", "lora.targets: must be a list, not 'q' (command line)"),
    ("loop=3", "loop: must be a section (key: value), not 3 (command line)"),
    ("algorithm=5", "algorithm: must be a section (key: value), not 5 (command line)"),
    ("algorithm.name=stf", "algorithm.name: no algorithm is called 'stf'; did you mean sft? (command line)"),
    ("algorithm.name=[]", "algorithm.name: no algorithm is called a list; known: "),
    ("algorithm={}", "algorithm.name: is required; known: "),
    ("algorithm.kind=nl", "algorithm.kind: must be one of 'nll' or 'dft', not 'nl'; did you mean nll?"),
    ("algorithm.normalise=constant", "x.yaml:10: algorithm.constant: "),
    ("loop.epochs=1", "x.yaml:14: loop.steps: give exactly one of loop.steps and loop.epochs"),
    ("loop.micro_batches=3", "loop.micro_batches: 3 does not divide data.batch_size 4 (command line)"),
    ("seed=99999999999", "seed: must be at most 4294967295, not 99999999999 (command line)"),
    ("loop.eval_every=2", "loop.eval_every: there is nothing to evaluate; give data.eval or eval.tasks (command line)"),
    ("eval.metric=exact_match", "eval.metric: it scores answers to the prompts of data.eval, and there is none"),
    ("data.train=[]", "data.train: no source; name one, or pass data.path=FILE (command line)"),
    ("data.path=x.foo", "data.path: "),
    ("data.train.2.source=x", "data.train.2: the list has positions 0 to 0, and 1 for one more (command line)"),
    ("data.train.x.source=x", "data.train.x: the list has positions 0 to 0, and 1 for one more (command line)"),
    ("data.train.1.limit=2", "data.train.1.source: is required (command line)"),
    ("data.train.0.columns={a: 1}", "data.train.0.columns.a: must be text, not 1 (command line)"),
    ("run_dir.x=1", "x.yaml:1: run_dir: is 'runs/x', which has no key 'x'"),
    ("run_dir=${NOT_SET_ANYWHERE}", "run_dir: the environment variable 'NOT_SET_ANYWHERE' is not set"),
    ("run_dir=${}", "run_dir: the environment variable '' is not set"),
    ("data.buckets=[1,2", "data.buckets: value:1:5: expected ',' or ']'"),
    ("steps", "'steps' is not KEY=VALUE (command line)"),
    ("=3", "'=3' is not KEY=VALUE (command line)"),
    ("a..b=2", "'a..b=2' is not KEY=VALUE (command line)"),
    ("__dataclass_self__=1", "__dataclass_self__: unknown key; known here: run_dir, seed, "),
    ("a\nb=1", r"'a\nb': unknown key"),
]


@pytest.mark.parametrize(("override", "want"), CASES)
def test_errors_say_what_where_and_what_else(file, override, want):
    assert want in message(file, override)


def test_errors_name_the_line_of_the_file(tmp_path):
    assert message(edited(tmp_path, "rank: 8", "rnk: 8")) == "x.yaml:4: lora.rnk: unknown key; did you mean lora.rank?"
    assert message(edited(tmp_path, "2e-3", "high")) == "x.yaml:12: optim.learning_rate: must be a number, not 'high'"
    assert "x.yaml:15:3: duplicate key 'steps'" in message(edited(tmp_path, "steps: 20", "steps: 20\n  steps: 3"))
    assert message(edited(tmp_path, "    - source:", "    - sauce:")) == (
        "x.yaml:7: data.train.0.sauce: unknown key; did you mean data.train.0.source? (and 1 more)"
    )
    assert message(edited(tmp_path, "run_dir: runs/x\n", "")) == "x.yaml:1: run_dir: is required"
    assert message(edited(tmp_path, TEXT, "")) == "x.yaml: the config is empty"
    assert message(edited(tmp_path, TEXT, "- 1")) == "x.yaml: a config is a mapping (key: value), this is a list"


def test_every_synonym_leads_to_a_real_key():
    places = dict(problems.walk_sections(config.Config))
    known = {name for kind in places.values() for name in problems.hints(kind)}
    assert set(problems.SYNONYMS.values()) <= known


def test_relative_paths(tmp_path, monkeypatch, file):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("JAXPOST_DATA", raising=False)
    text = TEXT.replace("smollm2-135m", "../model").replace("rows/*.jsonl", "${JAXPOST_DATA}/a.jsonl")
    path = there / "x.yaml"
    path.write_text(text + "eval:\n  tasks: [{name: t, source: 'jsonl:t.jsonl', metric: exact_match}]\n")
    loaded = config.load(path, ["data.eval.0.source=jsonl:b.jsonl", "model.tokenizer=gguf:t.gguf"]).config
    assert loaded.model.source == str(tmp_path / "model")  # written: from the file
    assert loaded.eval.tasks[0].source == f"jsonl:{there}/t.jsonl"
    assert loaded.data.eval[0].source == f"jsonl:{here}/b.jsonl"  # typed: from the working directory
    assert loaded.model.tokenizer == f"gguf:{here}/t.gguf"
    assert loaded.data.train[0].source == f"jsonl:{here}/data/a.jsonl"  # JAXPOST_DATA unset: ./data
    assert loaded.run_dir == str(here / "runs/x")  # runs are made in the working directory
    monkeypatch.setenv("JAXPOST_DATA", "/d")
    assert config.load(path).config.data.train[0].source == "jsonl:/d/a.jsonl"
    for source, want in [
        ("ckpt:runs/a/3", f"ckpt:{here}/runs/a/3"),
        ("hf:org/name", "hf:org/name"),
        ("init:tiny", "init:tiny"),
        ("smollm2-135m", "smollm2-135m"),
        ("/abs/model", "/abs/model"),
        ("~/model", os.path.expanduser("~/model")),
    ]:
        assert config.load(path, [f"model.source={source}"]).config.model.source == want
    assert config.load(path, ["data.path=my.parquet"]).config.data.sources[0].source == f"parquet:{here}/my.parquet"


def test_code_is_taken_from_the_command_line_only(tmp_path, file):
    loaded = config.load(file, ["eval.metric=score.py:f", "data.eval.0.source=jsonl:b"])
    assert loaded.config.eval.metric == f"{os.getcwd()}/score.py:f"
    (tmp_path / "config.yaml").write_text(loaded.dump())
    with pytest.raises(ConfigError, match="code is only taken from the command line; type eval.metric="):
        config.load(tmp_path / "config.yaml")
    assert config.load_saved(tmp_path).eval.metric is None
    with pytest.raises(ConfigError, match="not a run directory"):
        config.load_saved(tmp_path / "none")


def test_a_changed_config_is_refused_field_by_field(tmp_path, file):
    saved = tmp_path / "config.yaml"
    saved.write_text(config.load(file).dump())
    harmless = ["mesh.fsdp=2", "data.workers=2", "loop.log_every=5", "checkpoint.keep=3", "eval.batch_size=2"]
    config.check_resume(saved, config.load(file, harmless).config)
    typed = ["seed=3", "lora.targets=[q]", "data.train.1.source=jsonl:b", "model.source=hf:a/b"]
    changed = config.load(file, typed).config
    with pytest.raises(CheckpointError) as caught:
        config.check_resume(saved, changed)
    text = str(caught.value)
    assert "seed: 0 -> 3; model.source: smollm2-135m -> " in text and "\n" not in text
    assert "lora.targets: [q, k, v, o, gate, up, down] -> [q]" in text
    assert text.endswith("--allow_changed=seed,model.source,lora.targets")  # data are compared by content
    config.check_resume(saved, changed, ["seed", "model", "lora.targets", "data.train"])
    with pytest.raises(CheckpointError, match="lora.targets"):
        config.check_resume(saved, changed, ["seed", "model", "data.train"])
    with pytest.raises(ConfigError, match="--allow_changed=lora.rnk: no such config key; did you mean lora.rank?"):
        config.check_resume(saved, changed, ["lora.rnk"])
    with pytest.raises(CheckpointError, match="lora: "):
        config.check_resume(saved, config.load(file, ["lora=null"]).config)


def test_a_field_newer_than_the_run_counts_as_its_default(tmp_path, file):
    old = config.to_tree(config.load(file).config)
    del old["optim"]["min_lr_ratio"], old["data"]["train"][0]["weight"], old["mesh"], old["loop"]["micro_batches"]
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml_loader.dump(old))
    config.check_resume(saved, config.load(file).config)
    changed = config.load(file, ["optim.min_lr_ratio=0.5"]).config
    with pytest.raises(CheckpointError, match="optim.min_lr_ratio: 0.0 -> 0.5"):
        config.check_resume(saved, changed)


def test_lora_plus_needs_adapters(file):
    assert config.load(file, ["optim.lora_plus_ratio=16"]).config.optim.lora_plus_ratio == 16
    text = message(file, "optim.lora_plus_ratio=16", "lora=null")
    assert text.startswith("optim.lora_plus_ratio: it is for adapters")


def test_diff_by_hand():
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 1, "e": None}, {"a": {"b": 1.0, "c": [1, 3]}, "d": True, "f": None}
    assert config.diff(old, new) == [("a.c.1", 2, 3), ("d", 1, True)]
    assert config.diff([1], [1, 2]) == [("", [1], [1, 2])]


def test_secrets_do_not_reach_dumps_or_errors(tmp_path, monkeypatch, file):
    monkeypatch.setenv("MY_API_KEY", "verysecretvalue")
    columns = "data.train.0.columns={x: '${MY_API_KEY}', my_token: abc}"
    loaded = config.load(file, [columns, "model.source=hf:${MY_API_KEY}"])
    assert loaded.config.data.train[0].columns["x"] == "verysecretvalue"
    dump = loaded.dump()
    assert "verysecretvalue" not in dump and "abc" not in dump and 'my_token: "***"' in dump
    assert redact_text("at https://me:pw12@host/x with hf_abcdefghijklmnop1234") == "at https://***@host/x with ***"
    assert redact({"max_new_tokens": "a", "tokenizer": "b", "hf_token": "c", "n": 1}) == {
        "max_new_tokens": "a", "tokenizer": "b", "hf_token": "***", "n": 1,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(dump)
    config.check_resume(tmp_path / "config.yaml", loaded.config)  # compares what may be seen


def test_schema_is_fresh_and_knows_every_key():
    schema = config.schema()
    assert schema == json.loads((ROOT / "configs/schema.json").read_text()), (
        "python -m jaxpost.config --schema > configs/schema.json"
    )
    assert schema["$defs"]["LoopConfig"]["properties"]["steps"]["description"] == "optimizer steps; or give epochs"
    for path, kind in problems.walk_sections(config.Config):
        part = schema["$defs"][kind.__name__] if path else schema
        assert set(part["properties"]) == set(problems.hints(kind)), path
        assert part["additionalProperties"] is False


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path):
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    loaded = config.load(path)
    assert yaml_loader.parse(loaded.dump()).tree == compose.escape(config.to_tree(loaded.config))


TYPED = ["run_dir=r", "model.source=smollm2-135m", "data.train.0.source=jsonl:a", "algorithm.name=sft", "loop.steps=1"]


def all_keys():
    tree = config.to_tree(config.load(None, [*TYPED, "lora.rank=1"]).config)
    return sorted({yaml_loader.dotted(at) for at in compose.paths(tree) if at})


KEYS = all_keys()
VALUES = st.text(max_size=12) | st.sampled_from(
    ["1", "0", "-1", "1e-4", ".nan", ".inf", "true", "no", "null", "", "[]", "{}", "[1, 2]", "{a: b}", "[[1]]", "x"]
    + ["[{name: x}]", "jsonl:x", "a.py:f", "é\u2028", "'", '"', "[&a 1, *a]", "${HOME}", "${", "$${", "9" * 30, "sft"]
    + ["x" * 300]
)
NAMES = st.sampled_from(KEYS) | st.text(max_size=8) | st.sampled_from(KEYS).map(lambda k: k[:-1] + "x")
OVERRIDES = st.lists(st.tuples(NAMES, VALUES).map("=".join), max_size=3)


def check_overrides(file, overrides):
    """A config that survives dump and load, or one line."""
    try:
        loaded = config.load(file, overrides)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 2_000
        return
    dump = loaded.dump()
    assert yaml_loader.parse(dump).tree == compose.escape(redact(config.to_tree(loaded.config)))


def check_mutated(tmp_path_factory, at, cut, text):
    file = tmp_path_factory.getbasetemp() / "mutated.yaml"
    at %= len(TEXT)
    file.write_text(TEXT[:at] + text + TEXT[at + cut :], encoding="utf-8", errors="surrogatepass")
    check_overrides(file, [])


MUTATIONS = {
    "at": st.integers(0, 10_000),
    "cut": st.integers(0, 12),
    "text": VALUES | st.sampled_from(["\n", ": ", "- ", "  "]),
}


@FEW
@given(overrides=OVERRIDES)
def test_any_override_is_a_config_or_one_line(file, overrides):
    check_overrides(file, overrides)


@FEW
@given(**MUTATIONS)
def test_any_edit_of_a_file_is_a_config_or_one_line(tmp_path_factory, at, cut, text):
    check_mutated(tmp_path_factory, at, cut, text)


@pytest.mark.slow
@MANY
@given(overrides=OVERRIDES)
def test_any_override_is_a_config_or_one_line_long(file, overrides):
    check_overrides(file, overrides)


@pytest.mark.slow
@MANY
@given(**MUTATIONS)
def test_any_edit_of_a_file_is_a_config_or_one_line_long(tmp_path_factory, at, cut, text):
    check_mutated(tmp_path_factory, at, cut, text)
