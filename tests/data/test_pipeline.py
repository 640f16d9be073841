"""Batches of the global stream: each example once an epoch, any position restored exactly, any number of hosts."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import time

import data_toys as toys
import numpy as np
import pydantic
import pytest

from jaxpost.data.pipeline import DataConfig, EvalRows, PackedSource
from jaxpost.data.sources import SourceConfig
from jaxpost.errors import CheckpointError, ConfigError, DataError

COLUMNS = ("tokens", "targets", "mask", "positions", "segments")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    toys.write_jsonl(folder / "a.jsonl", toys.words(230, seed=1))
    toys.write_jsonl(folder / "b.jsonl", toys.words(60, seed=2, tag="b"))
    return folder


def config_of(files, *names, weights=None, **options):
    names = names or ("a",)
    weights = weights or [None] * len(names)
    train = [SourceConfig(source=f"jsonl:{files}/{n}.jsonl", weight=w) for n, w in zip(names, weights)]
    return DataConfig(**(dict(train=tuple(train), batch_size=4, seq_len=64, window=50) | options))


def open_(config, seed=0, **options):
    return PackedSource(config, toys.byte_task, seed=seed, **options)


def take(source, count):
    """(columns, info, state) of the next batches."""
    found = []
    for _ in range(count):
        batch = next(source)
        found.append(([getattr(batch, name) for name in COLUMNS], source.info, source.state()))
    return found


def same(first, second):
    assert len(first) == len(second)
    for (columns, info, state), (other_columns, other_info, other_state) in zip(first, second):
        assert all(np.array_equal(a, b) for a, b in zip(columns, other_columns))
        assert info == other_info
        assert state == other_state


MODES = {
    "best_fit": {},
    "none": {"packing": "none"},
    "bucketed": {"packing": "bucketed", "buckets": (16, 32, 64)},
    "mixture": {"names": ("a", "b"), "weights": [1.0, 2.0]},
    "in_order": {"shuffle": False},
}


def mode_config(files, mode, **options):
    options = MODES[mode] | options
    names = options.pop("names", ("a",))
    return config_of(files, *names, **options)


@pytest.mark.parametrize("mode", MODES)
def test_every_example_once_an_epoch(files, mode):
    source = open_(mode_config(files, mode))
    counts, epochs = collections.Counter(), 3
    found = take(source, source.count_batches(epochs))
    source.close()
    for columns, info, _ in found[:-1]:
        assert info["epoch"] < epochs
        counts.update(info["example_ids"])
        tokens, _, mask, _, segments = columns
        assert tokens.shape[0] == 4 and segments.max() <= 8 and mask[segments > 0].all()
        assert info["num_tokens"] == (segments > 0).sum()
        assert info["padding_fraction"] == pytest.approx(1 - info["num_tokens"] / segments.size, abs=1e-12)
    assert found[-1][1]["epoch"] >= epochs
    last = found[-1][1]["example_ids"]
    if mode == "mixture":
        counts.update(last)
        a = sum(count for id, count in counts.items() if "a.jsonl" in id)
        assert abs(a / sum(counts.values()) - 1 / 3) < 0.01
        b = [count for id, count in counts.items() if "b.jsonl" in id]
        assert len(b) == 60 and max(b) - min(b) <= 1  # pass after pass over the smaller source
    else:
        assert set(counts) | set(last) == {f"{files}/a.jsonl:{i}" for i in range(1, 231)}
        counts.update(last)
        # The batch that ends an epoch is completed with rows of the next one.
        assert set(counts.values()) <= {3, 4}


def test_packing_is_tight_and_unshuffled_order_is_file_order(files, tmp_path):
    path = toys.write_jsonl(tmp_path / "short.jsonl", toys.words(600, longest=24))
    packed = open_(DataConfig(path=str(path), batch_size=4, seq_len=64, max_segments=64))
    epoch = take(packed, packed.count_batches())
    assert np.mean([info["padding_fraction"] for _, info, _ in epoch]) < 0.02
    plain = open_(config_of(files, packing="none", shuffle=False))
    ids = [id for _, info, _ in take(plain, 60) for id in info["example_ids"]]
    assert ids[:230] == [f"{files}/a.jsonl:{i}" for i in range(1, 231)]
    packed.close()
    plain.close()


def test_bucketed_batches_have_few_widths(files):
    source = open_(mode_config(files, "bucketed"))
    found = take(source, 60)
    source.close()
    assert {columns[0].shape for columns, _, _ in found} == {(4, 16), (4, 32), (4, 64)}
    packed = np.mean([info["padding_fraction"] for _, info, _ in found])
    assert packed < 0.35


@pytest.mark.parametrize("mode", MODES)
def test_restored_anywhere_equals_the_uninterrupted_stream(files, mode):
    config = mode_config(files, mode)
    whole = open_(config, seed=5)
    start = whole.state()
    found = take(whole, 40)
    again = open_(config, seed=5)
    states = [start] + [state for _, _, state in found]
    for place in (0, 1, 7, 16, 17, 18, 31, 39):
        again.restore(json.loads(json.dumps(states[place])))
        assert again.state() == states[place]
        same(take(again, min(5, 40 - place)), found[place : place + 5])
    whole.close()
    again.close()


def test_state_ignores_what_is_read_ahead(files):
    source = open_(config_of(files))
    before = source.state()
    next(source)
    time.sleep(0.3)  # the thread is ahead by now
    state, ids = source.state(), source.info["example_ids"]
    assert before["batch"] == 0 and state["batch"] == 1
    source.restore(before)
    next(source)
    assert (source.state(), source.info["example_ids"]) == (state, ids)
    source.close()


@pytest.mark.parametrize("mode", ["best_fit", "bucketed"])
def test_hosts_slice_one_global_batch(files, mode):
    config = mode_config(files, mode, batch_size=8)
    alone = open_(config)
    expected = take(alone, 14)
    alone.close()
    for hosts in (2, 4):
        parts = [open_(config, shard_index=i, num_shards=hosts) for i in range(hosts)]
        for columns, info, state in expected:
            slices = [take(part, 1)[0] for part in parts]
            for i, whole in enumerate(columns):
                assert np.array_equal(np.concatenate([part[0][i] for part in slices]), whole)
            # Everything but the rows is the same on all hosts, also the position: their number may change.
            assert all(part[1] == info and part[2] == state for part in slices)
        for part in parts:
            part.close()
    with pytest.raises(ConfigError, match="do not divide among 3 hosts"):
        open_(config, shard_index=0, num_shards=3)


def test_workers_change_nothing(files):
    """Two real processes give the stream of none, also from a restored position, and end when told to."""
    options = {"weights": [1.0, 2.0], "window": 130}
    alone = open_(config_of(files, "a", "b", **options))
    expected = take(alone, 40)
    pids = PackedSource(config_of(files, workers=2, window=400), toys.pid_task, seed=0)
    places = {id for _, info, _ in take(pids, 1) for id in info["example_ids"]}
    started = time.monotonic()
    pids.close()
    assert time.monotonic() - started < 20  # Grain alone may wait 25 s for a worker with a full queue
    assert {place.split()[1] for place in places} == {"cpu"} and str(os.getpid()) not in str(places)
    two = open_(config_of(files, "a", "b", workers=2, **options))
    two.restore(expected[8][2])  # saved without workers, restored with two
    same(take(two, 31), expected[9:])
    two.close()
    alone.close()


LEAVES_OPEN = """
import sys
sys.path.insert(0, {folder!r})
import data_toys as toys
from jaxpost.data.pipeline import DataConfig, PackedSource

