"""Shared by all tests: quiet engines, no telemetry, where the real data sets lie."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# The models of the tests are tiny and the suite runs on two workers: a thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / "build" / "torch_extensions")
)
os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; the test is skipped without it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data sets at {folder}")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command line in this process: its exit code, and what it says."""
    from chainrule.pipeline import cli

    def command(*arguments: Any) -> tuple[int, str]:
        said = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["chainrule", *map(str, arguments)])
            patch.setattr(sys, "stderr", said)
            patch.setattr(cli.signal, "signal", lambda number, handler: None)
            code = cli._main()
        return code, said.getvalue()

    return command
