"""python -m jaxpost.data: what a run would see, what would stop it, and nothing that could steer a terminal."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxpost import cli
from jaxpost.data import command
from jaxpost.data.__main__ import FLAGS, main
from jaxpost.data.chat import load_tokenizer
from tests import tiny


def run(*argv: object) -> int:
    return cli.execute(main, ["data", *map(str, argv)], doc="doc", flags=FLAGS)


def test_survey_and_rows(tmp_path, capsys):
    assert run(tiny.write_config(tmp_path), "--rows=1") == 0
    out = capsys.readouterr().out
    assert "data.train: 120 of 120 records read, 120 to train on" in out
    assert "data.eval: 12 of 12 records read, 12 to train on" in out
    assert "packing 'best_fit' into rows of 64" in out and "% full" in out
    assert "row 1, trained tokens in [[ ]]:" in out and "row 2" not in out
    assert "<|im_start|>assistant\n[[" in out and "<|im_end|>]]" in out
    assert "train.jsonl:" in out.split("-- segment 1: ")[1].splitlines()[0]


def test_rows_are_those_of_a_run(tmp_path, capsys):
    from jaxpost.data.pipeline import PackedSource
    from jaxpost.data.tasks import make_task

    file = tmp_path / "c"
    config = tiny.load(file, ["seed=5", "data.batch_size=2"])
    path = str(file / "tokenizer")
    source = PackedSource(config.data, lambda s: make_task(s.task, path, config.data.loss_on), seed=config.seed)
    batch = next(source)
    ids = source.info["example_ids"]
    source.close()
    assert run(file / "config.yaml", "seed=5", "data.batch_size=2", "--rows=2") == 0
    out = capsys.readouterr().out
    shown = [line.split(": ")[1].split(",")[0] for line in out.splitlines() if line.startswith("-- segment")]
    assert [os.path.basename(name) for name in shown] == [os.path.basename(name) for name in ids]
    first = batch.segments[0] == 1
    text = load_tokenizer(path).decode(np.concatenate([batch.tokens[0][first][:1], batch.targets[0][first]]))
    assert text in out.replace("[[", "").replace("]]", "")


def test_problems_are_listed_and_counted(tmp_path, capsys):
    file = tiny.write_config(tmp_path)
    rows = tmp_path / "train.jsonl"
    long = '{"messages": [{"role": "user", "content": "' + "a" * 99 + '"}, {"role": "assistant", "content": "B"}]}\n'
    bad = '{"messages": [{"role": "user", "content": 5}]}\n'
    rows.write_text(rows.read_text() + long + bad)
    assert run(file, "--rows=0") == 3
    out, err = capsys.readouterr()
    assert "1 longer than data.seq_len: dropped, first" in out and "train.jsonl:121" in out
    assert "training would stop (1):" in out
    assert "train.jsonl:122: field 'messages[0].content': expected str or list, got int" in err
    assert run(file, "--rows=0", "data.on_bad_row=skip") == 0
    assert "bad rows (1):" in capsys.readouterr().out
    assert run(file, "--rows=0", "data.on_bad_row=skip", "data.max_bad_fraction=0.0") == 3
    assert "1 bad rows of 122, more than data.max_bad_fraction 0.0" in capsys.readouterr().err
    assert run(file, "--rows=0", "--scan=10") == 0
    assert "data.train: 10 of 122 records read" in capsys.readouterr().out


@pytest.mark.parametrize("packing", ["none", "bucketed"])
def test_other_packings(tmp_path, capsys, packing):
    buckets = ["data.buckets=[32, 64]"] if packing == "bucketed" else []
    assert run(tiny.write_config(tmp_path), f"data.packing={packing}", *buckets, "--rows=1") == 0
    assert f"packing '{packing}'" in capsys.readouterr().out


def test_wrong_usage(tmp_path, capsys):
    file = tiny.write_config(tmp_path)
    assert run() == 2
    assert run(file, "--rows=-1") == 2
    assert run(file, "data.train.0.task=nothing") == 2
    assert "data.train.0.task" in capsys.readouterr().err
    assert run(file, "model.tokenizer=null") == 2
    assert "model.tokenizer" in capsys.readouterr().err


def test_colour_and_escapes(tmp_path):
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path))
    ids = np.asarray(tokenizer.encode("a\x1b[31mb\nc"))
    trained = np.arange(len(ids)) >= len(ids) - 3
    assert command.marked(ids, trained, tokenizer, color=False) == "a\\x1b[31m[[b\nc]]"
    on, off = command.TRAINED, command.PLAIN
    assert command.marked(ids, trained, tokenizer, color=True) == f"a\\x1b[31m{on}b{off}\n{on}c{off}"


def test_histogram():
    assert command.histogram([5, 5, 25], 16) == [
        *[
            f"  {i:>2}-{i + 2:<2} {n:>7} {'#' * b}"
            for i, n, b in [(0, 0, 0), (3, 2, 40), (6, 0, 0), (9, 0, 0), (12, 0, 0), (15, 0, 0)]
        ],
        *[f"  {i}-{i + 2} {n:>7} {'#' * b}  > data.seq_len" for i, n, b in [(18, 0, 0), (21, 0, 0), (24, 1, 20)]],
    ]


def test_as_a_process(tmp_path):
    file = tiny.write_config(tmp_path)
    command_line = [sys.executable, "-m", "jaxpost.data", str(file)]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "row 2, trained tokens in [[ ]]:" in done.stdout and "\x1b" not in done.stdout
