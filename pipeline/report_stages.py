"""What the stages of a pipeline left under the runs folder, as the report sees it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chainrule.pipeline.artifact import ATTEMPT, MANIFEST, is_locked, read_json

DONE, STALE, RUNNING, FAILED, UNFINISHED = "done", "stale", "running", "failed", "unfinished"


@dataclass
class StageView:
    """What one stage left under the runs folder."""

    name: str
    folder: Path
    """The published artifact, or the `.partial` folder where there is none."""
    manifest: dict[str, Any]
    """`artifact.json`, or what `attempt.json` says of unfinished work."""
    published: bool
    state: str = DONE
    why: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> str:
        return str(self.manifest.get("job") or self.config.get("job") or "")

    @property
    def inputs(self) -> list[str]:
        """Names of the stages it reads, as its own config.yaml says."""
        names: list[str] = []
        for given in (self.config.get("inputs") or {}).values():
            names += [str(n) for n in (given if isinstance(given, list) else [given])]
        return names

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.manifest.get("metrics") or {})

    @property
    def seconds(self) -> float:
        return float(self.manifest.get("seconds") or 0.0)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        if self.published:
            return sum(int(entry["size"]) for entry in self.manifest["files"])
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def steps(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, whole lines only."""
        path = self.folder / "metrics.jsonl"
        records = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that is being written
        return records

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of a published artifact, or None."""
        path = self.folder / name
        return read_json(path) if self.published and path.is_file() else None


def read_stages(root: Path) -> list[StageView]:
    """Every stage under `root`, inputs before what reads them."""
    names = {
        path.name.removesuffix(".partial")
        for path in (root.iterdir() if root.is_dir() else ())
        if "." not in path.name.removesuffix(".partial")  # not what was put aside
        and path.is_dir()
        and ((path / MANIFEST).is_file() or (path / ATTEMPT).is_file())
    }
    views = {name: _view(root, name) for name in sorted(names)}
    for view in views.values():
        _mark_stale(view, views)
    return _ordered(views)


def _view(root: Path, name: str) -> StageView:
    folder, partial = root / name, root / f"{name}.partial"
    published = (folder / MANIFEST).is_file()
    attempt = read_json(partial / ATTEMPT) if (partial / ATTEMPT).is_file() else None
    view = StageView(
        name=name,
        folder=folder if published else partial,
        manifest=read_json(folder / MANIFEST) if published else dict(attempt or {}),
        published=published,
    )
    if is_locked(folder):
        view.state, view.why = RUNNING, "at work now"
    elif attempt is not None and "failed" in attempt:
        view.state, view.why = FAILED, str(attempt["failed"].get("error", ""))
    elif attempt is not None and not published:
        view.state, view.why = UNFINISHED, "an attempt was cut off; the next run resumes it"
    elif attempt is not None:
        view.state, view.why = STALE, "a newer attempt is unfinished; the artifact is the old one"
    config = view.folder / "config.yaml"
    if config.is_file():
        view.config = yaml.safe_load(config.read_text()) or {}
    return view


def _mark_stale(view: StageView, views: dict[str, StageView]) -> None:
    if not view.published or view.state != DONE:
        return
    for entries in (view.manifest.get("inputs") or {}).values():
        for entry in entries:
            source = views.get(entry.get("stage", ""))
            if source is None or not source.published:
                continue
            if source.manifest["fingerprint"] != entry["fingerprint"]:
                view.state, view.why = STALE, f"made from an earlier {source.name}"


def _ordered(views: dict[str, StageView]) -> list[StageView]:
    """Inputs first; otherwise in the order in which the stages began."""
    ordered: dict[str, StageView] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name in above:
            return
        for source in views[name].inputs:
            if source in views:
                visit(source, (*above, name))
        ordered[name] = views[name]

    for view in sorted(views.values(), key=lambda v: (v.manifest.get("start", ""), v.name)):
        visit(view.name, ())
    return list(ordered.values())


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def size_of(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
