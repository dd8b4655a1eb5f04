"""MADE: a masked autoencoder whose outputs are the conditionals of p(x).

Germain, Gregor, Murray, Larochelle 2015, "MADE: Masked Autoencoder for Distribution
Estimation". Element d has degree m0(d), its place in the order of generation (1..D). Hidden
unit k of layer l has a degree m_l(k), drawn between the least degree below it and D - 1, and
sees the units below whose degree is at most its own (eq. 12); output d sees the units whose
degree is less than m0(d) (eq. 13). So output d depends on the elements before d, and on all
of them if the layers are wide enough.

Training may go over several masks (section 4.2): other degrees (connectivity-agnostic), or
other orders too (order-agnostic, `order_agnostic`). Each mask is a model p_k(x) of its own
with shared weights. `ensemble_log_prob` combines them as a mixture: log-mean-exp of the
*joint* likelihoods. (Averaging the logits of different orders, which is often done, is not
a likelihood of anything: the averaged conditionals belong to no one order.)

With a Gaussian head or a mixture of Gaussians it is the density model MADE MoG of
Papamakarios et al. 2017, section 5 (RNADE's conditionals, Uria et al. 2013).

Legend: B batch, D elements of an event, E inputs an element, P parameters an element,
H hidden units, V vocabulary, K masks.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.contract import Autoregressive, Conditional
from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.heads import CategoricalHead, Head, check_head
from chainrule.pipeline.models.inputs import (
    ClassEmbedding,
    check_condition,
    check_elements,
    intensity,
)
from chainrule.pipeline.models.orderings import Ordering


class MADEConfig(Settings):
    family: Literal["made"] = "made"
    event_shape: tuple[int, ...] = (784,)
    vocabulary_size: int | None = Field(
        2, ge=2, description="values of a discrete element; none for a density"
    )
    head: Head = CategoricalHead()
    hidden: tuple[int, ...] = Field((500,), min_length=1, description="units of each hidden layer")
    direct: bool = Field(True, description="masked connections from input to output (eq. 11)")
    ordering: Ordering = Ordering()
    masks: int = Field(1, ge=1, description="masks that training draws from")
    order_agnostic: bool = Field(False, description="each mask has an order of its own")
    mask_seed: int = Field(0, ge=0, lt=2**31)
    classes: int | None = Field(None, ge=1)
    class_dropout: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _settings_agree(self) -> "MADEConfig":
        check_head(self.head, self.vocabulary_size)
        self.ordering.indices(self.event_shape)
        if self.order_agnostic and self.masks == 1:
            raise ValueError("order_agnostic needs masks > 1: one mask has one order")
        return self


PRESETS = {
    # Germain et al. 2015, Table 6: binarised MNIST, AdaGrad 0.01, batch 100, ReLU.
    "made-500": {"family": "made", "hidden": [500]},  # 1,399,940
    "made-8000": {"family": "made", "hidden": [8000]},  # 13,167,440
    "made-8000x2": {"family": "made", "hidden": [8000, 8000], "masks": 32},  # 77,175,440
    # Papamakarios et al. 2017, section 5: MADE MoG with 10 components on POWER (6 values).
    "made-mog-power": {  # 30,060
        "family": "made",
        "event_shape": [6],
        "vocabulary_size": None,
        "head": {"kind": "mixture-of-gaussians", "components": 10},
        "hidden": [100, 100],
    },
    "made-debug": {"family": "made", "event_shape": [4, 4], "hidden": [32, 32]},  # 2,384
    "made-mog-debug": {  # 2,156
        "family": "made",
        "event_shape": [3],
        "vocabulary_size": None,
        "head": {"kind": "mixture-of-gaussians", "components": 3},
        "hidden": [32, 32],
    },
}


class MADE(Autoregressive):
    config: MADEConfig
    orders: Tensor
    steps: Tensor

    def __init__(self, config: MADEConfig) -> None:
        super().__init__()
        self.config = config
        self.event_shape = config.event_shape
        self.length = math.prod(config.event_shape)
        # Binary elements: the value itself in, one logit out (a sigmoid), as in the paper.
        self.binary = config.head.kind == "categorical" and config.vocabulary_size == 2
        one_hot = config.head.kind == "categorical" and not self.binary
        self.inputs = config.vocabulary_size if one_hot and config.vocabulary_size else 1
        self.outputs = 1 if self.binary else config.head.size(config.vocabulary_size)

        widths = [self.length * self.inputs, *config.hidden]
        self.layers = nn.ModuleList(
            nn.Linear(below, above) for below, above in itertools.pairwise(widths)
        )
        self.output = nn.Linear(widths[-1], self.length * self.outputs)
        if not self.binary:
            bias = config.head.initial_bias(config.vocabulary_size)
            self.output.bias.data.copy_(bias.repeat(self.length))
        self.direct = (
            nn.Linear(widths[0], self.length * self.outputs, bias=False) if config.direct else None
        )
        if self.direct is not None:
            nn.init.zeros_(self.direct.weight)
        self.classes = (
            ClassEmbedding(
                config.classes,
                sum(config.hidden) + self.length * self.outputs,
                config.class_dropout,
            )
            if config.classes
            else None
        )

        orders, degrees = _draw_masks(config)
        self.register_buffer("orders", orders, persistent=False)
        self.register_buffer("steps", orders.argsort(dim=1), persistent=False)
        for layer, degree in enumerate(degrees):
            self.register_buffer(f"degrees_{layer}", degree, persistent=False)

    # The chain rule, all elements at once.

    def conditionals(self, x: Tensor, cond: Tensor | None = None, mask: int = 0) -> Conditional:
        """As the contract says, of the order of `mask`, one of the config's `masks`."""
        x = check_elements(x, self.event_shape, self.config.vocabulary_size)
        cond = check_condition(cond, self.config.classes, len(x))
        if not 0 <= mask < self.config.masks:
            raise ValueError(f"mask is {mask}: the model has 0..{self.config.masks - 1}")
        return self._conditional(self._by_element(x.flatten(1), cond, mask)[:, self.orders[mask]])

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, T) nats in the order of generation: of the model's own order, mask 0. In
        training, of a mask drawn anew for each batch (from torch's global generator)."""
        mask = 0
        if self.training and self.config.masks > 1:
            mask = int(torch.randint(self.config.masks, ()))
        conditionals = self.conditionals(x, cond, mask)  # which also checks x
        return conditionals.log_prob(x.flatten(1)[:, self.orders[mask]])

    def ensemble_log_prob(
        self, x: Tensor, cond: Tensor | None = None, masks: int | None = None
    ) -> Tensor:
        """(B,) nats of the mixture of the first `masks` (default: all) models,
        log 1/K sum_k p_k(x)."""
        count = self.config.masks if masks is None else masks
        if not 1 <= count <= self.config.masks:
            raise ValueError(f"masks is {count}: the model has 1..{self.config.masks}")
        joints = [
            self.conditionals(x, cond, k).log_prob(x.flatten(1)[:, self.orders[k]]).sum(dim=1)
            for k in range(count)
        ]
        return torch.stack(joints).logsumexp(dim=0) - math.log(count)

    def _by_element(self, x: Tensor, cond: Tensor | None, mask: int) -> Tensor:
        """(B, D) elements to (B, D, P), both by flat index."""
        biases = self._condition_biases(cond, len(x))
        inputs = self._encode(x).flatten(1)
        below = self._input_degrees(mask)
        hidden = inputs
        for layer, degree, bias in self._layers(mask, biases):
            sees = degree.unsqueeze(1) >= below
            hidden = F.relu(F.linear(hidden, layer.weight * sees, layer.bias) + bias)
            below = degree
        element = (self.steps[mask] + 1).repeat_interleave(self.outputs).unsqueeze(1)
        output = F.linear(hidden, self.output.weight * (element > below), self.output.bias)
        if self.direct is not None:
            sees = element > self._input_degrees(mask)
            output = output + F.linear(inputs, self.direct.weight * sees)
        return (output + biases[-1]).unflatten(1, (self.length, self.outputs))

    def _layers(
        self, mask: int, biases: tuple[Tensor | float, ...]
    ) -> Iterator[tuple[nn.Linear, Tensor, Tensor | float]]:
        """Each hidden layer with the degrees of its units and the bias that the class adds."""
        for i, (layer, bias) in enumerate(zip(self.layers, biases[:-1], strict=True)):
            yield cast(nn.Linear, layer), getattr(self, f"degrees_{i}")[mask], bias

    def _input_degrees(self, mask: int) -> Tensor:
        """(D*E,): m0 of each input."""
        return (self.steps[mask] + 1).repeat_interleave(self.inputs)

    def _condition_biases(self, cond: Tensor | None, batch: int) -> tuple[Tensor | float, ...]:
        """What the class adds to each hidden layer and to the output; it precedes every x."""
        if self.classes is None:
            return (0.0,) * (len(self.layers) + 1)
        embedded: Tensor = self.classes(cond, batch)
        return embedded.split([*self.config.hidden, self.length * self.outputs], dim=1)

    def _encode(self, x: Tensor) -> Tensor:
        """(B, n) elements to (B, n, E) inputs."""
        weight = self.output.weight
        if self.inputs > 1:
            return F.one_hot(x.long(), self.inputs).to(weight.dtype)
        values = x if self.binary else intensity(x, self.config.vocabulary_size)
        return values.to(weight.dtype).unsqueeze(-1)

    def _conditional(self, parameters: Tensor) -> Conditional:
        """(..., P) to the distributions of (...)."""
        if self.binary:
            parameters = F.pad(parameters, (1, 0))  # softmax(0, l) = sigmoid(l)
        return self.config.head.conditional(parameters, self.config.vocabulary_size)

    def to_sequence(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self.orders[0]]

    def to_event(self, sequence: Tensor) -> Tensor:
        return sequence[:, self.steps[0]].reshape(len(sequence), *self.event_shape)

    def cursor(self, batch: int, cond: Tensor | None = None) -> "MADECursor":
        cond = check_condition(cond, self.config.classes, batch)
        return MADECursor(self, batch, cond)


def _draw_masks(config: MADEConfig) -> tuple[Tensor, list[Tensor]]:
    """Orders (K, D) and the degrees (K, H) of each hidden layer, from the seed alone:
    RandomState's stream is frozen (NEP 19), so the config defines the masks for ever."""
    length = math.prod(config.event_shape)
    random = np.random.RandomState(config.mask_seed)
    own = config.ordering.indices(config.event_shape)
    orders, degrees = [], []
    for k in range(config.masks):
        another = config.order_agnostic and k > 0
        orders.append(torch.from_numpy(random.permutation(length)) if another else own)
        least, layers = 1, []
        for units in config.hidden:
            drawn = random.randint(least, max(length - 1, least) + 1, units)
            layers.append(torch.from_numpy(drawn))
            least = int(drawn.min())
        degrees.append(layers)
    stacked = [torch.stack(layer).long() for layer in zip(*degrees, strict=True)]
    return torch.stack(orders).long(), stacked


class MADECursor(CachedCursor):
    """Each hidden unit is computed once, when the last element that it may see is known.

    Units are sorted by degree, so those that become computable when elements t..t+k-1
    arrive are one slice of each layer. All T steps together cost one network evaluation,
    and forgetting elements is nothing but standing at an earlier position.
    """

    def __init__(self, model: MADE, batch: int, cond: Tensor | None) -> None:
        super().__init__(batch, model.length, model.config.vocabulary_size, model._conditional)
        self.model = model
        self._pack(model, batch, cond)
        self._start()

    @torch.no_grad()
    def _pack(self, model: MADE, batch: int, cond: Tensor | None) -> None:
        """The weights in the order in which units are reached, with their masks applied."""
        length, order = model.length, model.orders[0]
        below_order = _expand(order, model.inputs)
        below_degree = model._input_degrees(0)[below_order]
        input_order, input_degree = below_order, below_degree
        self.weights, self.offsets, self.ends, self.hidden = [], [], [], []
        biases = model._condition_biases(cond, batch)
        for layer, degree, bias in model._layers(0, biases):
            degree, unit_order = degree.sort(stable=True)
            sees = degree.unsqueeze(1) >= below_degree
            self.weights.append(layer.weight[unit_order][:, below_order] * sees)
            self.offsets.append((layer.bias + bias).expand(batch, -1)[:, unit_order])
            reached = torch.searchsorted(
                degree, torch.arange(length + 1, device=degree.device), right=True
            )
            self.ends.append(reached.tolist())
            self.hidden.append(layer.weight.new_zeros(batch, len(degree)))
            below_order, below_degree = unit_order, degree
        rows = _expand(order, model.outputs)
        element = torch.arange(1, length + 1, device=order.device)
        element = element.repeat_interleave(model.outputs)
        sees = element.unsqueeze(1) > below_degree
        self.output = model.output.weight[rows][:, below_order] * sees
        self.output_offset = (model.output.bias + biases[-1]).expand(batch, -1)[:, rows]
        self.direct = None
        if model.direct is not None:
            sees = element.unsqueeze(1) > input_degree
            self.direct = model.direct.weight[rows][:, input_order] * sees
        self.inputs = model.output.weight.new_zeros(batch, length * model.inputs)

    def _write(self, first: int, x: Tensor) -> None:
        model, end = self.model, first + x.shape[1]
        self.inputs[:, first * model.inputs : end * model.inputs] = model._encode(x).flatten(1)
        below = self.inputs
        for weight, offset, ends, hidden in zip(
            self.weights, self.offsets, self.ends, self.hidden, strict=True
        ):
            units = slice(ends[first], ends[end])
            hidden[:, units] = F.relu(F.linear(below, weight[units]) + offset[:, units])
            below = hidden

    def _predict(self, first: int, end: int) -> Tensor:
        rows = slice(first * self.model.outputs, end * self.model.outputs)
        output = F.linear(self.hidden[-1], self.output[rows]) + self.output_offset[:, rows]
        if self.direct is not None:
            output = output + F.linear(self.inputs, self.direct[rows])
        return output.unflatten(1, (end - first, self.model.outputs))

    @property
    def nbytes(self) -> int:
        """Inputs and hidden units (the packed weights do not count: they are the model's)."""
        return sum(t.numel() * t.element_size() for t in [self.inputs, *self.hidden])


def _expand(index: Tensor, count: int) -> Tensor:
    """Rows index*count .. index*count + count - 1 for each entry."""
    return (index.unsqueeze(1) * count + torch.arange(count, device=index.device)).flatten()


FAMILIES = {"made": (MADEConfig, MADE)}
