"""Weights of 8 bits: a quarter of the bytes that a step of decoding reads.

Weight-only, symmetric, a scale a row (Dettmers et al. 2022, LLM.int8(), section 2.1, without its
outlier columns): w is rounded to w_int8 * scale with scale about max |row| / 127; activations
are bfloat16. Embedding tables keep their own dtype: one row of them is read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_WIDTH = 32
"""Torch's kernel for the CPU reads past the end of rows whose length is no multiple of 16
(torch 2.13: wrong sums, then a crash); 32 is what its widest vectors hold of bfloat16."""


class Int8Linear(nn.Module):
    """A linear layer with its weight in int8 (out, in) and a scale a row (out,)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        # Rounded to bfloat16, which the kernel wants, before anything is divided by it; a
        # hair larger, so that the largest weight stays inside 127.
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127 * (1 + 2**-8)).to(torch.bfloat16)
        rounded = (weight / scale.float().unsqueeze(1)).round()
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        weight, scale = self.get_buffer("weight"), self.get_buffer("scale")
        if x.device.type == "cpu" and self.in_features % KERNEL_WIDTH == 0:
            # The kernel's float32 path is a plain loop, 20 times as slow as this one.
            flat = x.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(flat, weight, scale)
            y = y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantise(model: nn.Module) -> None:
    """Put Int8Linear in the place of every linear layer, and the rest into bfloat16.

    A head tied to its embedding gets an int8 copy; the embedding keeps its floats.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    model.to(torch.bfloat16)
