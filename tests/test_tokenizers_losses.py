"""Perceptual and adversarial terms: against formulas, and against a collapse made on purpose."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.losses import (
    LPIPS,
    Adversarial,
    Adversary,
    MultiScale,
    Perceptual,
    Watch,
    build_perceptual,
)
from chainrule.tokenizers.vqgan import Discriminator, VQGANSettings, VQGANTokenizer, smallest_side

CPU = torch.device("cpu")


def pictures(seed: int = 0, side: int = 32, n: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bilinear")


def test_multiscale_is_zero_for_equals_and_grows_with_blur_and_noise() -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = MultiScale()
    assert distance(x, x).abs() < 1e-5
    blurred = [F.avg_pool2d(x, k, 1, k // 2) for k in (3, 5, 9)]
    by_blur = [float(distance(b, x)) for b in blurred]
    assert by_blur == sorted(by_blur)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    by_noise = [float(distance(x + s * noise, x)) for s in (0.01, 0.1, 0.5)]
    assert by_noise == sorted(by_noise)
    small = pictures(side=8)
    assert distance(small, small + 0.1).isfinite()


def lpips_weights(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1),
    }
    for s, layers in enumerate(LPIPS.SLICES, start=1):
        for layer in layers:
            if layer == "M":
                continue
            number, width, out = layer
            weight = torch.randn(out, width, 3, 3, generator=generator) / (9 * width) ** 0.5
            state[f"net.slice{s}.{number}.weight"] = weight
            state[f"net.slice{s}.{number}.bias"] = torch.zeros(out)
        state[f"lin{s - 1}.model.1.weight"] = torch.rand(1, layers[-1][2], 1, 1)
    save_file(state, path)
    return state


def test_lpips_reads_the_packages_names_and_is_a_distance(tmp_path: Path) -> None:
    path = tmp_path / "lpips.safetensors"
    state = lpips_weights(path)
    distance = build_perceptual(Perceptual(kind="lpips", weights=path))
    x, y = pictures(0), pictures(1)
    assert distance(x, x) == 0
    assert distance(x, y) > 0
    assert list(distance.parameters()) == []  # nothing for the generator's optimiser
    grey = x[:, :1]
    torch.testing.assert_close(
        distance(grey, y[:, :1]),
        distance(grey.expand(-1, 3, -1, -1), y[:, :1].expand(-1, 3, -1, -1)),
    )
    # the first slice alone, by hand
    h = [(z - state["scaling_layer.shift"]) / state["scaling_layer.scale"] for z in (x, y)]
    for number in (0, 2):
        w, b = state[f"net.slice1.{number}.weight"], state[f"net.slice1.{number}.bias"]
        h = [F.relu(F.conv2d(z, w, b, padding=1)) for z in h]
    a, b = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in h)
    first = ((a - b).square() * state["lin0.model.1.weight"]).sum(1).mean()
    for s in range(1, 5):
        getattr(distance, f"lin{s}").zero_()
    torch.testing.assert_close(distance(x, y), first)


def test_lpips_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a file for kind lpips"):
        Perceptual(kind="lpips")
    with pytest.raises(TokenizerError, match="no safetensors of LPIPS"):
        LPIPS(tmp_path / "missing.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TokenizerError, match="not the weights of LPIPS"):
        LPIPS(tmp_path / "other.safetensors")


def adversary(side: int = 32, **settings: object) -> Adversary:
    torch.manual_seed(0)
    given = {"start": 10, "ramp": 4, "layers": 2, "channels": 8, **settings}
    return Adversary(Adversarial.model_validate(given), 3, side, 1e-3, CPU)


def test_the_weight_is_delayed_and_ramped() -> None:
    it = adversary()
    assert [it.ramp(step) for step in (0, 10, 11, 12, 14, 99)] == [0, 0, 0.25, 0.5, 1, 1]
    assert [it.active(step) for step in (10, 11)] == [False, True]


def test_the_adaptive_weight_balances_the_last_layers_gradients() -> None:
    it = adversary(weight=0.5)
    layer = torch.nn.Conv2d(3, 3, 1)
    x = pictures()
    fake = layer(x)
    rec = (fake - x).square().mean()
    term, weight = it.generator_loss(100, rec, fake, layer.weight)
    [of_term] = torch.autograd.grad(term, layer.weight, retain_graph=True)
    [of_rec] = torch.autograd.grad(rec, layer.weight, retain_graph=True)
    assert float(of_term.norm()) == pytest.approx(0.5 * float(of_rec.norm()), rel=0.05)
    assert not weight.requires_grad
    plain, weight = adversary(weight=0.5, adaptive=False).generator_loss(
        100, rec, fake, layer.weight
    )
    assert float(weight) == 0.5
    torch.testing.assert_close(plain, -0.5 * it.discriminator(fake).mean())


@pytest.mark.parametrize("settings", [{}, {"r1": 0.01}, {"lecam": 0.1}], ids=str)
def test_a_discriminator_learns_to_tell(settings: dict) -> None:
    it = adversary(**settings)
    real = pictures(0, n=8)
    fake = real + 0.3 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    figures = [it.update(real, fake, 1.0)[0] for _ in range(60)]
    assert figures[-1]["discriminator_loss"] < 0.6 * figures[0]["discriminator_loss"]
    assert figures[-1]["logits_real"] > figures[-1]["logits_fake"]


def test_r1_flattens_the_discriminator_on_reals() -> None:
    real, fake = pictures(0, n=8), pictures(1, n=8)
    slopes = []
    for r1 in (0.0, 10.0):
        it = adversary(r1=r1)
        for _ in range(30):
            it.update(real, fake, 1.0)
        x = real.clone().requires_grad_()
        [gradient] = torch.autograd.grad(it.discriminator(x).sum(), x)
        slopes.append(float(gradient.square().sum((1, 2, 3)).mean()))
    assert slopes[1] < 0.1 * slopes[0]


def test_the_update_does_not_touch_the_generator() -> None:
    it = adversary()
    fake = pictures(1).requires_grad_()
    it.update(pictures(0), fake, 1.0)
    assert fake.grad is None


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_side_is_what_the_discriminator_takes(layers: int) -> None:
    side = smallest_side(layers)
    Discriminator(3, 4, layers)(torch.zeros(1, 3, side, side))
    with pytest.raises(TokenizerError, match=f"needs images of {side} pixels"):
        adversary(side=side - 1, layers=layers)


def test_a_start_that_never_comes_is_refused() -> None:
    with pytest.raises(ValueError, match="would never start"):
        Adversarial(start=100).check(steps=100)


def test_the_watch_names_a_collapse_and_nothing_else() -> None:
    watch = Watch(Adversarial(start=500, largest_drop=3.0))
    psnr = [20 + 0.01 * min(step, 500) for step in range(1500)]
    assert all(watch.see(step, value) is None for step, value in enumerate(psnr[:600]))
    # a drop that stays within the allowance, then one that does not
    assert all(watch.see(step, 23.0) is None for step in range(600, 1000))
    again = Watch(watch.settings, watch.state())
    said = [again.see(step, 15.0) for step in range(1000, 1400)]
    fallen = next(line for line in said if line is not None)
    assert "PSNR fell from 24." in fallen
    assert "start (step 500)" in fallen


def first_said(watch: Watch, psnr: list[float]) -> int | None:
    """The step (from 1) at which the watch speaks."""
    for step, value in enumerate(psnr, start=1):
        if watch.see(step, value) is not None:
            return step
    return None


def test_the_mark_is_the_picture_just_before_an_early_start() -> None:
    """An average that begins with the untrained network would lie decibels below it."""
    rising = [6 + 8.3 * min(step / 60, 1) for step in range(100)]  # 14.3 dB over the last 40
    watch = Watch(Adversarial(start=100))
    step = first_said(watch, [*rising, *[8.7] * 300])
    assert step is not None
    assert 150 < step < 300
    assert watch.mark == pytest.approx(14.3, abs=0.5)
    dip = [*rising, *[8.7] * 30, *[14.3] * 270]  # what a start may cost for a while
    assert first_said(Watch(Adversarial(start=100)), dip) is None


@pytest.mark.parametrize("start", [0, 5])
def test_a_start_with_no_picture_before_it_is_marked_by_the_first_steps(start: int) -> None:
    watch = Watch(Adversarial(start=start))
    assert first_said(watch, [8.0] * 20) is None
    assert watch.mark is None
    assert first_said(Watch(watch.settings), [5 + 0.1 * step for step in range(200)]) is None
    assert first_said(Watch(watch.settings), [8.0] * 20 + [2.0] * 200) is not None
    assert first_said(Watch(watch.settings), [8.0]) is None


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_vqgan_at_any_factor(factor: int, tmp_path: Path) -> None:
    settings = VQGANSettings(downsampling=factor, codebook_size=32, dim=8, channels=8)
    assert settings.widths()[-1] == 32
    torch.manual_seed(0)
    tokenizer = VQGANTokenizer(settings, 3, (32, 32))
    images = [(pictures()[0].permute(1, 2, 0).numpy() * 127 + 128).astype("uint8")]
    [tokens] = tokenizer.encode(images)
    assert tokens.shape == (32 // factor, 32 // factor)
    assert tokenizer.decode([tokens])[0].shape == (32, 32, 3)


def test_vqgan_of_the_papers_size_has_its_parameters() -> None:
    """Taming's f16 model: about 29.3M in the encoder with latents of 256, 42.4M in the decoder."""
    with torch.device("meta"):
        model = VQGANTokenizer.build(VQGANSettings(), 3)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    decoder = sum(p.numel() for p in model.decoder.parameters())
    assert 28e6 < encoder < 31e6
    assert 41e6 < decoder < 44e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multipliers": [1, 2]}, "has 2 levels, downsampling 16 needs 5"),
        ({"attention_levels": [5]}, "attention level 5 is none of 0 to 4"),
        ({"downsampling": 12}, "not a power of two"),
    ],
)
def test_vqgan_that_cannot_be_built_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VQGANSettings.model_validate(settings)
