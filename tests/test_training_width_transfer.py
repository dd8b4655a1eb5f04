"""µP: what a step changes is of one size at every width, and so the best learning rate is."""

from pathlib import Path

import pytest
import torch

from chainrule.pipeline.models.registry import build
from chainrule.pipeline.training import width_transfer as transfer
from chainrule.pipeline.training.optimizers import OptimizerSettings, parameter_groups

WIDTHS = (64, 128, 256, 512)


def change(width: int, base_width: int | None) -> float:
    """RMS change of what enters the last block after three steps of AdamW at a rate of 2^-7."""
    model = transfer.decoder(width, base_width)
    x = torch.randint(256, (8, transfer.CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.features(x)[-2]
    groups = parameter_groups(model, OptimizerSettings(learning_rate=2.0**-7, weight_decay=0.0))
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        loss = -model.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = model.features(x)[-2]
    return float((after - before).pow(2).mean().sqrt())


@pytest.mark.slow
def test_coordinates_move_alike_at_every_width() -> None:
    scaled = [change(width, WIDTHS[0]) for width in WIDTHS]
    plain = [change(width, None) for width in WIDTHS]
    assert max(scaled) / min(scaled) < 1.2, scaled
    assert plain[-1] / plain[0] > 2.5, plain


def test_at_its_base_width_rates_are_what_they_were() -> None:
    with_base, without = transfer.decoder(64, 64), transfer.decoder(64, None)
    settings = OptimizerSettings()
    for a, b in zip(
        parameter_groups(with_base, settings), parameter_groups(without, settings), strict=True
    ):
        assert (a["lr"], a["weight_decay"]) == (b["lr"], b["weight_decay"])


def test_rates_and_decay_by_width() -> None:
    model = transfer.decoder(256, 64)
    settings = OptimizerSettings(learning_rate=1e-2, weight_decay=0.1)
    by_name = {id(p): name for name, p in model.named_parameters()}
    rates = {
        by_name[id(p)]: (group["lr"], group["lr"] * group["weight_decay"])
        for group in parameter_groups(model, settings)
        for p in group["params"]
    }
    assert rates["head.weight"] == pytest.approx((1e-2 / 4, 1e-3))
    assert rates["blocks.0.mlp.output.weight"] == pytest.approx((1e-2 / 4, 1e-3))
    assert rates["embedding.weight"] == pytest.approx((1e-2, 0))
    assert rates["final_norm.weight"] == pytest.approx((1e-2, 0))


def test_what_cannot_transfer_is_refused() -> None:
    with pytest.raises(ValueError, match="tied_embeddings: false"):
        build("gpt2-debug", base_width=64)
    with pytest.raises(ValueError, match="keep head_width"):
        build("llama-debug", base_width=100)


@pytest.mark.slow
def test_the_sweep_and_its_picture(tmp_path: Path) -> None:
    text = b"the best rate is the same at every width. " * 50
    runs = transfer.sweep(text, (64, 128), (2.0**-10, 2.0**-6), 10, 4)
    assert len(runs) == 8
    found = transfer.best_rates(runs)
    assert set(found) == set(transfer.WAYS)
    assert found["µP"][64] == found["standard"][64]
    transfer.picture(runs, tmp_path / "width.png")
    assert (tmp_path / "width.png").read_bytes()[:4] == b"\x89PNG"
