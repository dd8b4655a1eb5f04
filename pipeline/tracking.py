"""MLflow tracking that training never waits for.

Everything is put on a queue; one thread talks to the store, in batches. A store that is
slow, goes away or refuses is reported once, tried again now and then, and never stops or
slows a stage: `metrics.jsonl` in the artifact is the complete record.

One experiment a pipeline; one parent run a pipeline run, one nested run a stage. A stage
that is resumed goes on in its run: what its `metrics.jsonl` has and the store lacks, because
a kill came before it was sent, is sent first, and steps that the store already has are not
sent again. The store is `runs/mlflow.db` (SQLite) unless MLFLOW_TRACKING_URI says otherwise.
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import posixpath
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from chainrule.pipeline.whole_file import whole

FLUSH_EVERY_S = 2.0
RETRY_EVERY_S = 30.0
FINISH_WITHIN_S = 20.0
GIVE_UP_WITHIN_S = 3.0
"""On a store that has not answered once, though it was asked."""
BATCH = 1000  # the most metrics that MLflow takes in one log_batch
_OF_THREADS = threading.Lock()
"""A record lock keeps processes apart, not the threads of one."""
NOT_FINITE = ("nan", "inf", "-inf")
"""How `metrics.jsonl` writes numbers that JSON has not."""
BACKLOG = 200_000
"""Metrics kept while the store is away; older ones are dropped (metrics.jsonl has them)."""


def tracking_uri(runs: Path) -> str:
    """Where runs are kept: MLFLOW_TRACKING_URI, or one SQLite file under the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(runs / 'mlflow.db').absolute()}"


def is_local() -> bool:
    """Whether the store is the one that a runs folder has of its own."""
    return not os.environ.get("MLFLOW_TRACKING_URI")


def client(runs: Path) -> Any:
    """An MlflowClient with short time-outs and no chatter. Imports MLflow (about 1 s)."""
    _quiet()
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracking_uri(runs))


def _quiet() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _sqlite_file(runs: Path) -> Path | None:
    """The file that the store is, where it is one."""
    uri = tracking_uri(runs)
    if not uri.startswith("sqlite:///") or "?" in uri or ":memory:" in uri:
        return None
    return Path(uri.removeprefix("sqlite:///"))


