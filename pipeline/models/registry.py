"""Every family and preset by name: ``build("llama-debug")``, ``build({"family": "made", ...})``.

A family file holds FAMILIES, {family name: (config class, model class)}, and PRESETS,
{preset name: settings with "family"}. This file only gathers them.
"""

from typing import Any

import pydantic
import torch

from chainrule.pipeline.config import Settings, explain, nearest
from chainrule.pipeline.models import decoder, gated_pixelcnn, made, pixelcnn, pixelcnnpp, wavenet
from chainrule.pipeline.models.contract import Autoregressive

_FILES = (decoder, pixelcnn, gated_pixelcnn, pixelcnnpp, wavenet, made)

FAMILIES: dict[str, tuple[type[Settings], type[Autoregressive]]] = {}
PRESETS: dict[str, dict[str, Any]] = {}
for _file in _FILES:
    FAMILIES.update(_file.FAMILIES)
    PRESETS.update(_file.PRESETS)


def resolve(spec: str | dict[str, Any] | Settings, **overrides: Any) -> Settings:
    """The whole config that a spec names, validated.

    `spec` is a preset's name, ``{"preset": name, **changes}``, ``{"family": name, **settings}``
    or a config. `overrides` come last. ValueError, one line, for what is unknown or wrong.
    """
    if isinstance(spec, Settings):
        settings = spec.model_dump()
    elif isinstance(spec, str):
        settings = _preset(spec)
    elif isinstance(spec, dict):
        settings = dict(spec)
        name = settings.pop("preset", None)
        if name is not None:
            settings = _merge(_preset(name), settings)
    else:
        raise ValueError(f"model: a preset's name or settings, not {type(spec).__name__}")
    settings = _merge(settings, overrides)

    family = settings.get("family")
    if family is None:
        raise ValueError("model: 'family' or 'preset' is missing")
    if family not in FAMILIES:
        raise ValueError(f"model: unknown family '{family}'{nearest(str(family), list(FAMILIES))}")
    config_class = FAMILIES[family][0]
    try:
        return config_class.model_validate(settings)
    except pydantic.ValidationError as error:
        # A default that is computed from a field at fault is no fault of its own.
        faults = [
            text
            for _, text in explain(error, config_class)
            if "default factory uses validated data" not in text
        ]
        raise ValueError(f"model '{family}': " + "; ".join(faults)) from None


def faults_of(spec: str | dict[str, Any]) -> list[str]:
    """What is wrong with the keys of `spec` by themselves, before it is known what the data will
    fill in: a key that the family lacks, a value that its field does not take."""
    given = {} if isinstance(spec, str) else spec
    asked = {k: v for k, v in given.items() if k != "preset" and v is not None}
    name = spec if isinstance(spec, str) else spec.get("preset")
    settings = _merge(_preset(name), asked) if name is not None else asked
    config_class = FAMILIES[str(settings["family"])][0]
    try:
        config_class.model_validate(settings)
    except pydantic.ValidationError as error:
        # A fault without a place is one of fields together, of which some may be still to come;
        # so may be what is missing.
        return [
            text
            for place, text in explain(error, config_class, settings)
            if place and place[0] in asked and not text.endswith("is missing")
        ]
    return []


def build(
    spec: str | dict[str, Any] | Settings, seed: int | None = None, **overrides: Any
) -> Autoregressive:
    """A fresh model; with `seed`, its weights are the same every time."""
    config = resolve(spec, **overrides)
    model_class: Any = FAMILIES[config.family][1]  # type: ignore[attr-defined]
    if seed is None:
        model: Autoregressive = model_class(config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config)
    return model


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise ValueError(f"model: unknown preset '{name}'{nearest(str(name), list(PRESETS))}")
    return dict(PRESETS[name])


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`. The length and the shape of an event say the same thing: who
    changes one does not mean to keep the other."""
    base = dict(base)
    if "event_shape" in changes and "context" not in changes:
        base.pop("context", None)
    if "context" in changes and "event_shape" not in changes:
        base.pop("event_shape", None)
    family = changes.get("family", base.get("family"))
    if base.get("family", family) != family:
        raise ValueError(f"model: the preset is of family '{base['family']}', not '{family}'")
    return {**base, **changes}
