"""A rank's pulse: every logged step beats it; too long without one ends the process.

A hang (a lost peer in a collective, a dead filesystem) holds nodes until the time limit.
With CHAINRULE_HANG_AFTER_S set, a rank that makes no step for so long writes the stacks of
all its threads and exits with the code that asks for a requeue: the last checkpoint is whole.
"""

import faulthandler
import os
import sys
import threading
import time

VARIABLE = "CHAINRULE_HANG_AFTER_S"
STACKS_BEFORE_EXIT_S = 10.0
"""The first rank to exit takes the others with it: each has this long to write its stacks."""
START_UP = 10
"""Before its first step a process may be silent so many times longer: imports, compilation,
meeting the other ranks."""

_last = time.monotonic()
_beats = 0


def beat() -> None:
    """Something moved on: a step, a sample, a shard."""
    global _last, _beats
    _last = time.monotonic()
    _beats += 1


def watch_if_asked(exit_code: int) -> None:
    """Start the watch where the environment asks for it."""
    if VARIABLE in os.environ:
        watch(float(os.environ[VARIABLE]), exit_code)


def watch(hang_after_s: float, exit_code: int) -> None:
    """End this process with `exit_code` once `hang_after_s` pass without a beat."""
    global _last, _beats
    _last, _beats = time.monotonic(), 0
    thread = threading.Thread(
        target=_watch, args=(hang_after_s, exit_code), name="heartbeat", daemon=True
    )
    thread.start()


def _watch(hang_after_s: float, exit_code: int) -> None:
    while True:
        silent = time.monotonic() - _last
        allowed = hang_after_s if _beats else START_UP * hang_after_s
        if silent < allowed:
            time.sleep(min(allowed - silent, hang_after_s, 60.0))
            continue
        before = _last
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"rank {rank}: no step for {silent:.0f} s; the stacks of its threads:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(min(STACKS_BEFORE_EXIT_S, hang_after_s))
        if _last == before:  # else it was only slow
            os._exit(exit_code)
