"""The command itself, before any of its commands."""

import importlib
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pydantic
import pytest

from chainrule.pipeline import cli
from chainrule.pipeline.catalogue import job_module, stage_jobs
from chainrule.pipeline.cli_model import settings
from chainrule.pipeline.config import RequestError, explain

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_the_version_is_printed_and_nothing_else_happens() -> None:
    command = [sys.executable, "-m", "chainrule.pipeline", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"chainrule {cli._version()}\n"


def test_the_version_is_the_package_s_or_else_the_checkout_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: f"7 of {name}")
    assert cli._version() == "7 of chainrule"

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli._version() == PROJECT["version"]


def test_a_value_that_is_no_yaml_is_shown_in_quotes() -> None:
    with pytest.raises(RequestError, match=r"""--set 'stop=":"', in a list \[":"\]"""):
        settings("sample", {}, ["stop=:"])
    assert settings("sample", {}, ['stop=[":"]']).stop == [":"]


def test_ctrl_c_while_the_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "chainrule.pipeline", "--version"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    module, _, function = PROJECT["scripts"]["chainrule"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("job", stage_jobs())
def test_numbers_that_no_job_can_use_are_refused(job: str) -> None:
    config = job_module(job).Config
    fields = {
        name: field.annotation
        for name, field in config.model_fields.items()
        if name == "seed" or field.annotation in (float, float | None)
    }
    for name, kind in fields.items():
        wrong = (-1, 2**63, 2**70) if name == "seed" else (float("inf"), float("nan"))
        for value in wrong:
            with pytest.raises(pydantic.ValidationError) as error:
                config.model_validate({name: value})
            said = dict(explain(error.value, config, {name: value}))[(name,)]
            assert ("a seed is" in said or "greater than" in said) or "finite" in said, kind
