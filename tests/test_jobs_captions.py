"""Pictures conditioned on texts, from folders of pictures with captions to samples of a prompt."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from chainrule.jobs import distill, ingest, pretokenize, sample, train_tokenizer
from chainrule.jobs.evaluate import Config as EvaluateConfig, evaluate_folder
from chainrule.jobs.gallery import write_gallery
from chainrule.jobs.sample import (
    Config as SampleConfig,
    open_draft,
    open_source,
    require_tokenizers,
    settle,
)
from chainrule.pipeline.artifact import Artifact, LineageError
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.batches import joint_captions, mixture_of
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.plan import plan
from chainrule.pipeline.sampling.sampler import SamplingError, draw
from chainrule.pipeline.sampling.store import Store
from chainrule.pipeline.stage import Stage, StageFailed
from chainrule.pipeline.training.assembly import model_config
from chainrule.pipeline.training.objective import Objective
from chainrule.pipeline.training.throughput import flops_per_element
from chainrule.tokenizers import interface

Run = Callable[..., tuple[int, str]]
WORDS = ["dark", "grey", "light"]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path, number: int = 30) -> Path:
    """Plain squares whose captions say how dark they are; file names say nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i:03d}.png").write_bytes(png((20, 120, 230)[i % 3]))
        word = WORDS[i % 3]
        (folder / f"{i:03d}.txt").write_text(f"a {word} square\n\n  {word} all over \n")
    return folder


# --- shards and batches -----------------------------------------------------------------------


def stage_of(job: str, folder: Path, **inputs: Artifact) -> Stage:
    given = {role: [artifact] for role, artifact in inputs.items()}
    return Stage(name=job, pipeline="t", job=job, folder=folder, fingerprint=job, inputs=given)


def made(job: Any, name: str, folder: Path, settings: dict[str, Any], **inputs: Artifact) -> Stage:
    stage = stage_of(name, folder, **inputs)
    folder.mkdir(parents=True, exist_ok=True)
    job.main(job.Config.model_validate(settings), stage)
    return stage


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("captioned")
    source = {"kind": "image-folder", "path": str(pictures(root / "squares")), "captions": "beside"}
    made(ingest, "ingest", root / "raw", {"source": {**source, "channels": 1}})
    raw = Artifact.bare(root / "raw")
    for name, tokenizer in (
        ("levels", {"kind": "pixels", "levels": 8}),
        ("words", {"kind": "characters"}),
    ):
        made(train_tokenizer, name, root / name, {"tokenizer": tokenizer}, data=raw)
    found = {name: Artifact.bare(root / name) for name in ("raw", "levels", "words")}
    inputs = {"data": raw, "tokenizer": found["levels"], "captions": found["words"]}
    made(pretokenize, "tokens", root / "tokens", {}, **inputs)
    return {**found, "tokens": Artifact.bare(root / "tokens")}


def test_token_shards_hold_the_ids_of_captions(stages: dict[str, Artifact]) -> None:
    words = interface.load(stages["words"].folder)
    tokens = TokenSet.open(stages["tokens"].folder)
    longest = len("a light square")
    assert tokens.captions == {
        "fingerprint": words.fingerprint,
        "kind": "characters",
        "vocabulary_size": words.vocabulary["size"],
        "longest": longest,
        "cut": 0,
    }
    for i in range(len(tokens)):
        _, found = tokens[i]
        assert words.decode([np.array(ids) for ids in found["caption_ids"]]) == found["captions"]


def test_captions_are_cut_and_counted(stages: dict[str, Artifact], tmp_path: Path) -> None:
    inputs = {"data": stages["raw"], "tokenizer": stages["levels"], "captions": stages["words"]}
    stage = made(pretokenize, "tokens", tmp_path / "cut", {"caption_tokens": 13}, **inputs)
    assert stage.summary["longest_caption"] == 13
    assert stage.summary["captions_cut"] == 20  # both captions of the ten light squares


