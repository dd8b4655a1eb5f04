"""Worker processes of a job: whatever ends the job ends them, and signals are the job's to hear."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from chainrule.pipeline.stage import StageFailed

LEFT_TO_THE_JOB = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class _Worker(SpawnProcess):
    """A broken pool ends its workers by `terminate`, a signal that these ignore."""

    def terminate(self) -> None:
        self.kill()


class _Workers(SpawnContext):
    Process = _Worker


@contextmanager
def worker_processes(
    count: int, prepare: Callable[..., None], *given: Any
) -> Iterator[ProcessPoolExecutor]:
    """`count` of them, each made ready by `prepare(*given)`. StageFailed where one is killed.

    They are started anew, not forked: a fork has the locks of threads that it lacks.
    """
    pool = ProcessPoolExecutor(count, _Workers(), _begin, (prepare, given))
    try:
        yield pool
    except BrokenProcessPool:
        raise StageFailed(
            "a worker process was killed (is memory short?); run the same command again, with "
            "fewer workers if it happens again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(prepare: Callable[..., None], given: tuple[Any, ...]) -> None:
    for name in LEFT_TO_THE_JOB:
        if hasattr(signal, name):  # Windows has two of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    prepare(*given)


def _end_with_the_job() -> None:
    # A worker holds both ends of the pipe that it waits at: it would wait for a dead job for ever.
    job = parent_process()
    assert job is not None
    connection.wait([job.sentinel])
    os._exit(1)
