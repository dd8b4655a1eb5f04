"""The request of an evaluation outside a pipeline, so that a killed one goes on and no other does.

`request.json` in the folder of the work: the settings that change figures, and what tells each
input from another one in the same place.
"""

from pathlib import Path

from chainrule.pipeline.artifact import Artifact, read_json, write_json
from chainrule.pipeline.config import RequestError, Settings, result_settings

REQUEST = "request.json"


def take_up(working: Path, config: Settings, inputs: dict[str, list[Artifact]]) -> bool:
    """Whether a killed run of the same request left `working`; RequestError for another's."""
    request = {
        "settings": result_settings(config),
        "inputs": {role: artifact.identity for role, (artifact,) in inputs.items()},
    }
    path = working / REQUEST
    if not path.exists():
        write_json(path, request)
        return False
    found = read_json(path)
    if found == request:
        return True
    other = [
        f"{part}.{key}"
        for part, values in request.items()
        for key in sorted({*values, *found[part]})
        if values.get(key) != found[part].get(key)
    ]
    raise RequestError(
        f"{working}: holds what a killed evaluation of another request left (other: "
        f"{', '.join(other)}); run that one again, name another --out, or remove it"
    )
