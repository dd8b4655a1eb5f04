"""Quantizers with a learned codebook: straight-through, EMA, l2, Gumbel-softmax, residual.

A codebook starts as k-means of features (`start`) and its dead codes are revived: a code
that no position of any rank used for `revive_after` steps takes the place of a live
feature of the batch at hand. What is drawn is a function of the quantizer's own step
counter, which its state holds, so that a resumed run draws what the first would have.

Shapes as in `quantizers.py`.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.tokenizers.kmeans import kmeans, nearest
from chainrule.tokenizers.quantizers import (
    EMA,
    Cosine,
    Gumbel,
    Quantized,
    Quantizer,
    Residual,
    Straight,
    distributed,
    gather,
    grid,
    rows,
    straight_through,
    sum_over_ranks,
)

START_ITERATIONS = 20


class _Codebook(Quantizer):
    """What codebooks share: nearest code, the time each code lies idle, revival."""

    idle: Tensor
    steps: Tensor

    def __init__(self, codebook_size: int, dim: int, revive_after: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.revive_after = revive_after
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @property
    def vectors(self) -> Tensor:
        """(K, D): the codes, in the space where distances are taken."""
        raise NotImplementedError

    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        """Put codes `index` at `vectors` (n, D)."""
        raise NotImplementedError

    def features(self, z_BDHW: Tensor) -> Tensor:
        """(N, D): features in the space where distances are taken."""
        return rows(z_BDHW)

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        centres = kmeans(
            self.features(z), self.codebook_size, START_ITERATIONS, generator=generator
        )
        everything = torch.arange(self.codebook_size, device=centres.device)
        self.set_codes(everything, centres)

    @torch.no_grad()
    def revive(self, features_ND: Tensor) -> None:
        """Move the codes that idled too long to live features of all ranks' batch.

        Before the batch is quantised, so that no gradient under way sees a code move.
        """
        self.steps += 1
        if self.revive_after == 0:
            return
        dead = (self.idle >= self.revive_after).nonzero().flatten()
        if len(dead) == 0:
            return
        live = gather(features_ND)
        generator = torch.Generator().manual_seed(int(self.steps))
        order = torch.randperm(len(live), generator=generator)[: len(dead)].to(live.device)
        dead = dead[: len(order)]
        self.set_codes(dead, live[order])
        self.idle[dead] = 0

    @torch.no_grad()
    def count_idle(self, counts_K: Tensor) -> None:
        """`counts_K`: uses in this step over all ranks."""
        self.idle = torch.where(counts_K > 0, 0, self.idle + 1)


class StraightThroughQuantizer(_Codebook):
    """VQ-VAE's own: the codebook follows by gradient."""

    def __init__(self, settings: Straight, codebook_size: int, dim: int) -> None:
        super().__init__(codebook_size, dim, settings.revive_after)
        self.settings = settings
        bound = 1 / codebook_size
        self.codebook = nn.Parameter(torch.empty(codebook_size, dim).uniform_(-bound, bound))

    @property
    def vectors(self) -> Tensor:
        return self.codebook

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = vectors.to(self.codebook.dtype)

    def forward(self, z: Tensor) -> Quantized:
        features = rows(z)
        if self.training:
            self.revive(features.detach())
        index, _ = nearest(features.detach(), self.codebook.detach())
        quantised = self.codebook[index]
        commitment = F.mse_loss(features, quantised.detach())
        loss = self.settings.commitment * commitment + F.mse_loss(quantised, features.detach())
        if self.training:
            counts = torch.bincount(index, minlength=self.codebook_size).float()
            self.count_idle(sum_over_ranks(counts))
        out = grid(straight_through(features, quantised), z)
        return Quantized(out, _codes(index, z), loss, commitment.detach())

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].permute(0, 3, 1, 2)


