"""Attention's kernels against one another, and which is taken when."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from chainrule.pipeline import build
from chainrule.pipeline.models import attention
from chainrule.pipeline.models.attention import (
    flex_attention,
    flex_fits,
    visible,
    visible_blocks,
    written_out_attention,
)

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 70 + [1] * 130, [0] * 5 + [1] * 190 + [2] * 5])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_written_out_is_attention(kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8)
    k, v = torch.randn(2, 2, kv_heads, 6, 8).unbind()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    bias = torch.zeros(1, 1, 6, 6).masked_fill(~mask, -torch.inf)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != 4)
    assert torch.allclose(written_out_attention(q, k, v, bias, 0.0), wanted, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@torch.no_grad()
def test_blocks_show_what_the_mask_shows(
    kv_heads: int, window: int | None, documents: torch.Tensor | None
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 200, 16)
    k, v = torch.randn(2, 2, kv_heads, 200, 16).unbind()
    mask = visible(200, window, documents, CPU)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=kv_heads != 4)
    found = flex_attention(q, k, v, visible_blocks(200, window, documents, CPU))
    assert torch.allclose(found, wanted, atol=1e-5)


@torch.no_grad()
def test_blocks_that_nobody_sees_are_left_out() -> None:
    blocks = visible_blocks(1024, 128, None, CPU)
    assert blocks.sparsity() > 70  # of 8 x 8 blocks, two a row


@torch.no_grad()
def test_a_decoder_says_the_same_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(
        "mistral-debug", seed=0, layers=2, heads=2, width=32, context=200, window=50
    ).eval()
    x = torch.randint(model.config.vocabulary_size, (2, 200))
    wanted: Any = model(x), model(x, documents=DOCUMENTS)
    calls = []

    def through_blocks(q: torch.Tensor, dropout: float) -> bool:
        calls.append(dropout)
        return True

    monkeypatch.setattr(attention, "flex_fits", through_blocks)
    for found, expected in zip((model(x), model(x, documents=DOCUMENTS)), wanted, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert len(calls) == 4  # two layers, twice


def test_flex_is_for_a_gpu_with_heads_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 200, 64, device="cuda", dtype=torch.bfloat16)
        narrow = torch.empty(2, 4, 200, 8, device="cuda", dtype=torch.bfloat16)
        odd = torch.empty(2, 4, 200, 48, device="cuda", dtype=torch.bfloat16)
    assert flex_fits(q, 0.0)
    assert not flex_fits(q, 0.1)
    assert not flex_fits(narrow, 0.0)
    assert not flex_fits(odd, 0.0)
    assert not flex_fits(torch.empty(2, 4, 200, 64), 0.0)
    monkeypatch.setenv("CHAINRULE_FLEX", "0")
    assert not flex_fits(q, 0.0)
