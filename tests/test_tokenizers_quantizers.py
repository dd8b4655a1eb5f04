"""Quantizers: codes and features agree, codebooks start from data, stay alive, span ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from chainrule.tokenizers.codebooks import EMAQuantizer, GumbelQuantizer
from chainrule.tokenizers.kmeans import kmeans, nearest
from chainrule.tokenizers.lookup_free import LFQQuantizer
from chainrule.tokenizers.quantizers import (
    EMA,
    FSQ,
    FSQ_LEVELS,
    LFQ,
    Cosine,
    Gumbel,
    Quantizer,
    QuantizerSettings,
    Residual,
    Straight,
    build_quantizer,
    rows,
)
from chainrule.tokenizers.vqvae import VQVAESettings

KINDS = [Straight(), EMA(), Cosine(dim=4), Residual(depth=3), Gumbel(), FSQ(), LFQ()]
K, D = 64, 12


def quantizer_of(settings: object, codes: int = K) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer(settings, codes, D)  # type: ignore[arg-type]


def features(b: int = 8, h: int = 4, w: int = 6, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, D, h, w, generator=generator)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.kind)
def test_lookup_gives_what_the_decoder_saw(settings: object) -> None:
    quantizer = quantizer_of(settings)
    quantizer.start(features(), torch.Generator().manual_seed(0))
    quantizer.eval()
    z = features(seed=2)
    quantized = quantizer(z)
    assert quantized.codes.shape == (8, 4, 6 * quantizer.depth)
    assert quantized.codes.min() >= 0
    assert quantized.codes.max() < quantizer.codebook_size
    assert len(quantized.codes.unique()) > 8
    torch.testing.assert_close(quantizer.lookup(quantized.codes), quantized.z, atol=1e-5, rtol=0)
    assert quantized.z.shape == z.shape


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.kind)
def test_gradients_reach_the_encoder_and_are_finite(settings: object) -> None:
    quantizer = quantizer_of(settings)
    z = features().requires_grad_()
    quantized = quantizer(z)
    (quantized.z.square().mean() + quantized.loss).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("settings", [Straight(), EMA(), Residual(depth=2)], ids=lambda s: s.kind)
def test_straight_through_passes_the_gradient_unchanged(settings: object) -> None:
    quantizer = quantizer_of(settings).eval()
    z = features().requires_grad_()
    weight = torch.randn_like(z)
    (quantizer(z).z * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: s.kind)
def test_evaluation_moves_no_statistics(settings: object) -> None:
    quantizer = quantizer_of(settings).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(features())
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_codebook_starts_at_the_centres_of_the_data() -> None:
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(3)) * 10
    z = centres.repeat(8, 1) + 0.01 * torch.randn(8 * K, D)
    grid = z.reshape(8, 8, 8, D).permute(0, 3, 1, 2)
    quantizer = quantizer_of(EMA())
    quantizer.start(grid, torch.Generator().manual_seed(0))
    _, distance = nearest(centres, quantizer.codebook)  # type: ignore[arg-type]
    assert distance.max() < 0.1


def test_ema_follows_the_appendix_of_the_paper() -> None:
    quantizer = quantizer_of(EMA(decay=0.9, revive_after=0), codes=4)
    assert isinstance(quantizer, EMAQuantizer)
    z = features()
    counts, sums, codebook = quantizer.counts.clone(), quantizer.sums.clone(), quantizer.codebook
    index, _ = nearest(rows(z), codebook)
    for i in range(4):
        mine = rows(z)[index == i]
        counts[i] = 0.9 * counts[i] + 0.1 * len(mine)
        sums[i] = 0.9 * sums[i] + 0.1 * mine.sum(0)
    quantizer(z)
    torch.testing.assert_close(quantizer.counts, counts)
    torch.testing.assert_close(quantizer.codebook, sums / counts[:, None], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [Straight(revive_after=3), EMA(revive_after=3)])
def test_dead_codes_are_revived_from_live_features(settings: Straight | EMA) -> None:
    quantizer = quantizer_of(settings)
    with torch.no_grad():
        quantizer.codebook[8:] = 1e3  # type: ignore[index, operator] # far from any feature
        if isinstance(quantizer, EMAQuantizer):
            quantizer.sums.copy_(quantizer.codebook * quantizer.counts[:, None])
    z = features(b=32)
    used = [len(quantizer(z).codes.unique()) for _ in range(5)]
    assert used[0] <= 8
    assert used[2] <= 8
    assert used[-1] > 40


def test_revival_is_a_function_of_the_state_alone() -> None:
    a, b = quantizer_of(EMA(revive_after=1)), quantizer_of(EMA(revive_after=1))
    torch.manual_seed(5)
    a(features())
    a(features(seed=2))
    torch.manual_seed(6)
    b(features())
    c = quantizer_of(EMA(revive_after=1))
    c.load_state_dict(b.state_dict())
    c(features(seed=2))
    assert torch.equal(a.codebook, c.codebook)  # type: ignore[arg-type]


def test_fsq_has_every_code_and_no_other() -> None:
    for size, levels in FSQ_LEVELS.items():
        if size > 5000:
            continue
        quantizer = build_quantizer(FSQ(levels=levels), size, D)
        codes = torch.arange(size).reshape(1, 1, -1)
        # through the projections: the value of a code is its own nearest value
        quantizer.inward = nn.Identity()  # type: ignore[assignment]
        quantizer.outward = nn.Identity()  # type: ignore[assignment]
        values = quantizer.lookup(codes)
        assert len(rows(values).unique(dim=0)) == size
        half = torch.tensor(levels) // 2
        inverse = _unbound(rows(values) * half, levels)
        again = quantizer(inverse.T.reshape(1, len(levels), 1, size))
        assert torch.equal(again.codes, codes)


def _unbound(x: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """The feature whose bounded form is x (pulled a little inward at the ends)."""
    n = torch.tensor(levels)
    half = (n - 1) * (1 + 1e-3) / 2
    offset = torch.where(n % 2 == 0, 0.5, 0.0)
    return ((x + offset) / half).clamp(-0.9999, 0.9999).atanh() - (offset / half).atanh()


def test_lfq_entropy_is_that_of_the_enumerated_codes() -> None:
    quantizer = quantizer_of(LFQ(temperature=0.7, diversity=0.5), codes=16)
    assert isinstance(quantizer, LFQQuantizer)
    f = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    bits = (torch.arange(16)[:, None] // 2 ** torch.arange(4)) % 2
    codes = 2.0 * bits - 1
    p = (-torch.cdist(f, codes).square() / 0.7).softmax(1)
    each = -(p * p.log()).sum(1).mean()
    mean = p.mean(0)
    expected = each - 0.5 * -(mean * mean.log()).sum()
    torch.testing.assert_close(quantizer.entropy(f), expected)


def test_gumbel_temperature_falls_to_its_minimum() -> None:
    quantizer = quantizer_of(Gumbel(temperature=2.0, minimum_temperature=0.5, anneal_steps=4))
    assert isinstance(quantizer, GumbelQuantizer)
    seen = []
    for _ in range(6):
        seen.append(quantizer.temperature())
        quantizer(features())
    assert seen[0] == 2.0
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 0.5


def test_kmeans_of_few_distinct_points_still_gives_k_centres() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
    centres = kmeans(points, 8, generator=torch.Generator().manual_seed(0))
    assert centres.shape == (8, 2)
    assert centres.isfinite().all()
    assert nearest(points, centres)[1].max() < 1e-2


@pytest.mark.parametrize(
    ("quantizer", "size", "message"),
    [
        ({"kind": "fsq"}, 100, "no default levels"),
        ({"kind": "fsq", "levels": [8, 8]}, 100, "make 64 codes"),
        ({"kind": "fsq", "levels": [1, 64]}, 64, "2 or more"),
        ({"kind": "lfq"}, 100, "not a power of two"),
        ({"kind": "nearest"}, 64, "kind"),
        ({"kind": "ema", "decay": 1.0}, 64, "less than 1"),
    ],
)
def test_what_cannot_be_built_is_refused(quantizer: dict, size: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VQVAESettings.model_validate({"codebook_size": size, "quantizer": quantizer})


RANK = """
import sys, torch
import torch.distributed as dist
from pydantic import TypeAdapter
from chainrule.tokenizers.quantizers import QuantizerSettings, build_quantizer
from chainrule.tokenizers.lookup_free import LFQQuantizer

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)
results = {}
for kind in ("straight-through", "ema", "l2", "residual", "gumbel", "fsq", "lfq"):
    revived = kind in ("straight-through", "ema", "l2", "residual")
    settings = TypeAdapter(QuantizerSettings).validate_python(
        {"kind": kind, "revive_after": 2} if revived else {"kind": kind}
    )
    torch.manual_seed(0)
    quantizer = build_quantizer(settings, 64, 12)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(8, 8, 12, 4, 4, generator=generator)
    mine = whole[:, rank * 8 // world : (rank + 1) * 8 // world]
    quantizer.start(quantizer.gather_start(mine[0]), torch.Generator().manual_seed(2))
    for z in mine[1:]:
        z = z.clone().requires_grad_()
        quantized = quantizer(z)
        (quantized.loss + quantized.z.square().mean()).backward()
    for name, parameter in quantizer.named_parameters():
        if world > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world
        results[kind + "/" + name + ".grad"] = parameter.grad
    results |= {kind + "/" + n: t for n, t in quantizer.state_dict().items()}
if rank == 0:
    torch.save(results, out)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_of_half_the_batch_give_the_codebook_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for world in (1, 2):
        store, out = tmp_path / f"store{world}", tmp_path / f"{world}.pt"
        for rank in range(world):
            command = [sys.executable, "-c", RANK, str(rank), str(world), str(store), str(out)]
            runs.append(subprocess.Popen(command, env=environment))
    assert [run.wait() for run in runs] == [0, 0, 0]
    one = torch.load(tmp_path / "1.pt", weights_only=True)
    two = torch.load(tmp_path / "2.pt", weights_only=True)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


def test_settings_round_trip_through_json() -> None:
    adapter = TypeAdapter(QuantizerSettings)
    for settings in KINDS:
        assert adapter.validate_json(adapter.dump_json(settings)) == settings
