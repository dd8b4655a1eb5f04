"""A token space: its size, the named ranges that modalities occupy, the special tokens.

The plain-dict form is what `index.json` and every `card.json` hold under "vocabulary":

    {"size": 4098, "ranges": {"text": [0, 4096], "specials": [4096, 4098]},
     "specials": {"bos": 4096, "eos": 4097}}
"""

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from chainrule.pipeline.config import Settings


class Vocabulary(Settings):
    """Named half-open ranges `[start, stop)` of ids, disjoint and inside `size`."""

    size: int = Field(ge=1)
    ranges: dict[str, tuple[int, int]]
    specials: dict[str, int] = {}

    @model_validator(mode="after")
    def _ranges_are_disjoint(self) -> "Vocabulary":
        end = 0
        for name, (start, stop) in sorted(self.ranges.items(), key=lambda item: item[1]):
            if not end <= start < stop <= self.size:
                raise ValueError(
                    f"range '{name}' [{start}, {stop}) overlaps another or leaves [0, {self.size})"
                )
            end = stop
        for name, token in self.specials.items():
            if not 0 <= token < self.size:
                raise ValueError(f"special '{name}' = {token} lies outside [0, {self.size})")
        return self

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id."""
        return np.dtype(np.min_scalar_type(self.size - 1))

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
