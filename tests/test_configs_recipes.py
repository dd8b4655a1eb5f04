"""The cluster recipes: each is parsed, planned at full size, and run at debug size."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chainrule.pipeline import launch
from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.plan import plan
from chainrule.pipeline.slurm import Profile
from chainrule.pipeline.submit import submit

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = {
    "gpt2-124m": ("gpt2-debug", 124.4),
    "llama-1b": ("llama-debug", 1236),
    "llama-7b": ("llama-debug", 6738),
    "mistral-7b": ("mistral-debug", 7242),
    "falcon-7b": ("falcon-debug", 6922),
}
PICTURES = "vqgan-imagenet256"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"), [*((n, m) for n, (_, m) in TEXT.items()), (PICTURES, 342.9)]
)
def test_a_recipe_is_what_it_is_called_and_fits(name: str, millions: float) -> None:
    plans = {found["stage"]: found for found in plan(load_pipeline(CONFIGS / f"{name}.yaml"))}
    decoder = plans["decoder"]
    assert decoder["parameters"] / 1e6 == pytest.approx(millions, rel=1e-3)
    assert decoder["assumed"] == []
    assert decoder["chosen"]["fits"]
    assert decoder["hours"] < 24 * 21


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One runs folder for all: MLflow's store in it is made once."""
    return tmp_path_factory.mktemp("runs")


ONE_PROCESS = "{processes: 1}"


def _debug(name: str, model: str, *more: str) -> list[str]:
    """Overrides that make a recipe a matter of seconds on one process."""
    overrides = [
        f"decoder.model={model}",
        "decoder.steps=3",
        "decoder.batch_size=4",
        "decoder.accumulate=2",
        "decoder.precision=fp32",
        "decoder.checkpoint_every=2",
        "decoder.validation_batches=1",
        "decoder.engine={strategy: single}",
        "samples.number=2",
        "samples.dtype=float32",
        *more,
    ]
    stages = load_pipeline(CONFIGS / f"{name}.yaml").stages
    return overrides + [f"{stage}.resources={ONE_PROCESS}" for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_a_text_recipe_runs_at_debug_size(name: str, tmp_path: Path, runs: Path) -> None:
    lines = [
        f'{{"text": "The meaning of {i} is {i * i}, and once upon a time it was {i + 1}."}}'
        for i in range(120)
    ]
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.jsonl").write_text("\n".join(lines))
    overrides = _debug(
        name,
        f"{{preset: {TEXT[name][0]}, layers: 1, context: 32}}",
        f"documents.source.path={tmp_path / 'documents'}",
        "documents.validation=0.2",
        "documents.workers=0",
        "words.tokenizer.vocabulary_size=300",
        "samples.length=8",
    )
    pipeline = load_pipeline(CONFIGS / f"{name}.yaml", overrides, runs)
    assert launch.run_pipeline(pipeline, launch.Selection()) == launch.DONE
    figures = Artifact.open(pipeline.folder("evaluation")).metrics
    assert 0 < figures["bits_per_byte"] < 12
    assert all(d.line is None for d in submit(pipeline, Profile(), dry_run=True))


@pytest.mark.slow
def test_the_picture_recipe_runs_at_debug_size(tmp_path: Path, runs: Path) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 4)):
        for i in range(number):
            folder = tmp_path / "imagenet" / split / ("cat", "dog")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    overrides = _debug(
        PICTURES,
        "{preset: vqgan-transformer-debug, layers: 1, vocabulary_size: 16, event_shape: [2, 2]}",
        "decoder.batch_size=4",
        f"photographs.source.path={tmp_path / 'imagenet'}",
        "photographs.source.size=32",
        "photographs.workers=0",
        "codes.tokenizer={kind: vqgan, downsampling: 16, channels: 8, codebook_size: 16, dim: 8}",
        "codes.steps=4",
        "codes.batch_size=2",
        "codes.precision=fp32",
        "codes.adversarial={start: 2, channels: 4, layers: 1}",
        "tokens.accept_collapsed=true",
        "samples.classes=[cat, dog]",
    )
    pipeline = load_pipeline(CONFIGS / f"{PICTURES}.yaml", overrides, runs)
    assert launch.run_pipeline(pipeline, launch.Selection()) == launch.DONE
    assert Artifact.open(pipeline.folder("evaluation")).metrics["nats_per_token"] > 0
