"""Decay groups, Muon, and the learning rate of each group."""

import pytest
import torch
from torch import nn

from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    orthogonalize,
    parameter_groups,
    set_learning_rate,
)


@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "imagegpt-debug", "wavenet-debug"])
def test_every_parameter_is_in_one_group(preset):
    model = build(preset, seed=0)
    for name in ("adamw", "muon"):
        groups = parameter_groups(model, OptimizerSettings(name=name))
        found = [id(p) for group in groups for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_matrices_decay_and_the_rest_does_not():
    model = build("gpt2-debug", seed=0)
    settings = OptimizerSettings(weight_decay=0.3)
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model, settings)
        for p in group["params"]
    }
    for name, p in model.named_parameters():
        table = name.startswith("embedding")  # tied: the output layer is the same parameter
        assert decay[id(p)] == (0.3 if p.ndim >= 2 and not table else 0.0), name


def test_muon_takes_the_matrices_inside():
    model = build("llama-debug", seed=0)
    groups = parameter_groups(model, OptimizerSettings(name="muon"))
    (muon,) = [group for group in groups if group.get("muon")]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in muon["params"]}
    assert found == {
        n for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2
    }


FAMILIES = "gpt2 llama imagegpt pixelcnn gated-pixelcnn pixelcnnpp wavenet made"


@pytest.mark.parametrize("preset", [f"{family}-debug" for family in FAMILIES.split()])
def test_muon_leaves_tables_and_the_output_layer_to_adamw(preset):
    model = build(preset, seed=0)
    groups = parameter_groups(model, OptimizerSettings(name="muon"))
    taken = {id(p) for group in groups if group.get("muon") for p in group["params"]}
    inside = {n for n, p in model.named_parameters() if p.ndim >= 2 and id(p) not in taken}
    outputs = {"head.weight", "output.weight", "output.direction", "last.2.weight"}
    assert inside <= outputs | {"embedding.weight", "positions", "input.table.weight"}
    if not getattr(model.config, "tied_embeddings", False):
        assert inside & outputs


def test_muon_on_a_filter_is_muon_on_its_matrix():
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 8, 2, bias=False), nn.Linear(12, 8, bias=False)
    linear.weight.data = convolution.weight.detach().flatten(1).clone()
    x = torch.randn(5, 3, 2, 2)
    settings = OptimizerSettings(name="muon", weight_decay=0.1)
    for model, given in ((convolution, x), (linear, x.flatten(1))):
        optimizer = build_optimizer(model, settings)
        for _ in range(3):
            optimizer.zero_grad()
            model(given).square().sum().backward()
            optimizer.step()
    assert torch.allclose(convolution.weight.flatten(1), linear.weight, atol=1e-5)


def test_the_rate_scales_every_group_from_its_own_base():
    model = build("gpt2-debug", seed=0)
    settings = OptimizerSettings(name="muon", learning_rate=1e-3, muon_learning_rate=0.02)
    optimizer = build_optimizer(model, settings)
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(5e-4)
    rates = {bool(group.get("muon")): group["lr"] for group in optimizer.param_groups}
    assert rates == {True: pytest.approx(0.01), False: pytest.approx(5e-4)}


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_orthogonalised_singular_values_lie_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        orthogonalize(matrix).flatten(), (u @ v).flatten(), dim=0
    )
    assert cosine > 0.95


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    settings = OptimizerSettings(name=name, learning_rate=1e-2, weight_decay=0.0)
    optimizer = build_optimizer(model, settings)
    x = torch.randn(64, 8)
    first = last = 0.0
    for step in range(100):
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        set_learning_rate(optimizer, 1 - step / 100)
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.3 * first
