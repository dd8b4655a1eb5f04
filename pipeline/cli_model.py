"""Commands on a bare model folder: sample, evaluate, compress, decompress, export, verify.

They call the same jobs as stages do, with a stage made for the occasion. Jobs are looked up
by name, as a pipeline file names them.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
import typer
import yaml

from chainrule.pipeline.artifact import Artifact, new_folder
from chainrule.pipeline.bare_stage import bare_stage
from chainrule.pipeline.catalogue import job_module
from chainrule.pipeline.cli import ModelArgument, app, model_folders
from chainrule.pipeline.config import RequestError, explain
from chainrule.pipeline.stage import DONE, FAILED

JobSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=V", help="A setting of the job: KEY.SUBKEY=VALUE."),
]


def settings(job: str, values: dict[str, Any], overrides: list[str] | None) -> Any:
    """The job's Config from options that were given and `--set`; RequestError names a fault."""
    merged: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
    for override in overrides or []:
        name, equals, raw = override.partition("=")
        if not equals:
            raise RequestError(f"--set {override}: write it as key.subkey=value")
        target = merged
        *path, last = name.strip().split(".")
        for key in path:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise RequestError(f"--set {override}: '{key}' is {target!r}, without keys below")
        if target.get(last) is not None:  # a later one would silently take its place
            raise RequestError(f"--set {override}: {name.strip()} is given already; give it once")
        try:
            target[last] = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise RequestError(
                f"--set {override}: '{raw}' is no YAML value; put text of such characters in "
                f'quotes: --set \'{name.strip()}="{raw}"\', in a list ["{raw}"]'
            ) from None
    config = job_module(job).Config
    try:
        return config.model_validate(merged)
    except pydantic.ValidationError as error:
        raise RequestError("; ".join(m for _, m in explain(error, config, merged))) from None


@app.command()
def sample(
    model: ModelArgument,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            min=1,
            help="How many samples (default: one a prompt where text streams, else 8).",
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="Asked for in turn, by name or number (default: every class in turn).",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="Continued in turn, or, where the model takes captions, drawn; \\n is a new "
            "line, \\t a tab, \\\\ a \\.",
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture of which a part is kept, the rest drawn.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="What of it: top:0.5 (the default), left:0.5, outside:x0,y0,x1,y1."),
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="A sound file whose beginning is kept, the rest drawn.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How much of --audio; half of what the model makes.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Elements after the prompt (default: as many as fit; a WaveNet makes any number)."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the mode (default: 1).")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Only the k likeliest elements (default: all).")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only the likeliest that make up p (default: all).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all samples (default: 0).")] = None,
    draft: Annotated[
        Path | None,
        typer.Option(
            callback=model_folders,
            help="A smaller model of the same tokens (`distill`) that runs ahead.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the store, pictures and texts (default: text to the terminal, else "
            "./samples).",
        ),
    ] = None,
    overrides: JobSetOption = None,
) -> None:
    """Draw from a model: text streams to the terminal, pictures and sound go to a folder.

    The job's other settings go by --set: guidance, min_p, repetition_penalty, stop, gamma, dtype,
    batch_size.

    Killed, it leaves OUT.partial; the same command goes on from there.
    """
    job: Any = job_module("sample")
    if keep is not None and image is None:
        raise RequestError("--keep: says what is kept of --image FILE; give that too")
    picture = None if image is None else {"file": image, **({"keep": keep} if keep else {})}
    if seconds is not None and audio is None:
        raise RequestError("--seconds: says what is kept of --audio FILE; give that too")
    recording = None if audio is None else {"file": audio, "seconds": seconds}
    prompts = [unescaped(p) for p in prompt or []]
    values: dict[str, Any] = {
        "number": n,
        "classes": classes or None,
        "prompts": prompts or None,
        "picture": picture,
        "recording": recording,
        "length": length,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    config = settings("sample", values, overrides)
    modality = job.card_of(model).get("modality")
    if out is None and modality == "text":
        _stream(job, model, draft, config)
        return
    folder = out if out is not None else Path("samples")
    with bare_stage("sample", config, {"model": model, "draft": draft}, folder) as stage:
        job.main(config, stage)
    typer.echo(folder)


def unescaped(prompt: str) -> str:
    r"""A prompt as it was typed: \n, \t and \\ mean a new line, a tab and a backslash."""
    meant = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda found: meant[found[1]], prompt)


