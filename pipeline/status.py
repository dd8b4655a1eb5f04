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
        attempt = read_json(partial / ATTEMPT) if (partial / ATTEMPT).is_file() else None
        if attempt is not None and attempt["fingerprint"] == row["fingerprint"]:
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


COLUMNS = (
    *("stage", "job", "state", "job_id", "nodes", "elapsed", "time", "restarts"),
    *("step", "loss", "reason"),
)
HEADS = {"job_id": "slurm", "reason": "why"}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text; columns that are empty in every row are left out."""
    cells = [{column: _cell(row, column) for column in COLUMNS} for row in rows]
    columns = [column for column in COLUMNS if any(row[column] for row in cells)]
    head = {column: HEADS.get(column, column) for column in columns}
    widths = {c: max(len(line[c]) for line in (head, *cells)) for c in columns[:-1]}
    lines = []
    for row, line in zip(({}, *rows), (head, *cells), strict=True):
        padded = [line[c].ljust(widths[c]) for c in columns[:-1]]
        lines.append("  ".join([*padded, line[columns[-1]]]))
        lines += [f"    | {said}" for said in row.get("log_tail", ())]
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get("seconds") if column == "time" else row.get(column)
    if column == "time":
        return f"{value:.1f} s" if value is not None else ""
    if column == "loss":
        return f"{value:.4f}" if isinstance(value, float) else ""
    if column == "restarts":
        why = f" ({row['restart_reason']})" if "restart_reason" in row else ""
        return f"{value}{why}" if value else ""
    return "" if value is None else str(value)


def is_settled(rows: list[dict[str, Any]]) -> bool:
    """Whether nothing is running or waiting."""
    return not any(row["state"] in ("running", "waiting") for row in rows)
