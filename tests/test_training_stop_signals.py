"""Signals while a training runs: a wish for its loop, and never lost."""

import signal
from collections.abc import Iterator

import pytest

from chainrule.pipeline.training.run_state import stop_signals


class Heard(Exception):
    """What the handler outside makes of a signal."""


@pytest.fixture
def outside() -> Iterator[None]:
    def hear(number: int, _frame: object) -> None:
        raise Heard(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, hear)
    yield
    signal.signal(signal.SIGTERM, before)


def signalled(obeys: bool) -> None:
    with stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        if obeys and stop.requested:
            raise InterruptedError


def test_a_wish_that_the_loop_obeys_is_heard_once(outside: None) -> None:
    with pytest.raises(InterruptedError):
        signalled(obeys=True)


def test_a_signal_after_the_last_look_is_passed_on(outside: None) -> None:
    """Else a pipeline would go on with its next stage though it was told to stop."""
    with pytest.raises(Heard, match="SIGTERM"):
        signalled(obeys=False)


def test_without_a_signal_nothing_is_raised(outside: None) -> None:
    with stop_signals() as stop:
        pass
    assert not stop.requested
