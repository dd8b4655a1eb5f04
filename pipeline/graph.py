"""A pipeline: its stages in order, their fingerprints, and the state each is in.

A stage is a job's name, its inputs (names of other stages, or the folder of a published
artifact, written with a slash), its resources, and the job's own settings.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from chainrule.pipeline import catalogue
from chainrule.pipeline.artifact import (
    ATTEMPT,
    MANIFEST,
    Artifact,
    is_locked,
    lock_holder,
    partial_folder,
    read_json,
)
from chainrule.pipeline.config import RequestError, Resources, Settings, digest, result_settings
from chainrule.pipeline.sources import source_digest
from chainrule.pipeline.stage import Input


@dataclass(frozen=True)
class StageSpec:
    """One stage as the file says it, validated."""

    name: str
    job: str
    config: Settings
    inputs: dict[str, list[str]]
    resources: Resources

    @property
    def module(self) -> ModuleType:
        return catalogue.job_module(self.job)

    @property
    def roles(self) -> dict[str, Input]:
        return self.module.INPUTS

    def upstream(self) -> list[str]:
        """Names of the stages it reads (folders of other artifacts are left out)."""
        return [name for names in self.inputs.values() for name in names if not is_folder(name)]

    def merged(self) -> dict[str, Any]:
        """The merged settings, as stored in the artifact's config.yaml."""
        return {
            "job": self.job,
            "inputs": {role: names for role, names in self.inputs.items()},
            "resources": self.resources.model_dump(mode="json", exclude_defaults=True),
            **self.config.model_dump(mode="json"),
        }


def is_folder(reference: str) -> bool:
    return "/" in reference


class State(StrEnum):
    NEW = "new"
    FRESH = "fresh"
    STALE = "stale"
    UNFINISHED = "unfinished"
    RUNNING = "running"
    FAILED = "failed"


@dataclass
class Pipeline:
    """A pipeline file, its stages in an order in which they can be run."""

    name: str
    path: Path
    runs: Path
    stages: dict[str, StageSpec]
    overrides: list[str] = field(default_factory=list)
    without_source: dict[str, str] = field(default_factory=dict)
    """Stages whose raw data are gone, and what is said of them."""
    _fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.runs / self.name

    def folder(self, stage: str) -> Path:
        """Where a stage's published artifact lies (or the folder that the input names)."""
        return Path(stage) if is_folder(stage) else self.root / stage

    def fingerprint(self, stage: str) -> str:
        """hash(job, settings that change the result, fingerprints of the inputs)."""
        if is_folder(stage):
            return Artifact.open(stage).fingerprint
        if stage not in self._fingerprints:
            spec = self.stages[stage]
            content: dict[str, Any] = {
                "job": spec.job,
                "settings": result_settings(spec.config),
                "inputs": {
                    role: [self.fingerprint(name) for name in names]
                    for role, names in sorted(spec.inputs.items())
                },
            }
            if hasattr(spec.module, "source_files"):
                try:
                    files = spec.module.source_files(spec.config)
                except RequestError as error:
                    if not self._is_as_asked(stage):
                        raise RequestError(f"stage '{stage}': {error}") from None
                    # Raw data that were moved away since: what was made of them stands.
                    self.without_source[stage] = str(error)
                    manifest = read_json(self.folder(stage) / MANIFEST)
                    self._fingerprints[stage] = manifest["fingerprint"]
                    return self._fingerprints[stage]
                content["source"] = source_digest(files, self.root / ".sources" / f"{stage}.json")
            self._fingerprints[stage] = digest(content)
        return self._fingerprints[stage]

    def _is_as_asked(self, stage: str) -> bool:
        """Whether there is an artifact, made with the settings that are asked for now."""
        folder = self.folder(stage)
        if not (folder / MANIFEST).is_file():
            return False
        return not self._changed_settings(stage)

    def _changed_settings(self, stage: str) -> list[str]:
        """Of the settings that decide the result, those that are others than the artifact's."""
        spec = self.stages[stage]
        wanted = {"job": spec.job, **result_settings(spec.config)}
        stored = yaml.safe_load((self.folder(stage) / "config.yaml").read_text())
        return list(_differences(_of_keys(wanted, stored), wanted))

    def downstream(self, stage: str) -> set[str]:
        """The stage and all that hang on it."""
        found = {stage}
        for name, spec in self.stages.items():  # topological order: one pass is enough
            if found.intersection(spec.upstream()):
                found.add(name)
        return found

    def upstream(self, stage: str) -> set[str]:
        """The stage and all that it hangs on."""
        found = {stage}
        for name in self.stages[stage].upstream():
            found |= self.upstream(name)
        return found

    def check(self, stages: Iterable[str]) -> None:
        """Let the jobs refuse, before anything runs, what could only fail later. RequestError."""
        for name in stages:
            spec = self.stages[name]
            if hasattr(spec.module, "check"):
                spec.module.check(self, spec)

    def state(self, stage: str) -> tuple[State, str]:
        """The state of a stage and why, in words."""
        folder = self.folder(stage)
        if is_locked(folder):
            return State.RUNNING, lock_holder(folder)
        wanted = self.fingerprint(stage)
        attempt = _attempt(partial_folder(folder), wanted)
        published = (folder / MANIFEST).is_file()
        if published and read_json(folder / MANIFEST).get("fingerprint") == wanted:
            gone = self.without_source.get(stage)
            return State.FRESH, f"done (its raw data are gone: {gone})" if gone else "done"
        if attempt is not None:
            if "failed" in attempt:
                return State.FAILED, attempt["failed"]["error"]
            return State.UNFINISHED, "an earlier attempt was cut off; it will be resumed"
        if published:
            return State.STALE, self._why_stale(stage)
        if (partial_folder(folder) / ATTEMPT).is_file():
            return State.NEW, "what was begun was under other settings or inputs; it begins anew"
        return State.NEW, "never run"

    def _why_stale(self, stage: str) -> str:
        folder = self.folder(stage)
        manifest = read_json(folder / MANIFEST)
        for role, names in self.stages[stage].inputs.items():
            before = [entry["fingerprint"] for entry in manifest["inputs"].get(role, [])]
            if before != [self.fingerprint(name) for name in names]:
                return f"input {role} ({', '.join(names)}) changed"
        return "; ".join(self._changed_settings(stage)[:3]) or "the source files changed"


def _attempt(partial: Path, fingerprint: str) -> dict[str, Any] | None:
    if not (partial / ATTEMPT).is_file():
        return None
    attempt = read_json(partial / ATTEMPT)
    return attempt if attempt["fingerprint"] == fingerprint else None


def _of_keys(pattern: Any, value: Any) -> Any:
    """`value` without the keys that `pattern` has not, on every level."""
    if not (isinstance(pattern, dict) and isinstance(value, dict)):
        return value
    return {key: _of_keys(pattern[key], item) for key, item in value.items() if key in pattern}


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from _differences(
                before.get(key), after.get(key), f"{path}.{key}" if path else str(key)
            )
    elif before != after:
        yield f"{path}: {_short(before)} → {_short(after)}"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
