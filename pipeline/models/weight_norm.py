"""Convolutions with weight normalisation and data-dependent initialisation.

Salimans and Kingma 2016, "Weight Normalization": w = g v / ||v|| for each output map
(eq. 2). `initialise` makes the next evaluation set g and b so that, on that batch, each
output map has mean 0 and standard deviation `init_scale` (section 3, eq. 5 and 6).

Legend: B batch, H rows, W columns, maps first as in torch: (B, maps, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormConv2d(nn.Module):
    """A convolution over a picture padded with zeros, `padding` (left, right, top, bottom)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        stride: int = 1,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.padding, self.stride, self.init_scale = padding, stride, init_scale
        self.direction = nn.Parameter(torch.randn(outputs, inputs, *kernel) * 0.05)
        self.gain = nn.Parameter(torch.full((outputs,), init_scale))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.initialise = False

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs, kh, kw)"""
        norm = self.direction.flatten(1).norm(dim=1)
        return self.direction * (self.gain / norm)[:, None, None, None]

    def _apply_to(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, stride=self.stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.initialise:
            with torch.no_grad():
                self.gain.fill_(1.0)
                self.bias.zero_()
                variance, mean = torch.var_mean(self._apply_to(x), dim=(0, 2, 3), correction=0)
                self.gain.copy_(self.init_scale / (variance + 1e-10).sqrt())
                self.bias.copy_(-mean * self.gain)
            self.initialise = False
        return self._apply_to(x)


class WeightNormTransposedConv2d(WeightNormConv2d):
    """A transposed convolution of stride 2: each pixel becomes 2 x 2. A kernel of three
    columns also reaches into the pixels to the left and right of those."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, kernel, stride=2)
        self.overlap = kernel[1] - 2

    def _apply_to(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(
            x,
            self.weight.transpose(0, 1),
            self.bias,
            stride=2,
            padding=(0, self.overlap),
            output_padding=(0, self.overlap),
        )
