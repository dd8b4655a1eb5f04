"""Real numbers, column by column, to mean 0 and deviation 1: for the continuous densities.

Nothing is quantised: a row of D numbers (float64) becomes D numbers in float32. The density of
a row in its own units is that of the standardised one over the product of the deviations, so
its log-density is lower by `log_volume` nats.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chainrule.tokenizers.interface import (
    Tokenizer,
    TokenizerError,
    TokenizerSettings,
    fingerprint_of,
    read_card,
    require_fingerprint,
)


class StandardizeSettings(TokenizerSettings):
    kind: Literal["standardize"] = "standardize"


class StandardizeTokenizer(Tokenizer):
    kind = "standardize"
    modality = "table"

    def __init__(
        self, mean: np.ndarray, deviation: np.ndarray, columns: Sequence[str] | None = None
    ) -> None:
        """`mean`, `deviation` (D,), the deviations above 0; `columns` the names of the D."""
        self.columns = None if columns is None else list(columns)
        self.mean = np.asarray(mean, np.float64)
        self.deviation = np.asarray(deviation, np.float64)
        if self.mean.ndim != 1 or self.mean.shape != self.deviation.shape:
            raise TokenizerError(
                f"standardize: means {self.mean.shape}, deviations {self.deviation.shape}"
            )
        if not (np.isfinite(self.mean).all() and (self.deviation > 0).all()):
            at = int(np.argmin(self.deviation))
            name = at if self.columns is None else f"'{self.columns[at]}'"
            raise TokenizerError(f"standardize: column {name} is constant; leave it out")
        if self.columns is not None and len(self.columns) != len(self.mean):
            raise TokenizerError(
                f"standardize: {len(self.columns)} names for {len(self.mean)} columns"
            )

    @classmethod
    def train(
        cls, rows: Iterable[np.ndarray], columns: Sequence[str] | None = None
    ) -> "StandardizeTokenizer":
        """From training rows (D,), in one pass."""
        count, total, squares = 0, np.zeros(0), np.zeros(0)
        first = np.zeros(0)
        for row in rows:
            x = np.asarray(row, np.float64)
            if count == 0:
                first, total, squares = x, np.zeros_like(x), np.zeros_like(x)
            if x.shape != first.shape:
                raise TokenizerError(f"standardize: rows of {len(first)} and of {len(x)} numbers")
            count += 1
            total += x - first  # about a value of the column's own size
            squares += (x - first) ** 2
        if count == 0:
            raise TokenizerError("standardize: no rows to train on")
        mean = total / count
        return cls(first + mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0)), columns)

    @property
    def log_volume(self) -> float:
        """Nats by which a row's log-density in its own units is lower."""
        return float(np.log(self.deviation).sum())

    @property
    def vocabulary(self) -> dict[str, Any]:
        """Of size 0: elements are real numbers."""
        return {"size": 0, "ranges": {}, "specials": {}}

    @property
    def fingerprint(self) -> str:
        decisive: dict[str, Any] = {"kind": self.kind}
        if self.columns is not None:
            decisive["columns"] = self.columns
        return fingerprint_of(decisive, {"mean": self.mean, "deviation": self.deviation})

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [((self._row(x) - self.mean) / self.deviation).astype(np.float32) for x in batch]

    def decode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._row(x) * self.deviation + self.mean for x in batch]

    def _row(self, x: np.ndarray) -> np.ndarray:
        row = np.asarray(x)
        if row.shape != self.mean.shape or row.dtype.kind not in "fiu":
            raise TokenizerError(
                f"a row is {row.dtype} {row.shape}; this tokenizer takes {len(self.mean)} numbers"
            )
        return row.astype(np.float64)

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "mean": self.mean.tolist(),
            "deviation": self.deviation.tolist(),
            "columns": self.columns,
            "log_volume": self.log_volume,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "StandardizeTokenizer":
        card = read_card(folder)
        try:
            mean, deviation = (np.array(card[key], np.float64) for key in ("mean", "deviation"))
            names = card.get("columns")
            columns = None if names is None else [str(name) for name in names]
        except (KeyError, TypeError, ValueError):
            raise TokenizerError(f"{folder / 'card.json'}: no means and deviations") from None
        tokenizer = cls(mean, deviation, columns)
        if not math.isfinite(tokenizer.log_volume):
            raise TokenizerError(f"{folder / 'card.json'}: a deviation is not finite")
        require_fingerprint(folder, card, tokenizer.fingerprint)
        return tokenizer