def test_tokenizer_and_captions_come_together(stages: dict[str, Artifact], tmp_path: Path) -> None:
    inputs = {"data": stages["raw"], "tokenizer": stages["levels"]}
    with pytest.raises(StageFailed, match="holds captions: give the stage a tokenizer of text"):
        made(pretokenize, "tokens", tmp_path / "a", {}, **inputs)
    with pytest.raises(StageFailed, match="a tokenizer of image; captions are text"):
        made(pretokenize, "tokens", tmp_path / "b", {}, **inputs, captions=stages["levels"])
    made(ingest, "ingest", tmp_path / "raw", {"source": {"kind": "sklearn-digits"}})
    plain = {"data": Artifact.bare(tmp_path / "raw"), "tokenizer": stages["levels"]}
    with pytest.raises(StageFailed, match="holds no captions"):
        made(pretokenize, "tokens", tmp_path / "c", {}, **plain, captions=stages["words"])


def test_each_epoch_brings_the_next_caption(stages: dict[str, Artifact]) -> None:
    tokens = TokenSet.open(stages["tokens"].folder)
    drawn = mixture_of([tokens], shuffle=False)
    n = len(tokens)
    epochs = [drawn.batch(epoch * n, n) for epoch in range(3)]
    for batch in epochs:
        assert batch.cond is None
        assert batch.captions is not None
        assert batch.captions.shape == (n, tokens.captions["longest"])  # type: ignore[index]
        for row, [piece] in zip(batch.captions.tolist(), batch.ids, strict=True):
            ids = tokens[piece.sample][1]["caption_ids"]
            assert [i for i in row if i >= 0] == ids[(piece.epoch + piece.sample) % 2]
            assert row == sorted(row, key=lambda i: i < 0)  # -1 only past the end
    first, second, third = (batch.captions for batch in epochs)
    assert not torch.equal(first, second)  # type: ignore[arg-type]
    assert torch.equal(first, third)  # type: ignore[arg-type]
    parts = drawn.batch(0, 20).split(4)
    joined = torch.cat([part.captions for part in parts])  # type: ignore[misc]
    assert torch.equal(joined, drawn.batch(0, 20).captions)  # type: ignore[arg-type]


def test_captions_of_two_tokenizers_do_not_mix(stages: dict[str, Artifact]) -> None:
    one, other = (TokenSet.open(stages["tokens"].folder) for _ in range(2))
    other.captions = {**(other.captions or {}), "fingerprint": "f" * 64}
    with pytest.raises(RequestError, match="tokens of several tokenizers"):
        joint_captions([one, other])


def test_templates_make_captions_of_classes(tmp_path: Path) -> None:
    settings = {
        "source": {"kind": "sklearn-digits"},
        "caption_templates": ["{class}", "a {class}, again {class}"],
    }
    made(ingest, "ingest", tmp_path / "raw", settings)
    shards = Shards.open(tmp_path / "raw")
    first = shards.read("train", 0)
    assert shards.captioned
    assert shards.classes is not None
    assert first is not None
    name = first.meta["class"]
    assert first.meta["captions"] == [name, f"a {name}, again {name}"]
    with pytest.raises(ValueError, match="'digit' has no {class}"):
        ingest.Config.model_validate({**settings, "caption_templates": ["digit"]})
    source = {"kind": "image-folder", "path": str(pictures(tmp_path / "squares"))}
    for given, words in (
        (source, "the source has none"),
        ({**source, "captions": "beside"}, "captions of its own"),
        ({"kind": "sklearn-table", "name": "iris"}, "for pictures, the source holds table"),
    ):
        with pytest.raises(StageFailed, match=words):
            made(ingest, "ingest", tmp_path / "other", {**settings, "source": given})


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """Tokens of digits that have classes and captions made of them."""
    root = tmp_path_factory.mktemp("both")
    source = {"kind": "sklearn-digits"}
    made(ingest, "ingest", root / "raw", {"source": source, "caption_templates": ["a {class}"]})
    raw = Artifact.bare(root / "raw")
    for name, tokenizer in (
        ("levels", {"kind": "pixels", "levels": 8}),
        ("words", {"kind": "bytes"}),
    ):
        made(train_tokenizer, name, root / name, {"tokenizer": tokenizer}, data=raw)
    inputs = {
        "tokenizer": Artifact.bare(root / "levels"),
        "captions": Artifact.bare(root / "words"),
    }
    made(pretokenize, "tokens", root / "tokens", {}, data=raw, **inputs)
    return TokenSet.open(root / "tokens")


