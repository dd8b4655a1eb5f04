"""A token space: its size, the named ranges that modalities occupy, the special tokens.

The plain-dict form is what `index.json` and every `card.json` hold under "vocabulary":

    {"size": 4098, "ranges": {"text": [0, 4096], "specials": [4096, 4098]},
     "specials": {"bos": 4096, "eos": 4097}}

A size of 0 says that elements are real numbers (tables): no ids, no ranges.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from chainrule.pipeline.config import Settings


class Vocabulary(Settings):
    """Named half-open ranges `[start, stop)` of ids, disjoint and inside `size`."""

    size: int = Field(ge=0, description="0: elements are real numbers")
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
    def continuous(self) -> bool:
        """Whether elements are real numbers."""
        return self.size == 0

    @property
    def values(self) -> int | None:
        """How many values an element has; None for real numbers."""
        return self.size or None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every id; float32 for real numbers."""
        if self.continuous:
            return np.dtype(np.float32)
        return np.dtype(np.min_scalar_type(self.size - 1))

    @property
    def batch_dtype(self) -> np.dtype[Any]:
        """What a model takes: int64 ids, or float32 numbers."""
        return np.dtype(np.float32 if self.continuous else np.int64)

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def join(vocabularies: Sequence[Vocabulary]) -> tuple[Vocabulary, list[np.ndarray]]:
    """One space that holds several, and for each a table int64 (size,): own id -> joint id.

    The ranges lie one after the other in the order given (a name met again gets a number:
    image, image-1); then the specials, shared by name. Ids of no range map to -1.
    """
    ranges: dict[str, tuple[int, int]] = {}
    specials: dict[str, int] = {}
    tables = []
    end = 0
    for vocabulary in vocabularies:
        table = np.full(vocabulary.size, -1, np.int64)
        for name, (start, stop) in sorted(vocabulary.ranges.items(), key=lambda item: item[1]):
            if name == "specials":
                continue
            ranges[_free(name, ranges)] = (end, end + stop - start)
            table[start:stop] = np.arange(end, end + stop - start)
            end += stop - start
        for name, token in vocabulary.specials.items():
            if table[token] >= 0:  # a special inside a modality's range moves with it
                specials[_free(name, specials)] = int(table[token])
        tables.append(table)
    first = end
    shared: dict[str, int] = {}
    for vocabulary, table in zip(vocabularies, tables, strict=True):
        for name, token in sorted(vocabulary.specials.items(), key=lambda item: item[1]):
            if table[token] < 0:
                if name not in shared:
                    shared[name] = end
                    end += 1
                table[token] = shared[name]
    if end > first:
        ranges["specials"] = (first, end)
    for name, token in shared.items():
        specials[_free(name, specials)] = token
    return Vocabulary(size=end, ranges=ranges, specials=specials), tables


def _free(name: str, taken: dict[str, Any]) -> str:
    """`name`, with a number where it is taken."""
    number, candidate = 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
