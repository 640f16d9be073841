"""The global order is a pure function of position; mixtures keep their shares."""

import numpy as np
import pytest

from jaxpost.data.order import Order, draws_per_epoch, fold, interleave, permutation


def test_permutation_is_one_and_is_fixed_for_ever():
    order = permutation(1000, fold(3, 1))
    assert sorted(order.tolist()) == list(range(1000))
    # Saved runs resume in this order: the numbers may never change.
    assert permutation(8, fold(0, 4)).tolist() == [2, 6, 1, 3, 0, 4, 7, 5]
    assert fold(1, 2) != fold(2, 1) != fold(0, 1, 2)


def test_permutation_looks_uniform():
    first = np.bincount([permutation(8, fold(seed))[0] for seed in range(4000)], minlength=8)
    assert abs(first - 500).max() < 100  # 4.8 standard deviations
    drift = np.corrcoef(permutation(4000, fold(9)), np.arange(4000))[0, 1]
    assert abs(drift) < 0.08


def test_an_epoch_without_weights_holds_every_record_once():
    order = Order([70, 5, 33], None, key=7, shuffle=True)
    assert order.records_per_epoch == 108
    seen = [sorted(zip(*map(np.ndarray.tolist, order.locate(epoch, 0, 108)))) for epoch in range(3)]
    expected = [(k, i) for k, size in enumerate((70, 5, 33)) for i in range(size)]
    assert seen == [expected] * 3


def test_epochs_differ_and_seeds_differ():
    a, b = (Order([50], None, key=key, shuffle=True) for key in (1, 2))
    assert a.locate(0, 0, 50)[1].tolist() != a.locate(1, 0, 50)[1].tolist()
    assert a.locate(0, 0, 50)[1].tolist() != b.locate(0, 0, 50)[1].tolist()
    plain = Order([50], None, key=1, shuffle=False)
    assert plain.locate(4, 0, 50)[1].tolist() == list(range(50))


def test_any_position_without_replay():
    whole = Order([40, 13], [1.0, 2.0], key=5, shuffle=True)
    stream = [tuple(map(int, pair)) for e in range(6) for pair in zip(*whole.locate(e, 0, 53))]
    for epoch, start, stop in [(5, 50, 53), (2, 0, 1), (0, 7, 30), (4, 52, 53)]:
        fresh = Order([40, 13], [1.0, 2.0], key=5, shuffle=True)
        got = [tuple(map(int, pair)) for pair in zip(*fresh.locate(epoch, start, stop))]
        assert got == stream[epoch * 53 + start : epoch * 53 + stop]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3], [5.0, 1.0]])
def test_shares_hold_after_every_prefix(weights):
    order = Order([60, 140], weights, key=5, shuffle=True)
    source, record = (np.concatenate(x) for x in zip(*(order.locate(epoch, 0, 200) for epoch in range(5))))
    share = weights[0] / sum(weights)
    drawn = np.cumsum((source == 0).reshape(5, 200), axis=1)
    assert np.abs(drawn - share * np.arange(1, 201)).max() <= 2.0  # (K + 1) / 2, and 1/2 of rounding
    assert (drawn[:, -1] == order.draws[0]).all()
    for k, size in enumerate((60, 140)):  # passes: no record again before all others came
        of_source = record[source == k]
        for start in range(0, len(of_source) - size + 1, size):
            assert sorted(of_source[start : start + size].tolist()) == list(range(size))


def test_draws_by_largest_remainder():
    assert draws_per_epoch([10, 20], None) == (10, 20)
    assert draws_per_epoch([5, 5], [1.0, 2.0]) == (3, 7)
    with pytest.raises(ValueError, match="not one record"):
        draws_per_epoch([5, 5], [1.0, 1e9])


def test_interleave_by_hand():
    # times: source 0 at 1/4, 3/4; source 1 at 1/8, 3/8, 5/8, 7/8
    source, draw = interleave([2, 4])
    assert source.tolist() == [1, 0, 1, 1, 0, 1]
    assert draw.tolist() == [0, 0, 1, 2, 1, 3]
