"""What a reconstruction is trained by, besides its pixels: perceptual and adversarial terms.

Images are (B, C, H, W) in [-1, 1]. Statistics are averaged over ranks, as in `quantizers.py`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.tokenizers.interface import TokenizerError, TokenizerSettings
from chainrule.tokenizers.quantizers import distributed, mean_over_ranks, sum_over_ranks
from chainrule.tokenizers.vqgan import Discriminator, smallest_side

# --- perceptual -------------------------------------------------------------------------


class Perceptual(TokenizerSettings):
    """`multiscale` needs nothing; `lpips` reads the weights of the lpips package from a file."""

    kind: Literal["multiscale", "lpips"] = "multiscale"
    weight: float = Field(1.0, gt=0)
    weights: Path | None = Field(
        None, description="lpips: safetensors of lpips.LPIPS(net='vgg').state_dict()"
    )

    @model_validator(mode="after")
    def _weights_belong_to_lpips(self) -> "Perceptual":
        if (self.kind == "lpips") != (self.weights is not None):
            raise ValueError("weights: a file for kind lpips, and for it alone")
        return self


def build_perceptual(settings: Perceptual) -> nn.Module:
    """A module (x, y) -> scalar distance. TokenizerError where its weights cannot be read."""
    if settings.weights is not None:
        return LPIPS(settings.weights)
    return MultiScale()


class MultiScale(nn.Module):
    """Structure at several octaves, without any learned weight.

    At each octave 1 - SSIM in a 7x7 window (Wang et al. 2004), and the absolute difference
    of neighbouring pixels' differences (edges); halved by averaging until 8 pixels remain.
    """

    OCTAVES = 4
    WINDOW = 7

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x.new_zeros(())
        octaves = 0
        for _ in range(self.OCTAVES):
            total = total + (1 - self._ssim(x, y)) + self._edges(x, y)
            octaves += 1
            if min(x.shape[2:]) < 16:
                break
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return total / octaves

    def _ssim(self, x: Tensor, y: Tensor) -> Tensor:
        side = min(self.WINDOW, *x.shape[2:])

        def mean(z: Tensor) -> Tensor:
            return F.avg_pool2d(z, side, 1)

        mx, my = mean(x), mean(y)
        vx, vy = mean(x * x) - mx * mx, mean(y * y) - my * my
        cov = mean(x * y) - mx * my
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # values span 2
        score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        return score.mean()

    def _edges(self, x: Tensor, y: Tensor) -> Tensor:
        d = x - y
        return d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()


class LPIPS(nn.Module):
    """Zhang et al., "The Unreasonable Effectiveness of Deep Features" (2018), on VGG-16.

    Reads what the lpips package holds, under its own names, from a safetensors file:
    `save_file(lpips.LPIPS(net="vgg").state_dict(), path)`. Grey images are repeated.
    """

    # VGG-16 in the slices of the package: (layer number in torchvision, in, out); "M" pools
    SLICES = (
        ((0, 3, 64), (2, 64, 64)),
        ("M", (5, 64, 128), (7, 128, 128)),
        ("M", (10, 128, 256), (12, 256, 256), (14, 256, 256)),
        ("M", (17, 256, 512), (19, 512, 512), (21, 512, 512)),
        ("M", (24, 512, 512), (26, 512, 512), (28, 512, 512)),
    )

    shift: Tensor
    scale: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise TokenizerError(f"{path}: no safetensors of LPIPS ({error})") from None
        try:
            self.register_buffer("shift", state["scaling_layer.shift"].reshape(1, 3, 1, 1))
            self.register_buffer("scale", state["scaling_layer.scale"].reshape(1, 3, 1, 1))
            for s, layers in enumerate(self.SLICES, start=1):
                for layer in layers:
                    if layer == "M":
                        continue
                    name = f"net.slice{s}.{layer[0]}"
                    self.register_buffer(f"w{layer[0]}", state[f"{name}.weight"])
                    self.register_buffer(f"b{layer[0]}", state[f"{name}.bias"])
                self.register_buffer(f"lin{s - 1}", state[f"lin{s - 1}.model.1.weight"])
        except KeyError as error:
            raise TokenizerError(f"{path}: not the weights of LPIPS on VGG: no {error}") from None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, y]).expand(-1, 3, -1, -1)
        h = (both - self.shift) / self.scale
        total = x.new_zeros(())
        for s, layers in enumerate(self.SLICES):
            for layer in layers:
                if layer == "M":
                    h = F.max_pool2d(h, 2)
                else:
                    weight, bias = getattr(self, f"w{layer[0]}"), getattr(self, f"b{layer[0]}")
                    h = F.relu(F.conv2d(h, weight, bias, padding=1))
            unit = h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
            a, b = unit.chunk(2)
            total = total + F.conv2d((a - b).square(), getattr(self, f"lin{s}")).mean()
        return total


def lpips_of_images(
    weights: Path, device: str
) -> Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]:
    """LPIPS of two lists of uint8 images (H, W, C), summed over them; TokenizerError."""
    network = LPIPS(weights).to(device)

    def scaled(image: np.ndarray) -> Tensor:
        values = image.transpose(2, 0, 1)[None] / np.float32(127.5) - 1
        return torch.from_numpy(values).to(device)

    def summed(originals: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
        with torch.inference_mode():
            pairs = zip(originals, others, strict=True)
            return sum(float(network(scaled(a), scaled(b))) for a, b in pairs)

    return summed


# --- adversarial ------------------------------------------------------------------------


class Adversarial(TokenizerSettings):
    """A discriminator that joins late and softly (Esser et al. 2021, section 3.1)."""

    start: int = Field(10_000, ge=0, description="step at which the discriminator begins")
    ramp: int = Field(2_000, ge=1, description="steps over which its weight rises to full")
    weight: float = Field(0.8, gt=0)
    adaptive: bool = Field(True, description="scale by the last layer's gradients (their eq. 7)")
    maximum: float = Field(1e4, gt=0, description="largest adaptive factor")
    layers: int = Field(3, ge=1, description="of the PatchGAN")
    channels: int = Field(64, ge=1, description="of its first layer")
    learning_rate: float | None = Field(None, gt=0, description="that of the generator by default")
    r1: float = Field(0.0, ge=0, description="γ of the gradient penalty on reals; 0: none")
    lecam: float = Field(0.0, ge=0, description="weight of LeCAM (Tseng et al. 2021); 0: none")
    largest_drop: float = Field(
        4.0, gt=0, description="dB of PSNR that the start may cost; more stops the stage"
    )

    def check(self, steps: int) -> None:
        """ValueError where the discriminator would never start."""
        if self.start >= steps:
            raise ValueError(
                f"adversarial.start {self.start} is not before the last of {steps} steps: "
                "the discriminator would never start"
            )


class Adversary(nn.Module):
    """Discriminator, its optimiser, and what it asks of the generator."""

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(
        self,
        settings: Adversarial,
        channels: int,
        side: int,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        """`side`: of the smaller edge of the images. TokenizerError where no patch fits it."""
        super().__init__()
        self.settings = settings
        if side < smallest_side(settings.layers):
            raise TokenizerError(
                f"adversarial.layers {settings.layers} needs images of "
                f"{smallest_side(settings.layers)} pixels or more, not {side}"
            )
        self.discriminator = Discriminator(channels, settings.channels, settings.layers)
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))
        self.to(device)
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(),
            settings.learning_rate or learning_rate,
            # the momentum of the papers' GANs
            betas=(0.5, 0.9),
        )
        self.base_rate = settings.learning_rate or learning_rate

    def active(self, step: int) -> bool:
        return step > self.settings.start

    def ramp(self, step: int) -> float:
        """0 until the start, 1 after the ramp."""
        return min(1.0, max(0.0, (step - self.settings.start) / self.settings.ramp))

    def generator_loss(
        self, step: int, reconstruction_loss: Tensor, fake: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The term to add to the generator's loss, and its weight (for the log)."""
        logits = self.discriminator(fake)
        loss = -logits.mean()
        weight = torch.tensor(self.settings.weight * self.ramp(step), device=fake.device)
        if self.settings.adaptive:
            weight = weight * self._balance(reconstruction_loss, loss, last_layer)
        return weight * loss, weight

    def _balance(self, reconstruction_loss: Tensor, loss: Tensor, last_layer: Tensor) -> Tensor:
        norms = []
        for term in (reconstruction_loss, loss):
            [gradient] = torch.autograd.grad(term, last_layer, retain_graph=True)
            norms.append(mean_over_ranks(gradient).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, self.settings.maximum).detach()

    def update(
        self,
        real: Tensor,
        fake: Tensor,
        factor: float,
        accumulate: int = 1,
        clip: float | None = None,
    ) -> tuple[dict[str, Tensor], float]:
        """One step of the discriminator on hinge loss; `factor` scales its learning rate.

        In `accumulate` micro-batches; `clip` is the norm that gradients are clipped to.
        Returns figures and the gradient's norm: where that is not finite no step is made.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_rate * factor
        means = self.real_mean.clone(), self.fake_mean.clone()
        self.optimizer.zero_grad()
        pairs = zip(real.chunk(accumulate), fake.chunk(accumulate), strict=True)
        parts = [self.learn(*pair, accumulate) for pair in pairs]
        parameters = list(self.discriminator.parameters())
        average_gradients(parameters)
        norm = clip_gradients(parameters, clip)
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.real_mean.copy_(means[0])
            self.fake_mean.copy_(means[1])
        return {key: torch.stack([p[key] for p in parts]).mean() for key in parts[0]}, norm

    def learn(self, real: Tensor, fake: Tensor, accumulate: int = 1) -> dict[str, Tensor]:
        """Add the gradients of the hinge loss on one of `accumulate` micro-batches; figures."""
        real = real.detach().requires_grad_(self.settings.r1 > 0)
        on_real, on_fake = self.discriminator(real), self.discriminator(fake.detach())
        hinge = 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
        loss = hinge
        if self.settings.r1 > 0:
            [gradient] = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            loss = loss + self.settings.r1 / 2 * gradient.square().sum((1, 2, 3)).mean()
        if self.settings.lecam > 0:
            loss = loss + self.settings.lecam * self._lecam(on_real, on_fake)
        (loss / accumulate).backward()
        return {
            "discriminator_loss": hinge.detach(),
            "logits_real": on_real.detach().mean(),
            "logits_fake": on_fake.detach().mean(),
        }

    def _lecam(self, on_real: Tensor, on_fake: Tensor) -> Tensor:
        """Distance of the logits to the running mean of the other side's (their eq. 6)."""
        with torch.no_grad():
            for mean, logits in ((self.real_mean, on_real), (self.fake_mean, on_fake)):
                mean.lerp_(mean_over_ranks(logits.mean()), 0.01)
        return (on_real - self.fake_mean).square().mean() + (
            on_fake - self.real_mean
        ).square().mean()


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients averaged over ranks, in one message; nothing on a single one."""
    if not distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = sum_over_ranks(torch.cat([g.flatten() for g in gradients]))
    flat /= torch.distributed.get_world_size()
    parts = flat.split([g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: list[nn.Parameter], most: float | None) -> float:
    """Their norm before it is clipped to `most` (None: left as it is)."""
    return float(nn.utils.clip_grad_norm_(parameters, most or math.inf))


class Watch:
    """Names the collapse of a picture after the discriminator's start.

    The mark is the PSNR just before the start, averaged over about `BEFORE` steps: the picture
    still gets better there, and a longer memory would lag behind it. From there on PSNR is
    averaged over about `AFTER` steps, beginning at the mark; where that lies more than
    `largest_drop` below it, `see` says so.

    A start within the first `BEFORE` steps (`start: 0`) has no picture before it that could
    be lost: the mark is then what the PSNR was over those steps.
    """

    BEFORE = 20
    AFTER = 100

    def __init__(self, settings: Adversarial, state: dict[str, Any] | None = None) -> None:
        self.settings = settings
        self.smooth: float | None = None
        self.mark: float | None = None
        if state:
            self.smooth, self.mark = state["smooth"], state["mark"]

    def state(self) -> dict[str, float | None]:
        return {"smooth": self.smooth, "mark": self.mark}

    def see(self, step: int, psnr: float) -> str | None:
        """Take in a step's PSNR; what to say where the picture collapsed, else None."""
        before = step <= max(self.settings.start, self.BEFORE)
        if self.smooth is None:
            self.smooth = psnr
        if not before and self.mark is None:
            self.mark = self.smooth
        # of few steps a plain mean: the untrained network's PSNR would weigh most otherwise
        memory = min(max(step, 1), self.BEFORE) if before else self.AFTER
        self.smooth += (psnr - self.smooth) / memory
        if self.mark is None:
            return None
        if self.smooth >= self.mark - self.settings.largest_drop:
            return None
        return (
            f"the picture collapsed after the discriminator's start (step {self.settings.start}): "
            f"PSNR fell from {self.mark:.1f} to {self.smooth:.1f} dB by step {step}\n"
            "lower adversarial.weight or its learning_rate, lengthen ramp, start later, or add "
            f"r1; adversarial.largest_drop is {self.settings.largest_drop:g} dB"
        )
