"""Reading a pipeline file: YAML and overrides in, a validated `Pipeline` out.

Every fault is a RequestError that names the file and the line (or the `--set`), the key and the
nearest known key. Defaults < YAML < `--set a.b=v`.
"""

import importlib.resources
import re
from pathlib import Path
from typing import Any

import pydantic
import yaml

from chainrule.pipeline.artifact import MANIFEST, Artifact, ArtifactError
from chainrule.pipeline.catalogue import job_module
from chainrule.pipeline.config import RequestError, Resources, explain, nearest
from chainrule.pipeline.graph import Pipeline, StageSpec, is_folder

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
        self.overridden: list[tuple[tuple, str]] = []
        """Keys and text of each `--set`, in order."""
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
        self.overridden.append((tuple(keys), text))

    def fault(self, location: tuple, message: str) -> RequestError:
        """A RequestError that names the `--set` that gave what is at `location`, or else the file,
        the nearest line known for it, and each `--set` inside it."""
        keys = tuple(str(part) for part in location)
        for given, text in reversed(self.overridden):
            if keys[: len(given)] == given:
                return RequestError(f"--set {text}: {message}")
        of_a_setting = len(keys) > len(("stages", "name"))
        inside = [t for g, t in self.overridden if of_a_setting and g[: len(keys)] == keys]
        changed = f" with --set {' --set '.join(inside)}" if inside else ""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        line = f":{self.lines[keys]}" if keys else ""
        return RequestError(f"{self.path}{line}{changed}: {message}")

    def pipeline(self, runs: str | Path | None, overrides: list[str]) -> Pipeline:
        for key in self.value:
            if key not in TOP_KEYS:
                raise self.fault((key,), f"unknown key '{key}'{nearest(str(key), list(TOP_KEYS))}")
        name = self.value.get("name", self.path.stem)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            remedy = f'; write it in quotes: "{name}"' if not isinstance(name, str) else ""
            raise self.fault(
                ("name",), f"'name': letters, digits, - and _ only (given: {name!r}){remedy}"
            )
        stages = self.value.get("stages")
        if not isinstance(stages, dict) or not stages:
            raise self.fault(("stages",), "'stages' must map stage names to stages")
        specs = {str(key): self._stage(str(key), value) for key, value in stages.items()}
        self._check_inputs(specs)
        root = Path(runs if runs is not None else self.value.get("runs", "runs"))
        there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise RequestError(f"runs {root}: {there} is a file, not a folder")
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
            try:
                job = Artifact.open(name).manifest.get("job")
            except ArtifactError as error:
                below = Path(self.value.get("runs", "runs")) / name
                hint = f"; did you mean '{below}'?" if (below / MANIFEST).is_file() else ""
                raise self.fault(
                    where, f"stage '{spec.name}': input '{role}': {error}{hint}"
                ) from None
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
