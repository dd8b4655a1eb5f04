"""Quantizers without a codebook: FSQ rounds each channel, LFQ takes its sign.

Features are projected to as many channels as the code has digits, and back.
Shapes as in `quantizers.py`; L digits a code.
"""

import math

import torch
from torch import Tensor, nn

from chainrule.tokenizers.quantizers import (
    FSQ,
    FSQ_LEVELS,
    LFQ,
    Quantized,
    Quantizer,
    grid,
    mean_over_ranks,
    rows,
    straight_through,
)

GROUP_BITS = 10
"""LFQ: bits whose joint distribution is enumerated; longer codes are split in such groups."""


class FSQQuantizer(Quantizer):
    """Mentzer et al. (2023), section 3; bounds and offsets as in their appendix A.1."""

    levels: Tensor
    bases: Tensor

    def __init__(self, settings: FSQ, codebook_size: int, dim: int) -> None:
        super().__init__()
        levels = settings.levels or FSQ_LEVELS[codebook_size]
        assert math.prod(levels) == codebook_size
        self.codebook_size = codebook_size
        self.inward = nn.Conv2d(dim, len(levels), 1)
        self.outward = nn.Conv2d(len(levels), dim, 1)
        bases = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("bases", torch.tensor(bases), persistent=False)

    def _bound(self, x_NL: Tensor) -> Tensor:
        """Into (-0.5, levels - 0.5) about 0, so that rounding gives `levels` values."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (x_NL + shift).tanh() * half - offset

    def forward(self, z: Tensor) -> Quantized:
        bounded = self._bound(rows(self.inward(z)))
        rounded = bounded.round()
        half = self.levels // 2
        index = ((rounded + half).long() * self.bases).sum(1)
        out = self.outward(grid(straight_through(bounded, rounded) / half, z))
        commitment = (bounded - rounded).square().mean().detach()
        b, _, h, w = z.shape
        return Quantized(out, index.reshape(b, h, w), bounded.new_zeros(()), commitment)

    def lookup(self, codes: Tensor) -> Tensor:
        half = self.levels // 2
        digits = (codes[..., None] // self.bases) % self.levels
        values = (digits - half).float() / half
        return self.outward(values.permute(0, 3, 1, 2))


class LFQQuantizer(Quantizer):
    """Yu et al. (2024), section 3.1: code = sign bits; entropy term of their eq. 5.

    The soft assignment of a feature f to a code c is softmax(-|f - c|² / temperature), a
    product over bits with sigmoid(4 f_l / temperature) for each. The entropy of one
    position is therefore a sum over bits, exactly. The entropy of the batch mean is exact
    up to `GROUP_BITS` bits; beyond, it is summed over groups of so many (an upper bound).
    """

    powers: Tensor

    def __init__(self, settings: LFQ, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.codebook_size = codebook_size
        self.bits = codebook_size.bit_length() - 1
        self.inward = nn.Conv2d(dim, self.bits, 1)
        self.outward = nn.Conv2d(self.bits, dim, 1)
        self.register_buffer("powers", 2 ** torch.arange(self.bits), persistent=False)

    def forward(self, z: Tensor) -> Quantized:
        features = rows(self.inward(z))
        signs = torch.where(features > 0, 1.0, -1.0)
        index = ((features > 0).long() * self.powers).sum(1)
        commitment = (features - signs).square().mean()
        loss = self.settings.commitment * commitment
        if self.training:
            loss = loss + self.settings.entropy * self.entropy(features)
        out = self.outward(grid(straight_through(features, signs), z))
        b, _, h, w = z.shape
        return Quantized(out, index.reshape(b, h, w), loss, commitment.detach())

    def entropy(self, features_NL: Tensor) -> Tensor:
        """E[H(p(c|f))] - γ H(E[p(c|f)]), in nats, the mean taken over all ranks."""
        logits = 4 * features_NL / self.settings.temperature
        on, off = logits.sigmoid(), (-logits).sigmoid()
        log_on, log_off = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
        sure = -(on * log_on + off * log_off).sum(1).mean()
        spread = logits.new_zeros(())
        for start in range(0, self.bits, GROUP_BITS):
            joint = torch.ones(len(on), 1, device=on.device)
            for bit in range(start, min(start + GROUP_BITS, self.bits)):
                joint = torch.cat([joint * off[:, bit : bit + 1], joint * on[:, bit : bit + 1]], 1)
            mean = mean_over_ranks(joint.mean(0))
            spread = spread - (mean * mean.clamp_min(1e-12).log()).sum()
        return sure - self.settings.diversity * spread

    def lookup(self, codes: Tensor) -> Tensor:
        bits = (codes[..., None] // self.powers) % 2
        return self.outward((2.0 * bits - 1).permute(0, 3, 1, 2))
