"""The engine: the one file that names Accelerate and DeepSpeed.

A model goes in, a model to call comes out, and one method makes an update from a list of
micro-batches. Everything else in the project is written for one process:

    engine = Engine(settings, precision="bf16", clip=1.0)
    engine.prepare(model, lambda model: build_optimizer(model, ...))
    result = engine.update(micro_batches, objective, tokens, judge)

Strategies: `single`; `ddp` (torch DistributedDataParallel); `zero0` … `zero3` (DeepSpeed).
Accelerate starts and wraps all of them. On a CPU ranks talk through gloo, on GPUs through
NCCL. Ranks come from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

What is put right or refused here, because it is silently wrong otherwise (Accelerate 1.15,
DeepSpeed 0.19, each seen happening):

- Accelerate with a DeepSpeed plugin on a CPU makes every rank believe to be rank 0 of 1
  unless `PartialState(cpu=True)` exists first; what it believes is compared with the
  environment afterwards.
- bf16 at ZeRO stage 0: DeepSpeed's optimiser takes an Adam step on zero gradients in its
  constructor. Refused.
- Several ranks under `single` would train the same data several times. Refused.
"""

import gc
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from chainrule.pipeline.config import RequestError, Settings
from chainrule.pipeline.stage import StageFailed, StageInterrupted
from chainrule.pipeline.training.checkpoints import Checkpoint, newest, snapshot
from chainrule.pipeline.training.ema import ExponentialAverage

Strategy = Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3"]
Precision = Literal["fp32", "bf16", "fp16"]
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's names of the precisions."""
LOWEST_LOSS_SCALE = 1.0
"""fp16: a gradient that overflows even here is at fault itself. DeepSpeed's own floor, too."""
Micro = TypeVar("Micro")
"""A micro-batch: whatever the objective takes."""


class EngineSettings(Settings):
    """How the training is spread. None of it changes what is learned, but for rounding."""

    strategy: Strategy = Field("auto", description="auto: single for one rank, ddp for more")
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = Field(None, description="folder on a local NVMe disk")
    activation_checkpointing: bool = Field(False, description="recompute blocks in backward")
    compile: bool = Field(
        False, description="torch.compile the model (a Transformer in fp32 on a CPU is faster in C)"
    )
    deterministic: bool = Field(True, description="deterministic GPU kernels (bit-for-bit resume)")
    asynchronous_checkpoints: bool = True

    @model_validator(mode="after")
    def _combinations(self) -> "EngineSettings":
        zero = self.strategy.startswith("zero")
        offloads = {self.offload_optimizer, self.offload_parameters} - {"none"}
        if offloads and (not zero or self.strategy == "zero0"):
            raise ValueError(f"offload needs strategy zero1, zero2 or zero3, not {self.strategy}")
        if self.offload_parameters != "none" and self.strategy != "zero3":
            raise ValueError("offload_parameters needs strategy zero3")
        if "nvme" in offloads and self.strategy != "zero3":
            raise ValueError("offload to nvme needs strategy zero3")
        if "nvme" in offloads and self.nvme_path is None:
            raise ValueError("offload to nvme needs nvme_path")
        if self.compile and self.strategy == "zero3":
            raise ValueError("compile does not work with zero3: parameters come and go")
        return self


@dataclass(frozen=True)
class Update:
    """What one update did; the same on every rank."""

    loss: float
    """Nats an element, mean over the global batch."""
    gradient_norm: float
    """Before clipping; inf or nan where a gradient was not finite."""
    applied: bool
    """False without a fault: fp16 overflowed at this loss scale, and the next one is lower."""
    fault: str | None = None
    """Why it was not applied."""
    loss_scale: float | None = None
    """fp16: what the loss of this step was multiplied with."""


