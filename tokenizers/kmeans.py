"""Lloyd's k-means on weighted points: the start of codebooks, and the colours of a palette.

Lloyd, "Least squares quantization in PCM" (1982); the start is k-means++ (Arthur and
Vassilvitskii, 2007), drawn in chunks. Deterministic: a function of points and generator.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Most elements of a block of distances: 64 MiB of float32."""


def nearest(points_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Index of, and squared distance to, the nearest centre: (N,) long, (N,) float."""
    rows = max(1, CHUNK_ELEMENTS // max(1, len(centres_KD)))
    norms_K = centres_KD.square().sum(1)
    indices, distances = [], []
    for part in points_ND.split(rows):
        d = torch.addmm(norms_K, part, centres_KD.T, alpha=-2)
        best = d.min(dim=1)
        indices.append(best.indices)
        distances.append((best.values + part.square().sum(1)).clamp_min(0))
    return torch.cat(indices), torch.cat(distances)


def kmeans(
    points_ND: Tensor,
    k: int,
    iterations: int = 10,
    weights_N: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`k` centres (k, D) of the points.

    With fewer distinct points than `k`, some centres coincide up to a small noise, so that
    training can move them apart. An empty cluster takes the point that is worst served.
    """
    points_ND = points_ND.float()
    n = len(points_ND)
    if n == 0:
        raise ValueError("k-means of no points")
    weights_N = torch.ones(n, device=points_ND.device) if weights_N is None else weights_N.float()
    centres = _spread_start(points_ND, k, weights_N, generator)
    for _ in range(iterations):
        index, distance = nearest(points_ND, centres)
        mass = torch.zeros(k, device=points_ND.device).index_add_(0, index, weights_N)
        total = torch.zeros_like(centres).index_add_(0, index, points_ND * weights_N[:, None])
        centres = torch.where(mass[:, None] > 0, total / mass.clamp_min(1e-12)[:, None], centres)
        empty = (mass == 0).nonzero().flatten()
        if len(empty):
            worst = (distance * weights_N).topk(min(len(empty), n)).indices
            centres[empty[: len(worst)]] = points_ND[worst]
    return centres


def _spread_start(
    points_ND: Tensor, k: int, weights_N: Tensor, generator: torch.Generator | None
) -> Tensor:
    """k-means++: centres drawn in proportion to weighted squared distance, a few at a time."""
    n, device = len(points_ND), points_ND.device
    if n < k:
        extra = torch.randint(n, (k - n,), generator=generator).to(device)
        scale = points_ND.std(unbiased=False).clamp_min(1e-6)
        noise = torch.randn(k - n, points_ND.shape[1], generator=generator).to(device)
        return torch.cat([points_ND, points_ND[extra] + 1e-3 * scale * noise])
    first = _draw(weights_N, 1, generator)
    centres = points_ND[first]
    _, distance = nearest(points_ND, centres)
    step = max(1, k // 32)
    while len(centres) < k:
        chance = distance * weights_N
        many = min(step, k - len(centres), int((chance > 0).sum()))
        if many == 0:  # every distinct point is a centre already
            more = points_ND[_draw(weights_N, k - len(centres), generator)]
            noise = torch.randn(more.shape, generator=generator).to(device)
            scale = points_ND.std(unbiased=False).clamp_min(1e-6)
            return torch.cat([centres, more + 1e-3 * scale * noise])
        new = points_ND[_draw(chance, many, generator)]
        _, to_new = nearest(points_ND, new)
        distance = torch.minimum(distance, to_new)
        centres = torch.cat([centres, new])
    return centres


def _draw(weights_N: Tensor, many: int, generator: torch.Generator | None) -> Tensor:
    """`many` indices in proportion to their weights, different where there are enough.

    Gumbel top-k rather than `torch.multinomial`, which refuses more than 2^24 categories.
    """
    uniform = torch.rand(len(weights_N), generator=generator, dtype=torch.float64)
    keys = weights_N.double().cpu().log() - (-uniform.clamp_min(1e-300).log()).log()
    if len(keys) < many:
        return torch.randint(len(keys), (many,), generator=generator).to(weights_N.device)
    return keys.topk(many).indices.to(weights_N.device)
