"""The parts of the report: figures at the top, likelihoods, curves, tokenizers, data.

Each takes the stages and gives HTML, or "" where no stage has anything to show.
"""

import re
from html import escape
from typing import Any

from chainrule.pipeline.charts import Level, Mark, Series, bar_chart, line_chart, number
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
GUESS = re.compile(r"(context_free|unigram)(?!.*perplexity)")
LIKELIHOODS = ("bits_per_byte", "bits_per_dim", "nats_per_token", "nats_per_element", "nats")


# --- figures at the top -------------------------------------------------------------------


def tiles(stages: list[StageView]) -> str:
    """What each evaluation found first of all, with what it stands beside."""
    tiles = []
    for stage in of_jobs(stages, "evaluate"):
        found = numbers(stage)
        key = headline(found)
        if key is not None:
            codecs = codec_rates(found)
            guess = context_free(found)
            note = words(key)
            if codecs and key == "bits_per_byte":
                best = min(codecs, key=lambda name: codecs[name])
                note = f"best of the codecs: {best}, {number(codecs[best])}"
            elif guess is not None:
                note = f"best context-free guess: {number(guess)}"
            tiles.append(_tile(stage.name, f"{number(found[key])} {unit_of(key)}", note))
        if "classifier_agreement" in found:
            share = f"{100 * found['classifier_agreement']:.4g} %"
            tiles.append(_tile(stage.name, share, "of the samples are named as what was asked for"))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(what: str, figure: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="what">{escape(what)}</div>'
        f'<div class="figure">{escape(figure)}</div><div class="note">{escape(note)}</div></div>'
    )


def numbers(stage: StageView) -> dict[str, float]:
    """The figures of an evaluation, its notes on split and unit left out."""
    found = flat(stage.json("evaluation.json") or {})
    return {key: float(value) for key, value in found.items() if is_number(value)}


def headline(found: dict[str, float]) -> str | None:
    """The likelihood that says most, by name."""
    return next((name for name in LIKELIHOODS if name in found), None)


def codec_rates(found: dict[str, float]) -> dict[str, float]:
    """Bits per byte of each general-purpose codec on the same bytes."""
    rates = {}
    for codec in CODECS:
        for key, label in (
            (f"{codec}_bits_per_byte", codec),
            (f"{codec}_joined_bits_per_byte", f"{codec}, files joined"),
        ):
            if key in found:
                rates[label] = found[key]
    return rates


def context_free(found: dict[str, Any]) -> float | None:
    """Nats per token of the best guess that ignores context, where it is among the figures."""
    for key, value in found.items():
        if GUESS.search(key) and is_number(value):
            return float(value)
    return None


# --- likelihoods --------------------------------------------------------------------------


def likelihoods(stages: list[StageView]) -> str:
    """Each evaluation: beside codecs and by class where it has them, and all its figures."""
    cards = []
    for stage in of_jobs(stages, "evaluate"):
        found = numbers(stage)
        if not found:
            continue
        said = flat(stage.json("evaluation.json") or {})
        main = {key: value for key, value in found.items() if ".class." not in key}
        by_class = {key: value for key, value in found.items() if ".class." in key}
        charts = _beside_codecs(found) + _by_class(by_class)
        shown = "".join(picture(path, words(path.stem)) for path in pictures(stage))
        more = ""
        if by_class:
            more = f"<details><summary>by class</summary>{_figures(by_class, said)}</details>"
        cards.append(
            f'<div class="card scroll"><h3>{escape(stage.name)}</h3>'
            f'<div class="grid">{charts}{shown}</div>{_figures(main, said)}{more}</div>'
        )
    return "".join(cards)


def _figures(found: dict[str, float], said: dict[str, Any]) -> str:
    """A table: figure, value, split, and what exactly is counted."""
    default = str(said.get("split") or "")
    rows = "".join(
        f"<tr><td>{escape(words(key))}</td><td class='n'>{escape(number(value))}</td>"
        f"<td>{escape(str(said.get(f'{key}.split') or default))}</td>"
        f"<td class='what'>{escape(str(said.get(f'{key}.unit') or unit_of(key)))}</td></tr>"
        for key, value in found.items()
    )
    heads = "<th>figure</th><th class='n'>value</th><th>split</th><th>unit</th>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _beside_codecs(found: dict[str, float]) -> str:
    codecs = codec_rates(found)
    if not codecs or "bits_per_byte" not in found:
        return ""
    bars = {"this model": found["bits_per_byte"], **codecs}
    ordered = dict(sorted(bars.items(), key=lambda item: item[1]))
    return bar_chart(
        "Held-out text", ordered, "bits per byte; shorter is better", emphasis=("this model",)
    )


def _by_class(found: dict[str, float]) -> str:
    """How often a classifier names what was asked for, a bar a class."""
    start = "classifier_agreement.class."
    bars = {k.removeprefix(start): 100 * v for k, v in found.items() if k.startswith(start)}
    return bar_chart(
        "Samples named as the class asked for", bars, "% of each class", emphasis=tuple(bars)
    )


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
        card = stage.json("card.json") or {}
        # the card's account of its health, and what else the stage found
        facts = {
            key: value
            for key, value in {**flat(card.get("health") or {}), **stage.metrics}.items()
            if is_number(value)
        }
        rows = "".join(
            f"<tr><td>{escape(words(k))}</td><td class='n'>{number(v)} {unit_of(k)}</td></tr>"
            for k, v in facts.items()
        )
        shown = "".join(picture(path, _caption(path.stem)) for path in pictures(stage))
        records = stage.steps()
        chart = _tokenizer_curve(stage, records)
        across_start = _psnr_across_start(stage, records)
        kind = f" <small>{escape(str(card.get('kind', '')))}</small>"
        body = f"<table><tbody>{rows}</tbody></table>" if rows else ""
        if body or shown or chart or across_start:
            cards.append(
                f'<div class="card"><h3>{escape(stage.name)}{kind}</h3>{shown}{body}</div>'
            )
        if chart or across_start:
            others = small_charts(records, but=("loss", "psnr") if across_start else ("loss",))
            cards.append(f'<div class="card">{chart}{across_start}{others}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _caption(name: str) -> str:
    if name == "reconstructions":
        return "held-out originals, their reconstructions, and the difference"
    return words(name)


def _tokenizer_curve(stage: StageView, records: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for record in records for key in record))
    chosen = [key for key in keys if "loss" in key or "mse" in key][:4]
    series = [
        Series(words(key), points(records, key), f"s{i + 1}", dots=bool(VALIDATION.search(key)))
        for i, key in enumerate(chosen)
    ]
    return line_chart(f"{stage.name}: training", series, "step", "loss")


def _psnr_across_start(stage: StageView, records: list[dict[str, Any]]) -> str:
    """PSNR of a tokenizer with a discriminator, whose start is what wrecks pictures; else ""."""
    adversarial = stage.config.get("adversarial")
    if not adversarial:
        return ""
    series = [
        Series("training", points(records, "psnr"), "s1"),
        Series("validation", points(records, "validation_psnr"), "s2", dots=True),
    ]
    marks = [Mark("discriminator's start", float(adversarial["start"]))]
    title = f"{stage.name}: PSNR across the discriminator's start"
    return line_chart(title, series, "step", "PSNR, dB", marks=marks)


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
