"""Pretrain a model on token shards: one loop, from one process to ZeRO-3 on many nodes.

    token sets → global order → rank's slice of batch s → update s → log → now and then
    validation and a checkpoint → model.json and the last checkpoint, for handoff

With a model as the input `initial`, its weights are what the first update starts from.

Killed at any instant and started again, it goes on from the last whole checkpoint and gives
the losses of the run that was not killed. Nothing random outlives a step: each step's seed
is a function of (seed, step, rank).
"""

import logging
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from pydantic import Field, field_validator, model_validator

from chainrule.pipeline import plan_text
from chainrule.pipeline.artifact import write_json
from chainrule.pipeline.config import RequestError, Settings, digest, runtime
from chainrule.pipeline.data.batches import Loader, Mixture
from chainrule.pipeline.data.reader import OnDamage
from chainrule.pipeline.devices import physical_memory
from chainrule.pipeline.graph import Pipeline, StageSpec, is_folder
from chainrule.pipeline.heartbeat import beat
from chainrule.pipeline.models.inputs import has_captions
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.plan_inputs import foreseen_model, ranks_of, rows_of
from chainrule.pipeline.plan_memory import parameter_count
from chainrule.pipeline.stage import Input, Stage, StageFailed, StageInterrupted, for_json, say
from chainrule.pipeline.training import assembly
from chainrule.pipeline.training.checkpoints import CheckpointWriter
from chainrule.pipeline.training.engine import (
    Engine,
    EngineSettings,
    Precision,
    check_combination,
    strategy_of,
)
from chainrule.pipeline.training.faults import FaultMonitor, FaultSettings
from chainrule.pipeline.training.objective import Objective, initialise_from_data
from chainrule.pipeline.training.optimizers import (
    OptimizerSettings,
    build_optimizer,
    set_learning_rate,
)
from chainrule.pipeline.training.run_state import (
    LedgerKeeper,
    RunState,
    StopSignals,
    begin,
    roll_back,
    stop_signals,
)
from chainrule.pipeline.training.schedules import BatchRamp, ScheduleSettings
from chainrule.pipeline.training.throughput import (
    Meter,
    checkpoints_too_dear,
    flops_per_element,
    measured_peak,
    memory_gb,
    progress_line,
)
from chainrule.pipeline.training.validation import Validation, context_free_loss, validation_sets
from chainrule.pipeline.training.warm_start import take_weights

log = logging.getLogger("chainrule.pretrain")
INPUTS = {
    "tokens": Input(("pretokenize",), many=True),
    "initial": Input(("handoff", "distill"), optional=True),
}


