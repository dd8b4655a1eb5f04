"""Make a draft for speculative decoding: a small model fitted to a large one's distributions.

    the model draws samples of its own (once) → step: KL(model || draft) on some of them and on
    training data → checkpoints → a model folder like any other, which `sample` takes as `draft`

Resumes at its last checkpoint, with the losses of the uninterrupted run: the rows of step s are
a function of (seed, s).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from safetensors import safe_open

from chainrule.jobs.sample import open_source, token_set
from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.config import RequestError, Settings, result_settings, runtime
from chainrule.pipeline.data.batches import Batch, Mixture, mixture_of, sequential
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.models import folder as model_folder
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.inputs import has_captions
from chainrule.pipeline.sampling.distillation import Rows, divergence, new_draft
from chainrule.pipeline.sampling.request import (
    Captioned,
    Config as SampleConfig,
    Request,
    Source,
    settle,
)
from chainrule.pipeline.sampling.sampler import draw
from chainrule.pipeline.sampling.store import Layout, Store
from chainrule.pipeline.stage import Input, Stage, StageFailed
from chainrule.pipeline.training.assembly import known_model
from chainrule.pipeline.training.objective import condition_of
from chainrule.pipeline.whole_file import whole

INPUTS = {
    "model": Input(("handoff",)),
    "tokens": Input(("pretokenize",), many=True, optional=True),
}
STATE = "state.safetensors"
OWN = "own"


class Config(Settings):
    layers: int | None = Field(
        None, ge=1, description="of the draft, started from the model's own; default: a quarter"
    )
    model: dict[str, Any] | None = Field(
        None, description="instead of layers: settings of a fresh model"
    )
    steps: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="rows at once; default: all")
    learning_rate: float = Field(1e-3, gt=0)
    warmup: int = Field(20, ge=0, description="steps")
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    own_samples: int = Field(256, ge=0, description="drawn from the model, at temperature 1")
    own_share: float = Field(
        0.5, ge=0, le=1, description="of a batch; the rest are training tokens, where given"
    )
    seed: int = Field(0, ge=0)
    checkpoint_every: int = runtime(100, ge=1)
    log_every: int = runtime(10, ge=1)
    validation_batches: int = Field(8, ge=1)
    device: str = runtime("auto")

    @field_validator("model")
    @classmethod
    def _a_known_model(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            known_model(value)
        return value

    @model_validator(mode="after")
    def _one_way_to_a_draft(self) -> "Config":
        if self.layers is not None and self.model is not None:
            raise ValueError("layers and model: two ways to a draft, give one of them")
        return self


def main(config: Config, stage: Stage) -> None:
    if not stage.is_main:
        return
    model_artifact = stage.input("model")
    source = open_source(model_artifact.folder, config.device)
    data = training_tokens(source, stage.inputs.get("tokens", []), config)
    own_share = config.own_share if data is not None else 1.0
    if own_share > 0 and config.own_samples == 0:
        raise RequestError("own_samples: 0, and nothing else to learn from; give `tokens`")
    draft = new_draft(source.model, config.layers, config.model, config.seed).to(source.device)
    own = OwnSamples(config, source, stage, data) if own_share > 0 else None
    train(config, stage, source, draft, data, own, own_share)
    validate(config, stage, source, draft, own)
    publish(stage, source, draft, model_artifact, config)


def training_tokens(source: Source, given: list[Artifact], config: Config) -> Mixture | None:
    """Rows of the training split; LineageError for tokens of another tokenizer."""
    if not given:
        return None
    return mixture_of(
        [token_set(source, artifact, "train") for artifact in given],
        source.elements,
        seed=config.seed,
    )


class OwnSamples:
    """Samples of the model, kept in a store until the draft is done."""

    def __init__(self, config: Config, source: Source, stage: Stage, data: Mixture | None) -> None:
        self.config, self.source = config, source
        wanted = SampleConfig(number=config.own_samples, seed=config.seed)
        captions = None
        if data is not None and has_captions(source.model.config):
            captions = captions_of(data.members[0].tokens, config.own_samples, source)
        request = settle(wanted, source, captions=captions)
        self.request = request
        per_shard = min(50, config.own_samples)
        columns = source.elements
        store = Store.start(
            _made(stage.folder / OWN),
            model=source.card["fingerprint"],
            settings=result_settings(wanted),
            number=config.own_samples,
            samples_per_shard=per_shard,
            arrays={"x": Layout((columns,), "int64"), "length": Layout((), "int64")},
        )
        self._fill(store, request, columns, stage)
        self.x = torch.from_numpy(store.read("x"))
        self.lengths = torch.from_numpy(store.read("length"))

    def _fill(self, store: Store, request: Request, columns: int, stage: Stage) -> None:
        todo = store.mine(0, 1)
        with stage.progress(sum(len(store.rows(s)) for s in todo), "own samples") as progress:
            for shard in todo:
                rows = store.rows(shard)
                drawn = draw(self.source.model, request.plan(rows), request.rules)
                x = np.zeros((len(rows), columns), dtype=np.int64)
                x[:, : drawn.x.shape[1]] = drawn.x.numpy()
                store.write(shard, {"x": x, "length": drawn.lengths})
                progress.update(len(rows))
        if not store.finished:
            store.finish()

    def rows(self, step: int, size: int) -> Rows:
        """Rows of a step: epochs in an order of (seed, epoch), one after another."""
        number = len(self.x)
        picked = []
        for position in range(step * size, (step + 1) * size):
            epoch, at = divmod(position, number)
            order = np.random.default_rng((self.config.seed, epoch)).permutation(number)
            picked.append(int(order[at]))
        return self.at(torch.tensor(picked))

    def at(self, index: torch.Tensor) -> Rows:
        model, device = self.source.model, self.source.device
        cond = self.request.cond(index.tolist())
        cond = None if cond is None else cond.to(device)
        x = model.to_event(self.x[index].to(device))
        counts = torch.arange(self.x.shape[1]) < self.lengths[index].unsqueeze(1)
        mask = None if bool(counts.all()) else model.to_event(counts.to(device))
        return Rows(x, cond, None, mask)


def _rows_of(batch: Batch, model: Autoregressive) -> Rows:
    """Training tokens as the draft and the model take them."""
    shape = (len(batch.x), *model.event_shape)
    mask = None if batch.mask is None else batch.mask.reshape(shape)
    cond = condition_of(batch, model.config)
    return Rows(batch.x.reshape(shape), cond, batch.documents, mask)


def captions_of(tokens: TokenSet, number: int, source: Source) -> Captioned | None:
    """First captions of so many samples from all over a set, None where they have none."""
    if tokens.captions is None:
        return None
    metas = [tokens[i][1] for i in tokens.shards.spread(tokens.split, number)]
    texts = [meta["captions"][0] for meta in metas]
    return Captioned.of_ids(texts, [meta["caption_ids"][0] for meta in metas], source)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def train(
    config: Config,
    stage: Stage,
    source: Source,
    draft: Autoregressive,
    data: Mixture | None,
    own: OwnSamples | None,
    own_share: float,
) -> None:
    """The loop: from the last checkpoint to the last step."""
    source.model.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        draft.parameters(), config.learning_rate, (0.9, 0.95), weight_decay=config.weight_decay
    )
    first = restore(stage.folder / STATE, draft, optimizer)
    stage.rewind_log(first)
    own_rows = round(own_share * config.batch_size) if own is not None else 0
    data_rows = config.batch_size - own_rows
    draft.train()
    with stage.progress(config.steps, "steps", first) as progress:
        for step in range(first, config.steps):
            parts = []
            if own is not None and own_rows:
                parts += _split(own.rows(step, own_rows), config.micro_batch)
            if data is not None and data_rows:
                batch = data.batch(step * data_rows, data_rows, step=step).to(source.device)
                parts += _split(_rows_of(batch, source.model), config.micro_batch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            nats, overlap, count = 0.0, 0.0, 0
            total = sum(_elements(part) for part in parts)
            for part in parts:
                loss, shared, n = divergence(source.model, draft, part)
                (loss / total).backward()
                nats += float(loss.detach())
                overlap, count = overlap + float(shared), count + n
            if not math.isfinite(nats):
                raise StageFailed(f"step {step}: the divergence is {nats}; lower learning_rate")
            torch.nn.utils.clip_grad_norm_(draft.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                stage.log(done, loss=nats / count, acceptance=overlap / count)
            if done % config.checkpoint_every == 0 or done == config.steps:
                save_state(stage.folder / STATE, draft, optimizer, done)
            progress.update(1, loss=nats / count, acceptance=overlap / count)
    draft.eval()


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


def _elements(rows: Rows) -> int:
    return rows.x.numel() if rows.mask is None else int(rows.mask.sum())


def _split(rows: Rows, size: int | None) -> list[Rows]:
    if size is None:
        return [rows]
    parts = []
    for start in range(0, len(rows.x), size):
        some = slice(start, start + size)
        fields = (rows.x, rows.cond, rows.documents, rows.mask)
        parts.append(Rows(*(None if f is None else f[some] for f in fields)))  # type: ignore[arg-type]
    return parts


def save_state(
    path: Path, draft: Autoregressive, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Weights, Adam's moments and the step, whole or not at all."""
    tensors = {}
    for name, parameter in draft.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value.contiguous()
    with whole(path) as temporary:
        model_folder.write_tensors(temporary, tensors, {"step": json.dumps(step)})


