"""What is minimised: nats of the next element, summed over the positions that count."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.batches import Batch
from chainrule.pipeline.models import native
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.inputs import has_captions, is_conditioned


class Objective:
    """Called with the wrapped model and a batch; gives two sums over the batch's positions.

    The first is to be minimised, the second is the plain negative log-likelihood in nats.
    """

    def __init__(self, model: Autoregressive, documents: bool, z_loss: float = 0.0) -> None:
        """`documents`: attention stays within the documents of a packed row, in families whose
        `log_prob` can keep it there.

        `z_loss`: weight of log^2 Z of the softmax (PaLM, Chowdhery et al. 2022, section 5),
        which keeps logits from drifting. RequestError where the model has no logits.
        """
        self.event_shape = model.event_shape
        self.config = model.config
        parameters = inspect.signature(type(model).log_prob).parameters
        self.documents = documents and "documents" in parameters
        self.z_loss = z_loss
        self._logits: Tensor | None = None
        if z_loss:
            head = getattr(model, "head", None)
            if not isinstance(head, nn.Linear) or model.config.head.kind != "categorical":
                raise RequestError("z_loss needs a model with a linear head of logits")
            head.register_forward_hook(self._keep_logits)

    @native.allowed()
    def __call__(self, wrapped: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {}
        cond = condition_of(batch, self.config)
        if cond is not None:
            arguments["cond"] = cond
        if self.documents and batch.documents is not None:
            arguments["documents"] = batch.documents
        x = batch.x
        if len(self.event_shape) > 1:
            x = x.reshape(-1, *self.event_shape)
        nats = -wrapped(x, **arguments)
        if batch.mask is not None:
            # where, not a product: 0 * inf would be nan.
            nats = torch.where(batch.mask, nats, nats.new_zeros(()))
        total = nats.sum()
        if not self.z_loss or self._logits is None:
            return total, total
        log_z = torch.logsumexp(self._logits.float(), dim=-1)
        if batch.mask is not None:
            log_z = torch.where(batch.mask, log_z, log_z.new_zeros(()))
        self._logits = None
        return total + self.z_loss * log_z.square().sum(), total

    def _keep_logits(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._logits = output if torch.is_grad_enabled() else None


def initialise_from_data(model: Autoregressive, batch: Batch) -> None:
    """Data-dependent initialisation on a first batch, in the families that have one.

    Before the model is wrapped, and with the same batch on every rank.
    """
    initialise = getattr(model, "initialise_from", None)
    if initialise is not None:
        x = batch.x.reshape(-1, *model.event_shape)
        initialise(x, condition_of(batch, model.config))


def condition_of(batch: Batch, config: Any) -> Tensor | None:
    """What a model of these settings takes of what the tokens bring: captions, classes, neither."""
    if has_captions(config):
        return batch.captions
    return batch.cond if is_conditioned(config) else None