class Config(Settings):
    model: str | dict[str, Any] = Field(
        description="a preset, or {preset: …, changes}, or {family: …, settings}; what the "
        "tokens settle (vocabulary_size, event_shape, classes or captions) is filled in"
    )
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="rows of T tokens in a global batch")
    batch_ramp: BatchRamp | None = None
    mixture_weights: dict[str, float] | None = Field(
        None, description="weight of each tokens stage; null: by size"
    )
    documents: bool = Field(True, description="attention stays within a document of a packed row")
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    clip: float | None = Field(1.0, gt=0, description="norm that gradients are clipped to")
    z_loss: float = Field(0.0, ge=0, description="weight of log² Z, as in PaLM: 1e-4")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of averaged weights")
    precision: Precision = "fp32"
    seed: int = Field(0, ge=0)
    faults: FaultSettings = FaultSettings()
    # When something is written or measured changes no step of training. (What `weights: best`
    # and `average` choose from it does: they take what there is.)
    checkpoint_every: int = runtime(1000, ge=1)
    keep: int = runtime(2, ge=1, description="newest checkpoints that are kept")
    keep_every: int | None = runtime(None, ge=1, description="multiples that are kept as well")
    validate_every: int | None = runtime(None, ge=1, description="null: at the end only")
    validation_batches: int | None = Field(
        None, ge=1, description="of each validation, the same ones; null: the whole split"
    )
    on_damage: OnDamage = runtime(
        "stop", description="a sample whose bytes were altered: stop, or mask it out and count it"
    )
    ledger: bool = Field(False, description="write down every sample consumed (chainrule verify)")
    accumulate: int = runtime(1, ge=1, description="micro-batches an update")
    engine: EngineSettings = runtime(EngineSettings())
    workers: int = runtime(1, ge=0, description="loader threads")
    log_every: int = runtime(1, ge=1)

    @field_validator("mixture_weights")
    @classmethod
    def _weights_are_shares(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name, weight in (value or {}).items():
            if weight <= 0:
                raise ValueError(
                    f"{name}: {weight:g} is no share of the rows; leave a set out of the stage's "
                    "inputs that is not to be drawn from"
                )
        return value

    @field_validator("model")
    @classmethod
    def _known(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        return assembly.known_model(value)

    @model_validator(mode="after")
    def _can_work(self) -> "Config":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by accumulate {self.accumulate}"
            )
        if self.batch_ramp is not None and self.batch_ramp.start > self.batch_size:
            raise ValueError(
                f"batch_ramp.start {self.batch_ramp.start} is above batch_size {self.batch_size}: "
                "a batch grows from one to the other"
            )
        if self.optimizer.name == "muon" and self.engine.strategy in ("zero1", "zero2", "zero3"):
            raise ValueError(
                f"optimizer.name muon needs whole matrices, engine.strategy {self.engine.strategy} "
                "cuts them into flat shards; take engine.strategy ddp, or optimizer.name adamw"
            )
        return self


def launch_apart(config: Config) -> bool:
    """Engines with a process group run in a process of their own."""
    return config.engine.strategy not in ("auto", "single")


def check(pipeline: Pipeline, spec: StageSpec) -> None:
    """Refuse a model that cannot be built of what the stages above will hand on, batches that
    cannot be shared out, weights of other sets, and stages that hold nothing out."""
    config = cast(Config, spec.config)
    where = f"stage '{spec.name}'"
    rows_of(spec)
    tokens = spec.inputs["tokens"]
    ranks = ranks_of(spec)
    gpu = spec.resources.gpus > 0 or torch.cuda.is_available()
    try:
        check_combination(strategy_of(config.engine, ranks), config.precision, ranks, gpu)
        batch_sizes(config, ranks)
        if config.mixture_weights is not None and not any(map(is_folder, tokens)):
            assembly.ordered_weights(config.mixture_weights, tokens)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    for name in tokens:
        above = pipeline.stages[name].inputs["data"] if name in pipeline.stages else []
        for source in above:
            if source in pipeline.stages and nothing_held_out(pipeline.stages[source].config):
                raise RequestError(
                    f"{where} needs something to validate on, and stage '{source}' holds nothing "
                    "out (validation: 0); set validation: 0.1 there"
                )
    foreseen_model(pipeline, spec)


def nothing_held_out(ingest: Settings) -> bool:
    return getattr(ingest, "validation", None) == 0


def main(config: Config, stage: Stage) -> None:
    with Engine(config.engine, config.precision, config.clip) as engine, stop_signals() as stop:
        try:
            train(config, stage, engine, stop)
        except (StageInterrupted, StageFailed, RequestError):
            raise
        except Exception as error:
            # A signal to the whole group also ends what a step may be waiting for: a compiler,
            # another rank.
            if not stop.requested:
                raise
            raise StageInterrupted(
                f"a signal came, and the step that it met could not end ({type(error).__name__}); "
                "the checkpoint before it stands"
            ) from error


STATES = 12
"""Bytes a parameter, at the least: weight, gradient and one moment in float32."""


def require_memory(model: Settings, stage: Stage, engine: Engine) -> None:
    """StageFailed where weights, gradients and moments alone exceed this machine's memory: the
    kernel would end the process without a word. (A disk may hold some of them.)"""
    offloads = (engine.settings.offload_optimizer, engine.settings.offload_parameters)
    if "nvme" in offloads:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of the ranks, at the least
    parameters, memory = parameter_count(model), physical_memory()
    needed = STATES * parameters * here // engine.world_size
    if memory is not None and needed > memory:
        raise StageFailed(
            f"stage '{stage.name}': {plan_text.count(parameters)} parameters, their gradients and "
            f"moments are {plan_text.size(needed)} or more; this machine has "
            f"{plan_text.size(memory)} of memory\n"
            "take a smaller model, a GPU, or more nodes (`chainrule plan` says what each takes)"
        )


def train(config: Config, stage: Stage, engine: Engine, stop: StopSignals) -> None:
    # --- data, model, optimiser ---------------------------------------------------------
    artifacts = stage.inputs["tokens"]
    sets = assembly.training_sets(artifacts, config.on_damage)
    held_out = validation_sets(artifacts)
    model_config = assembly.model_config(config.model, sets)
    if engine.device.type == "cpu":
        require_memory(model_config, stage, engine)
    model = build(model_config, seed=config.seed)
    context = torch.Size(model.event_shape).numel()
    drawn = assembly.mixture(sets, context, config.mixture_weights, config.seed)
    sizes = batch_sizes(config, engine.world_size)
    validation = Validation(
        held_out, context, config.batch_size, config.seed, drawn.interleave.shares
    )
    objective = Objective(model, config.documents, config.z_loss)
    flops = flops_per_element(model)
    description = assembly.describe(model_config, drawn, sets, artifacts)
    initial = stage.optional("initial")
    if initial is None:
        initialise_from_data(model, drawn.batch(0, sizes[0][1]))
    else:
        take_weights(model, initial, description)
    engine.prepare(model, lambda module: build_optimizer(module, config.optimizer))
    if config.ema is not None:
        engine.keep_average(config.ema)
    if stage.is_main:
        write_json(stage.folder / "model.json", description)
        for line in unlikely(drawn, sizes[-1][1], config.model, model_config):
            say(f"  {stage.name}: {line}")
        if config.engine.compile:
            say(f"  {stage.name}: the first step, and the first validation, wait for the compiler")
        if config.schedule.warmup > config.steps:
            say(
                f"  {stage.name}: schedule.warmup {config.schedule.warmup} is longer than the "
                f"training ({config.steps} steps): the learning rate does not reach its value"
            )
    stage.parameters({"parameters": engine.parameter_count, "context": context})

    # --- where to begin -----------------------------------------------------------------
    folder = stage.folder / "checkpoints"
    asynchronous = config.engine.asynchronous_checkpoints
    writer = CheckpointWriter(
        folder, stage.rank, engine.world_size, config.keep, config.keep_every, asynchronous
    )
    monitor = FaultMonitor(config.faults, stage.folder / "faults.jsonl" if stage.is_main else None)
    run = RunState(digest(description["model"]))
    begin(engine.newest(folder), run, engine, monitor)
    stage.rewind_log(run.step)
    ledger = LedgerKeeper(stage, engine, drawn, config.ledger)
    ledger.begin_at(run.step, run.position)
    meter = Meter(flops, engine.world_size * measured_peak(engine.device, config.precision))

    def save() -> None:
        if run.saved_step == run.step:
            return
        with meter.leaving_out("checkpoint"):
            ledger.sync()
            tensors, scalars = engine.export()
            state = run.state() | {"engine": scalars, "faults": monitor.state()}
            writer.save(run.step, tensors, state, run.best_step)
            run.saved_step = run.step

    def go_on() -> None:
        """Before each batch of a validation, which may take longer than a grace time."""
        beat()
        (stopping,) = engine.sum(stop.requested)
        if stopping:
            raise StageInterrupted

    def losses(last: bool) -> dict[str, float]:
        batches = config.validation_batches
        found = validation.losses(engine, objective, batches, go_on)
        if last and config.ema is not None:
            with engine.averaged():
                averaged = validation.losses(engine, objective, batches, go_on)
            found |= {f"ema_{name}": loss for name, loss in averaged.items()}
        return found

    def validate(record: dict[str, Any]) -> dict[str, Any]:
        """`record` with the losses; what is logged of a step waits for its validation."""
        last = run.step == config.steps
        run.pending = for_json(record)
        if last:
            save()  # a long validation of a finished training: nothing of it is trained again
        try:
            with meter.leaving_out("validation"):
                found = losses(last)
        except StageInterrupted:
            save()
            writer.wait()
            said = f"a signal came in a validation; step {run.step} is saved"
            raise StageInterrupted(said) from None
        run.pending = None
        if last or run.step % config.checkpoint_every == 0:
            run.note_best(found["validation_loss"])
        if last:
            run.final = found
        return record | found

    # --- the loop -------------------------------------------------------------------------
    engine.barrier()  # a checkpoint's remains are gone before anyone writes the next
    if run.pending is not None:  # the run was stopped in a validation
        stage.rewind_log(run.step - 1)
        stage.log(run.step, **validate(run.pending))
        writer.amend(run.step, run.state(), run.best_step)
    warned = False
    with stage.progress(config.steps, "steps", run.step) as bar:
        while run.step < config.steps:
            with Loader(
                drawn,
                sizes,
                stage.rank,
                engine.world_size,
                run.step,
                run.position,
                config.workers,
                pin=engine.device.type == "cuda",
            ) as loader:
                for batch in loader:
                    elements, stopping, failed = engine.sum(
                        batch.tokens, stop.requested, writer.failed
                    )
                    if failed:
                        writer.give_up()
                    if stopping:
                        save()
                        writer.wait()
                        raise StageInterrupted(f"a signal came; step {run.step} is saved")
                    ledger.record(batch)
                    torch.manual_seed(seed_of(config.seed, run.step, stage.rank))
                    rate = set_learning_rate(
                        engine.optimizer, config.schedule.factor(run.step, config.steps)
                    )
                    micro = [part.to(engine.device) for part in batch.split(config.accumulate)]
                    update = engine.update(micro, objective, elements, monitor.judge_loss)
                    run.step += 1
                    run.position = loader.state()["position"]
                    run.tokens_seen += int(elements)
                    meter.step(elements)
                    record: dict[str, Any] = {
                        "loss": update.loss,
                        "gradient_norm": update.gradient_norm,
                        "learning_rate": rate,
                    }
                    if update.loss_scale is not None:
                        record["loss_scale"] = update.loss_scale
                    fault = update.fault
                    if update.applied:
                        monitor.accept(update.loss)
                    else:
                        ids = engine.gather(batch.ids)
                        if fault is None and update.loss_scale is not None:
                            fault = monitor.overflow(run.step, update.loss_scale, ids)
                    if fault is not None:
                        record["fault"] = fault
                        monitor.skip(run.step, fault, ids)
                        if monitor.must_roll_back:
                            writer.wait()
                            engine.barrier()
                            passed_over = roll_back(folder, run, engine, monitor)
                            stage.rewind_log(run.step)
                            ledger.begin_at(run.step, run.position, passed_over)
                            bar.done = run.step
                            break

                    last = run.step == config.steps
                    validating = config.validate_every and run.step % config.validate_every == 0
                    if last or validating or fault or run.step % config.log_every == 0:
                        record |= meter.report(loader.stalled)
                        record["memory_gb"] = memory_gb(engine.device)
                        if last or validating:
                            record = validate(record)
                        stage.log(run.step, **record)
                        bar.update(0, **progress_line(record, meter.checkpoint_share))
                        said = None if warned else checkpoints_too_dear(record)
                        if said is not None and stage.is_main:
                            log.warning(said)
                        warned = warned or said is not None
                    bar.update(1)
                    if last:
                        writer.amend(run.step, run.state(), run.best_step)
                        break
                    if run.step % config.checkpoint_every == 0:
                        save()

    # --- what it came to ------------------------------------------------------------------
    ledger.close()
    (damaged,) = engine.sum(sum(tokens.damaged for tokens in sets))
    if stage.is_main:
        stage.summary.update(run.final)
        guesses = [context_free_loss(a, b) for a, b in zip(sets, held_out, strict=True)]
        stage.summary["unigram_loss"] = validation.mean(guesses)
        stage.summary["parameters"] = engine.parameter_count
        stage.summary["tokens_seen"] = run.tokens_seen
        stage.summary["best_step"] = run.best_step
        if damaged:
            stage.summary["damaged_samples"] = int(damaged)
        stage.summary["skipped_steps"] = monitor.skipped
        stage.summary["rollbacks"] = monitor.rollbacks
        if config.precision == "fp16":
            stage.summary["overflows"] = monitor.overflows
    engine.barrier()


def batch_sizes(config: Config, world_size: int) -> list[tuple[int, int]]:
    """[(from_step, rows), …]; RequestError where a batch does not divide by ranks."""
    ramp = [(0, config.batch_size)]
    if config.batch_ramp is not None:
        ramp = []
        for step in range(config.batch_ramp.steps + 1):
            size = config.batch_ramp.batch_size(step, config.batch_size)
            if not ramp or ramp[-1][1] != size:
                ramp.append((step, size))
    parts = world_size * config.accumulate
    for _, size in ramp:
        if size % parts:
            remedy = f"a multiple of {parts}"
            if config.batch_ramp is not None:
                remedy = f"batch_ramp.increment: {parts}, and multiples of it"
            raise RequestError(
                f"a batch of {size} rows does not divide by {world_size} ranks x accumulate "
                f"{config.accumulate}; take {remedy}"
            )
    return ramp


def unlikely(
    drawn: Mixture, batch_size: int, asked: str | dict[str, Any], model: Settings
) -> Iterator[str]:
    """What can be meant, but hardly is."""
    has_none = getattr(model, "classes", 0) is None and not has_captions(model)
    meant = isinstance(asked, dict) and "classes" in asked
    if has_none and not meant and any(m.tokens.classes for m in drawn.members):
        yield f"the classes are left out: {assembly.NO_CLASS_OF_ITS_OWN}"
    rows = sum(len(member.rows) for member in drawn.members)
    if batch_size > rows:
        yield (
            f"a step of {batch_size} rows goes {batch_size / rows:.1f} times through all there are "
            f"({rows}); take a smaller batch_size"
        )
    for member in drawn.members:
        if member.tokens.modality != "audio":
            continue
        longest = max(int(member.tokens.lengths.max()), 1)
        if drawn.context > 2 * longest:
            yield (
                f"a row of {drawn.context} elements holds {drawn.context // longest} recordings of "
                f"{member.tokens.name} or more, the longest has {longest}; set model.event_shape"
            )


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for everything random in one step on one rank (dropout, dropped classes)."""
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**64  # what torch takes