class EMAQuantizer(_Codebook):
    """The codebook is the moving average of the features assigned to it; no gradient.

    `counts` and `sums` are the N_i and m_i of the paper's appendix A.1. A revived or
    started code weighs as one average code, so that the next batches can move it.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, settings: EMA | Residual, codebook_size: int, dim: int) -> None:
        super().__init__(codebook_size, dim, settings.revive_after)
        self.settings = settings
        bound = 1 / codebook_size
        codebook = torch.empty(codebook_size, dim).uniform_(-bound, bound)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codebook.clone())

    @property
    def vectors(self) -> Tensor:
        return self.codebook

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        vectors = vectors.to(self.codebook.dtype)
        weight = self.counts.mean().clamp_min(1e-3)
        self.codebook[index] = vectors
        self.counts[index] = weight
        self.sums[index] = vectors * weight

    def forward(self, z: Tensor) -> Quantized:
        features = rows(z)
        if self.training:
            self.revive(features.detach())
        index, _ = nearest(features.detach(), self.codebook)
        quantised = self.codebook[index]
        commitment = F.mse_loss(features, quantised)
        if self.training:
            self._follow(features.detach(), index)
        out = grid(straight_through(features, quantised), z)
        loss = self.settings.commitment * commitment
        return Quantized(out, _codes(index, z), loss, commitment.detach())

    @torch.no_grad()
    def _follow(self, features: Tensor, index: Tensor) -> None:
        k, decay = self.codebook_size, self.settings.decay
        # counts and sums travel in one tensor: one message a step
        both = torch.zeros(k, 1 + self.dim, device=features.device)
        both[:, 0] = torch.bincount(index, minlength=k)
        both[:, 1:].index_add_(0, index, features)
        sum_over_ranks(both)
        counts, sums = both[:, 0], both[:, 1:]
        self.counts = decay * self.counts + (1 - decay) * counts
        self.sums = decay * self.sums + (1 - decay) * sums
        # Laplace smoothing of the counts: a code without features keeps a finite mean
        total = self.counts.sum()
        smoothed = (self.counts + 1e-5) / (total + k * 1e-5) * total
        self.codebook = self.sums / smoothed[:, None]
        self.count_idle(counts)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].permute(0, 3, 1, 2)


class CosineQuantizer(_Codebook):
    """Features projected to few dimensions and, like the codes, to the unit sphere."""

    def __init__(self, settings: Cosine, codebook_size: int, dim: int) -> None:
        super().__init__(codebook_size, settings.dim, settings.revive_after)
        self.settings = settings
        self.inward = nn.Conv2d(dim, settings.dim, 1)
        self.outward = nn.Conv2d(settings.dim, dim, 1)
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebook_size, settings.dim), dim=1))

    @property
    def vectors(self) -> Tensor:
        return F.normalize(self.codebook, dim=1)

    @torch.no_grad()
    def set_codes(self, index: Tensor, vectors: Tensor) -> None:
        self.codebook[index] = F.normalize(vectors, dim=1).to(self.codebook.dtype)

    def features(self, z_BDHW: Tensor) -> Tensor:
        return F.normalize(rows(self.inward(z_BDHW)), dim=1)

    def forward(self, z: Tensor) -> Quantized:
        features = self.features(z)
        if self.training:
            self.revive(features.detach())
        codebook = self.vectors
        index, _ = nearest(features.detach(), codebook.detach())
        quantised = codebook[index]
        # distances on the sphere do not shrink with the dimension: sum, not mean, over it
        commitment = (features - quantised.detach()).square().sum(1).mean()
        codebook_loss = (quantised - features.detach()).square().sum(1).mean()
        if self.training:
            counts = torch.bincount(index, minlength=self.codebook_size).float()
            self.count_idle(sum_over_ranks(counts))
        out = self.outward(grid(straight_through(features, quantised), z))
        loss = self.settings.commitment * commitment + codebook_loss
        return Quantized(out, _codes(index, z), loss, commitment.detach() / self.dim)

    def lookup(self, codes: Tensor) -> Tensor:
        return self.outward(self.vectors[codes].permute(0, 3, 1, 2))


class ResidualQuantizer(Quantizer):
    """A stack of EMA codebooks: the sum of their codes is the quantised feature."""

    def __init__(self, settings: Residual, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.depth = settings.depth
        self.levels = nn.ModuleList(
            EMAQuantizer(settings, codebook_size, dim) for _ in range(settings.depth)
        )

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        remains = rows(z)
        for level in self.levels:
            assert isinstance(level, EMAQuantizer)
            level.start(remains.T[None, :, None], generator)
            index, _ = nearest(remains, level.codebook)
            remains = remains - level.codebook[index]

    def forward(self, z: Tensor) -> Quantized:
        remains, codes = z.float(), []
        total, loss = torch.zeros_like(remains), z.new_zeros(())
        for level in self.levels:
            part: Quantized = level(remains)
            # the value of the code alone: gradients go straight through the whole stack below
            value = part.z.detach()
            loss = loss + part.loss
            commitment = part.commitment
            codes.append(part.codes)
            total = total + value
            remains = remains - value
        out = straight_through(z.float(), total)
        side_by_side = torch.stack(codes, dim=-1).flatten(2)
        return Quantized(out, side_by_side, loss, commitment)

    def lookup(self, codes: Tensor) -> Tensor:
        b, h, w = codes.shape
        apart = codes.reshape(b, h, w // self.depth, self.depth)
        parts = [level.lookup(apart[..., q]) for q, level in enumerate(self.levels)]  # type: ignore[operator]
        return torch.stack(parts).sum(0)


class GumbelQuantizer(Quantizer):
    """A soft, noisy choice among the codes that hardens as the temperature falls.

    Forward the choice is hard, backward soft (straight-through Gumbel-softmax), so that
    the decoder never sees what lookup cannot give.
    """

    steps: Tensor

    def __init__(self, settings: Gumbel, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.codebook_size = codebook_size
        self.logits = nn.Conv2d(dim, codebook_size, 1)
        self.codebook = nn.Parameter(torch.randn(codebook_size, dim) / math.sqrt(dim))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Codes at k-means of the features; logits minus squared distances to them."""
        features = rows(z)
        centres = kmeans(features, self.codebook_size, START_ITERATIONS, generator=generator)
        self.codebook.copy_(centres)
        spread = nearest(features, centres)[1].mean().clamp_min(1e-8)
        self.logits.weight.copy_((2 * centres / spread)[:, :, None, None])
        assert self.logits.bias is not None
        self.logits.bias.copy_(-centres.square().sum(1) / spread)

    def temperature(self) -> float:
        s = self.settings
        share = min(1.0, int(self.steps) / s.anneal_steps)
        fall = 0.5 * (1 + math.cos(math.pi * share))
        return s.minimum_temperature + (s.temperature - s.minimum_temperature) * fall

    def forward(self, z: Tensor) -> Quantized:
        logits = rows(self.logits(z))
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(self.codebook_size))).sum(1).mean()
        index = logits.argmax(1)
        if self.training:
            self.steps += 1
            soft = ((log_q + self.noise(z)) / self.temperature()).softmax(1)
            hard = F.one_hot(soft.argmax(1), self.codebook_size).to(soft.dtype)
            quantised = straight_through(soft, hard) @ self.codebook
        else:
            quantised = self.codebook[index]
        commitment = F.mse_loss(quantised.detach(), rows(z).detach())
        out = grid(quantised, z)
        return Quantized(out, _codes(index, z), self.settings.divergence * kl, commitment)

    def noise(self, z_BDHW: Tensor) -> Tensor:
        """(N, K) of the Gumbel law, a function of the step and the image's place in the batch of
        all ranks (equal parts in rank order), so that it is the same on however many."""
        images, _, h, w = z_BDHW.shape
        first = dist.get_rank() * images if distributed() else 0
        step, generator = int(self.steps), torch.Generator(z_BDHW.device)
        drawn = []
        for image in range(first, first + images):
            generator.manual_seed((step << 24) + image)
            shape = (h * w, self.codebook_size)
            drawn.append(torch.rand(shape, generator=generator, device=z_BDHW.device))
        return -(-torch.cat(drawn).clamp_min(1e-20).log()).clamp_min(1e-20).log()

    def lookup(self, codes: Tensor) -> Tensor:
        return self.codebook[codes].permute(0, 3, 1, 2)


def _codes(index_N: Tensor, z_BDHW: Tensor) -> Tensor:
    b, _, h, w = z_BDHW.shape
    return index_N.reshape(b, h, w)
