"""A learned tokenizer's training on paper: parameters, memory and FLOPs, for `chainrule plan`.

The very losses of the trainer are run on shapes (`pipeline/plan_paper.py`), with and without
the discriminator, so that nothing has to be kept in step with them by hand.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from chainrule.jobs.tokenizer_trainer import LEARNED
from chainrule.pipeline.plan_paper import Kept, on_cpu
from chainrule.tokenizers.losses import Adversary, build_perceptual


@dataclass(frozen=True)
class Paper:
    """What a training takes; `activations` and FLOPs are those of one image."""

    parameters: int
    discriminator: int
    """Parameters of the second network; 0 where there is none."""
    fixed: int
    """Bytes of weights that are not trained (LPIPS)."""
    activations: int
    """Bytes kept for backward when the generator's loss is whole, the discriminator's part in."""
    flops: float
    """Of a step, forward and backward, without the discriminator."""
    flops_joined: float
    """With it: in the generator's loss, and in its own update."""

    def training_flops(self, config: Any) -> float:
        """Of the whole training: the discriminator joins at its `start`."""
        alone = config.steps
        if config.adversarial is not None:
            alone = min(config.steps, config.adversarial.start)
        steps = alone * self.flops + (config.steps - alone) * self.flops_joined
        return config.batch_size * steps


def on_paper(config: Any, height: int, width: int, channels: int) -> Paper:
    """Count, for a tokenizer that is learned in steps. TokenizerError where the images are too
    small for the discriminator, or LPIPS's weights are not there."""
    shape = (channels, height, width)
    alone = _rehearse(config, shape, 1, joined=False)
    # casts of weights and the codebook are kept once, however many images there are
    one, two = (
        _rehearse(config, shape, images, joined=config.adversarial is not None) for images in (1, 2)
    )
    return Paper(
        parameters=one.parameters,
        discriminator=one.discriminator,
        fixed=one.fixed,
        activations=two.kept - one.kept,
        flops=alone.flops,
        flops_joined=one.flops,
    )


@dataclass(frozen=True)
class _Rehearsal:
    parameters: int
    discriminator: int
    fixed: int
    kept: int
    flops: float


class _OnPaper(Adversary):
    """It stays where it was made."""

    def to(self, *_: Any, **__: Any) -> Any:
        return self


def _rehearse(config: Any, shape: tuple[int, ...], images: int, joined: bool) -> _Rehearsal:
    """One step of `Trainer.step` on shapes."""
    perceptual = build_perceptual(config.perceptual) if config.perceptual is not None else None
    adversary = None
    counter = FlopCounterMode(display=False)
    with on_cpu(config.precision), counter:
        model = LEARNED[config.tokenizer.kind].build(config.tokenizer, shape[0]).train()
        model.quantizer.eval()  # statistics move on values, and there are none
        networks = [model, *([perceptual] if perceptual is not None else [])]
        if joined:
            side, rate = min(shape[1:]), config.learning_rate
            adversary = _OnPaper(config.adversarial, shape[0], side, rate, torch.device("cpu"))
            networks.append(adversary)
        x = torch.zeros(images, *shape)
        with Kept(*networks) as kept:
            reconstruction, quantized = model(x)
            fake = reconstruction.float()
            loss = (fake - x).square().mean()
            if perceptual is not None:
                loss = loss + perceptual(fake, x)
            if adversary is not None:
                step = config.adversarial.start + 1
                loss = loss + adversary.generator_loss(step, loss, fake, model.last_layer)[0]
            (loss + quantized.loss).backward()
        if adversary is not None:
            adversary.learn(x, fake)
    buffers = perceptual.buffers() if perceptual is not None else ()
    return _Rehearsal(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in adversary.parameters()) if adversary is not None else 0,
        sum(b.numel() * b.element_size() for b in buffers),
        sum(kept.sizes()),
        float(counter.get_total_flops()),
    )