if __name__ == "__main__":
    source = PackedSource(DataConfig(path={path!r}, seq_len=64), toys.byte_task, seed=0)
    next(source)
    print("one batch")
"""


def test_a_source_left_open_does_not_hold_up_the_exit(files, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(LEAVES_OPEN.format(folder=os.path.dirname(__file__), path=f"{files}/a.jsonl"))
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one batch\n", "")


def test_windows_never_cross_an_epoch_and_any_size_works(files):
    for window in (1, 63, 64, 65, 229, 230, 231):
        source = open_(config_of(files, window=window))
        found = take(source, source.count_batches(2))
        source.close()
        counts = collections.Counter(id for _, info, _ in found for id in info["example_ids"])
        assert len(counts) == 230 and set(counts.values()) <= {2, 3}


def test_count_batches_is_exact_for_fractions(files):
    for mode in ("best_fit", "mixture", "bucketed"):
        source = open_(mode_config(files, mode))
        assert source.batches_per_epoch is None
        for epochs in (0.3, 1.0, 1.7, 2.0):
            source.restore(source.state() | {"batch": 0, "epoch": 0, "window": 0, "row": 0})
            count = source.count_batches(epochs)
            found = take(source, count)
            assert found[-1][1]["epoch"] >= epochs
            assert count == 1 or found[-2][1]["epoch"] < epochs
        assert source.batches_per_epoch == source.count_batches(1)
        source.close()


def test_small_data_are_tokenised_once(files):
    toys.CountingTask.made.clear()
    source = PackedSource(config_of(files), lambda source: toys.CountingTask(), seed=0)
    take(source, source.count_batches(3))
    source.close()
    assert len(toys.CountingTask.made) == len(set(toys.CountingTask.made)) == 230


def test_more_than_is_kept_is_tokenised_again(files, monkeypatch):
    expected = take(open_(config_of(files)), 40)
    monkeypatch.setattr("jaxpost.data.stream._KEPT", 5000)
    toys.CountingTask.made.clear()
    source = PackedSource(config_of(files), lambda source: toys.CountingTask(), seed=0)
    same(take(source, 40), expected)
    source.close()
    assert len(toys.CountingTask.made) > 300


def test_truncation_policies_are_counted(tmp_path):
    rows = [{"text": letter * count} for letter, count in [("x", 20), ("y", 100), ("z", 100), ("w", 1), ("v", 65)]]
    rows[2]["prompt"] = 90
    path = toys.write_jsonl(tmp_path / "a.jsonl", rows)
    expected = {
        "drop": ({1, 5}, {"dropped/too_long": 2, "dropped/too_short": 1}),
        "right": ({1, 2, 5}, {"truncated": 1, "dropped/no_target": 1, "dropped/too_short": 1}),
        "left": ({1, 2, 3, 5}, {"truncated": 2, "dropped/too_short": 1}),
    }
    for policy, (lines, counts) in expected.items():
        source = open_(DataConfig(path=str(path), batch_size=len(lines), seq_len=64, packing="none", truncation=policy))
        _, info, _ = take(source, 1)[0]
        assert set(info["example_ids"]) == {f"{path}:{i}" for i in lines}
        assert {k: v for k, v in info.items() if k.startswith(("dropped/", "trunc")) and v} == counts
        assert info["rows_read"] == 5
        source.close()
    source = open_(DataConfig(path=str(path), seq_len=64, truncation="error"))
    with pytest.raises(DataError, match=r"a.jsonl:[23]: 99 positions"):
        next(source)
    with pytest.raises(DataError):  # and again: an error is not the end of the data
        next(source)
    source.close()


def test_bad_rows_stop_or_are_skipped_up_to_the_cap(files, tmp_path, caplog):
    lines = [json.dumps(row) for row in toys.words(100)]
    for i, bad in [(7, '{"text": 3}'), (40, "{"), (70, '{"text": "a", "r": NaN}')]:
        lines[i] = bad
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    options = dict(path=str(path), batch_size=2, seq_len=64, shuffle=False, window=50)
    stops = open_(DataConfig(**options))
    with pytest.raises(DataError, match=r"a.jsonl:8: field 'text': expected str, got int"):
        next(stops)
    skips = open_(DataConfig(**options, on_bad_row="skip"))
    found = take(skips, skips.count_batches(2))
    assert found[-1][1]["dropped/bad_row"] == 6 and found[-1][1]["rows_read"] == 200
    reported = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in reported] == [f"skipped {path}:{i}" for i in (8, 41, 71)]
    capped = open_(DataConfig(**options, on_bad_row="skip", max_bad_fraction=0.02))
    with pytest.raises(DataError, match=r"2 of 50 rows are bad, more than data.max_bad_fraction 0.02"):
        next(capped)
    for source in (stops, skips, capped):
        source.close()


def test_counters_survive_a_restore(files, tmp_path):
    rows = toys.words(80) + [{"text": "q"}] * 3
    path = toys.write_jsonl(tmp_path / "a.jsonl", rows)
    config = DataConfig(path=str(path), batch_size=2, seq_len=64, window=20)
    whole = open_(config)
    found = take(whole, 60)
    again = open_(config)
    again.restore(found[33][2])
    same(take(again, 26), found[34:])
    assert found[-1][1]["dropped/too_short"] >= 9
    whole.close()
    again.close()


def test_nothing_left_is_an_error(tmp_path):
    path = toys.write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 30)
    for packing in ("best_fit", "none"):
        source = open_(DataConfig(path=str(path), seq_len=64, window=8, packing=packing))
        with pytest.raises(DataError, match="no example is left to train on: rows_read 30, dropped/too_long 30"):
            next(source)
        with pytest.raises(DataError, match="no example is left to train on"):
            source.count_batches()
        with pytest.raises(DataError, match="no held-out example is left"):
            list(EvalRows(source.config, toys.byte_task, sources=source.config.sources))
        source.close()


def test_fewer_examples_than_a_batch(tmp_path):
    path = toys.write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "abcd"}])
    source = open_(DataConfig(path=str(path), batch_size=8, seq_len=16))
    _, info, state = take(source, 1)[0]
    assert info["epoch"] == 8.0 and len(info["example_ids"]) == 16 and state["epoch"] == 8
    source.close()


def test_changed_data_are_refused_field_by_field(files, tmp_path):
    config = config_of(files)
    source = open_(config, identity={"model.tokenizer": "aa"})
    next(source)
    state = json.loads(json.dumps(source.state()))
    source.close()

    def restore(config, seed=0, tokenizer="aa", allow=()):
        other = open_(config, seed=seed, identity={"model.tokenizer": tokenizer})
        other.restore(state, allow)
        return other

    with pytest.raises(CheckpointError, match="data.seq_len: saved 64, now 32"):
        restore(config_of(files, seq_len=32))
    with pytest.raises(CheckpointError, match="model.tokenizer: saved aa, now bb; seed: saved 0, now 1"):
        restore(config, seed=1, tokenizer="bb")
    changed = toys.write_jsonl(tmp_path / "a.jsonl", toys.words(231, seed=1))
    with pytest.raises(CheckpointError, match=r"train\[0\].content: .*data.train\[0\].records: saved 230, now 231"):
        restore(config_of(tmp_path))
    assert changed.exists()
    # Allowed by name, or by the name of the section; another place, worker count or bad-row policy needs no permission.
    next(restore(config_of(files, seq_len=32), allow=("data.seq_len", "data.max_segments")))
    next(restore(config_of(tmp_path), allow=("data.train",)))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "a.jsonl").write_bytes((files / "a.jsonl").read_bytes())
    restore(config_of(tmp_path / "moved", on_bad_row="skip", workers=3))


@pytest.mark.parametrize("mode", ["best_fit", "none", "bucketed"])
def test_eval_rows_are_finite_whole_and_repeatable(files, mode):
    config = mode_config(files, mode, batch_size=8)
    rows = EvalRows(config, toys.byte_task, sources=config.sources)
    ids, batches = [], []
    for batch in rows:
        batches.append(batch)
        ids += rows.info["example_ids"]
    assert sorted(ids) == sorted(f"{files}/a.jsonl:{i}" for i in range(1, 231))
    assert all(batch.tokens.shape[0] == 8 for batch in batches)
    padding = batches[-1].segments.max(axis=1) == 0
    assert padding.any() and not batches[-1].mask[padding].any()
    assert rows.counters["rows_read"] == 230
    again = list(rows)
    assert len(again) == len(batches)
    assert all(np.array_equal(getattr(a, n), getattr(b, n)) for a, b in zip(again, batches) for n in COLUMNS)
    options = {"sources": config.sources, "num_shards": 2}
    halves = [list(EvalRows(config, toys.byte_task, shard_index=i, **options)) for i in (0, 1)]
    for whole, left, right in zip(batches, *halves):
        assert np.array_equal(whole.tokens, np.concatenate([left.tokens, right.tokens]))


def test_path_is_shorthand(files):
    assert DataConfig(path="a.jsonl").sources == (SourceConfig(source="jsonl:a.jsonl"),)
    listed = SourceConfig(source="jsonl:x", task="text", limit=5)
    (source,) = DataConfig(path="tfds:b", train=(listed,)).sources
    assert (source.source, source.task, source.limit) == ("tfds:b", "text", 5)
    refused = [({}, "data.train: no source"), ({"path": "a.xyz"}, "unknown suffix"), ({"path": "hf:a"}, "hub")]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            _ = DataConfig(**options).sources


@pytest.mark.parametrize(
    "options,message",
    [
        ({"packing": "bucketed"}, "needs widths that end with seq_len"),
        ({"packing": "bucketed", "buckets": (32, 16, 64)}, "must rise"),
        ({"buckets": (64,)}, "only for packing 'bucketed'"),
        ({"train": ({"source": "jsonl:a", "weight": 1.0}, {"source": "jsonl:b"})}, r"train\[1\].weight: give every"),
        ({"eval": ({"source": "jsonl:a", "weight": 1.0},)}, r"eval\[0\].weight"),
        ({"train": ({"source": "jsonl:a"}, {"source": "jsonl:b"}), "path": "c.jsonl"}, "path: train lists 2"),
        ({"batch_size": 0}, "greater than 0"),
        ({"workers": True}, "valid integer"),
        ({"truncation": "middle"}, "truncation"),
    ],
)
def test_data_config_refuses(options, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        DataConfig(**({"seq_len": 64} | options))


def test_a_weight_too_small_is_named(files):
    with pytest.raises(ConfigError, match="data.train: weight 1.0 gives not one record"):
        open_(config_of(files, "a", "b", weights=[1.0, 1e9]))


def test_the_most_segments_of_a_row_follow_from_the_data(tmp_path):
    """Long examples leave room for few: S is small. Short ones raise it until rows fill as well as without a bound."""
    found = {}
    for name, length in (("long", 120), ("short", 12)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": "x" * length}) + "\n" for _ in range(300)))
        source = open_(DataConfig(path=str(path), batch_size=4, seq_len=512))
        found[name] = source.config.max_segments
        assert source.fingerprint["data.max_segments"] == found[name]
        assert max(int(next(source).segments.max()) for _ in range(3)) <= found[name]
    assert found == {"long": 8, "short": 32}  # 32 is as many as the bound of 512 / 16 allows
    assert open_(DataConfig(path=str(path), batch_size=4, seq_len=512, max_segments=9)).config.max_segments == 9


def test_a_longer_end_of_the_file_counts_too(tmp_path):
    """Unshuffled, long rows first: S follows from rows all over the file. One unit a row needs one segment."""
    path = tmp_path / "mixed.jsonl"
    lengths = [505] * 2000 + [12] * 6000
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in lengths))
    plain = DataConfig(path=str(path), batch_size=4, seq_len=512, shuffle=False)
    assert open_(plain).config.max_segments == 32
    assert open_(dataclasses.replace(plain, packing="none")).config.max_segments == 1
    assert open_(dataclasses.replace(plain, seq_len=1600)).config.max_segments <= 100  # never above the bound
