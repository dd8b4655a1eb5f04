"""`chainrule bench …`: ratios measured in one run, printed as tables that anyone can make again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from chainrule.pipeline.artifact import Artifact, require_same
from chainrule.pipeline.cli import ModelArgument, app, model_folders
from chainrule.pipeline.config import RequestError, nearest
from chainrule.pipeline.devices import chosen_device

bench = typer.Typer(help="Measure speed: ratios in one run.", rich_markup_mode=None)
app.add_typer(bench, name="bench")

DtypesOption = Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Times that each contestant is measured.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda", callback=chosen_device)]


def _chosen(option: str, given: list[str] | None, known: Any) -> list[str]:
    for name in given or []:
        if name not in known:
            raise RequestError(f"--{option} {name}: not known{nearest(name, list(known))}")
    return list(given or known)


def _print(rows: list[dict[str, Any]]) -> None:
    from chainrule.pipeline.sampling.bench import table

    typer.echo(table(rows))


@bench.command()
def step(
    family: Annotated[list[str] | None, typer.Option(help="Which decoders.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="4x128, 6x384")] = None,
    dtype: DtypesOption = None,
    rounds: RoundsOption = 15,
    device: DeviceOption = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile in both.")] = False,
) -> None:
    """A training step of each decoder against the same shape in `transformers`."""
    from chainrule.pipeline.models import bench as models

    families = _chosen("family", family, models.FAMILIES)
    shapes = _chosen("shape", shape or ["4x128"], models.SHAPES)
    dtypes = _chosen("dtype", dtype, ("float32", "bfloat16"))
    _print(models.step(families, shapes, dtypes, rounds, device, compiled))


@bench.command()
def train(
    shape: Annotated[list[str] | None, typer.Option(help="4x128, 6x384, 124m")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, bf16")] = None,
    rounds: RoundsOption = 15,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile in all.")] = False,
) -> None:
    """A pretraining step against a bare PyTorch loop and against transformers + accelerate."""
    from chainrule.pipeline.training import bench as training

    shapes = _chosen("shape", shape or ["4x128"], training.SHAPES)
    precisions = _chosen("precision", precision, ("fp32", "bf16"))
    _print(training.train(shapes, precisions, rounds, compiled))


@bench.command()
def loader(
    tokens: Annotated[Path, typer.Argument(help="Folder of token shards.")],
    shape: Annotated[list[str] | None, typer.Option(help="4x128, 6x384, 124m")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, bf16")] = None,
    rounds: RoundsOption = 9,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each kind in a round.")] = 30,
    workers: Annotated[int, typer.Option(min=0, help="Threads of the loader.")] = 1,
) -> None:
    """A pretraining step on batches read from shards against one on a ready batch."""
    from chainrule.pipeline.training import bench as training

    shapes = _chosen("shape", shape or ["4x128"], training.SHAPES)
    precisions = _chosen("precision", precision or ["fp32"], ("fp32", "bf16"))
    folder = Artifact.open(tokens).folder
    _print(training.loader(folder, shapes, precisions, rounds, steps, workers))


@bench.command()
def cursor(
    family: Annotated[
        list[str] | None, typer.Option(help="Which families; wavenet-4000, pixelcnnpp-32, …-paper.")
    ] = None,
    side: Annotated[list[int] | None, typer.Option(min=1, help="Sides of the pictures.")] = None,
    evaluations: Annotated[int, typer.Option(min=1)] = 5,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    device: DeviceOption = "cpu",
) -> None:
    """An element through the cursor against evaluating the whole network for it.

    `event`: the naive loop evaluates the whole network over the whole event for each element
    (over all 4,000 samples, 4,000 times); `known`: over what is known so far alone.
    wavenet-4000, pixelcnnpp-32 and pixelcnnpp-32-paper have sizes of their own: no `--side`.
    """
    from chainrule.pipeline.models import bench as models
    from chainrule.pipeline.models.registry import resolve

    families = _chosen("family", family, (*models.CURSORS, *models.CASES))
    sides = side or [8, 16, 32]
    for name in models.CURSORS.keys() & set(families):
        for pixels in sides:
            try:
                resolve(models.CURSORS[name](pixels))
            except ValueError as error:
                raise RequestError(f"--side {pixels}: {error}") from None
    _print(models.cursor(families, sides, evaluations, batch, device))


@bench.command()
def decode(
    model: Annotated[list[str] | None, typer.Option(help="Which models.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, int8 (weights alone).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 32,
    rounds: RoundsOption = 9,
    device: DeviceOption = "cpu",
) -> None:
    """Cached greedy generation against `transformers.generate`, and the share of the bound."""
    from chainrule.pipeline.sampling import bench as sampling

    names = _chosen("model", model, sampling.MODELS)
    dtypes = _chosen("dtype", dtype or ["float32"], ("float32", "bfloat16", "int8"))
    _print(sampling.decode(names, batch or (1, 32), dtypes, tokens, rounds, device))


@bench.command()
def images(
    model: Annotated[list[str] | None, typer.Option(help="Which models.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, int8")] = None,
    guidance: Annotated[float, typer.Option(min=0.0, help="Scale of the guidance.")] = 3.0,
    rounds: RoundsOption = 5,
    device: DeviceOption = "cpu",
) -> None:
    """Pictures a second from decoders of 16 x 16 codes, with guidance and without."""
    from chainrule.pipeline.sampling import bench as sampling

    names = _chosen("model", model, sampling.IMAGE_MODELS)
    dtypes = _chosen("dtype", dtype or ["float32"], ("float32", "bfloat16", "int8"))
    _print(sampling.images(names, batch or (1, 16), dtypes, guidance, rounds, device))


@bench.command()
def speculative(
    model: ModelArgument,
    draft: Annotated[
        Path | None,
        typer.Option(
            callback=model_folders, help="A distilled draft, beside n-grams of the prompt."
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Also the model's own first layers as a draft.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For a text model.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="After the prompt; default: as many as fit.")
    ] = None,
    gamma: Annotated[int, typer.Option(min=1, help="Elements a draft, at most.")] = 4,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch sizes.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    rounds: RoundsOption = 3,
) -> None:
    """Acceptance, draft cost, the formula's speed-up and the measured one."""
    from chainrule.pipeline.catalogue import job_module
    from chainrule.pipeline.sampling import bench as sampling
    from chainrule.pipeline.sampling.drafts import ModelDraft, NgramDraft, first_layers
    from chainrule.pipeline.sampling.request import settle
    from chainrule.pipeline.sampling.speculative import Gamma

    job: Any = job_module("sample")
    source = job.open_source(model)
    request = settle(
        job.Config(
            prompts=None if prompt is None else [prompt],
            length=tokens,
            temperature=temperature,
            end_at=[],
        ),
        source,
    )
    drafts: dict[str, Any] = {"n-gram": NgramDraft()}
    if layers is not None:
        try:
            drafts[f"first {layers}"] = ModelDraft(first_layers(source.model, layers))
        except ValueError as error:
            raise RequestError(f"--layers: {error}") from None
    if draft is not None:
        card = Artifact.bare(draft).card
        require_same(
            "tokenizers of model and draft",
            source.card["tokenizer"]["fingerprint"],
            str(model),
            card["tokenizer"]["fingerprint"],
            str(draft),
        )
        drafts["model"] = ModelDraft(job.open_source(draft).model)
    _print(
        sampling.speculative(
            source.model,
            drafts,
            lambda size: request.plan(range(size)),
            request.rules,
            batch or (1, 8),
            (Gamma(most=gamma, adapt=False), Gamma(most=gamma)),
            rounds,
        )
    )


