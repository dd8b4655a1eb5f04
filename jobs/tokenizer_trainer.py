"""The state of a learned tokenizer's training: model, optimiser, statistics, checkpoints.

One process, or ranks of torch.distributed (gloo on CPUs, NCCL on GPUs): each rank takes
its rows of the batch, gradients are averaged after backward, and the quantizers sum their
own statistics, so that n ranks train what one would, but for rounding.
"""

import math
import shutil
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from chainrule.pipeline.data.image_batches import ImageBatches
from chainrule.pipeline.devices import chosen_device
from chainrule.pipeline.stage import Stage, StageFailed, StageInterrupted
from chainrule.pipeline.training.checkpoints import Checkpoint, CheckpointWriter, newest, snapshot
from chainrule.pipeline.training.ema import ExponentialAverage
from chainrule.tokenizers.autoencoder import Autoencoder, AutoencoderTokenizer, to_pixels
from chainrule.tokenizers.health import of_codes, of_levels, worst_level
from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.losses import (
    Adversary,
    Watch,
    average_gradients,
    build_perceptual,
    clip_gradients,
)
from chainrule.tokenizers.quantizers import mean_over_ranks, sum_over_ranks
from chainrule.tokenizers.vqgan import VQGANTokenizer
from chainrule.tokenizers.vqvae import VQVAETokenizer

