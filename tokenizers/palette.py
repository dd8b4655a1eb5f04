"""A palette: each pixel becomes the nearest of a few colours (ImageGPT, Chen et al. 2020).

Section 3.1 there: k-means of RGB with 512 clusters, "9 bits" a pixel, faithful to colour
and three times shorter than pixels by channel. Grey images get a palette of greys.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from chainrule.tokenizers.interface import (
    Tokenizer,
    TokenizerError,
    TokenizerSettings,
    check_ids,
    fingerprint_of,
    read_card,
    read_weights,
    require_fingerprint,
    write_card,
    write_whole,
)
from chainrule.tokenizers.kmeans import kmeans, nearest

WEIGHTS = "weights.safetensors"


class PaletteSettings(TokenizerSettings):
    kind: Literal["palette"] = "palette"
    colours: int = Field(512, ge=2, le=65536)
    iterations: int = Field(25, ge=1, description="of Lloyd's algorithm")
    sample_pixels: int = Field(1_000_000, ge=1, description="training pixels that k-means sees")


class PaletteTokenizer(Tokenizer):
    kind = "palette"
    modality = "image"

    def __init__(
        self, settings: PaletteSettings, colours: np.ndarray, facts: dict[str, Any] | None = None
    ) -> None:
        """`colours`: uint8 (K, C)."""
        self.settings = settings
        self.colours = colours
        self.channels = colours.shape[1]
        self.facts = dict(facts or {})
        self._centres = torch.from_numpy(colours.astype(np.float32))

    @classmethod
    def train(cls, settings: PaletteSettings, pixels: np.ndarray, seed: int) -> "PaletteTokenizer":
        """From uint8 pixels (N, C). Equal pixels are counted once, with their weight."""
        generator = torch.Generator().manual_seed(seed)
        if len(pixels) > settings.sample_pixels:
            keep = torch.randperm(len(pixels), generator=generator)[: settings.sample_pixels]
            pixels = pixels[keep.numpy()]
        distinct, counts = np.unique(pixels, axis=0, return_counts=True)
        if len(distinct) < settings.colours:
            raise TokenizerError(
                f"palette: the sample has {len(distinct)} distinct colours, fewer than "
                f"tokenizer.colours {settings.colours}"
            )
        centres = kmeans(
            torch.from_numpy(distinct.astype(np.float32)),
            settings.colours,
            settings.iterations,
            torch.from_numpy(counts),
            generator,
        )
        colours = centres.clamp(0, 255).round().to(torch.uint8).numpy()
        # in order of brightness, so that neighbouring ids are similar colours
        luma = np.array([0.299, 0.587, 0.114]) if colours.shape[1] == 3 else np.ones(1)
        order = np.lexsort([*colours.T, colours @ luma])
        return cls(settings, colours[order])

    @property
    def vocabulary(self) -> dict[str, Any]:
        n = len(self.colours)
        return {"size": n, "ranges": {"image": [0, n]}, "specials": {}}

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": self.kind}, {"colours": self.colours})

    def encode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        dtype = np.min_scalar_type(len(self.colours) - 1)
        encoded = []
        for image in batch:
            image = np.asarray(image)
            if image.ndim != 3 or image.dtype != np.uint8 or image.shape[2] != self.channels:
                raise TokenizerError(
                    f"image is {image.dtype} {image.shape}; this tokenizer takes uint8 "
                    f"(H, W, {self.channels})"
                )
            ids = self._nearest(image.reshape(-1, self.channels))
            encoded.append(ids.astype(dtype).reshape(image.shape[:2]))
        return encoded

    @cached_property
    def _ids(self) -> np.ndarray:
        """The id of each colour met so far, -1 of others: one look-up a pixel from its second
        meeting on, where the search costs K distances."""
        return np.full(256**self.channels, -1, np.int32)

    def _nearest(self, pixels: np.ndarray) -> np.ndarray:
        """Ids (N,) of pixels (N, C)."""
        keys = pixels[:, 0].astype(np.int32)
        for channel in range(1, self.channels):
            keys = 256 * keys + pixels[:, channel]
        ids = self._ids[keys]
        unmet = np.unique(keys[ids < 0])
        if len(unmet):
            shifts = 8 * np.arange(self.channels - 1, -1, -1)
            colours = (unmet[:, None] >> shifts) & 255
            index, _ = nearest(torch.from_numpy(colours.astype(np.float32)), self._centres)
            self._ids[unmet] = index.numpy()
            ids = self._ids[keys]
        return ids

    def decode(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.colours[check_ids(tokens, len(self.colours))] for tokens in batch]

    def card(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": 1,
            "modality": self.modality,
            "vocabulary": self.vocabulary,
            "settings": self.settings.model_dump(mode="json"),
            "channels": self.channels,
            "downsampling": 1,
            **self.facts,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, save({"colours": self.colours}))
        write_card(folder, self.card())

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "PaletteTokenizer":
        from safetensors import SafetensorError
        from safetensors.numpy import load

        card = read_card(folder)
        try:
            settings = PaletteSettings.model_validate(card.get("settings"))
            colours = load(read_weights(folder, WEIGHTS))["colours"]
        except TokenizerError:
            raise
        except (SafetensorError, KeyError, ValueError) as error:
            raise TokenizerError(f"{folder}: altered or cut ({type(error).__name__})") from None
        known = {"kind", "format", "modality", "vocabulary", "settings", "channels"}
        known |= {"downsampling", "fingerprint"}
        facts = {key: value for key, value in card.items() if key not in known}
        tokenizer = cls(settings, colours, facts)
        require_fingerprint(folder, card, tokenizer.fingerprint)
        return tokenizer
