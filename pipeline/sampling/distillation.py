"""A draft fitted to a model's distributions: what `distill` minimises, and where it starts.

The draft learns KL(p || q) on the model's own samples and on training data: sequence-level and
supervised knowledge distillation in the terms of Zhou et al. 2024 (DistillSpec), section 4.
What speculative decoding gains from it is the acceptance 1 - TV(p, q) = sum min(p, q).

Legend: B rows, T elements, V tokens; p of the model, q of the draft.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.sampling.sampler import SamplingError, log_probs_of

INHERITED = (
    "vocabulary_size",
    "context",
    "event_shape",
    "classes",
    "captions",
    "bos",
    "ordering",
)
"""Settings of a decoder that its draft must share: they say what an element is."""


@dataclass
class Rows:
    """Elements to learn from."""

    x: Tensor
    """(B, *event_shape), or (B, T)."""
    cond: Tensor | None = None
    documents: Tensor | None = None
    mask: Tensor | None = None
    """(B, T) bool: elements that count; None for all."""


def new_draft(
    model: Autoregressive, layers: int | None, spec: dict[str, Any] | None, seed: int
) -> Autoregressive:
    """A draft before training.

    With `spec`, a fresh model of those settings; what an element is, is taken over. Else a
    model of `layers` layers (default: a quarter) that starts from evenly spaced layers of the
    large one and all of its embeddings, as Sanh et al. 2019 (DistilBERT), section 3.

    Raises SamplingError for settings that do not fit, or a family without layers.
    """
    own = model.config.model_dump(mode="json")
    # The model drops nothing while it is asked: a draft that did would learn to average.
    surely: dict[str, Any] = {
        name: 0.0 for name in ("dropout", "attention_dropout", "class_dropout") if name in own
    }
    if own.get("captions") is not None:
        surely["captions"] = {**own["captions"], "dropout": 0.0}
    try:
        if spec is not None:
            shared = {k: {**own, **surely}[k] for k in INHERITED if k in own}
            given = {k: v for k, v in shared.items() if k not in spec}
            fresh = build({**given, **spec}, seed=seed)
            for name in ("captions", "classes"):
                if own.get(name) is not None and getattr(fresh.config, name, None) is None:
                    raise ValueError(f"the model takes {name}, so must its draft: leave {name} out")
            return fresh
        if "layers" not in own:
            raise ValueError(f"family '{own['family']}' has no layers to start from; say `model`")
        chosen = layers if layers is not None else max(1, own["layers"] // 4)
        if chosen > own["layers"]:
            raise ValueError(f"layers is {chosen}: the model has {own['layers']}")
        draft = build({**own, **surely, "layers": chosen}, seed=seed)
    except ValueError as error:
        raise SamplingError(f"draft: {error}") from None
    last = own["layers"] - 1
    picked = torch.linspace(0, last, chosen).round().long().tolist() if chosen > 1 else [0]
    source = model.state_dict()
    weights = {}
    for name in draft.state_dict():
        theirs = name
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            theirs = f"blocks.{picked[int(number)]}.{rest}"
        weights[name] = source[theirs]
    draft.load_state_dict(weights)
    return draft


def divergence(
    model: Autoregressive, draft: Autoregressive, rows: Rows
) -> tuple[Tensor, Tensor, int]:
    """Sum of KL(p || q) in nats (with a gradient), sum of sum min(p, q), number of elements."""
    extra = {} if rows.documents is None else {"documents": rows.documents}
    with torch.no_grad():
        log_p = log_probs_of(model.conditionals(rows.x, rows.cond, **extra))
    log_q = log_probs_of(draft.conditionals(rows.x, rows.cond, **extra))
    p = log_p.exp()
    # p log p is 0 where p is 0, whatever its logarithm.
    nats = (p * (log_p.clamp(min=-1e4) - log_q.clamp(min=-1e4))).sum(dim=-1)
    with torch.no_grad():
        overlap = torch.minimum(p, log_q.exp()).sum(dim=-1)
    if rows.mask is not None:
        mask = draft.to_sequence(rows.mask)
        return (nats * mask).sum(), (overlap * mask).sum(), int(mask.sum())
    return nats.sum(), overlap.sum(), nats.numel()