SMALL = {"layers": 1, "width": 16, "heads": 2}


@pytest.mark.parametrize(
    ("spec", "classes", "captions"),
    [
        ({"preset": "imagegpt-debug", **SMALL}, None, 3),
        ({"preset": "vqgan-transformer-debug", **SMALL}, None, 3),
        ({"preset": "imagegpt-debug", **SMALL, "captions": {"dropout": 0.3, "length": 5}}, None, 5),
        ({"preset": "imagegpt-debug", **SMALL, "captions": None}, 10, None),
        ({"preset": "imagegpt-debug", **SMALL, "classes": 10}, 10, None),
        ({"preset": "imagegpt-debug", **SMALL, "captions": None, "classes": None}, None, None),
        ("gated-pixelcnn-debug", 10, None),
        ("made-debug", 10, None),
        ("pixelcnn-debug", None, None),
    ],
)
def test_a_model_is_given_what_it_takes(
    both: TokenSet, spec: Any, classes: int | None, captions: int | None
) -> None:
    config: Any = model_config(spec, [both])
    assert getattr(config, "classes", None) == classes
    found = getattr(config, "captions", None)
    assert (found and found.length) == captions
    model = build(config, seed=0).eval()
    batch = mixture_of([both]).batch(0, 4)
    _, nats = Objective(model, documents=True)(model, batch)
    given = {None: batch.cond if classes else None}.get(captions, batch.captions)
    x = batch.x.reshape(4, *model.event_shape)
    with torch.no_grad():
        assert nats.item() == pytest.approx(-model.log_prob(x, given).sum().item(), rel=1e-5)


def texts(root: Path) -> TokenSet:
    """Tokens of one text, under a tokenizer of its own."""
    (root / "words.txt").write_text("dark grey light " * 20)
    source = {"kind": "text", "path": str(root / "words.txt")}
    made(ingest, "ingest", root / "raw", {"source": source, "validation": 0})
    raw = Artifact.bare(root / "raw")
    made(train_tokenizer, "bytes", root / "bytes", {"tokenizer": {"kind": "bytes"}}, data=raw)
    inputs = {"data": raw, "tokenizer": Artifact.bare(root / "bytes")}
    made(pretokenize, "tokens", root / "tokens", {}, **inputs)
    return TokenSet.open(root / "tokens")


def test_rows_of_several_samples_have_no_caption(both: TokenSet, tmp_path: Path) -> None:
    sets = [both, texts(tmp_path)]
    spec = {"preset": "gpt2-debug", **SMALL, "context": 64}
    config: Any = model_config(spec, sets)
    assert config.captions is None
    with pytest.raises(RequestError, match="a row of tokens holds several samples"):
        model_config({**spec, "captions": {"dropout": 0.1}}, sets)
    packed = mixture_of(sets, context=128).batch(0, 8).captions
    assert packed is not None
    assert bool((packed == -1).all())


def test_captions_and_classes_are_not_both_asked_for(both: TokenSet) -> None:
    asked = {"preset": "imagegpt-debug", **SMALL, "captions": {"dropout": 0.1}, "classes": 10}
    with pytest.raises(RequestError, match="captions and classes: one condition"):
        model_config(asked, [both])


def test_captions_that_the_tokens_lack_are_refused(
    both: TokenSet, stages: dict[str, Artifact], tmp_path: Path
) -> None:
    for changes, words in (
        ({"length": 2}, "captions.length 2: the captions have 3"),
        ({"vocabulary_size": 5}, "captions.vocabulary_size 5: the captions have 258"),
    ):
        with pytest.raises(RequestError, match=words):
            model_config({"preset": "imagegpt-debug", "captions": changes}, [both])
    plain = {"data": stages["raw"], "tokenizer": stages["levels"], "captions": stages["words"]}
    made(pretokenize, "tokens", tmp_path / "tokens", {}, **plain)
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    (tmp_path / "tokens" / "index.json").write_text(json.dumps({**index, "captions": None}))
    without = TokenSet.open(tmp_path / "tokens")
    with pytest.raises(RequestError, match="the tokens have no captions"):
        model_config({"preset": "imagegpt-debug", "captions": {"dropout": 0.1}}, [without])


