"""`chainrule bench`: speeds as ratios within one run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.cli import ModelArgument, app
from chainrule.pipeline.cli_model import JobSetOption, job_module, settings
from chainrule.pipeline.config import RequestError, nearest

bench = typer.Typer(help="Measure speeds, as ratios within one run.", rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.command()
def decode(
    models: Annotated[
        list[str] | None, typer.Option("--model", help="gpt2-10m, llama-10m, gpt2-124m, …")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", min=1)] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Drawn after a prompt of 16.")] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Cached decoding against `transformers`, equal weights, and the bandwidth bound."""
    from chainrule.pipeline.sampling import bench as measure

    names = models or list(measure.MODELS)
    for name in names:
        if name not in measure.MODELS:
            raise RequestError(f"--model {name}: unknown{nearest(name, list(measure.MODELS))}")
    for dtype in dtypes or []:
        if dtype not in ("float32", "bfloat16"):
            raise RequestError(f"--dtype {dtype}: known: float32, bfloat16")
    most = min(measure.MODELS[name]["context"] for name in names) - measure.PROMPT
    if tokens > most:
        raise RequestError(f"--tokens {tokens}: at most {most} fit after the prompt")
    rows = measure.decode(names, batches or (1, 32), dtypes or ("float32",), tokens, rounds, device)
    typer.echo(measure.table(rows))


@bench.command()
def speculative(
    model: ModelArgument,
    draft: Annotated[
        Path | None, typer.Option(help="A draft's model folder (see the job distill).")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Also the model's own first layers.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="After the prompt.")] = None,
    gamma: Annotated[int, typer.Option(min=1, help="Elements drafted at once, at most.")] = 4,
    batches: Annotated[list[int] | None, typer.Option("--batch", min=1)] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    overrides: JobSetOption = None,
) -> None:
    """Acceptance, draft cost, the formula's speed-up and the measured one, gamma fixed and not.

    --set takes settings of `sample`: temperature, top_p, guidance.scale, …
    """
    from chainrule.pipeline.sampling import bench as measure
    from chainrule.pipeline.sampling.drafts import ModelDraft, NgramDraft, first_layers
    from chainrule.pipeline.sampling.speculative import Gamma

    job: Any = job_module("sample")
    config = settings("sample", {"prompts": prompt, "length": tokens}, overrides)
    source = job.open_source(model, config.device, config.dtype)
    request = job.settle(config, source)
    drafts: dict[str, Any] = {"n-gram": NgramDraft()}
    if layers is not None:
        try:
            drafts[f"first {layers}"] = ModelDraft(first_layers(source.model, layers))
        except ValueError as error:
            raise RequestError(f"--layers: {error}") from None
    if draft is not None:
        drafts["draft"] = job.open_draft(config, source, Artifact.bare(draft))
    gammas = [Gamma(most=gamma, adapt=False), Gamma(most=gamma)]
    rows = measure.speculative(
        source.model,
        drafts,
        lambda batch: request.plan(range(batch)),
        request.rules,
        batches or (1, 8),
        gammas,
        rounds,
    )
    typer.echo(measure.table(rows))


FamilyOption = Annotated[list[str] | None, typer.Option("--family", help="gpt2, llama, …")]


def _known(option: str, given: list[str] | None, known: Iterable[str]) -> list[str]:
    """What was given, all of it known; everything where nothing was."""
    known = list(known)
    for name in given or []:
        if name not in known:
            raise RequestError(f"{option} {name}: unknown{nearest(name, known)}")
    return given or known


@bench.command()
def step(
    families: FamilyOption = None,
    shapes: Annotated[list[str] | None, typer.Option("--shape", help="4x128, 6x384")] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="float32, bfloat16")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    device: Annotated[str, typer.Option()] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Both compiled.")] = False,
) -> None:
    """A decoder's training step against the same shape in `transformers`."""
    from chainrule.pipeline.models import bench as measure
    from chainrule.pipeline.sampling.bench import table

    try:
        import transformers  # noqa: F401
    except ImportError:
        raise RequestError("bench step: transformers is not installed; pip install it") from None
    rows = measure.step(
        _known("--family", families, measure.FAMILIES),
        _known("--shape", shapes or ["4x128"], measure.SHAPES),
        _known("--dtype", dtypes, ("float32", "bfloat16")),
        rounds,
        device,
        compiled,
    )
    typer.echo(table(rows))


@bench.command()
def cursor(
    families: FamilyOption = None,
    sides: Annotated[
        list[int] | None, typer.Option("--side", min=4, help="Events of side x side elements.")
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Of the whole network.")] = 5,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """An element through the cursor against the whole network for it, in every family."""
    from chainrule.pipeline.models import bench as measure
    from chainrule.pipeline.sampling.bench import table

    names = _known("--family", families, measure.CURSORS)
    for side in sides or []:
        if side % 4:
            raise RequestError(f"--side {side}: PixelCNN++ halves it twice, give a multiple of 4")
    typer.echo(table(measure.cursor(names, sides or (8, 16, 32), evaluations, batch, device)))
