"""Handed-off models in a real MLflow registry: versions, aliases, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from chainrule.pipeline import tracking
from chainrule.pipeline.artifact import MANIFEST
from chainrule.pipeline.cli import model_folders
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.model_registry import register, resolve
from chainrule.pipeline.models import folder as model_folder
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.tracking import Tracker

pytestmark = pytest.mark.slow  # MLflow makes its database: some seconds


def saved(folder: Path, seed: int) -> Path:
    model_folder.save(build("llama-debug", seed=seed, layers=1), folder, {})
    return folder


def test_versions_aliases_and_folders(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    tracker = Tracker(runs, "digits", "model")
    tracker.finish("FINISHED")
    assert tracker.run_id is not None
    first = saved(runs / "digits" / "model", 0)
    assert register(runs, "digits", "model", first, tracker.run_id) == "1"
    assert register(runs, "digits", "model", first, tracker.run_id) == "1"  # the same again
    other = saved(runs / "digits" / "other", 1)
    assert register(runs, "digits", "other", other, tracker.run_id) == "2"
    assert resolve(Path("models:/digits@model"), runs) == first
    assert resolve(Path("models:/digits@other"), runs) == other
    assert resolve(Path("models:/digits/1"), runs) == first
    assert resolve(Path("digits/model"), runs) == first
    assert resolve(first, runs) == first
    files = tracking.client(runs).list_artifacts(tracker.run_id, "model")
    assert [file.path for file in files] == ["model/card.json"]

    saved(first, 2)  # trained again: the alias moves on
    with pytest.raises(RequestError, match="another model now"):
        resolve(Path("models:/digits@model"), runs)
    assert register(runs, "digits", "model", first, tracker.run_id) == "3"
    assert resolve(Path("models:/digits@model"), runs) == first

    shutil.rmtree(other)
    with pytest.raises(RequestError, match="no model folder here"):
        resolve(Path("models:/digits@other"), runs)
    for wrong in ("models:/digits@nobody", "models:/nothing@model", "models:/digits/99"):
        with pytest.raises(RequestError, match="not in MLflow at"):
            resolve(Path(wrong), runs)
    with pytest.raises(RequestError, match="write it as"):
        resolve(Path("models:/digits"), runs)


def test_a_model_goes_with_a_runs_folder_that_is_moved_or_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = Path("models:/digits@model")
    runs = tmp_path / "here" / "runs"
    tracker = Tracker(runs, "digits", "model")
    tracker.finish("FINISHED")
    assert tracker.run_id is not None
    first = saved(runs / "digits" / "model", 0)
    assert register(runs, "digits", "model", first, tracker.run_id) == "1"
    copy = tmp_path / "copy" / "runs"
    shutil.copytree(runs, copy)
    assert resolve(alias, copy) == copy / "digits" / "model"
    assert resolve(alias, runs) == first
    monkeypatch.chdir(copy.parent)
    assert resolve(alias) == Path("runs/digits/model")

    saved(copy / "digits" / "model", 1)  # another, not registered: the recorded one is meant
    assert resolve(alias, copy) == first
    moved = tmp_path / "moved"
    runs.parent.rename(moved)
    assert resolve(alias, moved / "runs") == moved / "runs" / "digits" / "model"
    with pytest.raises(RequestError, match="copy/runs/digits/model holds another model now"):
        resolve(alias, copy)
    shutil.rmtree(copy / "digits" / "model")
    both = "copy/runs/digits/model or .*here/runs/digits/model, which is no model folder here"
    with pytest.raises(RequestError, match=both):
        resolve(alias, copy)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved / 'runs' / 'mlflow.db'}")
    with pytest.raises(RequestError, match="is of [^ ]*here/runs/digits/model, which is no"):
        resolve(alias, moved / "runs")  # a store that is not the folder's says where


def test_a_path_that_is_no_model_is_refused_and_the_nearest_named(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folder = saved(runs / "digits" / "digits_model", 0)
    (folder / MANIFEST).write_text(json.dumps({"job": "handoff"}))
    tokens = runs / "digits" / "digits_tokens"
    tokens.mkdir()
    (tokens / MANIFEST).write_text(json.dumps({"job": "pretokenize"}))
    for wrong in (runs / "digits" / "digits_modell", Path("digits/digits_modl")):
        with pytest.raises(
            RequestError, match="no such folder; did you mean 'digits/digits_model'"
        ):
            resolve(wrong, runs)
    with pytest.raises(RequestError, match="digits_tokens: no model there: neither card.json nor"):
        resolve(tokens, runs)
    with pytest.raises(RequestError, match="nothing: no such folder$"):
        resolve(tmp_path / "nothing", tmp_path)


def test_a_registry_that_is_away_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(tmp_path / "model", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert register(tmp_path, "digits", "model", model, "0" * 32) is None
    assert "not registered" in capsys.readouterr().err


def test_one_model_several_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line calls for every argument and option that is a model."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "runs" / "digits" / "model", 0)
    below, given = Path("runs/digits/model"), Path("digits/model")
    assert model_folders(None) is None
    assert model_folders(given) == below
    assert model_folders([given, below]) == [below, below]
