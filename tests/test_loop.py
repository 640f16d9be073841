"""Signals: one asks for a save at the step's end, a second Ctrl-C does not wait."""

import signal

import pytest

from jaxpost.loop import _StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_step(number):
    before = signal.getsignal(number)
    with _StopSignal() as stop:
        assert not stop.agreed(1)
        signal.raise_signal(number)
        assert stop.agreed(2)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)  # schedulers repeat it; the save goes on
    assert signal.getsignal(number) is before