class Engine:
    """Wraps one model and one optimiser for one strategy. A context manager."""

    def __init__(
        self,
        settings: EngineSettings,
        precision: Precision = "fp32",
        clip: float | None = 1.0,
        gpu: bool | None = None,
    ) -> None:
        """`gpu`: None takes one where there is one.

        RequestError where the combination cannot work here, before anything is started.
        """
        gpu = torch.cuda.is_available() if gpu is None else gpu
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        strategy = strategy_of(settings, ranks)
        check_combination(strategy, precision, ranks, gpu)
        self.settings, self.precision, self.clip = settings, precision, clip
        self.strategy = strategy
        self.stage = int(strategy[-1]) if strategy.startswith("zero") else None
        self._veto = False
        self._ema: ExponentialAverage | None = None
        self._added_variables = [] if strategy == "single" else _complete_environment()
        if gpu and settings.deterministic:
            # Read by cuBLAS when it starts; needed for reproducible matrix products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._owns_group = not dist.is_initialized()
        self._accelerator = self._accelerate(gpu)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        expected = (int(os.environ.get("RANK", "0")), ranks)
        if (self.rank, self.world_size) != expected:
            raise StageFailed(
                f"the engine believes to be rank {self.rank} of {self.world_size}, the environment "
                f"says {expected[0]} of {expected[1]}: it would train the same data several times"
            )

    # --- start and end ------------------------------------------------------------------

    def _accelerate(self, gpu: bool) -> Any:
        """An Accelerator of its own (Accelerate keeps state for the whole process)."""
        if self.stage is not None:
            _quiet_deepspeed(gpu)
        from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import DeepSpeedPlugin

        AcceleratorState._reset_state(reset_partial_state=True)
        if not gpu:
            os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
            if self.stage is not None:
                PartialState(cpu=True)  # see the head of this file
        options: dict[str, Any] = {"mixed_precision": MIXED_PRECISION[self.precision]}
        if self.stage is not None:
            options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config())
        else:
            options["cpu"] = not gpu
            options["kwargs_handlers"] = [
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ]
        return Accelerator(**options)

    def _deepspeed_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.stage}
        for what, where in (
            ("offload_optimizer", self.settings.offload_optimizer),
            ("offload_param", self.settings.offload_parameters),
        ):
            if where != "none":
                zero[what] = {"device": where, "pin_memory": torch.cuda.is_available()}
                if where == "nvme":
                    zero[what]["nvme_path"] = self.settings.nvme_path
        return {
            # Batches are cut by the loader and scaled in `update`; DeepSpeed only needs a number.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.clip or 0.0,
            "zero_optimization": zero,
            "bf16": {"enabled": self.precision == "bf16"},
            "fp16": {
                "enabled": self.precision == "fp16",
                "initial_scale_power": 16,
                "hysteresis": 1,  # lower at the first overflow, as torch's scaler does
                "min_loss_scale": LOWEST_LOSS_SCALE,
            },
            "zero_allow_untested_optimizer": True,
            # torch's fused AdamW is the faster one on a CPU, and needs no compiler.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
            "wall_clock_breakdown": False,
        }

    def prepare(
        self, model: nn.Module, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> nn.Module:
        """Take over a model and build its optimiser; the module to call in training."""
        model.to(self.device)
        if self.settings.activation_checkpointing:
            if hasattr(model, "activation_checkpointing"):
                model.activation_checkpointing = True  # type: ignore[assignment]
            else:
                checkpoint_activations(model)
        faster_uncompiled = getattr(model, "is_faster_uncompiled", lambda *_: False)
        if self.settings.compile and not faster_uncompiled(self.device, self.precision):
            model.compile()
        self.module = model
        self.parameters: list[tuple[str, Any]] = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad
        ]
        self._buffers = _persistent_buffers(model)
        with warnings.catch_warnings():
            # torch 2.13 renamed broadcast_buffers; Accelerate passes the old name on.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            self.wrapped, prepared = self._accelerator.prepare(model, optimizer(model))
        self.prepared_optimizer = prepared
        if self.stage:
            self._zero = self.wrapped.optimizer
            self.optimizer = self._zero.optimizer
            self._guard_overflow()
        else:
            self.optimizer = prepared.optimizer
            if self.stage == 0:
                self.optimizer = self.wrapped.optimizer
        self.wrapped.train()
        # What is there by now stays: collections of garbage, which a step's graph sets off, need
        # not go through all modules each time (3 to 5 % of a small step).
        gc.collect()
        gc.freeze()
        return self.wrapped

    def _guard_overflow(self) -> None:
        """Let DeepSpeed skip a step on our word too, and look for inf and nan in any precision.

        Its `step` discards the gradients where `overflow` is set: stages 1 and 2 set it in
        `check_overflow`, stage 3 reads it in `_loss_scale_update_and_overflow_cleanup`.
        """
        zero = self._zero
        zero.check_grad_overflow = True
        # fp16's loss scale moves in `_zero_step`, after the step: DeepSpeed moves it before it
        # divides the gradients by it, and raises at its floor, where we name a fault.
        zero._update_scale = lambda has_overflow=False: None
        zero.loss_scaler.raise_error_at_min_scale = False
        name = "_loss_scale_update_and_overflow_cleanup" if self.stage == 3 else "check_overflow"
        original = getattr(zero, name)

        def with_veto(*args: Any, **kwargs: Any) -> Any:
            if self.stage == 3:
                zero.overflow = bool(zero.overflow) or self._veto
                return original(*args, **kwargs)
            original(*args, **kwargs)
            zero.overflow = bool(zero.overflow) or self._veto

        setattr(zero, name, with_veto)

    def close(self) -> None:
        """Meet the other ranks, then leave the process group: no abort at interpreter exit."""
        if dist.is_initialized():
            dist.barrier()
        self.drop()

    def drop(self) -> None:
        """Leave the process group without waiting for anyone (another rank may be gone).

        A group that was there before this engine is left alone. (DeepSpeed remembers its
        group for the whole process: a second engine with it needs one made outside.)
        """
        from accelerate.state import AcceleratorState

        gc.unfreeze()
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in self._added_variables:
            os.environ.pop(name, None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        # An interruption is agreed on by all ranks; after a failure nobody may answer.
        if kind is None or issubclass(kind, StageInterrupted):
            self.close()
        else:
            self.drop()

    # --- between ranks ------------------------------------------------------------------

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, on every rank (float64)."""
        if self.world_size == 1:
            return [float(value) for value in values]
        dtype = torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """The plain values of all ranks, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return list(values)
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, list(values))
        return [value for box in boxes for value in box]

    # --- training -----------------------------------------------------------------------

    def update(
        self,
        micro_batches: Sequence[Micro],
        objective: Callable[[nn.Module, Micro], tuple[Tensor, Tensor]],
        elements: float,
        judge: Callable[[float], str | None] = lambda loss: None,
    ) -> Update:
        """One optimiser step over this rank's micro-batches.

        `objective(model, micro)` gives two sums over the micro-batch: what to minimise, and
        the nats for the report. `elements` counts the valid elements of the whole global
        batch, so the gradient is that of the global mean whatever the split into ranks and
        micro-batches. `judge(loss)` says why a step should be skipped, or None.
        """
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(micro_batches) - 1
        for number, micro in enumerate(micro_batches):
            with self._synchronised(number == last):
                to_minimise, spent = objective(self.wrapped, micro)
                # Gradients are averaged over ranks; the mean wanted is over all elements.
                self._backward(to_minimise * (self.world_size / elements), number == last)
            nats += spent.detach()
        (total,) = self.sum(nats.item())
        loss = total / elements
        fault = judge(loss)
        if self.stage:
            return self._zero_step(loss, fault)
        return self._torch_step(loss, fault)

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        if self.stage is not None:
            self.wrapped.set_gradient_accumulation_boundary(last)
            yield
        else:
            with nullcontext() if last else self._accelerator.no_sync(self.wrapped):
                yield

    def _backward(self, loss: Tensor, last: bool) -> None:
        if self.stage is not None:
            self.wrapped.backward(loss, scale_wrt_gas=False)
        else:
            self._accelerator.backward(loss)

    def _zero_step(self, loss: float, fault: str | None) -> Update:
        scale = float(self._zero.loss_scale) if self.precision == "fp16" else None
        self._veto = fault is not None
        self.wrapped.step()
        self._veto = False
        norm = float(self.wrapped.get_global_grad_norm())
        applied = not self._zero.overflow
        if applied and self._ema is not None:
            self._ema.update()
        if not applied:
            fault = fault or gradient_fault(scale)
        if scale is not None and fault is None:  # a fault says nothing about the scale
            self._zero.loss_scaler.update_scale(self._zero.overflow)
        return Update(loss, norm, applied, fault, scale)

    def _torch_step(self, loss: float, fault: str | None) -> Update:
        scaler = self._accelerator.scaler
        scale = float(scaler.get_scale()) if scaler is not None else None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        parameters = [p for _, p in self.parameters]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")).item()
        if not math.isfinite(norm):
            fault = fault or gradient_fault(scale)
        applied = math.isfinite(norm) and fault is None
        if applied:
            self.optimizer.step()
        if scaler is not None:
            # After every unscale_, or the next one raises. Lower after an overflow, higher
            # after many good steps; a fault says nothing about the scale, which stays.
            scaler.update(scale if fault is not None else None)
        self.prepared_optimizer.zero_grad()
        if self.stage == 0:
            self.wrapped.zero_grad()
        if applied and self._ema is not None:
            self._ema.update()
        return Update(loss, norm, applied, fault, scale)

    def keep_average(self, decay: float) -> None:
        """Follow the weights with an exponential moving average from here on."""
        if "nvme" in (self.settings.offload_optimizer, self.settings.offload_parameters):
            raise RequestError(
                "ema: the master weights lie on nvme; leave ema out or offload to cpu"
            )
        self._ema = ExponentialAverage(decay, self._masters())

    def newest(self, folder: Path) -> Checkpoint | None:
        """The newest whole checkpoint in `folder`, the same one on every rank.

        Rank 0 looks and hashes; the others take its word.
        """
        found = newest(folder) if self.rank == 0 else None
        name = self.broadcast(found.folder.name if found is not None else None)
        if name is None or found is not None:
            return found
        return Checkpoint.open(folder / name, verify=False)

    @property
    def parameter_count(self) -> int:
        """Trained parameters of the whole model."""
        return sum(self._size(p) for _, p in self.parameters)

    def _size(self, p: Any) -> int:
        return int(p.ds_numel if self.stage == 3 else p.numel())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model computes with the averaged weights inside."""
        if self._ema is None:
            raise ValueError("no average is kept")
        try:
            with self._ema.in_place_of_masters():
                self._masters_to_model()
                yield
        except StageInterrupted:  # agreed on by all ranks; after a failure nobody may answer
            self._masters_to_model()
            raise
        self._masters_to_model()

    # --- weights and moments, whole -------------------------------------------------------

    def _masters(self) -> list[Tensor]:
        """The float32 weights that this rank updates: parameters, or flat shards of them."""
        if not self.stage:
            return [p for _, p in self.parameters]
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _masters_to_model(self) -> None:
        """After the masters were written to: give the model what it computes with."""
        if not self.stage:
            return
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        from deepspeed.utils import safe_get_local_fp32_param

        for _, p in self.parameters:
            p.ds_tensor.data.copy_(safe_get_local_fp32_param(p))
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """This rank's share of the whole state, as whole tensors on the CPU, and the scalars.

        Collective: every rank calls it. The copy is taken at once; later updates do not
        touch it.
        """
        self._link_moments()
        owner = share_out([self._size(p) for _, p in self.parameters], self.world_size)
        kept: dict[str, Tensor] = {}
        steps: dict[str, float] = {}
        for kind in ["model", *self._moments()]:
            for (name, p), rank in zip(self.parameters, owner, strict=True):
                value = self._whole(p, None if kind == "model" else kind)
                if rank == self.rank and value is not None:
                    kept[f"{kind}/{name}"] = snapshot(value)
        if self._ema is not None:
            with self._ema.in_place_of_masters():
                for (name, p), rank in zip(self.parameters, owner, strict=True):
                    value = self._whole(p, None)
                    if rank == self.rank and value is not None:
                        kept[f"ema/{name}"] = snapshot(value)
        if self.rank == 0:
            kept.update({f"buffer/{n}": snapshot(b) for n, b in self._buffers})
        for name, p in self.parameters:
            steps[name] = self._step_of(p)
        scalars: dict[str, Any] = {"optimizer_steps": steps}
        if self._ema is not None:
            scalars["ema_updates"] = self._ema.updates
        if self.precision == "fp16":
            scalars["loss_scale"] = self._loss_scale_state()
        return kept, scalars

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up what `export` gave, under this or any other strategy and number of ranks.

        Collective. RequestError where the checkpoint is of another architecture.
        """
        by_name = dict(self.parameters)
        require_same_parameters(
            checkpoint,
            {n: tuple(p.ds_shape if self.stage == 3 else p.shape) for n, p in self.parameters},
        )
        scalars = checkpoint.state["engine"]
        steps = scalars["optimizer_steps"]
        if self._ema is not None and checkpoint.names("ema"):
            for name, value in checkpoint.tensors("ema"):
                self._set_whole(by_name[name], value, None)
            for average, master in zip(self._ema.tensors, self._masters(), strict=True):
                average.copy_(master)
            self._ema.updates = scalars["ema_updates"]
        for name, value in checkpoint.tensors("model"):
            self._set_whole(by_name[name], value, None)
        if self._ema is not None and not checkpoint.names("ema"):
            for average, master in zip(self._ema.tensors, self._masters(), strict=True):
                average.copy_(master)
        self._masters_to_model()
        kinds = {name.split("/", 1)[0] for name in checkpoint.index} - {"model", "ema", "buffer"}
        for kind in sorted(kinds):
            found = set(checkpoint.names(kind))
            self._make_moments(kind, found, steps)
            for name, value in checkpoint.tensors(kind):
                self._set_whole(by_name[name], value, kind)
        buffers = dict(self._buffers)
        for name, value in checkpoint.tensors("buffer"):
            buffers[name].copy_(value)
        if self.precision == "fp16" and "loss_scale" in scalars:
            self._restore_loss_scale(scalars["loss_scale"])

    def _moments(self) -> list[str]:
        """Names of the optimiser's tensors that have their weight's shape."""
        kinds = set()
        for p, state in self.optimizer.state.items():
            kinds |= {
                k
                for k, v in state.items()
                if torch.is_tensor(v) and v.shape == p.shape and k != "step"
            }
        return sorted(kinds)

    def _whole(self, p: Any, kind: str | None) -> Tensor | None:
        """A weight (kind None) or moment, whole, in float32."""
        if not self.stage:
            if kind is None:
                return p.detach()
            return self.optimizer.state.get(p, {}).get(kind)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind is None:
            return safe_get_full_fp32_param(p)
        return safe_get_full_optimizer_state(p, kind)

    def _set_whole(self, p: Any, value: Tensor, kind: str | None) -> None:
        if not self.stage:
            target = p.detach() if kind is None else self.optimizer.state[p][kind]
            target.copy_(value)
            return
        value = value.to(self.device, torch.float32)
        if self.stage < 3:
            p.set_full_hp_param(value, kind)
            return
        size = p.ds_tensor.numel()
        padded = torch.zeros(size * self.world_size, device=value.device)
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, size * self.rank, size)
        self._zero.set_local_hp_param(mine, p, kind)

    def _make_moments(self, kind: str, names: set[str], steps: dict[str, float]) -> None:
        """Make room for a kind of moment in an optimiser that has not stepped yet."""
        if not self.stage:
            for name, p in self.parameters:
                if name in names:
                    self._make_room(p, kind, steps[name])
            return
        count = max(steps.values(), default=0.0)
        for flat in self._masters():
            self._make_room(flat, kind, count)
        self._link_moments()

    def _link_moments(self) -> None:
        """Tell DeepSpeed's stages 1 and 2 again where each weight's moments lie.

        They link them after the first group's first step, when the other groups have none.
        """
        if self.stage in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _make_room(self, p: Tensor, kind: str, count: float) -> None:
        state = self.optimizer.state[p]
        state[kind] = torch.zeros_like(p)
        if kind != "momentum_buffer":
            fused = self.optimizer.defaults.get("fused")
            state["step"] = torch.tensor(
                count, dtype=torch.float32, device=p.device if fused else "cpu"
            )

    def _step_of(self, p: Any) -> float:
        if not self.stage:
            return float(self.optimizer.state.get(p, {}).get("step", 0.0))
        counts = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return float(counts[0]) if counts else 0.0

    def _loss_scale_state(self) -> dict[str, Any]:
        if self.stage:
            scaler = self._zero.loss_scaler
            names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
            return {name: getattr(scaler, name) for name in names}
        return dict(self._accelerator.scaler.state_dict())

    def _restore_loss_scale(self, state: dict[str, Any]) -> None:
        scaler = self._zero.loss_scaler if self.stage else self._accelerator.scaler
        if self.stage and "cur_scale" in state:
            for name, value in state.items():
                setattr(scaler, name, value)
        elif not self.stage and "scale" in state:
            scaler.load_state_dict(state)
        # From the other kind of scaler only the scale could be taken: it finds its own in
        # a few steps, so nothing is carried over.


