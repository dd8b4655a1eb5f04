"""Optimisers: AdamW with decay groups, and Muon for the matrices and filters.

Names of parameters are read off the module, so a group's content does not depend on the
order in which a model was written.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from chainrule.pipeline.config import Settings


class OptimizerSettings(Settings):
    """AdamW (Loshchilov & Hutter 2019), or Muon for matrices and the filters of convolutions, with
    AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="of matrices; vectors and tables have none")
    decay_embeddings: bool = False
    fused: bool = Field(True, description="one kernel for all parameters of a group")
    muon_learning_rate: float = Field(0.02, gt=0, description="muon: of matrices and filters")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    muon_iterations: int = Field(5, ge=1, description="Newton-Schulz iterations")


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest (biases, gains, embeddings, start symbols) without.

    With Muon, matrices and filters inside the network are a group of their own; embeddings, tables
    of positions and the output layer stay with AdamW (Jordan et al. 2024). Where the output layer
    is tied to the embedding it is the one parameter, and an embedding.

    A model with a `base_width` (µP: Yang et al. 2022, "Tensor Programs V", table 3) has rates for
    that width: those of matrices over the width, the output layer's among them, fall by
    base_width / width, and their decay a step stays what it was. Muon's update has a fixed norm
    and needs no such factor.
    """
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    matrices: list[Tensor] = []
    tables: list[Tensor] = []  # of positions: as wide as the model, however wide that is
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2:
            plain.append(p)
        elif id(p) in embeddings:
            (decayed if settings.decay_embeddings else plain).append(p)
        elif name == "positions":
            tables.append(p)
        elif settings.name == "muon" and not _is_output(name):
            matrices.append(p)
        else:
            decayed.append(p)
    rate, decay = settings.learning_rate, settings.weight_decay
    shrink = _width_factor(model)
    groups: list[dict[str, Any]] = [
        {
            "params": matrices,
            "lr": settings.muon_learning_rate,
            "weight_decay": decay,
            "muon": True,
        },
        {"params": decayed, "lr": rate * shrink, "weight_decay": decay / shrink},
        {"params": tables, "lr": rate, "weight_decay": decay},
        {"params": plain, "lr": rate, "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    for group in kept:
        group["base_lr"] = group["lr"]
    return kept


def _width_factor(model: nn.Module) -> float:
    config: Any = getattr(model, "config", None)
    base = getattr(config, "base_width", None)
    return 1.0 if base is None else float(base / config.width)


def _is_output(name: str) -> bool:
    """Whether a parameter is of the output layer, as our families name it."""
    return name.split(".")[0] in ("head", "output") or name.startswith("last.2.")  # PixelCNN's


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimiser over the model's parameters; each group carries its `base_lr`."""
    groups = parameter_groups(model, settings)
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
        "fused": settings.fused,
    }
    if settings.name == "muon":
        return MuonAdamW(groups, settings.muon_momentum, settings.muon_iterations, **common)
    return torch.optim.AdamW(groups, **common)


def set_learning_rate(optimizer: Any, factor: float) -> float:
    """Set every group to `factor` times its base rate; the first AdamW group's rate."""
    shown = 0.0
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        if not group.get("muon"):
            shown = group["lr"]
    return shown


class MuonAdamW(torch.optim.AdamW):
    """Groups marked `muon` by Muon, the others by AdamW, under one optimiser.

    Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"):
    Nesterov momentum, its update made nearly orthogonal by a quintic Newton-Schulz
    iteration, scaled by sqrt(max(1, rows / columns)). A filter of a convolution is a matrix
    with a row for each output, as in his code.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], momentum: float, iterations: int, **adamw: Any
    ) -> None:
        self._momentum, self._iterations = momentum, iterations
        super().__init__(groups, **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        everything = self.param_groups
        for group in everything:
            if group.get("muon"):
                self._muon(group)
        self.param_groups = [group for group in everything if not group.get("muon")]
        try:
            super().step()
        finally:
            self.param_groups = everything

    def _muon(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"]
            buffer.lerp_(p.grad, 1 - self._momentum)
            momentum = p.grad.lerp(buffer, self._momentum).flatten(1)
            update = orthogonalize(momentum, self._iterations)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix near to U V^T of `matrix` = U S V^T: singular values between 0.7 and 1.2.

    Quintic Newton-Schulz with the coefficients of Jordan et al. 2024, in bfloat16 on a
    GPU and in the matrix's own type elsewhere.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrix.dtype)
