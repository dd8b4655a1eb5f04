"""What enters a model: elements as features, the condition, and the checks of both.

Every check raises ValueError naming the argument, the value and the bound, before any
kernel runs on it. Ids may come in any integer dtype (shards hold uint8 and uint16); a check
gives them back as int64, which every kernel takes.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models import native


def as_ids(x: Tensor) -> Tensor:
    """`x` as int64; ValueError for what is no integer."""
    if not _is_integer(x):
        raise ValueError(f"x has dtype {x.dtype}: the model's elements are integers")
    return x.long()


def _is_integer(x: Tensor) -> bool:
    return not (x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool)


def check_elements(
    x: Tensor, event_shape: tuple[int, ...], vocabulary_size: int | None, shorter: bool = False
) -> Tensor:
    """`x` is (B, *event_shape); discrete elements (`vocabulary_size` given) are integers in
    0..vocabulary_size-1. `shorter`: a sequence may have fewer elements than the event.

    Returns `x`, discrete elements as int64."""
    check_tensor("x", x)
    fits = tuple(x.shape[1:]) == tuple(event_shape)
    if shorter and x.dim() == 2 and len(event_shape) == 1:
        fits = x.shape[1] <= event_shape[0]
    if not fits:
        wanted = ", ".join(str(n) for n in event_shape)
        few = " or shorter" if shorter and len(event_shape) == 1 else ""
        raise ValueError(f"x has shape {tuple(x.shape)}: the model takes (batch, {wanted}){few}")
    return check_values(x, vocabulary_size)


def check_tensor(name: str, value: Any) -> None:
    """ValueError for an array or a list, which torch's operations would take apart in places."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}: the model takes a torch.Tensor "
            f"(torch.as_tensor({name}))"
        )


def check_values(x: Tensor, vocabulary_size: int | None) -> Tensor:
    """Elements of any shape are of the model's kind: tokens in range (returned as int64), or
    floats."""
    if vocabulary_size is None:
        if not x.dtype.is_floating_point:
            raise ValueError(f"x has dtype {x.dtype}: the model's elements are floats")
        if _has_values(x) and not bool(torch.isfinite(x).all()):
            value = x[~torch.isfinite(x)][0].item()
            raise ValueError(f"x holds {value}: elements are finite numbers")
        return x
    x = as_ids(x)
    wrong = _outside(x, 0, vocabulary_size)
    if wrong is not None:
        raise ValueError(f"x holds {wrong}: elements lie in 0..{vocabulary_size - 1}")
    return x


def check_outcome(x: Tensor, shape: tuple[int, ...], vocabulary_size: int | None) -> Tensor:
    """What a conditional of this shape is asked the probability of: values in range, as int64, or
    numbers. On a GPU values go unchecked, where it would wait for all that came before."""
    check_tensor("x", x)
    if x.shape != shape:
        raise ValueError(f"x has shape {tuple(x.shape)}: the conditionals have {tuple(shape)}")
    if vocabulary_size is None:
        return x
    return as_ids(x) if x.is_cuda else check_values(x, vocabulary_size)


def check_documents(documents: Tensor | None, x: Tensor) -> Tensor | None:
    """`documents` (as many integers as `x` has elements), or None."""
    if documents is None:
        return None
    check_tensor("documents", documents)
    if documents.shape != x.shape or not _is_integer(documents):
        raise ValueError(
            f"documents has shape {tuple(documents.shape)} and dtype {documents.dtype}: the model "
            f"takes integers of shape {tuple(x.shape)}"
        )
    return documents


def runs_of(documents: Tensor) -> Tensor:
    """Documents (B, t) numbered as they stand: a number that comes back after another is a further
    document, whichever way it is attended to."""
    new = documents[:, 1:] != documents[:, :-1]
    return nn.functional.pad(new, (1, 0)).cumsum(dim=1)


def _has_values(x: Tensor) -> bool:
    """Neither a meta tensor (chainrule plan) nor a graph being compiled, nor one under vmap, has
    values to look at."""
    return (
        bool(x.numel())
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not native.is_transformed()
    )


def _outside(x: Tensor, low: int, stop: int) -> int | None:
    """A value of `x` that is not in low..stop-1, None where all are."""
    if not _has_values(x):
        return None
    if x.numel() == 1:
        least = most = int(x)
    else:
        least, most = (int(v) for v in torch.aminmax(x))
    if least < low:
        return least
    return most if most >= stop else None


def check_condition(cond: Tensor | None, classes: int | None, batch: int) -> Tensor | None:
    """`cond` is (B,) integers in -1..classes-1 (-1: unconditional), or None. Returned as
    int64."""
    if cond is None:
        return None
    if classes is None:
        raise ValueError("cond was given: the model was built without classes")
    check_tensor("cond", cond)
    if not _is_integer(cond) or tuple(cond.shape) != (batch,):
        raise ValueError(
            f"cond has shape {tuple(cond.shape)} and dtype {cond.dtype}: "
            f"the model takes integers of shape ({batch},)"
        )
    cond = cond.long()
    wrong = _outside(cond, -1, classes)
    if wrong is not None:
        raise ValueError(f"cond holds {wrong}: classes are 0..{classes - 1}, -1 for none")
    return cond


