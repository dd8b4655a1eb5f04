"""MLflow's model registry: handed-off models by name, `models:/PIPELINE@STAGE`.

A registered model bears the pipeline's name. Each handoff makes a version of it, with the
model's card as its content; the tags say which folder holds the weights and what fingerprint
they have. An alias of the stage's name leads to the newest version. In the store of a runs
folder that was moved or copied, the model is the one beside it, not the one where it was made.

The registry is where the runs are (`tracking.tracking_uri`). Like tracking it never stops a
stage: what it refuses is said, and the folder is the model all the same.
"""

import sys
from pathlib import Path
from typing import Any

from chainrule.pipeline.artifact import A_TRAINING, MANIFEST, is_training, read_json
from chainrule.pipeline.config import RequestError, nearest
from chainrule.pipeline.tracking import client, is_local, tracking_uri

SCHEME = "models:/"
FOLDER, FINGERPRINT, STAGE = "chainrule.folder", "chainrule.fingerprint", "chainrule.stage"
CARD, THEIRS = "card.json", "config.json"


def register(runs: Path, pipeline: str, stage: str, folder: Path, run_id: str) -> str | None:
    """Make the model in `folder` a version of `pipeline`; the version, or None if refused.

    `run_id`: the MLflow run of the handoff, which gets the card as an artifact.
    """
    from mlflow.exceptions import MlflowException

    fingerprint = str(read_json(folder / CARD)["fingerprint"])
    try:
        store = client(runs)
        version = _version_of(store, pipeline, stage, folder, fingerprint)
        if version is None:
            _make_model(store, pipeline)
            store.log_artifact(run_id, str(folder / CARD), "model")
            version = store.create_model_version(
                pipeline,
                f"runs:/{run_id}/model",
                run_id,
                tags={FOLDER: str(folder.absolute()), FINGERPRINT: fingerprint, STAGE: stage},
            ).version
        store.set_registered_model_alias(pipeline, stage, version)
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        sys.stderr.write(f"  MLflow at {tracking_uri(runs)}: not registered: {reason}\n")
        return None
    return str(version)


def _make_model(store: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(store: Any, name: str, stage: str, folder: Path, fingerprint: str) -> str | None:
    """The version that this very model has, if it was registered before."""
    for version in store.search_model_versions(f"name = '{name}'"):
        tags = version.tags
        if (tags.get(STAGE), tags.get(FOLDER), tags.get(FINGERPRINT)) == (
            stage,
            str(folder.absolute()),
            fingerprint,
        ):
            return str(version.version)
    return None


def resolve(model: Path, runs: Path = Path("runs")) -> Path:
    """The folder that `model` means: a path, `PIPELINE/STAGE` below `runs`, or a registered
    model, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    RequestError for a name that is not registered, or whose folder holds another model now, and
    for a folder that is none of a model.
    """
    name = model.as_posix()
    if not name.startswith(SCHEME):
        below = runs / model
        folder = below if not model.exists() and (below / CARD).is_file() else model
        if any((folder / file).is_file() for file in (CARD, THEIRS)):
            return folder
        there = folder if folder.is_dir() else below
        known = _handed_off(runs)
        fault = "no such folder"
        if is_training(there):
            fault, same = A_TRAINING, f"{there.resolve().parent.name}/"
            known = [title for title in known if title.startswith(same)] or known
        elif there.is_dir():
            fault = f"no model there: neither {CARD} nor, of transformers, {THEIRS}"
        raise RequestError(f"{name}: {fault}{nearest('/'.join(model.parts[-2:]), known)}")
    from mlflow.exceptions import MlflowException

    wanted = name.removeprefix(SCHEME)
    title, at, alias = wanted.partition("@")
    number = ""
    if not at:
        title, _, number = wanted.rpartition("/")
    if not title or not (alias or number):
        raise RequestError(f"{name}: write it as models:/NAME@ALIAS or models:/NAME/VERSION")
    uri = tracking_uri(runs)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise RequestError(f"{name}: nothing is registered in {runs}: there is no mlflow.db")
    try:
        store = client(runs)
        version = (
            store.get_model_version_by_alias(title, alias)
            if at
            else store.get_model_version(title, number)
        )
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"{name}: not in MLflow at {tracking_uri(runs)}: {reason}") from None
    return _folder_of(version, title, runs, name)


def _folder_of(version: Any, title: str, runs: Path, name: str) -> Path:
    """Where a registered model lies now: below `runs`, where that has the store, if it is the
    registered one; else where it was registered. RequestError, about `name`, for neither."""
    tags = version.tags
    candidates = [Path(tags[FOLDER])] if tags.get(FOLDER) else []
    if is_local() and tags.get(STAGE):
        candidates.insert(0, runs / title / tags[STAGE])
    other = None
    for folder in candidates:
        if not (folder / CARD).is_file():
            continue
        found = str(read_json(folder / CARD).get("fingerprint"))
        if found == tags.get(FINGERPRINT):
            return folder
        other = other or (folder, found)
    if other is not None:
        folder, found = other
        raise RequestError(
            f"{name}: {folder} holds another model now: {found[:16]}, registered was "
            f"{tags.get(FINGERPRINT, '')[:16]}; take the path itself, or hand it off again"
        )
    places = " or ".join(str(folder) for folder in candidates) or "another maker"
    raise RequestError(
        f"{name}: version {version.version} is of {places}, which is no model folder here; "
        "hand it off again"
    )


def _handed_off(runs: Path) -> list[str]:
    """The models below `runs`, as they may be named."""
    return [
        path.parent.relative_to(runs).as_posix()
        for path in sorted(runs.glob(f"*/*/{MANIFEST}"))
        if read_json(path).get("job") in ("handoff", "distill")
    ]
