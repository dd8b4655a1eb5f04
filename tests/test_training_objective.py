"""The objective with the families that are no Transformers, on tokens with classes."""

import numpy as np
import pytest
import torch

from chainrule.pipeline.data.batches import Batch
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training.objective import Objective, initialise_from_data


def batch_of(x: torch.Tensor, cond: torch.Tensor | None = None) -> Batch:
    rows = np.zeros((len(x), 6), np.int64)
    return Batch(x, cond, None, None, 0, 0, rows)


@pytest.mark.parametrize("preset", ["pixelcnn-debug", "gated-pixelcnn-debug", "made-debug"])
def test_a_model_without_classes_is_not_given_any(preset):
    model = build(preset, event_shape=(4, 4), vocabulary_size=2, seed=0).eval()
    x = torch.randint(2, (3, 16), generator=torch.Generator().manual_seed(0))
    objective = Objective(model, documents=True)
    total, nats = objective(model, batch_of(x, torch.tensor([0, 1, 2])))
    assert torch.equal(total, nats)
    assert nats.item() == pytest.approx(-model.log_prob(x.reshape(3, 4, 4)).sum().item())


def test_one_with_classes_is():
    model = build("gated-pixelcnn-debug", event_shape=(4, 4), classes=3, seed=0).eval()
    x = torch.randint(4, (3, 16), generator=torch.Generator().manual_seed(0))
    cond = torch.tensor([2, 0, -1])
    _, nats = Objective(model, documents=True)(model, batch_of(x, cond))
    assert nats.item() == pytest.approx(-model.log_prob(x.reshape(3, 4, 4), cond).sum().item())
    assert nats.item() != pytest.approx(-model.log_prob(x.reshape(3, 4, 4)).sum().item())


def test_data_dependent_initialisation_is_for_the_families_that_have_one():
    x = torch.randint(8, (16, 48), generator=torch.Generator().manual_seed(0))
    cond = torch.zeros(16, dtype=torch.long)
    model = build("pixelcnnpp-debug", event_shape=(3, 4, 4), seed=0).eval()
    initialise_from_data(model, batch_of(x, cond))
    maps = model.network(x.reshape(16, 3, 4, 4), None)
    mean, deviation = maps.mean(dim=(0, 2, 3)), maps.std(dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones_like(mean), atol=1e-2, rtol=0)
    other = build("made-debug", event_shape=(48,), vocabulary_size=8, seed=0)
    before = {name: p.clone() for name, p in other.named_parameters()}
    initialise_from_data(other, batch_of(x, cond))
    assert all(torch.equal(before[name], p) for name, p in other.named_parameters())