@contextlib.contextmanager
def _alone(runs: Path) -> Iterator[None]:
    """One hand at a time, on a store that is there: MLflow makes and migrates a SQLite store
    without a lock of its own, and one that is half made, because its maker was killed, it can
    neither use nor finish."""
    store = _sqlite_file(runs)
    if store is None:
        yield
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    with _OF_THREADS, open(store.with_name(f".{store.stem}.lock"), "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        if not store.exists():
            _make_store(store)
        yield


def _make_store(store: Path) -> None:
    """An empty SQLite store, whole or absent. Takes some seconds: MLflow migrates it from the
    first of its schemas to the last."""
    _quiet()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in store.parent.glob(f".{store.name}.*"):  # by a process that was killed
        left.unlink()
    with whole(store) as temporary:
        made = SqlAlchemyStore(
            f"sqlite:///{temporary}", (store.parent / "mlflow-artifacts").absolute().as_uri()
        )
        made.engine.dispose()


def metric_name(name: str) -> str:
    """`name` as MLflow takes it (letters, digits, `_-. :/`, 250 of them, a path without empty
    or dotted parts): one name that it refuses would take a whole batch with it."""
    clean = re.sub(r"[^\w.\- :/]", "_", name)[:250]
    if clean != posixpath.normpath(clean) or clean.startswith(("/", ".")):
        clean = clean.replace("/", "_").strip(".") or "_"
    return clean


def experiment(store: Any, name: str, runs: Path) -> str:
    """Id of the pipeline's experiment, made on first use."""
    found = store.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            store.restore_experiment(found.experiment_id)
        return found.experiment_id
    location = None
    if is_local():
        location = (runs / "mlflow-artifacts" / name).absolute().as_uri()
    return store.create_experiment(name, artifact_location=location)


def logged(log: Path) -> Iterator[tuple[str, float, int, int]]:
    """The numbers of a `metrics.jsonl` as MLflow's (name, value, time, step), in the file's order.

    The file does not say when: the time is now.
    """
    stamp = int(time.time() * 1000)
    if not log.is_file():
        return
    with open(log) as file:
        for line in file:
            try:
                values = json.loads(line)
                step = values.pop("step")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # a line that a kill, or its writer, left half written
            for key, value in values.items():
                if value in NOT_FINITE:
                    value = float(value)
                if isinstance(value, int | float):
                    yield metric_name(key), float(value), stamp, step


def _batches(
    points: Iterator[tuple[str, float, int, int]],
) -> Iterator[list[tuple[str, float, int, int]]]:
    while batch := list(itertools.islice(points, BATCH)):
        yield batch


def end_abandoned(runs: Path, run_id: str | None) -> None:
    """End a run that nobody goes on with as KILLED, if it is still said to be running.

    Waits for the store a moment, so that MLflow is not imported beside what imports it next; a
    store that takes longer is left to a thread, one that is away or knows no such run is let be.
    """
    if run_id is None:
        return
    store = _sqlite_file(runs)
    if store is not None and not store.exists():
        return  # nothing to end, and it would be made for that

    def end() -> None:
        with contextlib.suppress(Exception):  # a store must never stop a stage
            with _alone(runs):
                store = client(runs)
            if store.get_run(run_id).info.status == "RUNNING":
                store.set_terminated(run_id, status="KILLED")

    thread = threading.Thread(target=end, name="mlflow-end", daemon=True)
    thread.start()
    thread.join(GIVE_UP_WITHIN_S)


class Tracker:
    """One MLflow run, written from a thread of its own."""

    def __init__(
        self,
        runs: Path,
        pipeline: str,
        name: str,
        run_id: str | None = None,
        parent_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        on_run_id: Callable[[str], None] | None = None,
        log: Path | None = None,
    ) -> None:
        """`run_id` resumes a run; `on_run_id` is called with the id once the store gave one.

        `log`: the `metrics.jsonl` of the attempts before; what the store lacks of it is sent.
        """
        self.run_id = run_id
        self._runs, self._pipeline, self._name = runs, pipeline, name
        self._parent_id, self._tags = parent_id, dict(tags or {})
        self._on_run_id = on_run_id
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._metrics: list[tuple[str, float, int, int]] = []
        self._others: list[tuple[str, Any]] = []
        self._last_step: dict[str, int] = {}
        self._held: dict[str, bytearray] = {}
        """1 at each step that the store had of a metric when it was opened: a step before the last
        may be missing. A byte a step, since there may be millions."""
        self._log = log
        self._known: dict[str, str] = {}
        """Parameters that the store has; MLflow refuses another value of one."""
        self._store: Any = None
        self._warned = False
        self._status: str | None = None
        self._ended = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        stamp = int(time.time() * 1000)
        named = [(metric_name(key), value, stamp, step) for key, value in values.items()]
        self._queue.put(("metrics", named))

    def parameters(self, values: Mapping[str, Any]) -> None:
        self._queue.put(("parameters", dict(values)))

    def tags(self, values: Mapping[str, str]) -> None:
        self._queue.put(("tags", dict(values)))

    def file(self, path: Path) -> None:
        """Put a file among the run's artifacts; it is read before `finish` returns."""
        self._queue.put(("file", path))

    def finish(self, status: str | None) -> None:
        """Send what is left and end the run: FINISHED, FAILED or KILLED (to be resumed).

        With None the run stays as it is: another process goes on with it.
        """
        never_answered = self._warned and self._store is None
        within = GIVE_UP_WITHIN_S if never_answered else FINISH_WITHIN_S
        self._deadline = time.monotonic() + within
        self._queue.put(("end", status))
        self._thread.join(FINISH_WITHIN_S + 2)
        if self._thread.is_alive() or self._metrics or self._others or self._log:
            self._warn("it did not answer in time; metrics.jsonl has everything")

    # --- the thread -------------------------------------------------------------------

    def _work(self) -> None:
        next_try = 0.0
        while True:
            ending = self._collect()
            if ending or time.monotonic() >= next_try:
                try:
                    self._send()
                    next_try = 0.0
                except Exception as error:  # noqa: BLE001 (a store must never stop a stage)
                    self._warn(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
                    next_try = time.monotonic() + RETRY_EVERY_S
            if ending and (not self._pending() or time.monotonic() > self._deadline):
                return
            if ending:
                time.sleep(1.0)

    def _pending(self) -> bool:
        return bool(self._metrics or self._others or self._status or self._log)

    def _collect(self) -> bool:
        """Move what was queued in the next moments to the buffers; True once it is the end."""
        until = time.monotonic() + FLUSH_EVERY_S
        while not self._ended:
            try:
                kind, value = self._queue.get(timeout=max(until - time.monotonic(), 0.01))
            except queue.Empty:
                return False
            if kind == "metrics":
                self._metrics.extend(value)
                del self._metrics[:-BACKLOG]
            elif kind == "end":
                self._status, self._ended = value, True
            else:
                self._others.append((kind, value))
            if time.monotonic() > until:
                break
        return self._ended

    def _send(self) -> None:
        from mlflow.entities import Param, RunTag

        if self._store is None:
            self._open()
        while self._others:
            kind, value = self._others[0]
            if kind == "parameters":
                written = {key: str(item)[:6000] for key, item in value.items()}
                params = [Param(*item) for item in written.items() if item[0] not in self._known]
                # a resumed stage with other processes or workers: what it has now is a tag
                changed = [
                    RunTag(f"now.{key}", item)
                    for key, item in written.items()
                    if self._known.get(key, item) != item
                ]
                for i in range(0, len(params), 100):
                    self._store.log_batch(self.run_id, params=params[i : i + 100])
                if changed:
                    self._store.log_batch(self.run_id, tags=changed)
                self._known = written | self._known
            elif kind == "tags":
                tags = [RunTag(key, item) for key, item in value.items()]
                self._store.log_batch(self.run_id, tags=tags)
            elif Path(value).exists():
                self._store.log_artifact(self.run_id, str(value))
            self._others.pop(0)
        if self._log is not None:
            # Read as it is now, not as it was: what is logged meanwhile is in the queue as well,
            # and sent once.
            for batch in _batches(logged(self._log)):
                self._send_metrics(batch)
            self._log = None
        while self._metrics:
            batch = self._metrics[:BATCH]
            self._send_metrics(batch)
            del self._metrics[: len(batch)]
        if self._status is not None:
            self._store.set_terminated(self.run_id, status=self._status)
            self._status = None

    def _send_metrics(self, batch: list[tuple[str, float, int, int]]) -> None:
        """Those of a batch that the store lacks."""
        from mlflow.entities import Metric

        fresh: dict[tuple[str, int], tuple[str, float, int, int]] = {}
        for point in batch:
            if self._lacks(point[0], point[3]):
                fresh.setdefault((point[0], point[3]), point)
        if fresh:
            self._store.log_batch(self.run_id, metrics=[Metric(*m) for m in fresh.values()])
        for key, step in fresh:
            if step > self._last_step.get(key, -1):
                self._last_step[key] = step
            else:
                self._held[key][step] = 1

    def _lacks(self, key: str, step: int) -> bool:
        if step > self._last_step.get(key, -1):
            return True
        held = self._held.get(key, b"")
        return 0 <= step < len(held) and not held[step]

    def _open(self) -> None:
        """Find or make the run. What the store already has of a resumed run is not sent again."""
        with _alone(self._runs):
            store = client(self._runs)
            self.run_id = run_id = self._find_or_make_run(store)
        self._store = store
        if self._on_run_id is not None:
            self._on_run_id(run_id)

    def _find_or_make_run(self, store: Any) -> str:
        from mlflow.exceptions import MlflowException

        if self.run_id is not None:
            try:
                data = store.get_run(self.run_id).data
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # another store than last time: begin a new run there
            else:
                for key in data.metrics:
                    history = store.get_metric_history(self.run_id, key)
                    self._last_step[key] = last = max(metric.step for metric in history)
                    self._held[key] = held = bytearray(last + 1)
                    for metric in history:
                        held[metric.step] = 1
                self._known = dict(data.params)
                store.update_run(self.run_id, status="RUNNING")
                return self.run_id
        tags = {"mlflow.runName": self._name, **self._tags}
        if self._parent_id is not None:
            tags["mlflow.parentRunId"] = self._parent_id
        experiment_id = experiment(store, self._pipeline, self._runs)
        return str(store.create_run(experiment_id, tags=tags).info.run_id)

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            uri = tracking_uri(self._runs)
            sys.stderr.write(f"  MLflow at {uri}: {message}. The stage goes on without it.\n")
