"""Do samples look like the class that was asked for? A classifier fitted on real data says.

The figure is the share of samples that an SVC (RBF kernel, scikit-learn's defaults), fitted
on the real training images, names as the class each was sampled for. Beside it stands the
same classifier's accuracy on real images it was not fitted on: the most the first can mean.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chainrule.pipeline.artifact import read_json
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.held_out import labelled_images
from chainrule.pipeline.sampling.store import CAPTIONS
from chainrule.pipeline.stage import StageFailed, say


class NoClasses(Exception):
    """Samples were drawn for captions, and these do not tell which class is meant."""


@dataclass(frozen=True)
class Agreement:
    agreement: float
    """Share of samples named as the class asked for, 0..1."""
    accuracy: float
    """Share of held-out real images named right, 0..1."""
    by_class: dict[int, tuple[int, int]]
    """class -> (samples named as asked, samples asked for)"""


def classifier_agreement(
    real: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    held_out: npt.NDArray[np.uint8],
    held_out_labels: npt.NDArray[np.int64],
    samples: npt.NDArray[np.uint8],
    asked: npt.NDArray[np.int64],
) -> Agreement:
    """Images are (N, H, W, C) uint8, all of one shape; labels and `asked` (N,)."""
    from sklearn.svm import SVC

    if real.shape[1:] != samples.shape[1:]:
        raise ValueError(f"samples of {samples.shape[1:]} against real images of {real.shape[1:]}")

    def features(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        return images.reshape(len(images), -1) / 255.0

    classifier = SVC(gamma="scale").fit(features(real), labels)
    named = classifier.predict(features(samples))
    by_class = {}
    for label in np.unique(asked):
        chosen = asked == label
        by_class[int(label)] = (int((named[chosen] == label).sum()), int(chosen.sum()))
    return Agreement(
        float((named == asked).mean()),
        float(classifier.score(features(held_out), held_out_labels)),
        by_class,
    )


def _asked(samples: Path, store: Any, shards: Shards) -> npt.NDArray[np.int64] | None:
    """The class that each sample was asked for: by itself, or as the one that its caption names;
    None where samples were asked for neither. NoClasses where captions do not name classes."""
    if "class" in store:
        return np.asarray(store["class"])
    if "caption" not in store:
        return None
    if not shards.classes:
        raise NoClasses("the real pictures have no classes")
    of_caption = []
    for caption in read_json(samples / CAPTIONS):
        named = [name for name in shards.classes if _words(name) in _words(caption)]
        # "cat tree" names no cat
        named = [a for a in named if not any(_words(a) in _words(b) for b in named if a != b)]
        if len(named) != 1:
            raise NoClasses(f"the caption '{caption}' names {' and '.join(named) or 'none'}")
        of_caption.append(shards.classes.index(named[0]))
    return np.array(of_caption)[np.asarray(store["caption"])]


def _words(text: str) -> str:
    """The words of a text, a space before and after each."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


def measure_agreement(samples: Path, shards: Shards, figures: Figures) -> None:
    """The figures of the samples in `samples` (a folder with samples.zarr) against real shards."""
    import zarr

    store = zarr.open_group(str(samples / "samples.zarr"), mode="r")
    try:
        asked = _asked(samples, store, shards)
    except NoClasses as error:
        say(f"{samples}: not held against the classifier, which needs a class a sample: {error}")
        return
    if "images" not in store or asked is None:
        raise StageFailed(
            f"{samples}: no images with classes in samples.zarr; "
            "leave 'samples' out of this evaluation"
        )
    real, labels = labelled_images(shards, "train")
    held_out, held_out_labels = labelled_images(shards, "validation")
    images = np.asarray(store["images"])
    found = classifier_agreement(real, labels, held_out, held_out_labels, images, asked)
    fitted = f"an SVC (RBF) fitted on {len(real)} real training images"
    figures.put(
        "classifier_agreement",
        found.agreement,
        "samples",
        f"share of {len(images)} samples that {fitted} names as the class asked for",
    )
    figures.put(
        "classifier_accuracy",
        found.accuracy,
        "validation",
        f"share of {len(held_out)} real held-out images that the same SVC names right",
    )
    for label, (right, of) in sorted(found.by_class.items()):
        name = shards.classes[label] if shards.classes else str(label)
        figures.put(
            f"classifier_agreement.class.{name}", right / of, "samples", f"of {of} asked for"
        )
