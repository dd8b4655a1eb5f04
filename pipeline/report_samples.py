"""The report's samples: what models drew, wrote or sang, beside what they were asked for."""

import io
from html import escape
from typing import Any

from chainrule.pipeline.charts import number
from chainrule.pipeline.report_html import (
    LARGEST_INLINE,
    data_uri,
    is_number,
    of_jobs,
    picture,
    pictures,
    words,
)
from chainrule.pipeline.report_stages import StageView
from chainrule.pipeline.sampling.store import CAPTIONS

PICTURES_A_CLASS = 12
CLASSES_SHOWN = 40
PICTURES_WITHOUT_CLASS = 64
TEXTS_SHOWN = 12
SOUNDS_SHOWN = 6
TEXT_CHARACTERS = 3000


def samples(stages: list[StageView]) -> str:
    """What models drew, wrote or sang, beside what they were asked for."""
    cards = []
    for stage in of_jobs(stages, "sample"):
        if not stage.published:
            continue
        body = _drawn(stage, stages) or _written(stage) or _sung(stage)
        if not body:
            body = "".join(picture(path, words(path.stem)) for path in pictures(stage)[:4])
        if body:
            asked = _asked(stage)
            cards.append(f'<div class="card"><h3>{escape(stage.name)} {asked}</h3>{body}</div>')
    return "".join(cards)


def _asked(stage: StageView) -> str:
    shown = []
    for key in ("number", "temperature", "top_k", "top_p", "guidance", "seed"):
        value = stage.config.get(key)
        if isinstance(value, dict):  # guidance, with its schedule
            value = value.get("scale") if value.get("scale") != 1 else None
        if is_number(value):
            shown.append(f"{words(key)} {number(value)}")
    return f"<small>{escape(', '.join(shown))}</small>" if shown else ""


def _store(stage: StageView) -> Any:
    path = stage.folder / "samples.zarr"
    if not path.is_dir():
        return None
    import zarr

    return zarr.open_group(path, mode="r")


def _drawn(stage: StageView, stages: list[StageView]) -> str:
    """Image samples, a row for each class or caption asked for."""
    store = _store(stage)
    if store is None or "images" not in store:
        return ""
    images = store["images"]
    likelihoods = store["log_likelihood"][:] if "log_likelihood" in store else None
    by = next((name for name in ("class", "caption") if name in store), None)
    if by is None:
        chosen = range(min(images.shape[0], PICTURES_WITHOUT_CLASS))
        shown = "".join(_drawn_one(images, i, "", likelihoods) for i in chosen)
        return f'<div class="strip">{shown}</div>'
    asked = store[by][:]
    if by == "class":
        names = class_names(stage, stages)
    else:
        names = [str(text) for text in stage.json(CAPTIONS) or []]
    rows = []
    classes = sorted({int(c) for c in asked})
    for label in classes[:CLASSES_SHOWN]:
        name = names[label] if 0 <= label < len(names) else str(label)
        row = [i for i, c in enumerate(asked) if int(c) == label][:PICTURES_A_CLASS]
        shown = "".join(_drawn_one(images, i, name, likelihoods) for i in row)
        rows.append(
            f'<div class="asked">{escape(name)}</div><div class="strip" data-class="{label}">'
            f"{shown}</div>"
        )
    more = ""
    if len(classes) > CLASSES_SHOWN:
        more = f"<p class='quiet'>{len(classes) - CLASSES_SHOWN} further ones in the store</p>"
    return (
        f"<p class='quiet'>One row for each {by} asked for; hover for a sample's number and "
        f'log-likelihood.</p><div class="rows">{"".join(rows)}</div>{more}'
    )


def _drawn_one(images: Any, i: int, name: str, likelihoods: Any) -> str:
    from PIL import Image

    pixels = images[i]
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    tip = f"sample {i}" + (f", asked for {name}" if name else "")
    if likelihoods is not None:
        tip += f", {likelihoods[i]:.1f} nats"
    side = max(48, min(128, pixels.shape[1]))
    sharp = ' class="pixelated"' if pixels.shape[1] < side else ""
    return (
        f'<img{sharp} width="{side}" height="{side * pixels.shape[0] // pixels.shape[1]}" '
        f'src="{data_uri(buffer.getvalue(), "image/png")}" alt="{escape(tip)}" '
        f'title="{escape(tip)}">'
    )


def class_names(stage: StageView, stages: list[StageView]) -> list[str]:
    """Names of the classes as the card of the model that the stage read says."""
    for source in stages:
        if source.name in stage.inputs and source.job == "handoff":
            return [str(name) for name in (source.json("card.json") or {}).get("classes") or []]
    return []


def _written(stage: StageView) -> str:
    """Text samples; the prompt is set apart from what the model wrote."""
    files = sorted((stage.folder / "text").glob("*.txt"))
    prompts = [str(p) for p in stage.config.get("prompts") or []]
    store = _store(stage)
    likelihoods = store["log_likelihood"][:] if store and "log_likelihood" in store else None
    parts = []
    for i, path in enumerate(files[:TEXTS_SHOWN]):
        text = path.read_text(encoding="utf-8", errors="replace")
        prompt = max((p for p in prompts if p and text.startswith(p)), key=len, default="")
        rest = text[len(prompt) :]
        cut = " …" if len(rest) > TEXT_CHARACTERS else ""
        marked = f'<span class="prompt">{escape(prompt)}</span>' if prompt else ""
        note = f"sample {path.stem}"
        if likelihoods is not None and i < len(likelihoods):
            note += f" · {likelihoods[i]:.1f} nats"
        parts.append(
            f'<div><pre class="text">{marked}{escape(rest[:TEXT_CHARACTERS])}{cut}</pre>'
            f"<small>{escape(note)}</small></div>"
        )
    if not parts:
        return ""
    key = ""
    if any(prompts):
        key = '<p class="quiet"><span class="prompt">prompt</span> then what the model wrote</p>'
    more = ""
    if len(files) > TEXTS_SHOWN:
        more = f"<p class='quiet'>{len(files) - TEXTS_SHOWN} further texts in the artifact</p>"
    return f'{key}<div class="grid">{"".join(parts)}</div>{more}'


def _sung(stage: StageView) -> str:
    parts = []
    for path in sorted((stage.folder / "audio").glob("*.wav"))[:SOUNDS_SHOWN]:
        if path.stat().st_size <= LARGEST_INLINE:
            uri = data_uri(path.read_bytes(), "audio/wav")
            parts.append(
                f'<div><audio controls preload="none" src="{uri}"></audio>'
                f"<small>sample {escape(path.stem)}</small></div>"
            )
    return f'<div class="grid">{"".join(parts)}</div>' if parts else ""
