"""Settings: defaults < YAML < ``--set`` overrides, strict, one flow.

Every settings class of the project derives from :class:`Settings` and stands beside
what it configures. A field made with :func:`runtime` does not change a result
(logging, resources, worker counts): it never enters a stage's fingerprint.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

SEEDS = 2**63
"""Torch's generators take one more bit, NumPy's any number, neither one below 0."""


class RequestError(Exception):
    """The request is wrong: one or two lines for stderr, exit code 2, no traceback."""


class Settings(BaseModel):
    """Strict and immutable: an unknown key or a wrong type is an error, and so is a number that is
    not finite, or a seed that not every generator takes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _seeds_of_generators(cls, value: Any, info: ValidationInfo) -> Any:
        seed = info.field_name is not None and info.field_name.endswith("seed")
        if seed and isinstance(value, int) and not 0 <= value < SEEDS:
            raise ValueError("a seed is a whole number from 0 to 2^63 - 1")
        return value


class Resources(Settings):
    """What a stage may use. Never part of a fingerprint.

    Fields without a meaning on one machine (partition, account, ...) are read by `submit`.
    """

    processes: int = Field(1, ge=1, description="ranks started for this stage (a node, on Slurm)")
    nodes: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0, description="GPUs a node; one rank a GPU")
    gpu_type: str | None = None
    cpus: int | None = Field(None, ge=1, description="CPU cores a rank")
    memory: str | None = Field(None, description="a node, as Slurm writes it: 64G")
    time: str | None = Field(None, description="time limit, as Slurm writes it: 1-00:00:00")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: int | None = Field(None, ge=1, description="array tasks (pretokenize, sample)")
    array_limit: int | None = Field(None, ge=1, description="array tasks running at once")


def runtime(default: Any, **kwargs: Any) -> Any:
    """A field that does not change the result and so stays out of the fingerprint."""
    return Field(default, json_schema_extra={"runtime": True}, **kwargs)


def result_settings(settings: BaseModel) -> dict[str, Any]:
    """The settings that change the result, as plain JSON values (runtime fields left out)."""
    return {name: _plain(getattr(settings, name)) for name in _decisive(type(settings))}


def changed_settings(settings: BaseModel, then: dict[str, Any], path: str = "") -> Iterator[str]:
    """What `settings` ask for other than `result_settings` said `then`, in words.

    Only what could have been asked for then counts: a setting that the program got since decides
    nothing at its default, one that no longer changes the result nothing at all.
    """
    fields = type(settings).model_fields
    decisive = _decisive(type(settings))
    for name in decisive:
        value, where = getattr(settings, name), f"{path}{name}"
        if name in then:
            yield from _changed(value, then[name], where)
        elif _plain(value) != _plain(fields[name].get_default(call_default_factory=True)):
            yield f"{where}: not given → {_short(value)}"
    for name in sorted(set(then) - set(fields)):
        yield f"{path}{name}: {_short(then[name])} → not given"


def _changed(now: Any, then: Any, where: str) -> Iterator[str]:
    if isinstance(now, BaseModel) and isinstance(then, dict):
        yield from changed_settings(now, then, f"{where}.")
    elif isinstance(now, dict) and isinstance(then, dict):
        have = {str(k): v for k, v in now.items()}
        for key in sorted({*have, *then}):
            yield from _changed(have.get(key), then.get(key), f"{where}.{key}")
    elif isinstance(now, list | tuple) and isinstance(then, list) and len(now) == len(then):
        for i, (new, old) in enumerate(zip(now, then, strict=True)):
            yield from _changed(new, old, f"{where}[{i}]")
    elif _plain(now) != then:
        yield f"{where}: {_short(then)} → {_short(now)}"


def _short(value: Any) -> str:
    text = "not given" if value is None else str(_plain(value))
    return text if len(text) <= 40 else text[:37] + "..."


def _decisive(kind: type[BaseModel]) -> list[str]:
    """Names of the fields that change the result."""
    extras = {name: field.json_schema_extra for name, field in kind.model_fields.items()}
    return [n for n, e in extras.items() if not (isinstance(e, dict) and e.get("runtime"))]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return result_settings(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def nearest(word: str, known: Iterator[str] | list[str]) -> str:
    """``; did you mean 'x'?`` where something known is near, the known words otherwise."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def explain(
    error: pydantic.ValidationError, model: type[BaseModel], value: Any = None
) -> list[tuple[tuple, str]]:
    """Each fault of validating `value` as (location, one line: key, fault and remedy)."""
    faults = []
    listed: set[str] = set()
    # a misspelt key is a missing one too: say first that it is unknown
    found = sorted(error.errors(include_url=False), key=lambda f: f["type"] != "extra_forbidden")
    for fault in found:
        location = _keys_in(value, fault["loc"])
        dotted = ".".join(str(part) for part in location)
        if fault["type"] == "extra_forbidden":
            above = tuple(fault["loc"][:-1])
            remedy = nearest(str(location[-1]), _fields_at(model, above))
            if remedy.startswith("; known") and remedy in listed:  # they are named once
                remedy = ""
            listed.add(remedy)
            faults.append((location, f"unknown key '{dotted}'{remedy}"))
        elif fault["type"] == "union_tag_invalid":
            tags = re.findall(r"'([^']*)'", fault["ctx"]["expected_tags"])
            key, tag = fault["ctx"]["discriminator"].strip("'"), fault["ctx"]["tag"]
            faults.append((location, f"unknown {dotted}.{key} '{tag}'{nearest(tag, tags)}"))
        elif fault["type"] == "missing":
            faults.append((location, f"'{dotted}' is missing"))
        else:
            given = fault.get("input")
            shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] in ("model_type", "model_attributes_type"):
                message = "has settings of its own; write it as {key: value, ...}"
            faults.append((location, f"'{dotted}': {message}{shown}" if dotted else message))
    return faults


def _keys_in(value: Any, location: tuple) -> tuple:
    """The parts of a location that are keys of `value`: pydantic adds the tags of unions."""
    if value is None:
        return tuple(location)
    keys: list[Any] = []
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(value, dict) and (part in value or last):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not last or keys:
            continue
        keys.append(part)
    return tuple(keys)


def _fields_at(model: type[BaseModel], path: tuple) -> list[str]:
    """Names of the fields of the settings class that lies at `path` inside `model`."""
    candidates: list[type[BaseModel]] = [model]
    for part in path:
        deeper: list[type[BaseModel]] = []
        for candidate in candidates:
            if part in candidate.model_fields:
                deeper += list(_models_in(candidate.model_fields[part].annotation))
        tagged = [c for c in candidates if _is_tagged(c, part)]
        candidates = deeper or tagged or candidates
    return [name for candidate in candidates for name in candidate.model_fields]


def _is_tagged(model: type[BaseModel], tag: Any) -> bool:
    """Whether a member of a union of settings is the one that `kind: tag` chooses."""
    return any(
        tag in getattr(field.annotation, "__args__", ()) for field in model.model_fields.values()
    )


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
