"""The plan by hand and as a property; the columns by hand."""

import time

import numpy as np
import pytest

from jaxpost.data.pack import Row, best_fit_rows, bucket_rows, fit_unit, pack_rows, shuffle_rows
from jaxpost.data.tasks import Example
from jaxpost.errors import DataError


def example(tokens, untrained=1, id="f:1"):
    tokens = np.asarray(tokens, np.int32)
    return Example(tokens, np.arange(len(tokens)) >= untrained, id)


def test_best_fit_by_hand():
    # longest first: 7 | 6 | 4 -> new (rooms 3, 4, 6: 4 fits the 6-row exactly) | 3 -> the 7-row exactly | 2 | 1
    rows = best_fit_rows([2, 7, 4, 6, 3, 1], [1] * 6, 10, 8)
    assert rows == [Row((0, 5), 10), Row((1, 4), 10), Row((2, 3), 10)]
    # room 1, 4 and 6: a unit of 3 takes the row with the least room that holds it
    assert best_fit_rows([9, 6, 3], [1] * 3, 10, 8) == [Row((0,), 10), Row((1, 2), 10)]


def test_best_fit_honours_max_segments_and_units_of_several():
    assert len(best_fit_rows([1] * 9, [1] * 9, 100, 4)) == 3
    rows = best_fit_rows([5, 5, 5, 2], [2, 2, 2, 1], 100, 4)  # two pairs a row
    assert sorted(sum([2, 2, 2, 1][u] for u in row.units) for row in rows) == [3, 4]
    # 10 fills all but 6; the pair of 6 does not find two free segments there, so it opens a row
    assert best_fit_rows([10, 6, 5], [3, 2, 1], 16, 4) == [Row((0, 2), 16), Row((1,), 16)]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_properties(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 300, 500)
    rows = best_fit_rows(lengths, np.ones(500, int), 512, 12)
    assert sorted(u for row in rows for u in row.units) == list(range(500))
    assert all(sum(lengths[u] for u in row.units) <= 512 and len(row.units) <= 12 for row in rows)
    assert all(list(row.units) == sorted(row.units) for row in rows)
    assert rows == best_fit_rows(lengths.tolist(), [1] * 500, 512, 12)
    assert len(rows) <= -(-lengths.sum() // 512) + 2


def test_best_fit_is_fast_on_a_whole_window():
    lengths = np.random.default_rng(0).geometric(1 / 200, 8192).clip(1, 2048)
    start = time.process_time()
    rows = best_fit_rows(lengths, np.ones(8192, int), 2048, 128)
    assert time.process_time() - start < 1.0
    assert lengths.sum() / (2048 * len(rows)) > 0.995


def test_shuffle_rows_is_a_seeded_permutation():
    rows = [Row((i,), 4) for i in range(50)]
    assert shuffle_rows(rows, 1) == shuffle_rows(rows, 1) != shuffle_rows(rows, 2)
    assert sorted(shuffle_rows(rows, 1)) == rows


def test_buckets_by_hand():
    # buckets: 0 -> 4, 1 -> 8, 2 -> 4, 3 -> 4, 4 -> 16, 5 -> 4; a batch is two rows
    lengths = [3, 8, 4, 1, 9, 2]
    rows = bucket_rows(lengths, (4, 8, 16), 2, filled=0, key=None)
    assert rows == [Row((0,), 4), Row((2,), 4), Row((3,), 4), Row((5,), 4), Row((1,), 16), Row((4,), 16)]
    # One row is missing in the batch that the window before began: the widest unit completes it.
    rows = bucket_rows(lengths, (4, 8, 16), 2, filled=1, key=None)
    assert rows[0] == Row((4,), 16)
    assert rows[-1] == Row((1,), 8)
    assert sorted(row.units[0] for row in rows) == list(range(6))


@pytest.mark.parametrize("seed", range(4))
def test_buckets_keep_one_width_a_batch(seed):
    rng = np.random.default_rng(seed)
    buckets, pending, seen = (16, 32, 64), [], set()
    for window in range(6):
        lengths = rng.integers(1, 65, 37).tolist()
        rows = bucket_rows(lengths, buckets, 4, filled=len(pending), key=window)
        assert sorted(row.units[0] for row in rows) == list(range(37))
        assert all(lengths[row.units[0]] <= row.width for row in rows)
        whole = rows[-len(pending) % 4 : len(rows) - (len(rows) + len(pending)) % 4]
        for start in range(0, len(whole), 4):
            widths = {row.width for row in whole[start : start + 4]}
            assert len(widths) == 1
            seen |= widths
        pending = (pending + rows)[(len(pending) + len(rows)) // 4 * 4 :]
    assert seen == set(buckets)


def test_columns_by_hand():
    a, b = example([5, 6, 7], untrained=2), example([0, 9])
    batch = pack_rows([[(a,), (b,)], []], 5)
    assert batch.tokens.tolist() == [[5, 6, 0, 0, 0], [0] * 5]
    assert batch.targets.tolist() == [[6, 7, 9, 0, 0], [0] * 5]
    assert batch.mask.tolist() == [[False, True, True, False, False], [False] * 5]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0], [0] * 5]
    assert batch.segments.tolist() == [[1, 1, 2, 0, 0], [0] * 5]
    assert {str(x.dtype) for x in (batch.tokens, batch.targets, batch.positions, batch.segments)} == {"int32"}
    assert batch.weights is None and batch.extra == {}


