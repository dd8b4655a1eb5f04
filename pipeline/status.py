"""`chainrule status`: what each stage is, since when, how far, and why."""

import json
from typing import Any

from chainrule.pipeline.artifact import ATTEMPT, MANIFEST, partial_folder, read_json
from chainrule.pipeline.graph import Pipeline


def stage_rows(pipeline: Pipeline) -> list[dict[str, Any]]:
    """One row a stage: stage, job, state, reason, step, loss, seconds, attempts, fingerprint."""
    rows = []
    for name, spec in pipeline.stages.items():
        state, reason = pipeline.state(name)
        folder = pipeline.folder(name)
        partial = partial_folder(folder)
        row: dict[str, Any] = {
            "stage": name,
            "job": spec.job,
            "state": str(state),
            "reason": reason,
            "fingerprint": pipeline.fingerprint(name),
        }
        if (partial / ATTEMPT).is_file():
            attempt = read_json(partial / ATTEMPT)
            row |= {"seconds": attempt["seconds"], "attempts": attempt["attempts"]}
            row |= last_metrics(partial)
        elif (folder / MANIFEST).is_file():
            manifest = read_json(folder / MANIFEST)
            row |= {"seconds": manifest["seconds"], "attempts": manifest["attempts"]}
            row |= last_metrics(folder)
        rows.append(row)
    return rows


def last_metrics(folder: Any) -> dict[str, Any]:
    """Step and loss of the last whole line of a folder's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    for line in reversed(path.read_text().splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that is being written
        return {key: record[key] for key in ("step", "loss") if key in record}
    return {}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [("stage", "job", "state", "time", "step", "loss", "why")]
    for row in rows:
        seconds, loss = row.get("seconds"), row.get("loss")
        lines.append(
            (
                row["stage"],
                row["job"],
                row["state"],
                f"{seconds:.1f} s" if seconds is not None else "",
                str(row.get("step", "")),
                f"{loss:.4f}" if isinstance(loss, float) else "",
                row["reason"],
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[6]])
        for line in lines
    )