# --- pieces -----------------------------------------------------------------------------


def strategy_of(settings: EngineSettings, ranks: int) -> str:
    """The strategy that `auto` stands for with so many ranks, or the one that is named."""
    if settings.strategy == "auto":
        return "single" if ranks == 1 else "ddp"
    return settings.strategy


def check_combination(strategy: str, precision: str, ranks: int, gpu: bool) -> None:
    """RequestError for what cannot work or is silently wrong, with the remedy."""
    if strategy == "single" and ranks > 1:
        raise RequestError(
            f"engine.strategy single with {ranks} ranks would train the same data {ranks} times; "
            "use ddp or zero1 … zero3"
        )
    if strategy == "zero0" and precision != "fp32":
        raise RequestError(
            f"engine.strategy zero0 with precision {precision}: DeepSpeed's first update is wrong "
            "there; use ddp, or zero1 … zero3"
        )
    if precision == "fp16" and not gpu:
        raise RequestError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")


def gradient_fault(loss_scale: float | None) -> str | None:
    """What a gradient that is not finite means: under fp16 an overflow, which is no fault, as
    long as the loss scale can fall."""
    if loss_scale is None:
        return "gradient is not finite"
    if loss_scale <= LOWEST_LOSS_SCALE:
        return f"gradient is not finite at the lowest loss scale, {loss_scale:g}"
    return None


