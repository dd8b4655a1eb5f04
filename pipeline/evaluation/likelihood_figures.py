"""What the sums of a scored split are called, what divides them, what stands beside them.

Token space and pixel space are separate columns: the likelihood of a VQ code is not that of a
pixel. Text has bytes and words as well, beside general-purpose codecs on the same bytes.
"""

import math

import numpy as np

from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.evaluation import codecs, densities
from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.held_out import HeldOut
from chainrule.pipeline.evaluation.likelihood import Tally, unigram_nats
from chainrule.pipeline.progress import Progress
from chainrule.pipeline.stage import StageFailed

LN2 = math.log(2)


def put_tokens(
    figures: Figures,
    tokens: HeldOut,
    tally: Tally,
    given: str,
    windows: tuple[int, int] | None,
    unigram_tokens: int,
) -> None:
    """Token space. `given` names what the model is conditioned on; `windows` are (context,
    stride) where documents were scored in windows."""
    split = tokens.split
    how = ""
    if windows is not None:
        context, stride = windows
        how = (
            f"; windows of {context} tokens, each token after the first window with at least "
            f"{context - stride} before it"
        )
    mean = tally.mean
    figures.put("nats", mean, split, f"nats of -log p(token | the tokens before it{given}){how}")
    figures.put("nats_per_token", mean, split, "the same as `nats`")
    figures.put("bits_per_token", mean / LN2, split, "bits of -log2 p a token")
    figures.put("perplexity", math.exp(mean), split, "exp(nats a token)")
    figures.put(
        "nats_per_sample",
        tally.nats / max(tally.samples, 1),
        split,
        f"nats of -log p(sample{given}), mean over samples",
    )
    figures.put("tokens", tally.elements, split, "tokens scored")
    figures.put("samples", tally.samples, split, "samples scored")
    counts, used = _counts(tokens, unigram_tokens)
    guess = unigram_nats(counts, _held_out_counts(tokens, tally.samples))
    figures.put(
        "unigram_nats_per_token",
        guess,
        split,
        f"nats a token of the context-free guess: frequencies (add-one) of {used:,} training "
        "tokens, scored on this split",
    )
    figures.put("unigram_perplexity", math.exp(guess), split, "exp(unigram_nats_per_token)")
    for label, (nats, elements) in sorted(tally.by_class.items()):
        name = tokens.classes[label] if tokens.classes else str(label)
        figures.put(
            f"nats_per_token.class.{name}", nats / elements, split, f"nats a token, class {name}"
        )


def put_rows(
    figures: Figures, tokens: HeldOut, tally: Tally, given: str, log_volume: float | None
) -> None:
    """Densities of rows of real numbers, beside a Gaussian and a kernel density.

    `log_volume`: nats a row that standardising took off, so that they can be given back.
    """
    split = tokens.split
    nats = tally.nats / max(tally.samples, 1)
    how = f"nats of -log p(row{given}), mean over rows, columns standardised"
    figures.put("nats_per_row", nats, split, how)
    figures.put("nats", tally.mean, split, "nats_per_row over the columns")
    figures.put("rows", tally.samples, split, "rows scored")
    if log_volume is not None:
        own = "nats_per_row for columns in their own units"
        figures.put("nats_per_row.own_units", nats + log_volume, split, own)
    train = np.stack([row.astype(np.float64) for row in tokens.training()])
    held_out = np.stack([tokens[i][0].astype(np.float64).ravel() for i in range(tally.samples)])
    columns = densities.independent_gaussian_nats(train, held_out)
    figures.put("independent_gaussian_nats_per_row", columns, split, "a Gaussian for each column")
    gaussian = densities.gaussian_nats(train, held_out)
    figures.put(
        "gaussian_nats_per_row", gaussian, split, "one Gaussian fitted to the training rows"
    )
    kernel, width = densities.kernel_nats(train, held_out)
    figures.put(
        "kernel_density_nats_per_row",
        kernel,
        split,
        f"a Gaussian kernel of {width:.3g} deviations on each of "
        f"{min(len(train), densities.MOST_ROWS):,} training rows; the width is the best for a "
        "tenth of them",
    )


