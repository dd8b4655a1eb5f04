"""A pipeline: its stages in order, their fingerprints, and the state each is in.

A stage is a job's name, its inputs (names of other stages, or the folder of a published
artifact, written with a slash), its resources, and the job's own settings.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from chainrule.pipeline import catalogue
from chainrule.pipeline.artifact import (
    ATTEMPT,
    MANIFEST,
    Artifact,
    aside_folder,
    is_locked,
    lock_holder,
    partial_folder,
    read_json,
)
from chainrule.pipeline.config import (
    RequestError,
    Resources,
    Settings,
    changed_settings,
    digest,
    result_settings,
)
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
    _requests: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.runs / self.name

    def folder(self, stage: str) -> Path:
        """Where a stage's published artifact lies (or the folder that the input names)."""
        return Path(stage) if is_folder(stage) else self.root / stage

    def fingerprint(self, stage: str) -> str:
        """hash(job, settings that change the result, fingerprints of the inputs, raw files).

        Of what an earlier version of this program made or began, and would be asked for in the
        same words today, it is the one that this had: a new setting is no reason to train again.
        """
        if is_folder(stage):
            return Artifact.open(stage).fingerprint
        if stage not in self._fingerprints:
            made = self._made(stage)
            self._fingerprints[stage] = made if made is not None else digest(self.request(stage))
        return self._fingerprints[stage]

    def request(self, stage: str) -> dict[str, Any]:
        """What decides a stage's result. RequestError where raw files are not there."""
        if stage not in self._requests:
            self._requests[stage] = self._request(stage)
        return self._requests[stage]

    def _request(self, stage: str) -> dict[str, Any]:
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
                raise RequestError(f"stage '{stage}': {error}") from None
            content["source"] = source_digest(files, self.root / ".sources" / f"{stage}.json")
        return content

    def _made(self, stage: str) -> str | None:
        """The fingerprint of what was made, or else begun, for the same request."""
        folder = self.folder(stage)
        for path in (folder / MANIFEST, partial_folder(folder) / ATTEMPT):
            if not path.is_file():
                continue
            record = read_json(path)
            then = record.get("request")
            if then is None or self._changed_settings(stage, then):
                continue
            try:
                now = self.request(stage)
            except RequestError as error:
                if path.name != MANIFEST:
                    raise
                # Raw data that were moved away since: what was made of them stands.
                self.without_source[stage] = str(error).removeprefix(f"stage '{stage}': ")
                return str(record["fingerprint"])
            if all(now.get(key) == then.get(key) for key in ("inputs", "source")):
                return str(record["fingerprint"])
        return None

    def _changed_settings(self, stage: str, then: dict[str, Any]) -> list[str]:
        """What a request of before had other than this one, in words."""
        spec = self.stages[stage]
        if then["job"] != spec.job:
            return [f"job: {then['job']} → {spec.job}"]
        return list(changed_settings(spec.config, then["settings"]))

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
        if aside_folder(folder, wanted).is_dir():
            return State.UNFINISHED, "what was put aside for these settings will be resumed"
        if published:
            return State.STALE, self._why_stale(stage)
        if (partial_folder(folder) / ATTEMPT).is_file():
            return State.NEW, (
                "what was begun was under other settings or inputs and is put aside; it begins anew"
            )
        return State.NEW, "never run"

    def _why_stale(self, stage: str) -> str:
        folder = self.folder(stage)
        manifest = read_json(folder / MANIFEST)
        for role, names in self.stages[stage].inputs.items():
            before = [entry["fingerprint"] for entry in manifest["inputs"].get(role, [])]
            if before != [self.fingerprint(name) for name in names]:
                return f"input {role} ({', '.join(names)}) changed"
        if "request" not in manifest:
            return "made before artifacts said what they were asked for"
        changed = self._changed_settings(stage, manifest["request"])
        return "; ".join(changed[:3]) or "the source files changed"


def _attempt(partial: Path, fingerprint: str) -> dict[str, Any] | None:
    if not (partial / ATTEMPT).is_file():
        return None
    attempt = read_json(partial / ATTEMPT)
    return attempt if attempt["fingerprint"] == fingerprint else None