def plain_accelerator(device: torch.device, precision: Precision) -> Any:
    """An Accelerator as anyone would make it: what the engine is measured against."""
    from accelerate import Accelerator

    return Accelerator(cpu=device.type == "cpu", mixed_precision=MIXED_PRECISION[precision])


def require_same_parameters(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """RequestError naming the first parameter that differs between checkpoint and model."""
    found: dict[str, tuple[int, ...]] = {
        name: tuple(value.shape) for name, value in checkpoint.tensors("model")
    }
    for name, shape in shapes.items():
        if found.get(name) != shape:
            raise RequestError(
                f"{checkpoint.folder}: of another architecture: {name} is "
                f"{found.get(name, 'missing')} there, {shape} in the model"
            )
    extra = sorted(found.keys() - shapes.keys())
    if extra:
        raise RequestError(
            f"{checkpoint.folder}: of another architecture: the model has no parameter {extra[0]}"
        )


def share_out(sizes: Sequence[int], ranks: int) -> list[int]:
    """A rank for each tensor, so that ranks write about as many elements each."""
    load = [0] * ranks
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = load.index(min(load))
        owners[index] = rank
        load[rank] += sizes[index]
    return owners


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each block of the model's longest ModuleList in the backward pass.

    (Chen et al. 2016.) ValueError where a model has no such list.
    """
    from torch.utils.checkpoint import checkpoint

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise RequestError("engine.activation_checkpointing: this model has no list of blocks")
    for block in max(lists, key=len):
        original = block.forward

        def forward(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return _original(*args, **kwargs)
            return checkpoint(_original, *args, use_reentrant=False, **kwargs)

        block.forward = forward  # type: ignore[method-assign]


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = set(model.state_dict().keys())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _complete_environment() -> list[str]:
    """One rank started by hand: set what a launcher would have; the names of what was added."""
    wanted = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": os.environ.get("RANK", "0"),
        "LOCAL_WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
        "MASTER_ADDR": "127.0.0.1",
    }
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            wanted["MASTER_PORT"] = str(probe.getsockname()[1])
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    return added


def _quiet_deepspeed(gpu: bool) -> None:
    """Choose DeepSpeed's accelerator, hold its chatter, and spare a CPU its compiler.

    On a CPU DeepSpeed compiles a shared-memory all-reduce at its first start (75 s, and a
    compiler needed). Gloo does the same work; the operation is declared incompatible.
    """
    import logging

    if not gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls torch.distributed by names that torch 2.13 replaced, at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
