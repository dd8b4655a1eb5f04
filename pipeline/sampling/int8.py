"""Weights of 8 bits: a quarter of the bytes that a step of decoding reads.

Weight-only, symmetric, a scale a row (Dettmers et al. 2022, LLM.int8(), section 2.1, without its
outlier columns): w is rounded to w_int8 * scale with scale = max |row| / 127; activations and
sums stay float32. Embedding tables stay as they are: one row of them is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer with its weight in int8 (out, in) and a float32 scale a row (out,)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        if x.device.type == "cpu":
            flat = x.reshape(-1, self.in_features)
            y = torch.ops.aten._weight_int8pack_mm(flat, weight, scale)
            y = y.reshape(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantise_linears(model: nn.Module) -> int:
    """Put Int8Linear in the place of every linear layer; how many there were.

    A head tied to its embedding gets an int8 copy; the embedding keeps its floats.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
                count += 1
    return count
