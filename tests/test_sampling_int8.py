"""int8 weights: rounded as said, everything else untouched, a small and measured loss."""

import pytest
import torch
from torch import nn

from chainrule.pipeline import build
from chainrule.pipeline.sampling.int8 import Int8Linear, quantise_linears

TINY = {"vocabulary_size": 50, "context": 16, "layers": 2, "heads": 2, "width": 32}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (2, 3, 24)])
def test_the_layer_is_the_rounded_one(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0
    quantised = Int8Linear(linear)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    assert (
        (quantised.weight * quantised.scale[:, None] - linear.weight).abs() <= scale / 2 + 1e-7
    ).all()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = nn.functional.linear(
            x, quantised.weight.float() * quantised.scale[:, None], linear.bias
        )
        torch.testing.assert_close(quantised(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_loses_little(family: str) -> None:
    model = build({"family": family, **TINY}, seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "embedding" in name:
                parameter.mul_(10)
    x = torch.randint(50, (20, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.conditionals(x).pmf()
        linears = sum(isinstance(m, nn.Linear) for m in model.modules())
        assert quantise_linears(model) == linears
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        rounded = model.conditionals(x).pmf()
        divergence = (exact * (exact.log() - rounded.log())).sum(-1).mean()
        assert 0 < float(divergence) < 0.01
        torch.testing.assert_close(model.cursor(20).next.pmf(), rounded[:, 0], rtol=1e-4, atol=1e-6)
