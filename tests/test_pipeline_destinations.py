"""Destinations that cannot be written: one line and exit code 2, before anything is done."""

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chainrule.pipeline import launch
from chainrule.pipeline.artifact import write_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.destinations import refused, require_file_place, require_folder_place
from chainrule.pipeline.stage import StageFailed
from chainrule.pipeline.whole_file import write_whole

Run = Callable[..., tuple[int, str]]
CONFIG = """\
name: small
stages:
  digits: {job: ingest, source: {kind: sklearn-digits}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A pipeline of one stage, which was begun."""
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    attempt = {"fingerprint": "f", "attempts": 1, "seconds": 0.0}
    partial = tmp_path / "runs" / "small" / "digits.partial"
    partial.mkdir(parents=True)
    write_json(partial / "attempt.json", attempt)
    (tmp_path / "runs" / "small" / ".locks").mkdir()
    (tmp_path / "runs" / "small" / ".locks" / "digits.lock").touch()
    return path


def without_privileges(*arguments: object) -> subprocess.CompletedProcess:
    """The command line with root's right to write everywhere taken away, should it have that."""

    def drop() -> None:
        set_drop, dac_override, dac_read_search = 24, 1, 2  # linux/prctl.h, linux/capability.h
        for capability in (dac_override, dac_read_search):
            ctypes.CDLL(None).prctl(set_drop, capability, 0, 0, 0)

    command = [sys.executable, "-m", "chainrule.pipeline", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=drop, check=False
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_a_runs_folder_that_may_only_be_read(config: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "small"
    folders = [root, root / ".locks", root / "digits.partial"]
    (root / ".locks" / "digits.lock").chmod(0o444)
    for folder in folders:
        folder.chmod(0o555)
    try:
        asked = (config, "--runs", tmp_path / "runs")
        status = without_privileges("status", *asked)
        assert (status.returncode, status.stderr) == (0, "")
        assert "digits" in status.stdout
        report = without_privileges("report", *asked)
        assert report.returncode == 2
        assert report.stderr == (
            f"error: {root}: permission denied, nothing can be made there; "
            "name another place with --out\n"
        )
        page = without_privileges("report", *asked, "-o", tmp_path / "page.html")
        assert (page.returncode, page.stderr) == (0, "")
        again = without_privileges("run", *asked)
        assert again.returncode == 2
        assert again.stderr.endswith("name another place with --runs\n")
        assert again.stderr.count("\n") == 1
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_places_are_looked_at_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert require_file_place(tmp_path / "file") == tmp_path / "file"
    assert require_folder_place(tmp_path / "a" / "b").parent.name == "a"
    with pytest.raises(RequestError, match="file: is a file, not a folder; .*with --runs"):
        require_folder_place(tmp_path / "file" / "x", "--runs")
    with pytest.raises(RequestError, match="is a folder; name a file"):
        require_file_place(tmp_path)
    with pytest.raises(RequestError, match="pipe: not a regular file"):
        require_file_place(tmp_path / "pipe")


def test_what_the_system_refuses_is_named_by_the_place_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "folder", "text")
    assert refused(caught.value) == f"{tmp_path / 'folder'}: is a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught_below:
        write_whole(tmp_path / "file" / "x", "text")
    assert refused(caught_below.value) == f"{tmp_path / 'file' / 'x'}: not a directory"
    assert refused(OSError(errno.ENOSPC, "No space")) is None
    assert refused(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def test_a_refusal_is_one_line_and_its_traceback_can_be_had(
    config: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    asked = ("report", config, "--runs", tmp_path / "runs", "-o", tmp_path / "page.html")

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("chainrule.pipeline.report.write_whole", full)
    said = f"error: {tmp_path / 'page.html'}: no space left on device\n"
    assert run(*asked) == (2, said)
    monkeypatch.setenv("CHAINRULE_TRACEBACK", "1")
    code, said = run(*asked)
    assert code == 1
    assert "Traceback" in said


def test_a_stage_at_work_that_is_refused_has_failed(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="stage 'a': .*: is a directory"), launch.failing("a"):
        write_whole(tmp_path, "text")


def test_a_file_in_the_place_of_a_folder_and_the_other_way_round(
    config: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    report = ("report", config, "--runs", tmp_path / "runs", "-o")
    for command, words in (
        ((*report, tmp_path / "runs"), "is a folder; name a file"),
        ((*report, tmp_path / "file" / "page.html"), "file: is a file, not a folder"),
    ):
        code, said = run(*command)
        assert (code, said.count("\n")) == (2, 1)
        assert words in said
    assert sorted(tmp_path.rglob("*")) == before
