"""A stage outside any pipeline: a command's result folder, complete or absent, on bare folders.

The work is done in `<out>.partial`, which a killed command leaves behind: the same request goes
on there, another one is refused. `request.json` in it: the settings that change the result, and
what tells each input from another one in the same place.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from chainrule.pipeline.artifact import (
    Artifact,
    lock,
    lock_path,
    new_folder,
    partial_folder,
    read_json,
    write_json,
)
from chainrule.pipeline.config import RequestError, Settings, changed_settings, result_settings
from chainrule.pipeline.destinations import require_folder_place
from chainrule.pipeline.stage import Stage, say

REQUEST = "request.json"


@contextmanager
def bare_stage(
    job: str, config: Settings, inputs: Mapping[str, Path | Sequence[Path] | None], out: Path
) -> Iterator[Stage]:
    """A stage at work on the given folders; what it leaves becomes the folder `out`.

    RequestError: `out` holds something or cannot be made, another process is at work on it, or a
    killed command of another request left its work there.
    """
    out = new_folder(Path(out).absolute())
    if not out.parent.is_dir():
        raise RequestError(f"{out.parent}: no such folder")
    require_folder_place(out)
    found = {
        role: [Artifact.bare(path) for path in ([given] if isinstance(given, Path) else given)]
        for role, given in inputs.items()
        if given is not None
    }
    working = partial_folder(out)
    held = working / out.name  # the lock lies in the folder of the work, and goes with it
    with lock(held):
        resumed = _take_up(working, job, config, found)
        try:
            yield Stage(job, "", job, working, "", found, resumed=resumed)
        except BaseException as error:
            if not _results(working):
                shutil.rmtree(working)
            elif isinstance(error, KeyboardInterrupt):
                say(f"{working}: is kept; the same command goes on from there")
            raise
        (working / REQUEST).unlink()
        shutil.rmtree(lock_path(held).parent)
        if out.exists():
            out.rmdir()
        working.rename(out)


def _results(working: Path) -> bool:
    """Whether anything was made that would be missed: more than headers."""
    headers = {REQUEST, "metrics.jsonl", "zarr.json"}
    files = (path for path in working.rglob("*") if path.is_file())
    return any(f.name not in headers and f.parent.name != ".locks" for f in files)


def _take_up(
    working: Path, job: str, config: Settings, inputs: Mapping[str, list[Artifact]]
) -> bool:
    """Whether a killed run of the same request left `working`; RequestError for another's."""
    request = {
        "settings": result_settings(config),
        "inputs": {role: _identity(artifacts) for role, artifacts in inputs.items()},
    }
    path = working / REQUEST
    if not path.exists():
        if _results(working):
            raise RequestError(
                f"{working}: is there already, and no command's unfinished work; name another "
                "--out, or remove it"
            )
        write_json(path, request)
        return False
    found = read_json(path)
    other = [
        f"settings.{change.split(':')[0]}" for change in changed_settings(config, found["settings"])
    ]
    now, then = request["inputs"], found["inputs"]
    other += [f"inputs.{role}" for role in sorted({*now, *then}) if now.get(role) != then.get(role)]
    if not other:
        return True
    raise RequestError(
        f"{working}: holds what a killed or failed `{job}` of another request left (other: "
        f"{', '.join(other)}); run that one again, name another --out, or remove it"
    )


def _identity(artifacts: Sequence[Artifact]) -> str | list[str]:
    """What tells an input from another one in its place; of several, of each."""
    identities = [artifact.identity for artifact in artifacts]
    return identities[0] if len(identities) == 1 else identities