class Captions(Settings):
    """A text that the model is conditioned on: tokens of a tokenizer of its own."""

    vocabulary_size: int = Field(ge=1, description="of the captions' tokenizer")
    length: int = Field(ge=1, description="tokens of the longest caption")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="rate at which training drops the caption (for guidance)"
    )


def check_captions(cond: Tensor | None, captions: Captions, batch: int) -> Tensor | None:
    """`cond` is (B, n) integers, n <= captions.length: token ids of each caption, then -1 to its
    end; all -1 is no caption. Returned as int64 (B, captions.length), or None."""
    if cond is None:
        return None
    check_tensor("cond", cond)
    fits = cond.dim() == 2 and len(cond) == batch and cond.shape[1] <= captions.length
    if not _is_integer(cond) or not fits:
        raise ValueError(
            f"cond has shape {tuple(cond.shape)} and dtype {cond.dtype}: the model takes captions, "
            f"integers of shape ({batch}, {captions.length}) or shorter"
        )
    cond = cond.long()
    wrong = _outside(cond, -1, captions.vocabulary_size)
    if wrong is not None:
        raise ValueError(
            f"cond holds {wrong}: tokens of captions are 0..{captions.vocabulary_size - 1}, "
            "-1 past a caption's end"
        )
    if _has_values(cond) and bool(((cond[:, :-1] < 0) & (cond[:, 1:] >= 0)).any()):
        raise ValueError("cond holds tokens after -1, which stands past a caption's end only")
    return nn.functional.pad(cond, (0, captions.length - cond.shape[1]), value=-1)


def is_conditioned(config: Any) -> bool:
    """Whether a model of these settings takes `cond`."""
    return getattr(config, "classes", None) is not None or has_captions(config)


def has_captions(config: Any) -> bool:
    """Whether `cond` is a caption."""
    return getattr(config, "captions", None) is not None


def drop_rate(config: Any) -> float:
    """Rate at which training dropped the condition; 0 where there is none."""
    if has_captions(config):
        return float(config.captions.dropout)
    return float(getattr(config, "class_dropout", 0.0))


class CaptionEmbedding(nn.Module):
    """h in p(x | h): a learned vector a token, and one more for what lies past a caption's end.

    Dropped in training as a class is; a caption that is dropped is one without tokens.
    """

    def __init__(self, captions: Captions, width: int) -> None:
        super().__init__()
        self.captions = captions
        self.table = nn.Embedding(captions.vocabulary_size + 1, width)

    def forward(self, cond: Tensor | None, batch: int, drop: bool = False) -> Tensor:
        """(B, n) to (B, n, width), n the longest caption's length; `drop` as in training."""
        size, device = self.captions.vocabulary_size, self.table.weight.device
        if cond is None:
            cond = torch.full((batch, self.captions.length), -1, device=device)
        index = torch.where(cond < 0, size, cond.long()).to(device)
        if drop and self.captions.dropout > 0:
            dropped = torch.rand(batch, 1, device=device) < self.captions.dropout
            index = index.masked_fill(dropped, size)
        embedded: Tensor = self.table(index)
        return embedded


class ClassEmbedding(nn.Module):
    """h in p(x | h): a learned vector a class, and one more for "no class".

    In training the class is dropped at `dropout`, so that the same network is also a model
    of p(x) and guidance can be used (Ho and Salimans 2022, section 3.2).
    """

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.classes = classes
        self.dropout = dropout
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.05)

    def forward(self, cond: Tensor | None, batch: int) -> Tensor:
        """(B,) to (B, width); None and -1 are the vector of "no class"."""
        device = self.table.weight.device
        if cond is None:
            index = torch.full((batch,), self.classes, dtype=torch.long, device=device)
        else:
            index = torch.where(cond < 0, self.classes, cond.long()).to(device)
            if self.training and self.dropout > 0:
                dropped = torch.rand(batch, device=device) < self.dropout
                index = index.masked_fill(dropped, self.classes)
        embedded: Tensor = self.table(index)
        return embedded


InputKind = Literal["intensity", "embedding"]


def check_input(kind: InputKind, vocabulary_size: int | None) -> None:
    """ValueError for an embedding of elements without a vocabulary."""
    if kind == "embedding" and vocabulary_size is None:
        raise ValueError("input is 'embedding': a continuous element has no vocabulary")


def intensity(x: Tensor, vocabulary_size: int | None) -> Tensor:
    """Values 0..V-1 as numbers in [-1, 1], in float32 (bfloat16 would make neighbours of 256
    values one); a continuous element is itself."""
    return x if vocabulary_size is None else x.float() * (2.0 / (vocabulary_size - 1)) - 1.0


class ElementInput(nn.Module):
    """Elements (...) as features (..., E): one number where values are intensities or
    amplitudes, a learned vector where they are names (the codes of a VQ-VAE)."""

    def __init__(self, kind: InputKind, vocabulary_size: int | None, width: int) -> None:
        super().__init__()
        check_input(kind, vocabulary_size)
        self.vocabulary_size = vocabulary_size
        self.features = width if kind == "embedding" else 1
        embeds = kind == "embedding" and vocabulary_size is not None
        self.table = nn.Embedding(vocabulary_size or 0, width) if embeds else None

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.table is not None:
            embedded: Tensor = self.table(x.long())
            return embedded
        return intensity(x, self.vocabulary_size).to(dtype).unsqueeze(-1)
