"""Pieces of HTML that several parts of the report use: figures, pictures, wording."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from chainrule.pipeline.report_stages import StageView, size_of

LARGEST_INLINE = 4_000_000
"""Bytes of a picture or sound that the page still carries; larger ones are named only."""

UNITS = {
    "bits_per_dim": "bits/dim",
    "bits_per_byte": "bits/byte",
    "bits_per_token": "bits/token",
    "bits_per_character": "bits/character",
    "nats_per_token": "nats/token",
    "nats_per_element": "nats/element",
    "nats": "nats",
    "loss": "nats/token",
    "psnr": "dB",
    "tokens_per_second": "tokens/s",
    "samples_per_second": "samples/s",
    "seconds": "s",
    "bytes": "bytes",
}


def unit_of(key: str) -> str:
    """The unit that a metric's name implies ("" for a pure number)."""
    return next((unit for name, unit in UNITS.items() if name in key), "")


def words(key: str) -> str:
    return key.replace("_", " ").replace(".", " · ")


def flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested object as dotted keys."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(item, dict):
            found.update(flat(item, name))
        else:
            found[name] = item
    return found


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(path: Path, caption: str) -> str:
    """A PNG of an artifact as a figure; small ones are enlarged without smoothing."""
    if path.stat().st_size > LARGEST_INLINE:
        size = size_of(path.stat().st_size)
        return f"<p>{escape(caption)}: {escape(str(path))} ({size}, not carried in the page)</p>"
    from PIL import Image

    with Image.open(path) as image:
        width = image.width
    scale = max(1, 520 // max(width, 1))
    style = f' class="pixelated" style="width:{width * scale}px"' if scale > 1 else ""
    uri = data_uri(path.read_bytes(), "image/png")
    return (
        f'<figure class="picture"><figcaption>{escape(caption)}</figcaption>'
        f'<img{style} src="{uri}" alt="{escape(caption)}"></figure>'
    )


def of_jobs(stages: Iterable[StageView], *jobs: str) -> list[StageView]:
    return [stage for stage in stages if stage.job in jobs]


def pictures(stage: StageView, but: tuple[str, ...] = ()) -> list[Path]:
    if not stage.published:
        return []
    found = sorted(p for p in stage.folder.rglob("*.png") if ".zarr" not in p.as_posix())
    return [path for path in found if path.name not in but]
