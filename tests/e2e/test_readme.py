"""Every command of README.md runs, and every config in configs/ builds and trains, under a tiny overlay."""

import importlib
import json
import pathlib
import re
import shlex

import pytest

from jaxpost import cli, config, train
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMANDS = re.findall(r"^python -m (jaxpost\.\S+) ([^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
MODULES = {"jaxpost.data": "jaxpost.data.__main__"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished tiny LoRA run at run/, and rows to train on and to answer."""
    folder = tmp_path_factory.mktemp("readme")
    loaded = config.load(tiny.write_config(folder, lora={"rank": 2}, loop={"steps": 1}, mesh={"data": 8}))
    train.run(loaded.config, dump=loaded.dump())
    tiny.write_rows(folder / "my.jsonl", 40)
    tiny.write_rows(folder / "in.jsonl", 3)
    tiny.write_rows(folder / "pairs.jsonl", 40, make=tiny.pairs)
    return folder


def overlay(folder: pathlib.Path, file: str = "my.jsonl") -> list[str]:
    """What makes a shipped config tiny, without touching what it is about."""
    rows = f"jsonl:{folder / file}"
    return [
        f"model.source={tiny.MODEL}", f"model.tokenizer={folder / 'tokenizer'}", f"data.train=[{{source: '{rows}'}}]",
        f"data.eval=[{{source: '{rows}', limit: 4}}]", "eval.tasks=[]", "eval.max_new_tokens=4", "eval.samples=1",
        "data.batch_size=8", "data.seq_len=64", "loop.steps=2", "loop.eval_every=0", "optim.warmup_steps=0",
        "metrics.tensorboard=false", "metrics.console=none",
    ]  # fmt: skip


def run(module: str, argv: list[str]) -> int:
    module = importlib.import_module(MODULES.get(module, module))
    return cli.execute(module.main, ["command", *argv], doc=module.__doc__, flags=module.FLAGS)


def test_readme_names_commands():
    assert {name for name, _ in COMMANDS} == {"jaxpost.train", "jaxpost.data", "jaxpost.generate", "jaxpost.export"}


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=[f"{m} {w}".strip() for m, w in COMMANDS])
def test_command(module, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda _: "")
    monkeypatch.chdir(ROOT)
    argv = []
    for word in shlex.split(words):
        word = word.replace("runs/quickstart", str(folder / "run")).replace("runs/mine", str(tmp_path / "mine"))
        word = word.replace("my.jsonl", str(folder / "my.jsonl")).replace("in.jsonl", str(folder / "in.jsonl"))
        argv.append(word.replace("out.jsonl", str(tmp_path / "out.jsonl")))
    if module == "jaxpost.export":
        argv += ["--out", str(tmp_path / "export")]
    if module == "jaxpost.generate":
        argv += ["--max_new_tokens=4"]
    if module in ("jaxpost.train", "jaxpost.data"):
        small = overlay(folder)
        if any(word.startswith("data.path=") for word in argv):  # the README's own rows are the point there
            small = [word for word in small if not word.startswith("data.train")]
        argv = argv[:1] + small + argv[1:]
    assert run(module, argv) == 0, capsys.readouterr().err
    if module == "jaxpost.export":
        assert any((tmp_path / "export").glob("*.safetensors"))
    if "--output" in words:
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert len(rows) == 3 and all(isinstance(row["generated"], str) for row in rows)


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_config_trains(file, folder, tmp_path):
    kind = config.load(ROOT / "configs" / file, overlay(folder)).config.algorithm.rows
    rows = {"examples": "my.jsonl", "pairs": "pairs.jsonl"}[kind]
    loaded = config.load(ROOT / "configs" / file, [*overlay(folder, rows), f"run_dir={tmp_path / 'run'}"])
    state = train.run(loaded.config)
    assert int(state.step) == 2 and len(tiny.metric(tmp_path / "run", "eval/loss")) >= 1
    header = (ROOT / "configs" / file).read_text().split("\n\n")[0]
    assert "Hardware:" in header and "Data:" in header
