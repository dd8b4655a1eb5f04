"""The request of an evaluation outside a pipeline, so that a killed one goes on and no other does.

`request.json` in the folder of the work: the settings that change figures, and what tells each
input from another one in the same place.
"""

from pathlib import Path

from chainrule.pipeline.artifact import Artifact, read_json, write_json
from chainrule.pipeline.config import RequestError, Settings, digest, result_settings

REQUEST = "request.json"


def take_up(working: Path, config: Settings, inputs: dict[str, list[Artifact]]) -> bool:
    """Whether a killed run of the same request left `working`; RequestError for another's."""
    request = {
        "settings": result_settings(config),
        "inputs": {role: _identity(artifact) for role, (artifact,) in inputs.items()},
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


def _identity(artifact: Artifact) -> str:
    if artifact.fingerprint:
        return artifact.fingerprint
    for name in ("card.json", "index.json"):
        if (artifact.folder / name).is_file():
            return digest(read_json(artifact.folder / name))
    files = sorted(path for path in artifact.folder.iterdir() if path.is_file())
    return digest([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files])
