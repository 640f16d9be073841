"""Methods over pairs, as real runs: where the loss starts, what learns, what is copied, what comes back after a cut."""

import pathlib
import shutil

import jax
import numpy as np
import pytest

from jaxpost import build, config, errors, train
from jaxpost.algos.dpo import DPO
from jaxpost.metrics import Sinks
from tests import tiny

METHODS = {"dpo": {}, "simpo": {}, "cpo": {}, "orpo": {}}


def load(folder, method, overrides=(), *, swapped=False, **sections):
    given = {"algorithm": {"name": method}, "data": {"batch_size": 8, "seq_len": 96}}
    file = tiny.write_config(folder, **given | {"mesh": {"data": 1}, "optim": {"learning_rate": 2e-3}} | sections)
    for name, count, seed in (("train", 160, 1), ("heldout", 24, 2)):
        tiny.write_rows(folder / f"{name}.jsonl", count, seed, tiny.pairs, swapped=swapped)
    return config.load(file, list(overrides)).config


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_the_preference(tmp_path, method):
    """Held-out pairs are told apart, and the other way round where the labels are swapped."""
    for swapped in (False, True):
        run = load(tmp_path / str(swapped), method, swapped=swapped, loop={"steps": 12, "eval_first": True})
        train.run(run)
        before, after = tiny.metric(run.run_dir, "eval/rewards/accuracies")
        assert after >= 0.95, f"swapped {swapped}"
        first, last = tiny.metric(run.run_dir, "eval/loss")
        assert last < first
        if method == "dpo":
            assert first == pytest.approx(np.log(2), abs=1e-6) and before == 0  # the policy is its reference


def test_the_reference_stays_and_moves_nothing(tmp_path):
    """With all weights trained there is a frozen copy, equal to the start; with adapters the base serves, no copy."""
    for lora in (None, {"rank": 4, "alpha": 8.0}):
        run = load(tmp_path / str(bool(lora)), "dpo", lora=lora, loop={"steps": 2})
        with Sinks(run.run_dir, run.metrics) as sinks:
            job = build.build_job(run, sinks, devices=jax.devices()[:1])
        weights = jax.tree.leaves(job.state.params["policy"])
        if lora is None:
            assert set(job.frozen) == {"ref"}
            for mine, frozen in zip(weights, jax.tree.leaves(job.frozen["ref"]), strict=True):
                np.testing.assert_array_equal(mine, frozen)
                assert mine.unsafe_buffer_pointer() != frozen.unsafe_buffer_pointer()
        else:
            assert set(job.frozen) == {"policy"}


def test_it_resumes_bit_for_bit(tmp_path):
    whole = load(tmp_path / "a", "dpo", loop={"steps": 6, "save_every": 3})
    final = train.run(whole)
    cut = load(tmp_path / "b", "dpo", loop={"steps": 6, "save_every": 3})
    train.run(cut)
    shutil.rmtree(pathlib.Path(cut.run_dir, "checkpoints", "6"))
    pathlib.Path(cut.run_dir, "checkpoints", "LATEST").write_text("3\n")
    resumed = train.run(cut)
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert tiny.metric(whole.run_dir, name) == tiny.metric(cut.run_dir, name)


WRONG = {
    "algorithm.kind=sigmoyd": "algorithm.kind",
    "algorithm.kind=exo_pair": "exo_pair takes the logarithm of label_smoothing",
    "algorithm.beta=0": "algorithm.beta",
    "algorithm.label_smoothing=0.7": "label_smoothing",
    "data.max_segments=5": "a pair takes two segments",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_cannot_be_is_one_line(tmp_path, override):
    with pytest.raises(errors.ConfigError) as caught:
        load(tmp_path, "dpo", [override])
    assert WRONG[override] in str(caught.value) and "\n" not in str(caught.value)


def test_sorting_kinds_refuse_micro_batches(tmp_path):
    with pytest.raises(errors.ConfigError, match="sorts the whole batch"):
        load(tmp_path, "dpo", ["algorithm.kind=aot", "loop.micro_batches=2"])
    assert DPO(kind="aot").whole_batch and not DPO().whole_batch


def test_an_odd_bound_of_segments_is_made_even(tmp_path):
    """A pair takes two places; 500 / 16 is 31."""
    run = load(tmp_path, "orpo", ["data.seq_len=500"], loop={"steps": 1})
    assert run.data.segments_per_row == 30
    train.run(run)
    assert len(tiny.metric(run.run_dir, "loss")) == 1


def test_an_adapter_to_start_from_would_not_be_in_the_reference(tmp_path):
    with pytest.raises(errors.ConfigError, match="lora.source: the reference would be the base without that adapter"):
        load(tmp_path, "dpo", ["lora.source=adapter"], lora={"rank": 4})


def test_rows_of_another_method_are_refused(tmp_path):
    run = load(tmp_path, "dpo")
    tiny.write_rows(tmp_path / "train.jsonl", 8)
    with pytest.raises(errors.DataError, match=r"train.jsonl:\d+: field 'chosen': missing, found messages"):
        train.run(run)
