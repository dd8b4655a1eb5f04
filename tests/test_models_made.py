import itertools
import math

import pytest
import torch

from chainrule.pipeline.models.made import MADE, MADEConfig
from chainrule.pipeline.models.registry import build


def all_events(values: int, length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(values), repeat=length)))


def seen_by(model: MADE, mask: int) -> torch.Tensor:
    """(T, T) bool: [t, s] is true where the distribution of step t moves with step s."""
    length = model.length
    order = model.orders[mask]
    seen = torch.zeros(length, length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):  # a rectifier may hide a path from one input, not from eight
        x = torch.randn(1, length, generator=generator, requires_grad=True)
        parameters = model._by_element(x, None, mask)
        for t in range(length):
            (gradient,) = torch.autograd.grad(
                parameters[0, order[t]].sum(), x, retain_graph=True, allow_unused=True
            )
            if gradient is not None:
                seen[t] |= gradient[0, order] != 0
    return seen


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("ordering", ["raster", "spiral-out", {"kind": "permutation", "seed": 2}])
def test_masks_let_through_what_comes_before_and_all_of_it(ordering, direct):
    model = build(
        {
            "family": "made",
            "event_shape": [3, 3],
            "vocabulary_size": None,
            "head": {"kind": "gaussian"},
            "hidden": [200, 200],
            "direct": direct,
            "ordering": ordering,
            "masks": 3,
            "order_agnostic": True,
        },
        seed=0,
    )
    if direct:
        torch.nn.init.normal_(model.direct.weight)
    for mask in range(3):
        assert torch.equal(seen_by(model, mask), torch.ones(9, 9).tril(-1).bool())


def test_a_configs_masks_are_the_same_for_ever():
    config = MADEConfig(event_shape=(6,), hidden=(8,), masks=2, order_agnostic=True, mask_seed=3)
    model = MADE(config)
    assert model.orders.tolist() == [[0, 1, 2, 3, 4, 5], [5, 0, 4, 1, 3, 2]]
    assert model.degrees_0.tolist() == [[3, 1, 2, 4, 1, 1, 1, 4], [1, 5, 5, 1, 3, 2, 3, 3]]
    assert not any("orders" in key or "degrees" in key for key in model.state_dict())


@torch.no_grad()
def test_the_ensemble_of_orders_is_a_distribution():
    model = build(
        {
            "family": "made",
            "event_shape": [4],
            "vocabulary_size": 3,
            "hidden": [12],
            "masks": 5,
            "order_agnostic": True,
        },
        seed=1,
    ).eval()
    x = all_events(3, 4)
    joints = torch.stack(
        [model.conditionals(x, mask=k).log_prob(x[:, model.orders[k]]).sum(dim=1) for k in range(5)]
    )
    torch.testing.assert_close(joints.exp().sum(dim=1), torch.ones(5), atol=1e-5, rtol=0)
    ensemble = model.ensemble_log_prob(x)
    assert ensemble.exp().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(ensemble, joints.logsumexp(0) - math.log(5))
    torch.testing.assert_close(model.ensemble_log_prob(x, masks=1), model.log_prob(x).sum(dim=1))
    # Models that disagree: a mixture of them is better than they are on average (Jensen).
    assert (ensemble > joints.mean(dim=0)).all()
    with pytest.raises(ValueError, match=r"masks is 6: the model has 1..5"):
        model.ensemble_log_prob(x, masks=6)


def test_training_goes_over_the_masks_and_evaluation_keeps_to_its_own():
    model = build(
        {"family": "made", "event_shape": [8], "hidden": [16], "masks": 4, "mask_seed": 1}, seed=2
    )
    x = torch.randint(2, (5, 8), generator=torch.Generator().manual_seed(0))
    own = [
        model.conditionals(x, mask=k).log_prob(x[:, model.orders[k]]).sum().item() for k in range(4)
    ]
    assert len(set(own)) == 4
    torch.manual_seed(0)
    drawn = [model.log_prob(x).sum().item() for _ in range(40)]
    assert {round(value, 4) for value in drawn} == {round(value, 4) for value in own}
    torch.manual_seed(0)
    assert [model.log_prob(x).sum().item() for _ in range(40)] == drawn
    model.eval()
    assert model.log_prob(x).sum().item() == own[0]


@torch.no_grad()
def test_a_density_integrates_to_one():
    model = build(
        {
            "family": "made",
            "event_shape": [2],
            "vocabulary_size": None,
            "head": {"kind": "mixture-of-gaussians", "components": 3},
            "hidden": [16],
            "ordering": {"kind": "permutation", "seed": 1},
        },
        seed=3,
    )
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    axis = torch.linspace(-12, 12, 401)
    x = torch.cartesian_prod(axis, axis)
    total = model.log_prob(x).sum(dim=1).double().exp().sum().item() * (24 / 400) ** 2
    assert total == pytest.approx(1, abs=1e-4)


def test_a_class_moves_the_first_element_too():
    model = build(
        {"family": "made", "event_shape": [4], "hidden": [8], "classes": 2}, seed=0
    ).eval()
    one, other, none = (
        model.cursor(1, None if c is None else torch.tensor([c])).next.pmf() for c in (0, 1, None)
    )
    assert not torch.equal(one, other)
    assert torch.equal(none, model.cursor(1, torch.tensor([-1])).next.pmf())
    assert not torch.equal(none, one)


def test_training_finds_a_dependence():
    """x_2 = x_0 xor x_1 among independent bits: 3 bits of entropy instead of 4."""
    model = build({"family": "made", "event_shape": [4], "hidden": [64], "direct": False}, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        x = torch.randint(2, (64, 4), generator=generator)
        x[:, 2] = x[:, 0] ^ x[:, 1]
        loss = -model.log_prob(x).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(3 * math.log(2), abs=0.05)


@pytest.mark.parametrize("mask", [-1, 2, 5])
def test_a_mask_that_the_model_lacks_is_refused(mask):
    model = build({"preset": "made-debug", "masks": 2})
    with pytest.raises(ValueError, match=rf"mask is {mask}: the model has 0\.\.1"):
        model.conditionals(torch.zeros(1, 4, 4, dtype=torch.long), mask=mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order_agnostic": True}, "needs masks > 1"),
        ({"ordering": "hilbert", "event_shape": [16]}, "'hilbert' needs a grid"),
        ({"head": {"kind": "gaussian"}}, "is a density over real numbers"),
        ({"vocabulary_size": None}, "needs at least 2 values"),
        ({"hidden": []}, "hidden"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build({"preset": "made-debug", **changes})
