"""`chainrule bench`: speeds as ratios within one run."""

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
