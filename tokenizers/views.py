"""Windows and mirror images of a picture, for those who bake augmentations into token shards."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from chainrule.tokenizers.interface import TokenizerError, TokenizerSettings


class Views(TokenizerSettings):
    """Windows and mirror images baked into the shards: each training image gives several samples.

    LlamaGen's ten-crop (Sun et al. 2024, section 3.1) is `{crops: five, size: 256, flip: true}`.
    A validation image gives one: its centre, or the whole.
    """

    crops: Literal["whole", "center", "five"] = Field(
        "whole", description="five: the corners and the centre"
    )
    size: int | None = Field(None, ge=1, description="side of a window, in pixels")
    flip: bool = Field(False, description="each view mirrored as well")

    @model_validator(mode="after")
    def _windows_have_a_size(self) -> "Views":
        if (self.crops == "whole") != (self.size is None):
            raise ValueError("size is for crops center and five, and needed by them")
        return self

    def count(self, split: str) -> int:
        if split != "train":
            return 1
        return (5 if self.crops == "five" else 1) * (2 if self.flip else 1)

    def of(self, image: np.ndarray, split: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Each view of uint8 (H, W, C), with what was done to it. TokenizerError if too small."""
        height, width = image.shape[:2]
        places: list[tuple[int, int] | None] = [None]
        if self.size is not None:
            down, right = height - self.size, width - self.size
            if min(down, right) < 0:
                raise TokenizerError(
                    f"image of {height}x{width} is smaller than views.size {self.size}"
                )
            places = [(down // 2, right // 2)]
            if self.crops == "five" and split == "train":
                places += [(0, 0), (0, right), (down, 0), (down, right)]
        for mirrored in (False, True) if self.flip and split == "train" else (False,):
            for place in places:
                view = image
                done: dict[str, Any] = {}
                if place is not None and self.size is not None:
                    top, left = place
                    view = view[top : top + self.size, left : left + self.size]
                    done["crop"] = [top, left, self.size, self.size]
                if mirrored:
                    view, done["flip"] = view[:, ::-1], True
                yield done, np.ascontiguousarray(view)
