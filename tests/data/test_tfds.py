"""tfds: sources: a builder of our own, prepared as ArrayRecord, read by name, folder and slice without TensorFlow."""

import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from jaxpost import cli, train
from jaxpost.data.files import _plain
from jaxpost.data.sources import SourceConfig, open_source
from jaxpost.errors import DataError
from tests import tiny

tfds = pytest.importorskip("tensorflow_datasets")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The TFDS folder that holds jaxpost_toy_chats/1.0.0."""
    from tfds_toys import JaxpostToyChats

    folder = tmp_path_factory.mktemp("tfds")
    JaxpostToyChats(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def records(prepared, **options):
    return open_source(SourceConfig(source=f"tfds:{prepared / 'jaxpost_toy_chats' / '1.0.0'}", **options))


def every(source):
    return [source[i] for i in range(len(source))]


def test_rows_are_plain_values(prepared):
    """Sequences of dicts are lists of dicts again, with dicts inside; bytes are text; order is the same every time."""
    rows = {row["name"]: row for row in every(records(prepared))}
    assert len(rows) == 100
    assert rows["n5"] == {
        **tiny.rows(100, 1)[5],
        "name": "n5",
        "more": [{"role": "user", "content": "é5", "meta": {"likes": 5 + j}} for j in range(2)],
        "tags": ["ü"],
        "score": 0.5,
    }
    assert rows["n6"]["more"] == [] == rows["n6"]["tags"]
    assert type(rows["n5"]["more"][0]["meta"]["likes"]) is int and type(rows["n5"]["score"]) is float
    source = records(prepared)
    assert every(pickle.loads(pickle.dumps(source))) == every(source)


def test_splits_and_slices(prepared):
    whole = every(records(prepared))
    assert every(records(prepared, split="train[10%:20%]")) == whole[10:20]
    assert every(records(prepared, split="train[:5]")) == whole[:5]
    assert (
        every(records(prepared, split="train[-3:]+heldout[:2]"))
        == whole[-3:] + every(records(prepared, split="heldout"))[:2]
    )
    part = records(prepared, split="train[10%:20%]", skip=1, limit=2)
    assert every(part) == whole[11:13] and part.where(0).endswith("1.0.0/train[10%:20%]:2")
    prints = [records(prepared, split=s).fingerprint for s in ("train", "train[:5]", "train[5:10]", "heldout")]
    assert len({str(p) for p in prints}) == 4
    assert records(prepared, split="train[:5]").fingerprint == prints[1]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (None, "test", "Unknown split 'test'. Should be one of"),
        (None, "test[:5]", "Unknown split"),
        (None, "train[", "Error parsing split"),
        (None, "train[200:300]", "incompatible with 100 examples"),
        (None, "train[5:2]", "ends before it begins"),
        (None, "train[:0]", "cannot be opened"),
        ("jaxpost_no_such_set", "train", "jaxpost_no_such_set not found"),
        ("/no/such/folder", "train", "cannot be opened"),
        ("{prepared}", "train", "Could not read dataset info"),
    ],
)
def test_what_is_wrong_is_one_line(prepared, name, split, message):
    name = (name or "{prepared}/jaxpost_toy_chats/1.0.0").format(prepared=prepared)
    with pytest.raises(DataError) as caught:
        open_source(SourceConfig(source=f"tfds:{name}", split=split))
    text = str(caught.value)
    assert text.startswith(f"tfds:{name}: split {split} ") and message in text and "\n" not in text


def test_nested_sequences_that_tensorflow_wrote():
    """Preparing a sequence in a sequence needs TensorFlow; this is what TFDS reads back from such a file."""
    text = tfds.features.Text()
    call = {"name": text, "words": tfds.features.Sequence(text)}
    feature = tfds.features.Sequence({"role": text, "calls": tfds.features.Sequence(call)})
    value = {
        "role": [b"user", b"assistant"],
        "calls": {"name": [[], [b"f", b"g"]], "words": [[], [np.array([b"x"], object), np.array([], object)]]},
    }
    assert _plain(value, feature) == [
        {"role": "user", "calls": []},
        {"role": "assistant", "calls": [{"name": "f", "words": ["x"]}, {"name": "g", "words": []}]},
    ]
    with pytest.raises(ValueError, match=r"columns of \[1, 2\]"):
        _plain({"role": [b"user"], "calls": {"name": [[], []], "words": [[], []]}}, feature)


def test_two_training_steps_by_name_through_the_command(prepared, tmp_path):
    """A process that has neither the builder's code nor TensorFlow trains on it, by its name and TFDS_DATA_DIR."""
    data = {
        "train": [{"source": "tfds:jaxpost_toy_chats", "split": "train[:50%]"}],
        "eval": [{"source": f"tfds:{prepared}/jaxpost_toy_chats/1.0.0", "split": "heldout"}],
    }
    file = tiny.write_config(tmp_path, data=data, loop={"steps": 2, "save_every": 2}, mesh={"data": 1})
    code = (
        "import sys; from jaxpost import cli, train\n"
        "code = cli.execute(train.main, sys.argv, doc=train.__doc__, flags=train.FLAGS)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, f"--config={file}"]
    env = {**os.environ, "TFDS_DATA_DIR": str(prepared)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(tiny.metric(tmp_path / "run", "loss")) == 2 and len(tiny.metric(tmp_path / "run", "eval/loss")) == 1


def test_a_wrong_split_ends_the_command_in_one_line(prepared, tmp_path, capsys):
    data = {"train": [{"source": f"tfds:{prepared}/jaxpost_toy_chats/1.0.0", "split": "train[:50"}], "eval": []}
    argv = ["train", f"--config={tiny.write_config(tmp_path, data=data)}"]
    assert cli.execute(train.main, argv, doc=train.__doc__, flags=train.FLAGS) == 3
    assert "split train[:50 cannot be opened" in capsys.readouterr().err.splitlines()[-1]
