"""Files that several hands write at a time are whole; what is noted by one is kept by the other."""

import threading
from pathlib import Path

import pytest

from chainrule.pipeline import stage_run
from chainrule.pipeline.artifact import ATTEMPT, read_json, write_json
from chainrule.pipeline.stage import Stage
from chainrule.pipeline.whole_file import whole, write_whole


def test_a_failure_leaves_what_stood_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_whole(path, "before\n")

    def cut_off() -> None:
        with whole(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert path.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_note_an_attempt_lose_nothing(tmp_path: Path) -> None:
    """The tracking store gives its run id on a thread, often as a signal ends the attempt."""
    write_json(tmp_path / ATTEMPT, {"fingerprint": "f", "attempts": 1, "seconds": 0.0})
    stage = Stage("decoder", "small", "pretrain", tmp_path, "f")
    together = threading.Barrier(4)

    def note(hand: int) -> None:
        together.wait()
        for i in range(25):
            stage_run._note(stage, seconds=1.0, **{f"{hand}.{i}": "x" * 100 * hand})

    hands = [threading.Thread(target=note, args=(hand,)) for hand in range(4)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    attempt = read_json(tmp_path / ATTEMPT)
    assert attempt["seconds"] == 100
    assert len(attempt) == 3 + 100
    assert [path.name for path in tmp_path.iterdir()] == [ATTEMPT]