# --- the whole way --------------------------------------------------------------------------


def pipeline(root: Path) -> dict[str, Any]:
    source = {"kind": "image-folder", "path": str(pictures(root / "squares", 300)), "channels": 1}
    decoder = {
        "preset": "imagegpt-debug",
        "layers": 2,
        "width": 32,
        "heads": 2,
        "captions": {"dropout": 0.2},
    }
    return {
        "name": "squares",
        "stages": {
            "raw": {"job": "ingest", "source": {**source, "captions": "beside"}},
            "levels": {
                "job": "train_tokenizer",
                "inputs": {"data": "raw"},
                "tokenizer": {"kind": "pixels", "levels": 8},
            },
            "words": {
                "job": "train_tokenizer",
                "inputs": {"data": "raw"},
                "tokenizer": {"kind": "sentencepiece", "model": "unigram", "vocabulary_size": 276},
            },
            "tokens": {
                "job": "pretokenize",
                "inputs": {"data": "raw", "tokenizer": "levels", "captions": "words"},
            },
            "decoder": {
                "job": "pretrain",
                "inputs": {"tokens": "tokens"},
                "model": decoder,
                "steps": 60,
                "batch_size": 32,
                "optimizer": {"learning_rate": 1e-2},
                "schedule": {"name": "cosine", "warmup": 5},
            },
            "model": {
                "job": "handoff",
                "inputs": {"decoder": "decoder", "tokenizer": ["levels", "words"]},
            },
            "samples": {
                "job": "sample",
                "inputs": {"model": "model"},
                "number": 9,
                "guidance": 2.0,
                "prompts": [f"a {word} square" for word in WORDS],
            },
            "evaluation": {
                "job": "evaluate",
                "inputs": {"model": "model", "tokens": "tokens", "data": "raw"},
            },
        },
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the pipeline above, made by the command line."""
    import subprocess
    import sys

    root = tmp_path_factory.mktemp("squares")
    (root / "squares.yaml").write_text(yaml.safe_dump(pipeline(root)))
    command = [sys.executable, "-m", "chainrule.pipeline", "run", "squares.yaml"]
    for verb in (["plan", "squares.yaml"], command[3:]):
        done = subprocess.run(
            [*command[:3], *verb], cwd=root, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    return root / "runs" / "squares"


def levels_of(store: Store) -> np.ndarray:
    """Mean brightness of each sample, 0..255."""
    return store.read("images").reshape(store.number, -1).mean(axis=1)


@pytest.mark.slow
def test_samples_are_what_their_captions_say(finished: Path) -> None:
    store = Store.open(finished / "samples")
    asked = store.read("caption")
    assert asked.tolist() == [0, 1, 2] * 3
    texts = json.loads((finished / "samples" / "captions.json").read_text())
    assert texts == [f"a {word} square" for word in WORDS]
    for brightness, caption in zip(levels_of(store), asked, strict=True):
        assert brightness == pytest.approx((20, 120, 230)[caption], abs=30)
    assert (finished / "samples" / "sheet.png").is_file()
    sheets = {path.name for path in (finished / "samples" / "sheets").iterdir()}
    assert len(sheets) == 3


@pytest.mark.slow
def test_the_likelihood_is_given_the_caption(finished: Path) -> None:
    figures = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    said = json.dumps(figures)
    assert "given its caption" in said
    source = open_source(finished / "model", "cpu")
    tokens = TokenSet.open(finished / "tokens", "validation")
    x = torch.stack([torch.from_numpy(tokens[i][0].astype(np.int64)) for i in range(len(tokens))])
    captions = [tokens[i][1]["captions"][0] for i in range(len(tokens))]
    other = {WORDS[i]: WORDS[(i + 1) % 3] for i in range(3)}
    wrong = [" ".join(other.get(word, word) for word in text.split()) for text in captions]

    def nats(texts: list[str] | None) -> float:
        cond = None
        if texts is not None:
            length = source.model.config.captions.length
            cond = torch.full((len(texts), length), -1)
            for row, ids in enumerate(source.captioner.encode(texts)):
                cond[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            return float(-source.model.log_prob(x, cond).sum(dim=1).mean())

    own, none = nats(captions), nats(None)
    assert own < none < nats(wrong)
    assert own < 1.0  # the caption says all there is to say; of three alike, log 3 is 1.1
    found = next(
        v["value"] if isinstance(v, dict) else v
        for k, v in _leaves(figures)
        if k == "nats_per_sample"
    )
    assert found == pytest.approx(own, rel=1e-4)


def _leaves(figures: Any) -> list[tuple[str, Any]]:
    """(name, value) of every figure, wherever it stands."""
    found = []
    if isinstance(figures, dict):
        for key, value in figures.items():
            found.append((key, value))
            found += _leaves(value)
    elif isinstance(figures, list):
        for value in figures:
            if isinstance(value, dict) and "name" in value:
                found.append((value["name"], value))
            found += _leaves(value)
    return found


@pytest.mark.slow
def test_a_prompt_on_the_command_line_is_a_caption(
    finished: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "drawn"
    asked = ["sample", finished / "model", "--prompt", "light all over", "--n", 4, "-o", out]
    code, said = run(*asked, "--temperature", "0.5")
    assert code == 0, said
    assert levels_of(Store.open(out)).min() > 180
    code, said = run("sample", finished / "model", "--prompt", "dark " * 90, "-o", tmp_path / "cut")
    assert code == 0
    assert "is cut from" in said
    refused = tmp_path / "refused"
    for more, words in (
        (["--prompt", " \n"], "a caption without words"),
        (["--class", "0"], "trained without classes"),
        (["--set", "guidance=2"], "no caption is asked for; give prompts"),
    ):
        code, said = run("sample", finished / "model", "-o", refused, *more)
        assert code != 0
        assert words in said
        assert said.count("\n") <= 2
        assert not refused.exists()


@pytest.mark.slow
def test_plan_knows_captions(finished: Path) -> None:
    """Their tokens are inputs, of the cache and of the work an element. (Before anything has run:
    the fixture.)"""
    loaded = load_pipeline(finished.parents[1] / "squares.yaml", runs=finished.parent)
    assert loaded.root == finished
    plans = {found["stage"]: found for found in plan(loaded)}
    source = open_source(finished / "model", "cpu")
    cursor = source.model.cursor(1)
    assert plans["samples"]["kv_cache_bytes"] % cursor.nbytes == 0
    length = source.model.config.captions.length
    assert source.model.config.inputs == 16 + length
    without = build(source.model.config.model_copy(update={"captions": None}))
    assert flops_per_element(source.model) > 1.2 * flops_per_element(without)


@pytest.mark.slow
def test_completed_pictures_keep_their_captions(finished: Path, tmp_path: Path) -> None:
    config = SampleConfig.model_validate({"number": 6, "complete": {"share": 0.25, "of": 6}})
    inputs = {
        "model": [Artifact.open(finished / "model")],
        "tokens": [Artifact.open(finished / "tokens")],
    }
    stage = Stage("samples", "t", "sample", tmp_path / "out", "", inputs)
    sample.main(config, stage)
    texts = json.loads((tmp_path / "out" / "captions.json").read_text())
    shown = TokenSet.open(finished / "tokens", "validation")
    assert texts == [shown[i][1]["captions"][0] for i in range(6)]
    words = [next(word for word in WORDS if word in text) for text in texts]
    wanted = [(20, 120, 230)[WORDS.index(word)] for word in words]
    assert levels_of(Store.open(tmp_path / "out")) == pytest.approx(wanted, abs=30)


@pytest.mark.slow
def test_a_draft_learns_what_captions_mean(finished: Path, tmp_path: Path) -> None:
    inputs = {
        "model": [Artifact.open(finished / "model")],
        "tokens": [Artifact.open(finished / "tokens")],
    }
    stage = Stage("draft", "t", "distill", tmp_path / "draft", "", inputs)
    settings = {"steps": 40, "batch_size": 32, "own_samples": 30, "learning_rate": 1e-2}
    distill.main(distill.Config.model_validate(settings), stage)
    assert stage.summary["acceptance"] > 0.7
    draft = open_source(tmp_path / "draft", "cpu")
    assert draft.model.config.captions.dropout == 0
    given = SampleConfig.model_validate({"prompts": ["a light square"], "number": 4})
    request = settle(given, draft)
    drawn = draw(draft.model, request.plan(range(4)), request.rules)
    assert draft.tokenizer.decode(list(drawn.x.numpy().reshape(4, 4, 4)))[0].mean() > 150
    with pytest.raises(SamplingError, match="dropout 0 and has never seen a picture without"):
        settle(SampleConfig(number=1), draft)
    source = open_source(finished / "model", "cpu")
    assert open_draft(given, source, Artifact.bare(tmp_path / "draft")) is not None
    plain = build({"preset": "imagegpt-debug", **SMALL, "event_shape": [4, 4], "classes": 3})
    kept = {name: draft.card[name] for name in ("modality", "vocabulary", "grid", "tokenizer")}
    save(plain, tmp_path / "plain", {**kept, "classes": WORDS})
    shutil.copytree(tmp_path / "draft" / "tokenizer", tmp_path / "plain" / "tokenizer")
    with pytest.raises(SamplingError, match="conditioned on classes, the model is not"):
        open_draft(given, source, Artifact.bare(tmp_path / "plain"))


@pytest.mark.slow
def test_captions_of_another_tokenizer_are_refused(
    finished: Path, stages: dict[str, Artifact]
) -> None:
    source = open_source(finished / "model", "cpu")
    other = TokenSet.open(stages["tokens"].folder)
    with pytest.raises(LineageError, match="captions of model and tokens do not match"):
        require_tokenizers(source, other, "the model")
    longer = TokenSet.open(finished / "tokens")
    require_tokenizers(source, longer, "the model")
    longer.captions = {**(longer.captions or {}), "longest": 99}
    with pytest.raises(SamplingError, match="captions of up to 99 tokens, the model takes"):
        require_tokenizers(source, longer, "the model")


@pytest.mark.slow
def test_raw_pictures_are_scored_given_their_captions(finished: Path, tmp_path: Path) -> None:
    whole = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    folder = evaluate_folder(
        finished / "model", tmp_path / "out", EvaluateConfig(), None, finished / "raw"
    )
    found = json.loads((folder / "evaluation.json").read_text())
    wanted = dict(_leaves(whole))["nats_per_sample"]
    assert dict(_leaves(found))["nats_per_sample"] == pytest.approx(wanted, rel=1e-4)
    handed = tmp_path / "without"
    shutil.copytree(finished / "model", handed)
    shutil.rmtree(handed / "tokenizer-captions")
    card = json.loads((handed / "card.json").read_text())
    card["captions"]["path"] = None
    (handed / "card.json").write_text(json.dumps(card))
    (handed / "artifact.json").unlink()
    with pytest.raises(StageFailed, match="holds no tokenizer of captions"):
        evaluate_folder(handed, tmp_path / "other", EvaluateConfig(), None, finished / "raw")


@pytest.mark.slow
def test_the_gallery_and_the_report_name_captions(finished: Path, tmp_path: Path, run: Run) -> None:
    page = write_gallery(finished, tmp_path / "gallery.html").read_text()
    assert '"class": "a dark square"' in page or '"class":"a dark square"' in page
    report = finished / "report.html"
    assert "a grey square" in report.read_text()


@pytest.mark.slow
def test_what_a_captioned_model_cannot_do_is_refused(finished: Path, tmp_path: Path) -> None:
    source = open_source(finished / "model", "cpu")
    words = finished / "model" / "tokenizer-captions"
    assert words.is_dir()
    assert source.captioner.fingerprint == source.card["captions"]["fingerprint"]
    from chainrule.pipeline.models.transformers_format import to_transformers

    with pytest.raises(ValueError, match="which is conditioned on captions"):
        to_transformers(source.model, tmp_path)
