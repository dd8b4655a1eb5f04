"""Which jobs there are: the files of `jobs/`, looked up by the name that a pipeline file gives.

A job that can be a stage has `Config`, `INPUTS` and `main(config, stage)`; it may have
`check(pipeline, spec)`, which refuses what the settings of this stage and of those above it show
could only fail when its turn comes.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from chainrule.pipeline.config import RequestError, Resources, nearest


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
