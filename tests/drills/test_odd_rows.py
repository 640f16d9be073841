"""Drill 14: over-long prompts and completions, rows without a target, rows of one token, in whole runs.

None of them trains in silence: what cannot be trained is left out and counted, and the run is bit for bit that over
the other rows alone.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest

from jaxpost import config, train
from jaxpost.errors import DataError
from tests import tiny

run = functools.partial(train.run, devices=jax.devices()[:1])
SMALL = "init:llama,vocab_size=264,d_model=16,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=8,d_ff=24,tied=true"
WIDTH = 48  # data.seq_len: 49 tokens fit; the byte tokenizer gives a token a character
END = "<|im_end|>"


def pair(prompt: str, completion: str) -> dict:
    return {"prompt": prompt, "completion": completion}


GOOD = [pair("abcdefgh"[: 1 + k % 8], "ABCDEFGH"[: 1 + k % 5] * (1 + k % 3)) for k in range(21)]
LONG_PROMPT = pair("p" * 60, "abc")  # 64 tokens: cut on the right, no target is left
LONG_COMPLETION = pair("abc", "c" * 60)  # cut on the right it keeps targets, and no end token
FITS = pair("p" * 24, "c" * 24)  # 49 tokens: just fits
ONE_OVER = pair("p" * 24, "c" * 25)
ONE_TOKEN = pair("", END)  # nothing predicts the first token: no target
NO_TARGET = {"messages": [{"role": "user", "content": "nobody answers"}]}
ODD = [LONG_PROMPT, ONE_TOKEN, LONG_COMPLETION, NO_TARGET, FITS, ONE_OVER]
EXPECTED = {  # truncation -> (rows that train, as they train; the counters of an epoch)
    "drop": ([FITS], {"truncated": 0, "dropped/too_long": 3, "dropped/no_target": 0}),
    "right": ([LONG_COMPLETION, FITS, ONE_OVER], {"truncated": 2, "dropped/too_long": 0, "dropped/no_target": 1}),
    "left": (
        [LONG_PROMPT, LONG_COMPLETION, FITS, ONE_OVER],
        {"truncated": 3, "dropped/too_long": 0, "dropped/no_target": 0},
    ),
}


def settings(folder, rows, truncation, **loop):
    data = {
        "batch_size": 2,
        "seq_len": WIDTH,
        "eval": [],
        "shuffle": False,
        "loss_on": "completion",
        "truncation": truncation,
        "on_bad_row": "skip",
        "max_bad_fraction": 0.5,
    }
    file = tiny.write_config(folder, data=data, model={"source": SMALL}, loop=loop | {"save_every": 0})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def trained(file) -> dict:
    return run(config.load(file).config).params["policy"]


@pytest.mark.parametrize("truncation", EXPECTED)
def test_odd_rows_change_nothing_but_the_counters(tmp_path, truncation):
    """Spread among good rows, over two epochs."""
    rows = list(GOOD)
    for place, row in enumerate(ODD):
        rows.insert(4 * place, row)
    kept, counters = EXPECTED[truncation]
    params = trained(settings(tmp_path / "odd", rows, truncation, epochs=2.0, steps=None))
    run_dir = tmp_path / "odd" / "run"
    losses, norms = tiny.metric(run_dir, "loss"), tiny.metric(run_dir, "grad_norm")
    assert len(losses) >= 5 and all(isinstance(x, float) and x > 0.5 for x in losses), losses  # null would be nan
    assert all(norm > 0.01 for norm in norms) and tiny.metric(run_dir, "skipped_steps")[-1] == 0

    # every record is in a counter or in the run: 27 read an epoch, two of them bad
    last = {name: tiny.metric(run_dir, name)[-1] for name in ("rows_read", "dropped/bad_row", *counters)}
    assert last == {"rows_read": 54, "dropped/bad_row": 4} | {name: 2 * n for name, n in counters.items()}
    said = (run_dir / "logs" / "events.log").read_text()
    lost = {name: n for name, n in {**counters, "dropped/bad_row": 2}.items() if n}
    for name, count in lost.items():  # of the first epoch at once, of the whole run at its end
        assert f"{name} {count}" in said and f"{name} {2 * count}" in said
    assert "training rows so far: rows_read 27" in said and "training rows so far: rows_read 54" in said

    # the same bits as without those rows
    clean = [row for row in rows if row not in ODD or row in kept]
    alone = trained(settings(tmp_path / "clean", clean, truncation, steps=len(losses)))
    assert tiny.metric(tmp_path / "clean/run", "loss") == losses
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [
        ([NO_TARGET] * 5, [], "train.jsonl:1: no trainable token: no assistant turn"),
        ([*GOOD, ONE_TOKEN], [], "train.jsonl:22: no trainable token"),
        ([ONE_TOKEN] * 5, ["data.on_bad_row=skip", "data.max_bad_fraction=1"], "no example is left to train on"),
        (
            [LONG_PROMPT] * 5,
            ["data.truncation=right"],
            "no example is left to train on: rows_read 5, dropped/no_target 5",
        ),
        ([LONG_PROMPT] * 5, [], "no example is left to train on: rows_read 5, dropped/too_long 5"),
        ([LONG_COMPLETION], ["data.truncation=error"], "63 positions in 1 segments do not fit data.seq_len 48"),
    ],
    ids=["no target", "one token", "only one token", "all cut", "all long", "error"],
)
def test_a_run_that_could_only_train_on_nothing_does_not_start(tmp_path, rows, words, says):
    file = settings(tmp_path, rows, "drop", steps=2)
    loaded = config.load(file, ["data.on_bad_row=error", *words]).config
    with pytest.raises(DataError, match=re.escape(says)):
        run(loaded)
    assert not tiny.metric(tmp_path / "run", "loss")