@bench.command()
def pretokenize(
    data: Annotated[Path, typer.Argument(help="Folder of raw shards.")],
    tokenizer: Annotated[Path, typer.Argument(help="Folder of a tokenizer.")],
    samples: Annotated[int, typer.Option(min=1, help="At least so many, by whole shards.")] = 2000,
    workers: Annotated[
        int, typer.Option(min=1, help="Who decode raw samples: a thread, or several processes.")
    ] = 1,
    rounds: RoundsOption = 3,
    device: DeviceOption = "cpu",
) -> None:
    """The pretokenize job against its bare encoder on ready batches."""
    from chainrule.pipeline.catalogue import job_module

    job: Any = job_module("pretokenize")
    config = job.Config(device=device, workers=workers)
    _print(job.bench(data, tokenizer, config, samples, rounds))


@bench.command()
def width(
    widths: Annotated[
        list[int] | None, typer.Option("--width", min=1, help="The first is the base.")
    ] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates.")] = None,
    steps: Annotated[int, typer.Option(min=10)] = 150,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    text: Annotated[Path | None, typer.Option(help="A file; else Python's own sources.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("width.png"),
) -> None:
    """Where the best learning rate lies at each width, with µP (`base_width`) and without."""
    from chainrule.pipeline.data.text import PythonStdlib
    from chainrule.pipeline.training import width_transfer as transfer

    chosen = widths or [64, 128, 256]
    wrong = [w for w in chosen if w % transfer.HEAD_WIDTH]
    if wrong:
        raise RequestError(f"--width {wrong[0]}: a multiple of {transfer.HEAD_WIDTH} is needed")
    if text is not None and not text.is_file():
        raise RequestError(f"{text}: no such file")
    if text is None:
        files = PythonStdlib(kind="python-stdlib").files()
        content = b"".join(path.read_bytes() for path in files[:200])
    else:
        content = text.read_bytes()
    if len(content) <= transfer.CONTEXT:
        raise RequestError(f"{text}: {len(content)} bytes, more than {transfer.CONTEXT} are needed")
    rates = rate or [2.0**k for k in range(-11, -3)]

    def tell(run: transfer.Run) -> None:
        typer.echo(f"{run.way:8} width {run.width:4} rate {run.learning_rate:.5f}: {run.loss:.4f}")

    runs = transfer.sweep(content, chosen, rates, steps, batch, tell)
    for way, found in transfer.best_rates(runs).items():
        best = ", ".join(f"{w}: {r:.5f}" for w, r in sorted(found.items()))
        typer.echo(f"{way}: best rate by width {best}")
    transfer.picture(runs, out)
    typer.echo(out)
