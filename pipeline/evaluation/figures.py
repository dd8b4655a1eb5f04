"""The figures of an evaluation: one flat JSON object, each figure with its split and its unit.

"bits_per_byte": 2.31,
"bits_per_byte.split": "validation",
"bits_per_byte.unit": "bits of -log2 p(document, its end included) a UTF-8 byte of it",
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainrule.pipeline.artifact import write_json

FILE = "evaluation.json"
HEADLINES = (
    "classifier_agreement",
    "probe_accuracy",
    "bits_per_dim",
    "bits_per_byte",
    "xz_bits_per_byte",
    "nats",
    "unigram_nats_per_token",
    "psnr",
    "ssim",
    "codebook_usage",
)
"""Figures that a summary shows first, where there are such."""


@dataclass
class Figures:
    """Figures in the order they were put."""

    values: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, value: float | int | None, split: str, unit: str) -> None:
        """One figure. An infinite or undefined value is stored as null and said so."""
        if value is not None and not math.isfinite(value):
            unit += f" (here {value!r})"
            value = None
        self.values[name] = value
        self.values[f"{name}.split"] = split
        self.values[f"{name}.unit"] = unit

    def fact(self, name: str, value: str | int | float | None) -> None:
        """Something that is said about the evaluation and is no figure."""
        self.values[name] = value

    @property
    def numbers(self) -> dict[str, float]:
        """The figures alone, for a summary: the headlines first."""
        found = {
            name: value
            for name, value in self.values.items()
            if f"{name}.unit" in self.values and value is not None
        }
        return {name: found[name] for name in HEADLINES if name in found} | found

    def write(self, folder: Path) -> Path:
        path = folder / FILE
        write_json(path, self.values)
        return path