def _stream(job: Any, model: Path, draft: Path | None, config: Any) -> None:
    """Text samples one after another, each piece as it comes: as many as were asked for, else
    one a prompt."""
    from chainrule.pipeline.sampling.text import stream

    source = job.open_source(model, config.device, config.dtype)
    job.pictured(config, source)  # refuses one: they go with models of pictures
    request = job.settle(config, source)
    number = config.number if "number" in config.model_fields_set else len(request.prompts)
    given = None if draft is None else Artifact.bare(draft)
    drafting = job.open_draft(config, source, given)
    for i in range(number):
        if i:
            typer.echo("\n" + "─" * 40)
        prompt = request.prompts[i % len(request.prompts)]
        if prompt:
            sys.stdout.write(source.tokenizer.decode([np.asarray(prompt)])[0])
        for piece in stream(
            source.model,
            source.tokenizer,
            prompt,
            request.length,
            request.rules,
            config.seed,
            config.stop,
            index=i,
            draft=drafting,
            gamma=config.gamma,
        ):
            sys.stdout.write(piece)
            sys.stdout.flush()
    typer.echo()


@app.command()
def evaluate(
    model: ModelArgument,
    tokens: Annotated[
        Path | None, typer.Option(help="A pretokenize artifact, of the model's tokenizer.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="An ingest artifact.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for evaluation.json and pictures.")
    ] = Path("evaluation"),
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="A linear probe of each layer as well (images with labels: needs --data).",
        ),
    ] = False,
    overrides: JobSetOption = None,
) -> None:
    """Likelihoods of a model on shards: nats, bits a dimension or byte, beside the baselines.

    Killed, it leaves OUT.partial; the same command goes on from there.
    """
    if tokens is None and data is None:
        raise RequestError("evaluate: give --tokens (a pretokenize artifact) or --data (ingest's)")
    if probe and data is None:
        raise RequestError("evaluate: --probe needs labelled images: give --data (ingest's)")
    config = settings("evaluate", {"probe": {} if probe else None}, overrides)
    folder = job_module("evaluate").evaluate_folder(model, out, config, tokens, data)
    typer.echo((folder / "evaluation.json").read_text(), nl=False)


@app.command()
def compress(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(help="Any files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The container to write (.cr).")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Decode before calling it done.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the container.")] = False,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Let the model learn while it codes (slow).")
    ] = False,
    overrides: JobSetOption = None,
) -> None:
    """Compress files under a model's likelihood; they come back bit for bit."""
    job = job_module("compress")
    config = settings("compress", {"adapt": {} if adapt else None}, overrides).for_files()
    reports = job.compress_files(
        model, files, out, verify, config.layout, config.device, force, dtype=config.dtype
    )
    for line in job.printed(reports, out.stat().st_size):
        typer.echo(line)


@app.command()
def decompress(
    container: Annotated[Path, typer.Argument(help="A container that compress wrote (.cr).")],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            callback=model_folders,
            help="The model it was made with (default: where it lay, or nearby).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the files (default: the container's own)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda, … (default: the kind of device it was coded on)."),
    ] = None,
) -> None:
    """Give back the files of a container, or refuse before anything is written."""
    job = job_module_by_verb("decompress")
    for path in job.decompress_file(container, model, out, device, force):
        typer.echo(path)


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The format: transformers.")] = "transformers",
) -> None:
    """Write a decoder as a `transformers` folder (GPT-2, LLaMA, Mistral, Falcon, ImageGPT)."""
    if to != "transformers":
        raise RequestError(f"--to {to}: known: transformers")
    for line in job_module_by_verb("export").export(model, new_folder(out)):
        typer.echo(line, err=True)
    typer.echo(out)


@app.command()
def verify(
    run: Annotated[
        Path, typer.Argument(help="A pretraining with a ledger: its folder, or PIPELINE/STAGE.")
    ],
) -> None:
    """Read the ledger of a pretraining run: steps covered, samples skipped and repeated; exit 1
    unless every step that was trained is there once and the samples are 0 and 0."""
    raise typer.Exit(DONE if job_module_by_verb("verify").main(run, typer.echo) else FAILED)


@app.command()
def scoreboard(
    models: Annotated[
        list[Path], typer.Argument(callback=model_folders, help="Models, as elsewhere.")
    ],
    data: Annotated[Path, typer.Option(help="An ingest artifact: the files, its validation.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables.")] = Path(
        "scoreboard"
    ),
    overrides: JobSetOption = None,
) -> None:
    """Models and codecs on one axis over one set of files."""
    config = settings("scoreboard", {}, overrides)
    for line in job_module("scoreboard").scoreboard(models, data, out, config):
        typer.echo(line)


def job_module_by_verb(verb: str) -> Any:
    """A file of `jobs/` that is no stage."""
    import importlib

    return importlib.import_module(f"chainrule.jobs.{verb}")


@app.command()
def gallery(
    run: Annotated[
        Path, typer.Argument(help="A run folder, one sample artifact, or a folder of `sample`.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page to write (default: gallery.html in it)."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", callback=model_folders, help="The model of a folder of `sample`."
        ),
    ] = None,
) -> None:
    """Write a page to look through samples: surprise, nearest training data, tokens."""
    typer.echo(job_module_by_verb("gallery").write_gallery(run, out, model))
