"""One self-contained page for a pipeline's runs: what was made, from what, how well.

Reads nothing but what lies under `runs/<pipeline>/`: published artifacts, and unfinished
folders, which are shown as such and whose results are not. The page needs no network and
no script: pictures are data URIs, charts are SVG. All text from data is escaped.
"""

import importlib.resources
import string
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from chainrule.pipeline import report_sections as sections
from chainrule.pipeline.charts import Node, graph
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.destinations import require_file_place
from chainrule.pipeline.report_samples import samples
from chainrule.pipeline.report_stages import (
    DONE,
    FAILED,
    StageView,
    duration,
    read_stages,
    size_of,
)
from chainrule.pipeline.whole_file import write_whole


def write_report(root: Path, out: Path | None = None) -> Path:
    """Write the page of `runs/<pipeline>` to `out` (default: `report.html` in it).

    Raises RequestError where `root` holds no stage, or `out` cannot be written.
    """
    out = require_file_place(out or root / "report.html")
    stages = read_stages(root)
    if not stages:
        raise RequestError(f"{root}: no stage has left anything here yet; run the pipeline first")
    page = _template().substitute(
        title=escape(f"{root.name} · chainrule"), body=_body(root, stages)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)
    return out


def _template() -> string.Template:
    source = importlib.resources.files("chainrule.pipeline").joinpath("report_template.html")
    return string.Template(source.read_text(encoding="utf-8"))


# --- the page -----------------------------------------------------------------------------


def _body(root: Path, stages: list[StageView]) -> str:
    parts = [
        ("Samples", "samples", samples(stages)),
        ("Likelihoods", "likelihoods", sections.likelihoods(stages)),
        ("Learning curves", "curves", sections.curves(stages)),
        ("Tokenizers", "tokenizers", sections.tokenizers(stages)),
        ("Data", "data", sections.data(stages)),
        ("Stages and lineage", "lineage", _lineage(stages)),
    ]
    present = [(title, anchor, html) for title, anchor, html in parts if html]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in present)
    chain = graph([_node(stage) for stage in stages])
    return "\n".join(
        [
            f"<header><h1>{escape(root.name)}</h1><p class='quiet'>{_summary(stages)}</p>"
            f'<nav><a href="#chain">Chain</a>{links}</nav></header>',
            sections.tiles(stages),
            _failures(stages),
            f'<section id="chain"><h2>Chain of stages</h2><div class="card scroll">{chain}</div>'
            f"</section>",
            *(
                f'<section id="{anchor}"><h2>{title}</h2>{html}</section>'
                for title, anchor, html in present
            ),
            f"<footer>{_versions(stages)}</footer>",
        ]
    )


def _summary(stages: list[StageView]) -> str:
    done = sum(stage.state == DONE for stage in stages)
    seconds = sum(stage.seconds for stage in stages)
    size = sum(stage.size for stage in stages)
    said = f"{done} of {len(stages)} stages done · {duration(seconds)} of work · {size_of(size)}"
    ends = [str(stage.manifest["end"]) for stage in stages if stage.manifest.get("end")]
    if ends:
        said += f" · last finished {datetime.fromisoformat(max(ends)):%Y-%m-%d %H:%M} UTC"
    return escape(said)


def _node(stage: StageView) -> Node:
    time = duration(stage.seconds)
    size = size_of(stage.size)
    lines = [stage.job, f"{time} · {size}" if stage.state == DONE else f"{stage.state} · {time}"]
    return Node(stage.name, lines, stage.state, stage.inputs)


def _failures(stages: list[StageView]) -> str:
    return "".join(
        f'<div class="card failure"><h3>{escape(stage.name)} failed</h3>'
        f"<pre>{escape(stage.why)}</pre></div>"
        for stage in stages
        if stage.state == FAILED
    )


def _lineage(stages: list[StageView]) -> str:
    rows = []
    for stage in stages:
        sources = []
        for role, entries in (stage.manifest.get("inputs") or {}).items():
            for entry in entries:
                name = str(entry.get("stage", ""))
                sources.append(f"{escape(role)}: {escape(name)} {_short(entry['fingerprint'])}")
        run = (stage.manifest.get("mlflow") or {}).get("run_id") or stage.manifest.get(
            "mlflow_run_id"
        )
        reason = f' title="{escape(stage.why)}"' if stage.why else ""
        rows.append(
            f"<tr><td><b>{escape(stage.name)}</b></td><td>{escape(stage.job)}</td>"
            f'<td><span class="state {stage.state}"{reason}>{stage.state}</span></td>'
            f"<td>{_short(stage.manifest.get('fingerprint'))}</td>"
            f"<td>{'<br>'.join(sources) or '<span class=quiet>raw files</span>'}</td>"
            f'<td class="n">{duration(stage.seconds)}</td><td class="n">{size_of(stage.size)}</td>'
            f'<td class="n">{int(stage.manifest.get("attempts") or 1)}</td>'
            f"<td>{_short(run, 8)}</td><td>{escape(str(stage.manifest.get('host', '')))}</td></tr>"
        )
    heads = "<th>stage</th><th>job</th><th>state</th><th>fingerprint</th><th>made from</th>"
    heads += '<th class="n">time</th><th class="n">size</th><th class="n">attempts</th>'
    heads += "<th>MLflow run</th><th>host</th>"
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    configs = "".join(
        f"<details><summary>{escape(stage.name)}: merged settings</summary>"
        f'<pre class="text">{escape(yaml.safe_dump(stage.config, sort_keys=False))}</pre></details>'
        for stage in stages
        if stage.config
    )
    return f'<div class="card scroll">{table}</div><div class="card">{configs}</div>'


def _short(value: Any, length: int = 12) -> str:
    """The first characters of a hash, whole on hover."""
    if not value:
        return '<span class="quiet">none</span>'
    return f'<code title="{escape(str(value))}">{escape(str(value)[:length])}</code>'


def _versions(stages: list[StageView]) -> str:
    versions: dict[str, None] = {}
    for stage in stages:
        code = stage.manifest.get("code") or {}
        if code:
            commit = f" at {code['commit'][:12]}" if code.get("commit") else ""
            dirty = " (uncommitted changes)" if str(code.get("commit")).endswith("dirty") else ""
            versions[f"chainrule {code.get('version')}{commit}{dirty}"] = None
    return escape("; ".join(versions) or "no stage has been published yet")