def _counts(tokens: HeldOut, most: int) -> tuple[np.ndarray, int]:
    """Counts (V,) of about `most` training tokens, and how many those were."""
    counts = np.zeros(tokens.vocabulary.size, dtype=np.int64)
    used = 0
    for ids in tokens.training(most):
        counts += np.bincount(ids, minlength=len(counts))
        used += len(ids)
    return counts, used


def _held_out_counts(tokens: HeldOut, samples: int) -> np.ndarray:
    counts = np.zeros(tokens.vocabulary.size, dtype=np.int64)
    for i in range(samples):
        counts += np.bincount(tokens[i][0].ravel(), minlength=len(counts))
    return counts


def put_text(
    figures: Figures,
    tokens: HeldOut,
    tally: Tally,
    raw: Shards | None,
    baseline: codecs.Baseline | None,
    progress: Progress,
) -> None:
    """A byte and a word of text; with the raw documents, the codecs of `baseline` on them."""
    split, samples = tokens.split, tally.samples
    size = sum(int(tokens.meta(i)["bytes"]) for i in range(samples))
    ends = "its end (eos) included" if "eos" in tokens.vocabulary.specials else "without its end"
    figures.put(
        "bits_per_byte",
        tally.nats / LN2 / max(size, 1),
        split,
        f"bits of -log2 p(document, {ends}) a UTF-8 byte of it; each document alone, the "
        "model's own bytes not counted",
    )
    figures.put("bytes", size, split, "UTF-8 bytes of the documents scored")
    figures.put("bytes_per_token", size / max(tally.elements, 1), split, "UTF-8 bytes a token")
    if raw is None:
        return
    words = 0
    for i in range(samples):
        sample = raw.read(split, tokens.chosen[i])
        assert sample is not None  # shards opened to stop at damage raise instead
        document = sample.members["txt"]
        words += len(document.split())
        if baseline is not None:
            baseline.add(document)
        progress.update(1)
    figures.put(
        "perplexity_per_word",
        math.exp(min(tally.nats / max(words, 1), 700.0)),
        split,
        "exp(nats a word); words are what white space separates",
    )
    if baseline is None:
        return
    if baseline.bytes != size:
        raise StageFailed(
            f"{raw.folder}: {samples} documents of {split} hold {baseline.bytes} bytes, "
            f"those of {tokens.shards.folder} {size}; give the data that the tokens were made from"
        )
    for way, sizes in baseline.finish().items():
        what = "every document alone" if way == "alone" else "all documents joined into one"
        for name, compressed in sizes.items():
            figures.put(
                f"{name}_bits_per_byte" if way == "alone" else f"{name}_joined_bits_per_byte",
                8 * compressed / max(size, 1),
                split,
                f"bits a byte of {name} at its strongest setting on the same bytes, {what}",
            )


def put_audio(figures: Figures, tokens: HeldOut, tally: Tally, bits: int) -> None:
    """A sample of sound is one mu-law token, or two of the code of 16 `bits`."""
    kept = "all its 16 bits" if bits == 16 else "its mu-law value of 8 bits"
    figures.put(
        "bits_per_audio_sample",
        tally.mean / LN2 * bits / 8,
        tokens.split,
        f"bits of -log2 p a sample of sound ({kept})",
    )


def put_images(figures: Figures, tokens: HeldOut, tally: Tally) -> None:
    """Pixel space where the tokens are the pixels themselves, and only there."""
    if tokens.tokenizer_kind == "pixels" and tokens.vocabulary.size == 256:
        figures.put(
            "bits_per_dim",
            tally.mean / LN2,
            tokens.split,
            "bits of -log2 p a value (pixel and channel) of 256 levels: pixel space",
        )
        return
    figures.fact(
        "bits_per_dim.note",
        f"not given: the likelihood is of {tokens.tokenizer_kind} codes (token space), and a "
        "code's likelihood is not a pixel's",
    )
