"""Progress: a bar with speed and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeRemainingColumn,
)

from chainrule.pipeline.heartbeat import beat

LINE_EVERY_S = 10.0


class Progress:
    """Counts `unit`s up to `total` (None: unknown); a context manager.

    `update(n, loss=1.234)` moves it on; the keyword values are shown beside the bar.
    """

    def __init__(
        self, name: str, total: int | None, unit: str, start: int = 0, silent: bool = False
    ) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = start
        self.silent = silent
        self._start = start
        self._began = time.monotonic()
        self._last_line = self._began
        self._shown = ""
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if not self.silent and sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.name, total=self.total, completed=self.done, shown="", speed=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self.silent and kind is None:
            self._line()

    def update(self, n: int = 1, **shown: float | int | str) -> None:
        beat()
        self.done += n
        if self.silent:
            return
        if shown:
            self._shown = " ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in shown.items()
            )
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, shown=self._shown, speed=self._speed()
            )
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._line()

    def _rate(self) -> float:
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _speed(self) -> str:
        rate = self._rate()
        return f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        of = f"/{self.total}" if self.total is not None else ""
        left = ""
        if self.total is not None and self._rate() > 0 and self.done < self.total:
            left = f", {(self.total - self.done) / self._rate():.0f} s left"
        shown = f", {self._shown}" if self._shown else ""
        sys.stderr.write(
            f"  {self.name}: {self.done}{of} {self.unit}, {self._speed()}{left}{shown}\n"
        )
        sys.stderr.flush()
