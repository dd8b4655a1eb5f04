"""The parts of the report: figures at the top, likelihoods, curves, tokenizers, data.

Each takes the stages and gives HTML, or "" where no stage has anything to show.
"""

import re
from html import escape
from typing import Any

from chainrule.pipeline.charts import Level, Series, bar_chart, line_chart, number
from chainrule.pipeline.report_html import (
    flat,
    is_number,
    of_jobs,
    picture,
    pictures,
    unit_of,
    words,
)
from chainrule.pipeline.report_stages import StageView, size_of

SKIPPED_SHOWN = 20
CODECS = ("gzip", "bzip2", "xz", "zstd", "brotli", "ppmd")
VALIDATION = re.compile(r"(^|_|\.)val(idation)?(_|\.|$)")
GUESS = re.compile(r"context_free|unigram")
LIKELIHOODS = ("bits_per_byte", "bits_per_dim", "bits_per_token", "nats", "perplexity")


# --- figures at the top -------------------------------------------------------------------


def tiles(stages: list[StageView]) -> str:
    """One tile for the first likelihood of each evaluation, and what it stands beside."""
    tiles = []
    for stage in of_jobs(stages, "evaluate"):
        found = flat(stage.json("evaluation.json") or {})
        key = _headline(found)
        if key is None:
            continue
        codecs = codec_rates(found)
        note = ""
        if codecs and "bits_per_byte" in key:
            best = min(codecs, key=lambda name: codecs[name])
            note = f"best of the codecs: {best} {number(codecs[best])}"
        elif (guess := context_free(found)) is not None:
            note = f"best context-free guess: {number(guess)}"
        tiles.append(_tile(stage.name, f"{number(found[key])} {unit_of(key)}", note or words(key)))
    for stage in of_jobs(stages, "sample"):
        count = stage.metrics.get("samples")
        if is_number(count):
            tiles.append(_tile(stage.name, number(count), "samples"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(what: str, figure: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="what">{escape(what)}</div>'
        f'<div class="figure">{escape(figure)}</div><div class="note">{escape(note)}</div></div>'
    )


def _headline(found: dict[str, Any]) -> str | None:
    for name in LIKELIHOODS:
        for key, value in found.items():
            ours = name in key and not any(c in key for c in CODECS) and "context_free" not in key
            if ours and is_number(value):
                return key
    return None


def codec_rates(found: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of each general-purpose codec that an evaluation names."""
    rates = {}
    for codec in CODECS:
        for key, value in found.items():
            named = re.search(rf"(^|[_.]){codec}($|[_.])", key) and "bits_per_byte" in key
            if named and is_number(value):
                rates[codec] = float(value)
                break
    return rates


def context_free(found: dict[str, Any]) -> float | None:
    """The likelihood of the best guess that ignores context, where it is among the figures."""
    for key, value in found.items():
        if GUESS.search(key) and is_number(value):
            return float(value)
    return None


# --- likelihoods --------------------------------------------------------------------------


def likelihoods(stages: list[StageView]) -> str:
    """Each evaluation as a table with units; beside codecs on the same bytes where it has them."""
    cards = []
    for stage in of_jobs(stages, "evaluate"):
        found = flat(stage.json("evaluation.json") or {})
        if not found:
            continue
        split = str(found.get("split") or "")
        note = f" <small>{escape(split)} split</small>" if split else ""
        rows = "".join(
            f"<tr><td>{escape(words(key))}</td><td class='n'>{escape(_figure(value))}</td>"
            f"<td>{escape(unit_of(key))}</td></tr>"
            for key, value in found.items()
            if is_number(value)
        )
        table = (
            "<table><thead><tr><th>figure</th><th class='n'>value</th><th>unit</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
        cards.append(
            f'<div class="card scroll"><h3>{escape(stage.name)}{note}</h3>'
            f"{_beside_codecs(found)}{table}</div>"
        )
        cards += [
            f'<div class="card">{picture(path, words(path.stem))}</div>' for path in pictures(stage)
        ]
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _figure(value: float) -> str:
    return number(value) if value == value and abs(value) != float("inf") else str(value)


def _beside_codecs(found: dict[str, Any]) -> str:
    codecs = codec_rates(found)
    key = _headline(found)
    if not codecs or key is None or "bits_per_byte" not in key:
        return ""
    bars = {"this model": float(found[key]), **codecs}
    ordered = dict(sorted(bars.items(), key=lambda item: item[1]))
    return bar_chart("Held-out text", ordered, "bits per byte", emphasis=("this model",))


# --- learning curves ----------------------------------------------------------------------


def curves(stages: list[StageView]) -> str:
    """Loss against step for each stage that trains, with validation and the guess to beat."""
    cards = []
    for stage in of_jobs(stages, "pretrain", "distill"):
        records = stage.steps()
        chart = loss_chart(stage, records)
        if chart:
            others = small_charts(records, but=("loss",))
            cards.append(f'<div class="card">{chart}{others}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["step"], float(r[key])) for r in records if is_number(r.get(key))]


def loss_chart(stage: StageView, records: list[dict[str, Any]]) -> str:
    """Training and validation loss, and the context-free guess as a level."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    series = [Series("training", points(records, "loss"), "s1")]
    validation = [k for k in keys if VALIDATION.search(k) and "loss" in k and not GUESS.search(k)]
    for style, key in zip(("s2", "s3", "s4"), validation, strict=False):
        label = "validation" if len(validation) == 1 else words(key)
        series.append(Series(label, points(records, key), style, dots=True))
    guess = guess_of(stage, records)
    levels = [Level("best context-free guess", guess)] if guess is not None else []
    title = stage.name if stage.published else f"{stage.name} ({stage.state})"
    return line_chart(title, series, "step", "loss, nats per token", levels)


def guess_of(stage: StageView, records: list[dict[str, Any]]) -> float | None:
    """Loss of the best context-free guess, from the stage's summary or its last record of it."""
    candidates = (context_free(found) for found in (stage.metrics, *reversed(records)))
    return next((guess for guess in candidates if guess is not None), None)


def small_charts(records: list[dict[str, Any]], but: tuple[str, ...] = ()) -> str:
    """The other logged quantities, a small chart each, behind a fold."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    charts = []
    for key in keys:
        hidden = key in ("step", *but) or VALIDATION.search(key) or GUESS.search(key)
        values = points(records, key)
        if not hidden and len(values) > 1 and len({y for _, y in values}) > 1:
            label = f"{words(key)}, {unit_of(key)}".rstrip(", ")
            charts.append(line_chart(label, [Series(words(key), values, "s1")], "step", ""))
    if not charts:
        return ""
    return (
        f"<details><summary>further curves ({len(charts)})</summary>"
        f'<div class="small-charts">{"".join(charts)}</div></details>'
    )


# --- tokenizers ---------------------------------------------------------------------------


def tokenizers(stages: list[StageView]) -> str:
    """Reconstructions beside originals, use of the codebook, how the tokenizer learned."""
    cards = []
    for stage in of_jobs(stages, "train_tokenizer"):
        card = flat(stage.json("card.json") or {})
        facts = {
            key: value
            for key, value in {**card, **stage.metrics}.items()
            if is_number(value) and not key.startswith("vocabulary.ranges")
        }
        rows = "".join(
            f"<tr><td>{escape(words(k))}</td><td class='n'>{number(v)} {unit_of(k)}</td></tr>"
            for k, v in facts.items()
        )
        shown = "".join(picture(path, words(path.stem)) for path in pictures(stage))
        records = stage.steps()
        chart = _tokenizer_curve(stage, records)
        kind = f" <small>{escape(str(card.get('kind', '')))}</small>"
        body = f"<table><tbody>{rows}</tbody></table>" if rows else ""
        if body or shown or chart:
            cards.append(
                f'<div class="card"><h3>{escape(stage.name)}{kind}</h3>{shown}{body}</div>'
            )
        if chart:
            others = small_charts(records, but=("loss",))
            cards.append(f'<div class="card">{chart}{others}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _tokenizer_curve(stage: StageView, records: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record))
    chosen = [key for key in keys if "loss" in key or "mse" in key][:4]
    series = [
        Series(words(key), points(records, key), f"s{i + 1}", dots=bool(VALIDATION.search(key)))
        for i, key in enumerate(chosen)
    ]
    return line_chart(f"{stage.name}: training", series, "step", "loss")


# --- data ---------------------------------------------------------------------------------


def data(stages: list[StageView]) -> str:
    """Shards: samples and tokens a split, bytes, what was skipped and why."""
    rows, skipped = [], []
    for stage in of_jobs(stages, "ingest", "pretokenize"):
        index = stage.json("index.json")
        if index is None:
            continue
        for split in dict.fromkeys(str(shard.get("split")) for shard in index["shards"]):
            shards = [shard for shard in index["shards"] if str(shard.get("split")) == split]
            tokens = sum(int(shard.get("tokens") or 0) for shard in shards)
            rows.append(
                f"<tr><td><b>{escape(stage.name)}</b></td><td>{escape(split)}</td>"
                f"<td>{escape(str(index.get('modality', '')))}</td>"
                f'<td class="n">{number(len(shards))}</td>'
                f'<td class="n">{number(sum(int(s["samples"]) for s in shards))}</td>'
                f'<td class="n">{number(tokens) if tokens else ""}</td>'
                f'<td class="n">{size_of(sum(int(s["bytes"]) for s in shards))}</td></tr>'
            )
        skipped.append(_skipped(stage))
    if not rows:
        return ""
    heads = "<th>stage</th><th>split</th><th>modality</th><th class='n'>shards</th>"
    heads += "<th class='n'>samples</th><th class='n'>tokens</th><th class='n'>size</th>"
    return (
        f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{''.join(skipped)}"
    )


def _skipped(stage: StageView) -> str:
    path = stage.folder / "skipped.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not lines:
        return ""
    shown = "\n".join(lines[:SKIPPED_SHOWN])
    if len(lines) > SKIPPED_SHOWN:
        shown += f"\n… and {len(lines) - SKIPPED_SHOWN} more in skipped.jsonl"
    return (
        f'<div class="card skipped"><details><summary>{escape(stage.name)} skipped {len(lines)} '
        f"inputs</summary><pre>{escape(shown)}</pre></details></div>"
    )
