"""int8 weights: rounded as said, everything else untouched, a small loss."""

import pytest
import torch
from torch import nn

from chainrule.pipeline import build
from chainrule.pipeline.sampling.int8 import Int8Linear, quantise

TINY = {"vocabulary_size": 50, "context": 16, "layers": 2, "heads": 2, "width": 32}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [24, 48, 64])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_the_layer_is_the_rounded_one(bias: bool, width: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, 40, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = Int8Linear(linear)
    rounded = layer.weight.float() * layer.scale.float()[:, None]
    error = (rounded - linear.weight).abs()
    assert (error <= layer.scale.float()[:, None] / 2 + 1e-7).all()
    assert layer.weight.abs().max() <= 127
    x = torch.randn(*shape, width)
    with torch.no_grad():
        expected = nn.functional.linear(x, rounded, linear.bias)
        found = layer(x)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


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
        quantise(model)
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        rounded = model.conditionals(x).pmf()
        divergence = (exact * (exact.log() - rounded.log())).sum(-1).mean()
        assert 0 < float(divergence) < 0.01
        first = model.cursor(20).next.pmf()
        torch.testing.assert_close(first, rounded[:, 0], rtol=0.05, atol=1e-3)