LEARNED: dict[str, type[AutoencoderTokenizer]] = {
    "vqvae": VQVAETokenizer,
    "vqgan": VQGANTokenizer,
}
CHECKPOINTS = "checkpoints"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks for a checkpoint and a stop (Slurm's preemption and time limit)."""
START_VECTORS_A_CODE = 8
"""k-means of a codebook's start sees about so many features for each code..."""
MOST_START_BATCHES = 64
"""...from at most so many batches."""


@dataclass(frozen=True)
class _Part:
    """What a micro-batch leaves: pictures (B, C, H, W), their codes, figures (scalars)."""

    fake: Tensor
    codes: Tensor
    figures: dict[str, Tensor]


class Trainer:
    def __init__(
        self, config: Any, stage: Stage, batches: ImageBatches, pixel_variance: float
    ) -> None:
        self.config, self.stage, self.batches = config, stage, batches
        self.variance = pixel_variance
        self.device = _device(config.device)
        parts = stage.world_size * config.accumulate
        if config.batch_size % parts:
            raise StageFailed(
                f"stage '{stage.name}': batch_size {config.batch_size} does not divide by "
                f"{stage.world_size} ranks x accumulate {config.accumulate}; take a multiple of "
                f"{parts}"
            )
        first = batches.batch(0)
        self.channels = first.shape[3]
        self.resolution = (first.shape[1], first.shape[2])
        self.tokenizer_class = LEARNED[config.tokenizer.kind]
        torch.manual_seed(config.seed)
        model = self.tokenizer_class.build(config.tokenizer, self.channels)
        self.model: Autoencoder = model.to(self.device)
        try:
            # refuses a resolution that the factor does not divide before a step is made
            self.tokenizer().token_grid(*self.resolution)
        except TokenizerError as error:
            raise StageFailed(f"stage '{stage.name}': {error}") from None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            self.parameters, config.learning_rate, tuple(config.betas), fused=True
        )
        self.average = ExponentialAverage(config.ema, self.parameters) if config.ema else None  # type: ignore[arg-type]
        self.perceptual: torch.nn.Module | None = None
        self.adversary: Adversary | None = None
        self.psnr_watch: Watch | None = None
        try:
            if config.perceptual is not None:
                self.perceptual = build_perceptual(config.perceptual).to(self.device)
            if config.adversarial is not None:
                self.adversary = Adversary(
                    config.adversarial,
                    self.channels,
                    min(self.resolution),
                    config.learning_rate,
                    self.device,
                )
                self.psnr_watch = Watch(config.adversarial)
        except TokenizerError as error:
            raise StageFailed(f"stage '{stage.name}': {error}") from None
        self.depth = self.model.quantizer.depth
        self.counts = torch.zeros(self.depth, config.tokenizer.codebook_size, device=self.device)
        self.checkpoints = stage.folder / CHECKPOINTS
        self._writer: CheckpointWriter | None = None
        self._saved: int | None = None
        self.skipped = self.in_a_row = 0
        self._asked = self._stopping = False

    def __enter__(self) -> "Trainer":
        self._handlers = {number: signal.signal(number, self._ask_to_stop) for number in SIGNALS}
        if self.stage.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            if kind is None:  # else another rank may be gone
                dist.barrier()
            dist.destroy_process_group()

    def _ask_to_stop(self, number: int, _frame: object) -> None:
        self._asked = True

    def stop_if_asked(self, step: int) -> None:
        """After SIGTERM or SIGUSR1 on any rank: save, then StageInterrupted on all."""
        if self._stopping:
            self.save(step)
            if self._writer is not None:
                self._writer.wait()
            raise StageInterrupted(f"stage '{self.stage.name}': saved at step {step}")

    # --- steps ------------------------------------------------------------------------

    def step(self, step: int, images: np.ndarray) -> dict[str, float]:
        """One update (`step` counts from 1) on this rank's rows; figures of the global batch.

        A loss or a gradient that is not finite is not learned from: weights, moments and the
        codebook's statistics stay as they were. StageFailed after too many in a row.
        """
        factor = self.config.schedule.factor(step - 1, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        # dropout draws from torch's own stream: begun anew each step, so that a resumed run agrees
        seed = (self.config.seed << 40) + (step << 10) + self.stage.rank
        torch.manual_seed(seed % 2**64)
        self.model.train()
        codebook = {name: t.clone() for name, t in self.model.quantizer.state_dict().items()}
        x = to_pixels(images).to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        # micro-batches; the discriminator sees their reconstructions once all are made
        parts = [self._learn(step, part) for part in x.chunk(self.config.accumulate)]
        average_gradients(self.parameters)
        norm = clip_gradients(self.parameters, self.config.clip)
        figures = self._over_ranks(
            {key: torch.stack([p.figures[key] for p in parts]).mean() for key in parts[0].figures}
        )
        self._stopping = figures.pop("stopping") > 0
        total, error = figures["loss"], figures.pop("error")
        fault = None
        if not math.isfinite(total):
            fault = f"loss {total}"
        elif not math.isfinite(norm):
            fault = "gradient not finite"
        if fault is None:
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            for part in parts:
                self._count(part.codes)
            if self.adversary is not None and self.adversary.active(step):
                fake = torch.cat([part.fake for part in parts])
                with self._autocast():
                    found, norm = self.adversary.update(
                        x, fake, factor, self.config.accumulate, self.config.clip
                    )
                figures |= self._over_ranks(found)
                if not math.isfinite(norm):
                    fault = "gradient of the discriminator not finite"
        else:
            self.model.quantizer.load_state_dict(codebook)
        self._judge(step, fault)
        return {
            "loss": total,
            "reconstruction": figures.pop("reconstruction"),
            "psnr": 10 * math.log10(4 / max(error, 1e-12)) if math.isfinite(error) else math.nan,
            "commitment": figures.pop("commitment"),
            "learning_rate": self.config.learning_rate * factor,
            **{key: value for key, value in figures.items() if key != "loss"},
            **({"skipped_steps": self.skipped} if self.skipped else {}),
        }

    def _learn(self, step: int, x: Tensor) -> "_Part":
        """Add the gradients of the generator's loss on a micro-batch (B, C, H, W)."""
        with self._autocast():
            reconstruction, quantized = self.model(x)
            fake = reconstruction.float()
            error = (fake - x).square().mean()
            if self.config.pixel_loss == "l2":
                pixels = error / self.variance
            else:
                pixels = (fake - x).abs().mean() / math.sqrt(self.variance)
            loss, more = pixels, {}
            if self.perceptual is not None:
                more["perceptual"] = self.perceptual(fake, x)
                loss = loss + self.config.perceptual.weight * more["perceptual"]
            if self.adversary is not None and self.adversary.active(step):
                term, more["adversarial_weight"] = self.adversary.generator_loss(
                    step, loss, fake, self.model.last_layer
                )
                loss = loss + term
            loss = loss + quantized.loss
        (loss / self.config.accumulate).backward()
        figures = {
            "loss": loss,
            "error": error,
            "reconstruction": pixels,
            "commitment": quantized.commitment,
            "stopping": torch.tensor(float(self._asked), device=self.device),
            **more,
        }
        detached = {key: value.detach().float() for key, value in figures.items()}
        return _Part(fake.detach(), quantized.codes, detached)

    def _over_ranks(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Means over the ranks' equal parts of the batch."""
        values = mean_over_ranks(torch.stack([value.float() for value in figures.values()]))
        return dict(zip(figures, values.tolist(), strict=True))

    @torch.no_grad()
    def _count(self, codes: Tensor) -> None:
        for counts, of_level in zip(self.counts, codes.reshape(-1, self.depth).T, strict=True):
            counts += torch.bincount(of_level, minlength=len(counts))

    def _judge(self, step: int, fault: str | None) -> None:
        """Count a step that was not learned from; all ranks see the same numbers."""
        if fault is None:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row >= self.config.consecutive_faults:
            raise StageFailed(
                f"stage '{self.stage.name}': {fault} at step {step}, in {self.in_a_row} steps in a "
                f"row; lower learning_rate {self.config.learning_rate:g}, set clip, or take "
                "precision fp32"
            )

    def window(self) -> dict[str, float]:
        """Codebook usage and perplexity over the steps since the last call.

        Of several levels those of the worst, and each level's beside them.
        """
        counts = sum_over_ranks(self.counts.clone())
        self.counts.zero_()
        shown = ("codebook_usage", "codebook_perplexity")
        found = [of_codes(of_level) for of_level in counts.cpu().numpy()]
        levels = [{name: level[name] for name in shown} for level in found]
        worst = levels[worst_level(levels)]
        return worst if len(levels) == 1 else worst | of_levels(levels)

    def watch(self, step: int, psnr: float) -> None:
        """StageFailed where the discriminator's start wrecked the picture."""
        if not math.isfinite(psnr):  # of a step that was skipped
            return
        fallen = self.psnr_watch.see(step, psnr) if self.psnr_watch is not None else None
        if fallen is not None:
            raise StageFailed(f"stage '{self.stage.name}': {fallen}")

    def averaged(self) -> AbstractContextManager:
        """The averaged weights in place of the raw ones, where they are kept."""
        return nullcontext() if self.average is None else self.average.in_place_of_masters()

    def take_average(self) -> None:
        """Leave the averaged weights in the model: the last thing done to it."""
        if self.average is not None:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.average.tensors, strict=True):
                    parameter.copy_(value)

    def tokenizer(self) -> AutoencoderTokenizer:
        """The tokenizer as it stands (its module is the one in training)."""
        return self.tokenizer_class(
            self.config.tokenizer, self.channels, self.resolution, self.model
        )

    def _autocast(self) -> AbstractContextManager:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # --- start, stop, go on -------------------------------------------------------------

    def resume(self) -> int:
        """Steps done: those of the newest whole checkpoint, or 0 after the codebook's start."""
        found = newest(self.checkpoints) if self.checkpoints.is_dir() else None
        if found is None:
            self.stage.rewind_log(-1)
            self._start_codebook()
            return 0
        self._restore(found)
        self.stage.rewind_log(found.step)
        return found.step

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Codes begin at k-means of the untrained encoder's features of the first batches."""
        self.model.eval()
        wanted = START_VECTORS_A_CODE * self.config.tokenizer.codebook_size
        features: list[Tensor] = []
        for step in range(MOST_START_BATCHES):
            x = to_pixels(self.batches.batch(step)).to(self.device)
            features.append(self.model.encoder(x))
            z = features[-1]
            per_batch = z.shape[0] * z.shape[2] * z.shape[3] * self.stage.world_size
            if per_batch * len(features) >= wanted:
                break
        # gathered batch by batch: rank order inside a batch is the order of one rank's batch
        whole = torch.cat([self.model.quantizer.gather_start(z) for z in features])
        generator = torch.Generator().manual_seed(self.config.seed)
        self.model.quantizer.start(whole, generator)

    def save(self, step: int) -> None:
        """Model, moments and statistics, complete or absent; rank 0 writes.

        A step is saved once: a stop may be asked for at a step that was saved a moment before.
        """
        if step == self._saved:
            return
        self._saved = step
        counts = sum_over_ranks(self.counts.clone())
        if not self.stage.is_main:
            return
        if self._writer is None:
            self._writer = CheckpointWriter(self.checkpoints)
        tensors = {f"model/{n}": snapshot(t) for n, t in self.model.state_dict().items()}
        tensors |= _moments("optimizer", self.optimizer)
        tensors["window/counts"] = snapshot(counts)
        state: dict[str, Any] = {"step": step, "skipped": self.skipped, "in_a_row": self.in_a_row}
        if self.average is not None:
            state["average_updates"] = self.average.updates
            averages = enumerate(self.average.tensors)
            tensors |= {f"average/{number}": snapshot(t) for number, t in averages}
        if self.adversary is not None and self.psnr_watch is not None:
            state["watch"] = self.psnr_watch.state()
            adversary = self.adversary.state_dict().items()
            tensors |= {f"adversary/{n}": snapshot(t) for n, t in adversary}
            tensors |= _moments("adversary-optimizer", self.adversary.optimizer)
        self._writer.save(step, tensors, state, best=None)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.skipped = checkpoint.state.get("skipped", 0)
        self.in_a_row = checkpoint.state.get("in_a_row", 0)
        self.model.load_state_dict(dict(checkpoint.tensors("model")))
        _load_moments(self.optimizer, dict(checkpoint.tensors("optimizer")))
        if self.average is not None:
            self.average.updates = int(checkpoint.state["average_updates"])
            for number, tensor in checkpoint.tensors("average"):
                self.average.tensors[int(number)].copy_(tensor)
        if self.adversary is not None and self.psnr_watch is not None:
            self.adversary.load_state_dict(dict(checkpoint.tensors("adversary")))
            moments = dict(checkpoint.tensors("adversary-optimizer"))
            _load_moments(self.adversary.optimizer, moments)
            self.psnr_watch = Watch(self.psnr_watch.settings, checkpoint.state["watch"])
        counts = dict(checkpoint.tensors("window"))["counts"].to(self.device)
        counts = counts.view_as(self.counts)
        # summed over ranks when saved: one rank takes it up
        self.counts = counts if self.stage.is_main else torch.zeros_like(counts)

    @staticmethod
    def forget(stage: Stage) -> None:
        """Remove the checkpoints: the finished tokenizer stands in their place."""
        if stage.is_main:
            shutil.rmtree(stage.folder / CHECKPOINTS, ignore_errors=True)


def _device(wanted: str) -> torch.device:
    device = torch.device(chosen_device(wanted))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _moments(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam's state by parameter number: `<name>/3.exp_avg`, ..."""
    return {
        f"{name}/{number}.{key}": snapshot(value)
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
