"""One writer a stage, also where the lock cannot tell: attempts of a job that Slurm requeued.

When only a node's `slurmd` dies, Slurm requeues the job, and the old step goes on writing
beside the new one. So each attempt writes its name into `.locks/<stage>.fence`, and watches
that it stays there: an older attempt that finds another name ends itself at once, without
writing. The newer one waits until the older has let go of the lock.

An attempt is named `<job>.<restart>`. Only a later attempt of the same job may replace one
that still holds the lock; anybody else is refused, as ever.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from chainrule.pipeline import artifact
from chainrule.pipeline.artifact import StageLocked
from chainrule.pipeline.whole_file import write_whole

LOOK_EVERY_S = 0.5
NOTICE_WITHIN_S = 3 * LOOK_EVERY_S
"""What a newer attempt waits before it writes, where locks do not reach across nodes."""
LET_GO_WITHIN_S = 60.0
REPLACED = 3
"""Exit code of an attempt that has been replaced: neither done nor to be run again."""


def this_attempt() -> str | None:
    """The name of this process's attempt, where it runs as (a task of) a Slurm job."""
    if "SLURM_JOB_ID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return None
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return f"{job}.{env.get('SLURM_RESTART_COUNT') or 0}"


class Fence:
    """The name of the newest attempt at a stage."""

    def __init__(self, folder: Path, attempt: str) -> None:
        self.path = folder.parent / ".locks" / f"{folder.name}.fence"
        self.attempt = attempt

    def current(self) -> str | None:
        """Who stands there; None where the last attempt ended in order."""
        try:
            return self.path.read_text().strip() or None
        except FileNotFoundError:
            return None

    def take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, self.attempt + "\n")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While inside, this process ends as soon as another attempt has taken the fence."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), name="fence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(LOOK_EVERY_S):
            current = self.current()
            if current is not None and current != self.attempt:
                said = (
                    f"attempt {self.attempt} was replaced by {current} and ends without writing\n"
                )
                with open(self.path.with_suffix(".fence.log"), "a") as log:
                    log.write(said)  # nobody may be left to pass on what is written to stderr
                sys.stderr.write(said)
                sys.stderr.flush()
                os._exit(REPLACED)

    def leave(self) -> None:
        """Take the name away, if it is still this attempt's."""
        if self.current() == self.attempt:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """The stage's lock, and its fence where this is an attempt of a Slurm job.

    StageLocked if somebody holds it who is no earlier attempt of the same job.
    """
    attempt = this_attempt()
    if attempt is None:
        with artifact.lock(folder):
            yield
        return
    fence = Fence(folder, attempt)
    earlier = fence.current()
    within = 0.0
    if earlier is not None and earlier.rpartition(".")[0] == attempt.rpartition(".")[0]:
        fence.take()  # before the lock: this is what makes the earlier attempt let go
        time.sleep(NOTICE_WITHIN_S)
        within = LET_GO_WITHIN_S
    with lock_within(folder, within):
        fence.take()
        with fence.watched():
            yield
            fence.leave()


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """For ranks above 0, which take neither lock nor fence: they end with their attempt."""
    attempt = this_attempt()
    if attempt is None:
        yield
        return
    with Fence(folder, attempt).watched():
        yield


@contextlib.contextmanager
def lock_within(folder: Path, within_s: float) -> Iterator[None]:
    """The stage's lock, waited for; StageLocked if it is still held after `within_s`."""
    until = time.monotonic() + within_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(artifact.lock(folder))
                break
            except StageLocked:
                if time.monotonic() >= until:
                    raise
                time.sleep(LOOK_EVERY_S / 2)
        yield