def restore(path: Path, draft: Autoregressive, optimizer: torch.optim.Optimizer) -> int:
    """Take up a checkpoint, if there is one; the number of steps done."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        for name, parameter in draft.named_parameters():
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            optimizer.state[parameter] = {
                key: file.get_tensor(f"{key}/{name}").to(
                    "cpu" if key == "step" else parameter.device
                )
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in names
            }
        return int(json.loads(file.metadata()["step"]))


@torch.no_grad()
def validate(
    config: Config, stage: Stage, source: Source, draft: Autoregressive, own: OwnSamples | None
) -> None:
    """KL and acceptance on the validation split; on own samples where there are no tokens."""
    given = stage.inputs.get("tokens", [])
    parts = []
    if given:
        tokens = token_set(source, given[0], "validation")
        mixture = mixture_of([tokens], source.elements, shuffle=False)
        for number, batch in enumerate(sequential(mixture, config.batch_size)):
            if number == config.validation_batches:
                break
            parts.append(_rows_of(batch.to(source.device), source.model))
        where = "validation"
    else:
        assert own is not None
        parts.append(own.at(torch.arange(min(len(own.x), config.batch_size))))
        where = "own samples"
    sums = np.zeros(3)
    for part in parts:
        loss, shared, n = divergence(source.model, draft, part)
        sums += [float(loss), float(shared), n]
    stage.summary["divergence"] = float(sums[0] / sums[2])
    stage.summary["acceptance"] = float(sums[1] / sums[2])
    stage.summary["measured_on"] = where


def publish(
    stage: Stage, source: Source, draft: Autoregressive, model: Artifact, config: Config
) -> None:
    """The draft as a model folder, with the model's tokenizer; what was temporary goes."""
    card = {
        name: source.card.get(name)
        for name in ("modality", "vocabulary", "grid", "classes", "tokenizer", "captions")
    }
    for name in ("tokenizer", "captions"):
        path = (source.card.get(name) or {}).get("path")
        if path is not None:
            shutil.copytree(model.folder / path, stage.folder / path, dirs_exist_ok=True)
    validation = {"split": stage.summary["measured_on"], "unit": "nats an element"}
    validation["divergence"] = stage.summary["divergence"]
    card = {
        **card,
        "step": config.steps,
        "tokens_seen": None,
        "weights": "raw",
        "validation": validation,
        "lineage": {"model": source.card["fingerprint"]},
    }
    saved = model_folder.save(draft, stage.folder, card)
    stage.summary["fingerprint"] = saved["fingerprint"]
    ours = sum(p.numel() for p in draft.parameters())
    stage.summary["parameters"] = ours
    stage.summary["share_of_model"] = ours / sum(p.numel() for p in source.model.parameters())
    (stage.folder / STATE).unlink()
    shutil.rmtree(stage.folder / OWN, ignore_errors=True)
