"""Worker processes: what they are left with when one, or the job, is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from chainrule.pipeline.processes import worker_processes
from chainrule.pipeline.stage import StageFailed


def nothing() -> None:
    pass


def prepare(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def pids(pool: ProcessPoolExecutor) -> list[int]:
    return list({future.result() for future in [pool.submit(os.getpid) for _ in range(20)]})


def work(folder: Path) -> None:
    prepare(folder)
    time.sleep(600)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("busy", [0, 1, 2])
def test_a_worker_that_is_killed_fails_the_stage_by_name(tmp_path: Path, busy: int) -> None:
    """Whatever the others are at: idle, waiting for a lock that died with it, or long at work."""
    (tmp_path / "ready").mkdir()
    (tmp_path / "busy").mkdir()

    def stage() -> None:
        with worker_processes(2, prepare, tmp_path / "ready") as pool:
            for warming in [pool.submit(time.sleep, 0.1) for _ in range(2)]:
                warming.result()
            ready = wait_for(lambda: sorted((tmp_path / "ready").iterdir()), 2)
            tasks = [pool.submit(work, tmp_path / "busy") for _ in range(busy)]
            at_work = wait_for(lambda: sorted((tmp_path / "busy").iterdir()), busy)
            idle = [worker for worker in ready if worker.name not in {w.name for w in at_work}]
            os.kill(int((idle or at_work)[0].name), signal.SIGKILL)
            for task in tasks or [pool.submit(work, tmp_path / "busy")]:
                task.result()

    with pytest.raises(StageFailed, match="a worker process was killed"):
        stage()


def test_workers_leave_signals_to_the_job() -> None:
    with worker_processes(1, nothing) as pool:
        (worker,) = pids(pool)
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            os.kill(worker, getattr(signal, name))
        assert pids(pool) == [worker]


JOB = """
import time
from pathlib import Path
from chainrule.pipeline.processes import worker_processes
from tests.test_pipeline_processes import prepare

if __name__ == "__main__":
    with worker_processes(2, prepare, Path({folder!r})) as pool:
        for future in [pool.submit(time.sleep, 600) for _ in range(2)]:
            future.result()
"""


def test_workers_end_with_a_job_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB.format(folder=str(tmp_path / "workers")))
    (tmp_path / "workers").mkdir()
    job = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        workers = wait_for(lambda: sorted((tmp_path / "workers").iterdir()), 2)
    finally:
        job.kill()
        job.wait()
    assert wait_for(lambda: [w for w in workers if not is_running(int(w.name))], 2) == workers


def wait_for(found: Callable[[], list[Path]], count: int, seconds: float = 60) -> list[Path]:
    until = time.monotonic() + seconds
    while len(found()) < count and time.monotonic() < until:
        time.sleep(0.05)
    result = found()
    assert len(result) == count
    return result


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
