"""The pipeline file: parsing, stages in order, fingerprints, and the state of each stage.

    name: digits
    stages:
      data:      {job: ingest, source: {kind: image-folder, path: pictures}}
      tokenizer: {job: train_tokenizer, inputs: {data: data}, ...}

A stage is a job's name, its inputs (names of other stages, or the folder of a published
artifact, written with a slash), its resources, and the job's own settings. A job is the
file `jobs/<name>.py`: its `Config`, its `INPUTS`, its `main`.
"""

import importlib
import importlib.resources
import pkgutil
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import yaml

from chainrule.pipeline.artifact import (
    ATTEMPT,
    MANIFEST,
    Artifact,
    is_locked,
    lock_holder,
    partial_folder,
    read_json,
)
from chainrule.pipeline.config import (
    RequestError,
    Resources,
    Settings,
    digest,
    explain,
    nearest,
    result_settings,
)
from chainrule.pipeline.sources import source_digest
from chainrule.pipeline.stage import Input

RESERVED = ("job", "inputs", "resources")
TOP_KEYS = ("name", "runs", "stages")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number (YAML 1.1 wants `1.0e-3`) and keys are unique."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def job_names() -> list[str]:
    jobs = importlib.import_module("chainrule.jobs")
    return sorted(
        name for _, name, _ in pkgutil.iter_modules(jobs.__path__) if not name.startswith("_")
    )


def job_module(name: str) -> ModuleType:
    """The module of a job that can be a stage; RequestError for any other name."""
    if name in job_names():
        module = importlib.import_module(f"chainrule.jobs.{name}")
        if hasattr(module, "Config") and hasattr(module, "INPUTS"):
            return module
    raise RequestError(f"unknown job '{name}'{nearest(name, stage_jobs())}")


def stage_jobs() -> list[str]:
    """Jobs that a pipeline file may name."""
    return [
        name
        for name in job_names()
        if hasattr(importlib.import_module(f"chainrule.jobs.{name}"), "INPUTS")
    ]


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
        return job_module(self.job)

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
                files = spec.module.source_files(spec.config)
                content["source"] = source_digest(files, self.root / ".sources" / f"{stage}.json")
            self._fingerprints[stage] = digest(content)
        return self._fingerprints[stage]

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

    def state(self, stage: str) -> tuple[State, str]:
        """The state of a stage and why, in words."""
        folder = self.folder(stage)
        if is_locked(folder):
            return State.RUNNING, lock_holder(folder)
        wanted = self.fingerprint(stage)
        attempt = _attempt(partial_folder(folder), wanted)
        published = (folder / MANIFEST).is_file()
        if published and read_json(folder / MANIFEST).get("fingerprint") == wanted:
            return State.FRESH, "done"
        if attempt is not None:
            if "failed" in attempt:
                return State.FAILED, attempt["failed"]["error"]
            return State.UNFINISHED, "an earlier attempt was cut off; it will be resumed"
        if published:
            return State.STALE, self._why_stale(stage)
        return State.NEW, "never run"

    def _why_stale(self, stage: str) -> str:
        folder = self.folder(stage)
        manifest = read_json(folder / MANIFEST)
        for role, names in self.stages[stage].inputs.items():
            before = [entry["fingerprint"] for entry in manifest["inputs"].get(role, [])]
            if before != [self.fingerprint(name) for name in names]:
                return f"input {role} ({', '.join(names)}) changed"
        stored = yaml.safe_load((folder / "config.yaml").read_text())
        differences = list(_differences(stored, self.stages[stage].merged()))
        changed = [d for d in differences if not d.startswith(("resources", "inputs"))]
        return "; ".join(changed[:3]) or "the source files changed"


def _attempt(partial: Path, fingerprint: str) -> dict[str, Any] | None:
    if not (partial / ATTEMPT).is_file():
        return None
    attempt = read_json(partial / ATTEMPT)
    return attempt if attempt["fingerprint"] == fingerprint else None


def _differences(before: Any, after: Any, path: str = "") -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from _differences(
                before.get(key), after.get(key), f"{path}.{key}" if path else str(key)
            )
    elif before != after:
        yield f"{path}: {_short(before)} → {_short(after)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def find_config(given: str | Path) -> Path:
    """A YAML file by path, or one of the configs that come with the package by name."""
    path = Path(given)
    if path.is_file():
        return path
    if path.is_dir():
        raise RequestError(f"{path}: a folder; give a pipeline file (.yaml)")
    shipped = importlib.resources.files("chainrule.configs")
    names = sorted(p.name for p in shipped.iterdir() if p.name.endswith(".yaml"))
    if path.parent == Path(".") and f"{path.stem}.yaml" in names:
        with importlib.resources.as_file(shipped / f"{path.stem}.yaml") as found:
            return found
    raise RequestError(f"{path}: no such file{nearest(path.stem, [n[:-5] for n in names])}")


