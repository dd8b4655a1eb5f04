"""What a tokenizer gives back: encode then decode over batches of raw samples, as figures.

A tokenizer is anything with `encode`, `decode`, `vocabulary` and `depth` of
`chainrule.tokenizers.interface.Tokenizer`; jobs hand one in.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.frechet import Features, Moments, distance
from chainrule.pipeline.evaluation.reconstruction import Reconstruction, Usage

Perceptual = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]
SHOWN = 16
"""Pairs in the picture, at most: of these the ones that have the first one's shape."""


def measure_images(
    tokenizer: Any,
    batches: Iterable[Sequence[np.ndarray]],
    split: str,
    figures: Figures,
    picture: Path,
    perceptual: Perceptual | None = None,
    features: Features | None = None,
) -> None:
    """PSNR, SSIM, codebook usage of images; originals, reconstructions and errors as a PNG.

    `perceptual` gives LPIPS of two lists of images, summed over them; `features` those that the
    Fréchet distance (rFID) is of.
    """
    start, stop = tokenizer.vocabulary["ranges"]["image"]
    pairs, usage = Reconstruction(), Usage(start, stop, tokenizer.depth)
    shown: list[np.ndarray] = []
    tokens = pixels = 0
    far = 0.0
    originals, reconstructions = Moments(), Moments()
    for images in batches:
        codes = tokenizer.encode(images)
        back = tokenizer.decode(codes)
        pairs.add(images, back)
        if perceptual is not None:
            far += perceptual(images, back)
        if features is not None:
            originals.add(features(images))
            reconstructions.add(features(back))
        tokens += sum(code.size for code in codes)
        pixels += sum(image.shape[0] * image.shape[1] for image in images)
        for code in codes:
            usage.add(code)
        if not shown:
            pairs_of = zip(images[:SHOWN], back[:SHOWN], strict=True)
            alike = [pair for pair in pairs_of if pair[0].shape == images[0].shape]
            shown = [picture for side in zip(*alike, strict=True) for picture in side]
    figures.put("psnr", pairs.psnr, split, "dB, peak 255; mean over images that differ at all")
    figures.put("ssim", pairs.ssim, split, "mean structural similarity (Wang et al. 2004)")
    if perceptual is not None:
        how = "LPIPS (Zhang et al. 2018) on VGG-16, mean over images; 0 is the original"
        figures.put("lpips", far / pairs.pairs, split, how)
    if features is not None:
        figures.put(
            "rfid",
            distance(originals, reconstructions),
            split,
            f"Fréchet distance of Inception features of {originals.count} originals and their "
            "reconstructions (torch-fidelity's network); of few images it is biased upwards",
        )
    figures.put("mse", pairs.mse, split, "mean squared error a value, scale 0..255")
    figures.put("exact", pairs.exact / pairs.pairs, split, "share of images given back exactly")
    which = f" at the worst of {usage.depth} levels" if usage.depth > 1 else ""
    share, entropy = f"share of the {stop - start} codes used", "exp(entropy of the codes)"
    figures.put("codebook_usage", usage.used, split, share + which)
    figures.put("codebook_perplexity", usage.perplexity, split, entropy + which)
    if usage.depth > 1:
        for level, (used, perplexity) in enumerate(usage.levels, start=1):
            figures.put(f"codebook_usage_level_{level}", used, split, share)
            figures.put(f"codebook_perplexity_level_{level}", perplexity, split, entropy)
    figures.put(
        "code_bits_per_pixel",
        tokens * math.log2(max(stop - start, 2)) / pixels,
        split,
        "bits a pixel of the codes stored plainly (a rate, not a likelihood)",
    )
    side_by_side(shown, picture)


def side_by_side(images: Sequence[np.ndarray], path: Path) -> None:
    """n originals (the first half of `images`) above their n reconstructions and the error of
    each (grey is none), as a PNG; all of one shape."""
    from PIL import Image

    n = len(images) // 2
    rows = [np.concatenate(list(images[i : i + n]), axis=1) for i in (0, n)]
    error = rows[1].astype(np.int16) - rows[0]
    rows.append(np.clip(error + 128, 0, 255).astype(np.uint8))
    sheet = np.concatenate(rows, axis=0)
    scale = max(1, 64 // images[0].shape[0])
    sheet = sheet.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet).save(path)


def measure_texts(
    tokenizer: Any, batches: Iterable[Sequence[str]], split: str, figures: Figures
) -> None:
    """Whether texts come back exactly, and how many bytes a token stands for."""
    start, stop = tokenizer.vocabulary["ranges"]["text"]
    usage = Usage(start, stop)
    tokens = size = exact = documents = 0
    for texts in batches:
        codes = tokenizer.encode(texts)
        exact += sum(a == b for a, b in zip(texts, tokenizer.decode(codes), strict=True))
        documents += len(texts)
        tokens += sum(len(code) for code in codes)
        size += sum(len(text.encode()) for text in texts)
        for code in codes:
            usage.add(code)
    figures.put("exact", exact / documents, split, "share of documents given back exactly")
    figures.put("bytes_per_token", size / max(tokens, 1), split, "UTF-8 bytes a token")
    figures.put("vocabulary_usage", usage.used, split, f"share of the {stop - start} tokens used")


def measure_audio(
    tokenizer: Any, batches: Iterable[Sequence[np.ndarray]], split: str, figures: Figures
) -> None:
    """Signal to noise of what the codes keep of recordings (int16)."""
    signal = noise = 0.0
    exact = recordings = 0
    for sounds in batches:
        for sound, back in zip(sounds, tokenizer.decode(tokenizer.encode(sounds)), strict=True):
            x = sound.astype(np.float64)
            signal += float((x**2).sum())
            noise += float(((x - back.astype(np.float64)) ** 2).sum())
            exact += int(np.array_equal(sound, back))
            recordings += 1
    ratio = 10 * math.log10(signal / noise) if noise and signal else math.inf
    figures.put("snr", ratio, split, "dB: power of the signal over that of what was lost")
    figures.put("exact", exact / recordings, split, "share of recordings given back exactly")
