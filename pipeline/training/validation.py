"""Loss on held-out tokens, and the best guess that ignores the context."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import islice

import numpy as np
import torch

from chainrule.pipeline.artifact import Artifact, ArtifactError
from chainrule.pipeline.data.batches import Mixture, mixture_of, sequential
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.evaluation.densities import independent_gaussian_nats
from chainrule.pipeline.evaluation.likelihood import unigram_nats
from chainrule.pipeline.training.engine import Engine
from chainrule.pipeline.training.objective import Objective


class Validation:
    """The validation splits of the training sets, each row once, on all ranks."""

    def __init__(
        self,
        sets: list[TokenSet],
        context: int,
        batch_size: int,
        seed: int,
        shares: Sequence[float | Fraction] | None = None,
    ) -> None:
        """`sets` in the order of the training mixture, so that joint ids are the same, and the
        `shares` of it that they have (None: equal ones).

        Rows lie in a fixed shuffled order: the first few batches are a fair sample.
        """
        whole = mixture_of(sets, context=context, seed=seed)
        self.names = [tokens.name for tokens in sets]
        self._single = [Mixture([m], vocabulary=whole.vocabulary) for m in whole.members]
        self._batch_size = batch_size
        self._shares = [float(s) for s in shares or [Fraction(1, len(sets))] * len(sets)]

    def mean(self, figures: Sequence[float]) -> float:
        """One figure of the sets' own, weighed as the training mixture weighs them."""
        return sum(s * figure for s, figure in zip(self._shares, figures, strict=True))

    def losses(
        self,
        engine: Engine,
        objective: Objective,
        batches: int | None = None,
        go_on: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Nats an element over the first `batches` of each set, or the whole split.

        `validation_loss` weighs the sets as the training mixture does; of several, each has
        `validation_loss.<name>` as well. `go_on` is called before each batch, and what it raises
        ends the validation. Collective.
        """
        found: list[float] = []
        engine.wrapped.eval()
        with torch.no_grad():
            for mixture in self._single:
                nats = elements = 0.0
                stream = sequential(mixture, self._batch_size, engine.rank, engine.world_size)
                for batch in islice(stream, batches):
                    go_on()
                    nats += objective(engine.wrapped, batch.to(engine.device))[1].item()
                    elements += batch.tokens
                nats, elements = engine.sum(nats, elements)
                found.append(nats / elements)
        engine.wrapped.train()
        mean = {"validation_loss": self.mean(found)}
        if len(found) == 1:
            return mean
        each = zip(self.names, found, strict=True)
        return mean | {f"validation_loss.{name}": loss for name, loss in each}


def validation_sets(artifacts: Sequence[Artifact]) -> list[TokenSet]:
    """The validation split of each token artifact; ArtifactError where one has none."""
    sets = []
    for artifact in artifacts:
        try:
            sets.append(TokenSet.open(artifact.folder, "validation"))
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}: set a larger `validation` in ingest or, where it has a few long texts, "
                "cut them (source.document: paragraph, source.document_bytes)"
            ) from None
    return sets


def context_free_loss(training: TokenSet, held_out: TokenSet, at_most: int = 20_000_000) -> float:
    """Nats an element of the held-out tokens under the training tokens' frequencies.

    The unigram: the best guess that looks at no context (one is added to every count). For real
    numbers: a Gaussian fitted to each column.
    """
    if training.vocabulary.continuous:
        train, held = _rows(training, at_most), _rows(held_out, at_most)
        return independent_gaussian_nats(train, held) / train.shape[1]
    return unigram_nats(_counts(training, at_most), _counts(held_out, at_most))


def _rows(tokens: TokenSet, at_most: int) -> np.ndarray:
    """Rows (N, D) float64, of about so many elements at most."""
    found: list[np.ndarray] = []
    for i in tokens.spread(at_most):
        sample = tokens.sample(i)
        if sample is not None:
            found.append(tokens.decode(sample).astype(np.float64).reshape(-1))
    return np.stack(found)


def _counts(tokens: TokenSet, at_most: int) -> np.ndarray:
    counts = np.zeros(tokens.vocabulary.size, np.int64)
    for i in tokens.spread(at_most):
        sample = tokens.sample(i)
        if sample is None:  # damaged, and counted
            continue
        array = tokens.decode(sample)
        counts += np.bincount(array.reshape(-1), minlength=len(counts))
    return counts