def load_pipeline(
    config: str | Path, overrides: list[str] | None = None, runs: str | Path | None = None
) -> Pipeline:
    """Parse and validate a pipeline file; RequestError names file, line, key and remedy."""
    path = find_config(config)
    overrides = overrides or []
    document = _Document(path)
    for override in overrides:
        document.override(override)
    return document.pipeline(runs, overrides)


class _Document:
    """A YAML document with the line of every key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple, int] = {}
        try:
            node = yaml.compose(path.read_text(), Loader=_Loader)
            if node is not None:
                self._index(node, ())
            value = yaml.load(path.read_text(), Loader=_Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise RequestError(f"{path}{line}: not valid YAML: {problem}") from None
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}: not UTF-8 text ({error.reason})") from None
        if not isinstance(value, dict):
            raise RequestError(f"{path}: expected a mapping with 'name' and 'stages'")
        self.value: dict[str, Any] = value

    def _index(self, node: yaml.Node, path: tuple) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, child in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen and key.value != "<<":
                        raise RequestError(
                            f"{self.path}:{key.start_mark.line + 1}: key '{key.value}' given twice"
                        )
                    seen.add(key.value)
                    self.lines[(*path, key.value)] = key.start_mark.line + 1
                    self._index(child, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, child in enumerate(node.value):
                self.lines[(*path, str(i))] = child.start_mark.line + 1
                self._index(child, (*path, str(i)))

    def override(self, text: str) -> None:
        """Apply one `a.b=v`; `stages.` may be left out before a stage's name."""
        name, equals, raw = text.partition("=")
        if not equals or not name.strip():
            raise RequestError(f"--set {text}: write it as key.subkey=value")
        keys = name.strip().split(".")
        stages = self.value.get("stages")
        if keys[0] not in TOP_KEYS and isinstance(stages, dict):
            if keys[0] not in stages:
                near = nearest(keys[0], [str(s) for s in stages])
                raise RequestError(f"--set {text}: no stage '{keys[0]}'{near}")
            keys = ["stages", *keys]
        try:
            value = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:
            raise RequestError(f"--set {text}: the value is not valid YAML") from None
        target: Any = self.value
        for key in keys[:-1]:
            if not isinstance(target, dict):
                raise RequestError(f"--set {text}: '{key}' lies inside a value that has no keys")
            target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise RequestError(f"--set {text}: '{keys[-1]}' lies inside a value that has no keys")
        target[keys[-1]] = value
        self.lines = {k: v for k, v in self.lines.items() if k[: len(keys)] != tuple(keys)}

    def fault(self, location: tuple, message: str) -> RequestError:
        """A RequestError that names the file and the nearest line known for `location`."""
        keys = tuple(str(part) for part in location)
        while keys and keys not in self.lines:
            keys = keys[:-1]
        line = f":{self.lines[keys]}" if keys else ""
        return RequestError(f"{self.path}{line}: {message}")

    def pipeline(self, runs: str | Path | None, overrides: list[str]) -> Pipeline:
        for key in self.value:
            if key not in TOP_KEYS:
                raise self.fault((key,), f"unknown key '{key}'{nearest(str(key), list(TOP_KEYS))}")
        name = self.value.get("name", self.path.stem)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise self.fault(("name",), f"'name': letters, digits, - and _ only (given: {name!r})")
        stages = self.value.get("stages")
        if not isinstance(stages, dict) or not stages:
            raise self.fault(("stages",), "'stages' must map stage names to stages")
        specs = {str(key): self._stage(str(key), value) for key, value in stages.items()}
        self._check_inputs(specs)
        root = Path(runs if runs is not None else self.value.get("runs", "runs"))
        return Pipeline(name, self.path, root, self._ordered(specs), overrides)

    def _stage(self, name: str, value: Any) -> StageSpec:
        where = ("stages", name)
        if not NAME.fullmatch(name):
            raise self.fault(where, f"stage name '{name}': letters, digits, - and _ only")
        if not isinstance(value, dict) or "job" not in value:
            raise self.fault(where, f"stage '{name}': 'job' is missing")
        try:
            module = job_module(str(value["job"]))
        except RequestError as error:
            raise self.fault((*where, "job"), f"stage '{name}': {error}") from None
        inputs = value.get("inputs") or {}
        if not isinstance(inputs, dict):
            raise self.fault((*where, "inputs"), f"stage '{name}': 'inputs' maps roles to stages")
        settings = {key: item for key, item in value.items() if key not in RESERVED}
        return StageSpec(
            name=name,
            job=value["job"],
            config=self._validated(module.Config, settings, where, extra=RESERVED),
            inputs={
                str(role): [str(n) for n in (names if isinstance(names, list) else [names])]
                for role, names in inputs.items()
            },
            resources=self._validated(
                Resources, value.get("resources") or {}, (*where, "resources")
            ),
        )

    def _validated(
        self, model: type[Any], value: Any, where: tuple, extra: tuple[str, ...] = ()
    ) -> Any:
        try:
            return model.model_validate(value)
        except pydantic.ValidationError as error:
            location, message = explain(error, model, value)[0]
            known = list(model.model_fields) + list(extra)
            if len(location) == 1 and message.startswith("unknown key"):
                message = f"unknown key '{location[0]}'{nearest(str(location[0]), known)}"
            stage = f"stage '{where[1]}': " if len(where) > 1 else ""
            raise self.fault((*where, *location), stage + message) from None

    def _check_inputs(self, specs: dict[str, StageSpec]) -> None:
        for spec in specs.values():
            where = ("stages", spec.name, "inputs")
            said = f"stage '{spec.name}'"
            for role, names in spec.inputs.items():
                if role not in spec.roles:
                    raise self.fault(
                        (*where, role),
                        f"{said}: job {spec.job} has no input '{role}'"
                        f"{nearest(role, list(spec.roles))}",
                    )
                if len(names) != 1 and not spec.roles[role].many:
                    raise self.fault((*where, role), f"{said}: input '{role}' takes one stage")
                for name in names:
                    self._check_reference(spec, role, name, specs)
            for role, wanted in spec.roles.items():
                if role not in spec.inputs and not wanted.optional:
                    raise self.fault(
                        where,
                        f"{said}: input '{role}' is missing; name a stage of job "
                        f"{' or '.join(wanted.jobs)}",
                    )

    def _check_reference(
        self, spec: StageSpec, role: str, name: str, specs: dict[str, StageSpec]
    ) -> None:
        where = ("stages", spec.name, "inputs", role)
        wanted = spec.roles[role].jobs
        if is_folder(name):
            artifact = Artifact.open(name)  # names the folder and the remedy itself
            job = artifact.manifest.get("job")
        elif name in specs:
            job = specs[name].job
        else:
            raise self.fault(
                where,
                f"stage '{spec.name}': input '{role}' names '{name}', which is no stage"
                f"{nearest(name, list(specs))}",
            )
        if job not in wanted:
            raise self.fault(
                where,
                f"stage '{spec.name}': input '{role}' needs a stage of job {' or '.join(wanted)}, "
                f"'{name}' is {job}",
            )

    def _ordered(self, specs: dict[str, StageSpec]) -> dict[str, StageSpec]:
        """Topological order that keeps the file's order wherever it may."""
        ordered: dict[str, StageSpec] = {}
        visiting: list[str] = []

        def visit(name: str) -> None:
            if name in ordered:
                return
            if name in visiting:
                cycle = [*visiting[visiting.index(name) :], name]
                raise self.fault(
                    ("stages", name, "inputs"), f"the stages form a cycle: {' → '.join(cycle)}"
                )
            visiting.append(name)
            for upstream in specs[name].upstream():
                visit(upstream)
            visiting.pop()
            ordered[name] = specs[name]

        for name in specs:
            visit(name)
        return ordered


def json_schema() -> dict[str, Any]:
    """A JSON schema of pipeline files, for editors that complete YAML."""
    definitions: dict[str, Any] = {}
    stages = []
    for job in stage_jobs():
        module = job_module(job)
        schema = module.Config.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        roles = {
            role: {"type": ["string", "array"], "items": {"type": "string"}}
            for role in module.INPUTS
        }
        resources = Resources.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(resources.pop("$defs", {}))
        stages.append(
            {
                "title": job,
                "type": "object",
                "properties": {
                    "job": {"const": job},
                    "inputs": {
                        "type": "object",
                        "properties": roles,
                        "additionalProperties": False,
                    },
                    "resources": resources,
                    **schema.get("properties", {}),
                },
                "required": ["job", *schema.get("required", [])],
                "additionalProperties": False,
            }
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "chainrule pipeline",
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "runs": {"type": "string"},
            "stages": {"type": "object", "additionalProperties": {"oneOf": stages}},
        },
        "required": ["stages"],
        "additionalProperties": False,
        "$defs": definitions,
    }