def test_a_pair_is_two_adjacent_segments():
    batch = pack_rows([[(example([1, 2]), example([1, 3])), (example([4, 5]),)]], 4)
    assert batch.segments.tolist() == [[1, 2, 3, 0]]


def test_pack_unpack_identity():
    rng = np.random.default_rng(1)
    units = [(example(rng.integers(0, 9, n), untrained=rng.integers(1, n)),) for n in rng.integers(2, 30, 60)]
    rows = best_fit_rows([len(u[0].tokens) - 1 for u in units], [1] * 60, 64, 8)
    batch = pack_rows([[units[i] for i in row.units] for row in rows], 64)
    for b, row in enumerate(rows):
        for number, i in enumerate(row.units, 1):
            inside = batch.segments[b] == number
            tokens, targets = batch.tokens[b][inside], batch.targets[b][inside]
            assert [*tokens.tolist(), int(targets[-1])] == units[i][0].tokens.tolist()
            assert batch.mask[b][inside].tolist() == units[i][0].trainable[1:].tolist()
            assert batch.positions[b][inside].tolist() == list(range(inside.sum()))
    assert not batch.mask[batch.segments == 0].any()


def test_truncation_keeps_counts_and_targets():
    long = example(range(10), untrained=7)  # trained: tokens 7, 8, 9
    fits = fit_unit((example(range(5)),), 4, "drop", 8)
    assert fits[1] == "" and len(fits[0][0].tokens) == 5
    assert fit_unit((long,), 4, "drop", 8) == (None, "dropped/too_long")
    assert fit_unit((long,), 4, "right", 8) == (None, "dropped/no_target")  # a prompt alone teaches nothing
    (left,), reason = fit_unit((long,), 4, "left", 8)
    assert reason == "truncated" and left.tokens.tolist() == [5, 6, 7, 8, 9] and left.id == "f:1"
    assert left.trainable.tolist() == [False, False, True, True, True]
    (right,), _ = fit_unit((long,), 8, "right", 8)
    assert right.tokens.tolist() == list(range(9))
    with pytest.raises(DataError, match=r"f:1: 9 positions in 1 segments do not fit data.seq_len 4"):
        fit_unit((long,), 4, "error", 8)


def test_what_teaches_nothing_is_dropped():
    assert fit_unit((example([3]),), 4, "right", 8) == (None, "dropped/too_short")
    assert fit_unit((example([]),), 4, "right", 8) == (None, "dropped/too_short")
    assert fit_unit((example([3, 4], untrained=2),), 4, "right", 8) == (None, "dropped/no_target")
    first_only = Example(np.array([3, 4], np.int32), np.array([True, False]), "f:1")
    assert fit_unit((first_only,), 4, "right", 8) == (None, "dropped/no_target")


def test_units_of_several_are_never_cut():
    pair = (example(range(4)), example(range(4)))
    assert fit_unit(pair, 6, "right", 8) == (pair, "")
    assert fit_unit(pair, 5, "right", 8) == (None, "dropped/too_long")
    assert fit_unit(pair, 6, "left", 1) == (None, "dropped/too_long")
