"""What every model answers: the distribution of the next element, exactly.

    p(x) = prod_t p(x_t | x_<t)

A model is a backbone (causal features) and a head (which :class:`Conditional`).
Training, evaluation, sampling, speculative decoding and compression are each
written once against these three classes.

Shapes: B batch, T elements of one event in generation order (T = prod(event_shape)).
Likelihoods are in nats. An element is an integer (of any integer dtype) for discrete heads,
a float for continuous ones; a PixelCNN++ element is one channel of one pixel.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.pipeline.models import native


class Conditional(ABC):
    """A batch of distributions over the next element; `shape` are its batch dimensions."""

    shape: torch.Size

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Nats of `x` (of `shape`), of `shape`."""

    @abstractmethod
    def sample(
        self,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """One draw for each distribution, of `shape`. Temperature 0 is the mode.

        `top_k` and `top_p` are for discrete heads; a density raises ValueError.
        """

    def pmf(self) -> Tensor:
        """Probabilities `(*shape, V)` of a discrete distribution, rows summing to 1.

        Raises TypeError for a density.
        """
        raise TypeError(f"{type(self).__name__} is a density: it has no probability mass function")


class Cursor(ABC):
    """Where generation stands: KV cache, convolution queues, running sums."""

    position: int
    """Elements known so far, in generation order."""

    @property
    @abstractmethod
    def next(self) -> Conditional:
        """p(x_t | x_<t) at the current position, of shape (B,)."""

    @abstractmethod
    def advance(self, x: Tensor) -> Conditional:
        """Feed k known elements (B, k); the k conditionals that follow them, of shape (B, k).

        The last of them is the new `next`. After the last element of an event there is
        nothing to predict: the conditionals returned are then k - 1. ValueError past the
        end of the event.
        """

    @abstractmethod
    def rewind(self, n: int) -> None:
        """Forget the last `n` elements, as if they had never been fed."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the cache really holds."""


class Autoregressive(nn.Module, ABC):
    """A model of p(x) by the chain rule. Knows nothing of ranks, devices or files."""

    event_shape: tuple[int, ...]
    config: Any
    """The pydantic settings the model was built from; `build(config)` gives its like."""

    @abstractmethod
    def conditionals(self, x: Tensor, cond: Tensor | None = None) -> Conditional:
        """All conditionals at once by teacher forcing, of shape (B, T) in generation order.

        `x` is (B, *event_shape). A model over a sequence (one-dimensional event) takes
        shorter ones too: (B, t), t <= T. `cond` (B,) is the class, where the model has one, or
        (B, n) the tokens of a caption, -1 past its end; -1 (all of them) asks for the
        unconditional distribution of a model trained with dropped conditions.
        """

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Nats of each element, (B, T) in generation order; the sum over T is log p(x)."""
        return self.conditionals(x, cond).log_prob(self.to_sequence(x))

    def forward(self, x: Tensor, cond: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`log_prob`, under the name that DDP and DeepSpeed wrap."""
        return self.log_prob(x, cond, **kwargs)

    @abstractmethod
    def cursor(self, batch: int, cond: Tensor | None = None) -> Cursor:
        """A cursor at the start of `batch` events."""

    def lengthened(self, length: int) -> "Autoregressive":
        """This model of events of `length` elements, with the same weights (shared, not copied).

        ValueError for a family that knows where in the event it is: none but a WaveNet can.
        """
        elements = torch.Size(self.event_shape).numel()
        raise ValueError(
            f"{length} elements are asked of a model of {elements}: family "
            f"'{self.config.family}' has not learned what comes after them"
        )

    def to_sequence(self, x: Tensor) -> Tensor:
        """(B, *event_shape) to (B, T) in generation order."""
        return x.flatten(1)

    def to_event(self, sequence: Tensor) -> Tensor:
        """(B, T) in generation order to (B, *event_shape)."""
        return sequence.reshape(sequence.shape[0], *self.event_shape)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Tensor | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """`n` events, (n, *event_shape), element by element through the cursor.

        All come from one generator, so that the first depends on how many are drawn; where
        each has a seed of its own is `sampling.sampler.draw`.
        """
        was_training = self.training
        self.eval()
        try:
            device = next(self.parameters()).device
            generator = torch.Generator(device=device).manual_seed(seed)
            with native.allowed():
                cursor = self.cursor(n, cond)
            drawn = []
            length = torch.Size(self.event_shape).numel()
            for t in range(length):
                x = cursor.next.sample(generator, temperature, top_k, top_p)
                drawn.append(x)
                if t + 1 < length:
                    cursor.advance(x.unsqueeze(1))
            return self.to_event(torch.stack(drawn, dim=1))
        finally:
            self.train(was_training)
