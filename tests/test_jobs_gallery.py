"""The gallery: what it computes of each sample, and that a browser opens it without complaint."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from chainrule.jobs import gallery
from chainrule.jobs.gallery import write_gallery
from chainrule.jobs.sample import Config, main, sample_folder
from chainrule.pipeline import build, load
from chainrule.pipeline.artifact import (
    MANIFEST,
    Artifact,
    ArtifactError,
    LineageError,
    partial_folder,
    publish,
)
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.sampling.store import Store
from chainrule.pipeline.stage import Stage
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.interface import Tokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer

NAMES = ["cat", "dog"]
TINY = {"layers": 1, "heads": 2, "width": 16, "mlp_width": 16}
TRAINING_TEXT = "def main(config: Config, stage: Stage) -> None:\n    return None\n" * 3


def published(root: Path, name: str, job: str, inputs: dict[str, list[str]]) -> Artifact:
    entries = {role: [{"path": name} for name in names] for role, names in inputs.items()}
    (partial_folder(root / name)).mkdir(exist_ok=True)
    manifest = {"stage": name, "job": job, "fingerprint": f"fp-{name}", "inputs": entries}
    return publish(root / name, manifest)


def model_stage(root: Path, name: str, model: Any, tokenizer: Tokenizer, **card: Any) -> None:
    folder = partial_folder(root / name)
    tokenizer.save(folder / "tokenizer")
    kept = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint, "path": "tokenizer"}
    shared = {"modality": tokenizer.modality, "vocabulary": tokenizer.vocabulary}
    save(model, folder, {"tokenizer": kept, "grid": None, "classes": None, **shared, **card})
    published(root, name, "handoff", {"decoder": [f"{name}_decoder"]})


def samples_stage(root: Path, name: str, model: str, **settings: Any) -> None:
    config = Config(**settings)
    inputs = {"model": [Artifact.open(root / model)]}
    stage = Stage(name, root.name, "sample", partial_folder(root / name), "", inputs)
    main(config, stage)
    merged = {"job": "sample", **config.model_dump(mode="json")}
    (stage.folder / "config.yaml").write_text(yaml.safe_dump(merged))
    published(root, name, "sample", {"model": [model]})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two stages of pictures, one of them with guidance, and one of texts."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    root.mkdir()
    pixels = PixelTokenizer(PixelSettings(levels=16))
    settings = {"vocabulary_size": 16, "event_shape": [4, 4], "classes": 2, "class_dropout": 0.1}
    model = build({"family": "imagegpt", "context": 16, **settings, **TINY}, seed=0)
    model_stage(root, "pictures", model, pixels, grid=[4, 4], classes=NAMES)
    samples_stage(root, "pictures_samples", "pictures", number=6)
    samples_stage(root, "pictures_guided", "pictures", number=6, guidance=3.0)

    made = Store.open(root / "pictures_samples").read("tokens")
    tokens = partial_folder(root / "pictures_tokens")
    tokens.mkdir()
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "validation")):
        grids = rng.integers(0, 16, (20, 4, 4)).astype(np.uint8)
        if split == "train":
            grids[7] = made[3]  # the model "copied" this one
        with ShardWriter(tokens, number, split) as shard:
            for i, grid in enumerate(grids):
                members = {"tokens.npy": grid, "json": {"label": i % 2, "class": NAMES[i % 2]}}
                shard.write(key_of(20 * number + i), members, tokens=16)
    finish(
        tokens,
        kind="tokens",
        modality="image",
        shards=2,
        classes=NAMES,
        vocabulary=pixels.vocabulary,
        tokenizer={"fingerprint": pixels.fingerprint, "kind": "pixels"},
        grid=[4, 4],
        source="0" * 64,
    )
    published(root, "pictures_tokens", "pretokenize", {})
    published(root, "pictures_decoder", "pretrain", {"tokens": ["pictures_tokens"]})

    model = build({"family": "llama", "vocabulary_size": 258, "context": 60, **TINY}, seed=0)
    model_stage(root, "texts", model, ByteTokenizer())
    prompt = "é = 1 # def main(config"
    samples_stage(root, "texts_samples", "texts", number=2, prompts=[prompt], length=9)
    raw = partial_folder(root / "texts_raw")
    raw.mkdir()
    with ShardWriter(raw, 0, "train") as shard:
        shard.write(key_of(0), {"txt": TRAINING_TEXT.encode(), "json": {}})
    finish(raw, kind="raw", modality="text", shards=1)
    published(root, "texts_raw", "ingest", {})
    published(root, "texts_tokens", "pretokenize", {"data": ["texts_raw"]})
    published(root, "texts_decoder", "pretrain", {"tokens": ["texts_tokens"]})
    return root


def data_of(page: Path) -> dict[str, Any]:
    line = next(t for t in page.read_text().splitlines() if t.startswith("const DATA = "))
    data: dict[str, Any] = json.loads(line.removeprefix("const DATA = ").removesuffix(";"))
    return data


def test_what_the_page_knows(run: Path, tmp_path: Path) -> None:
    page = write_gallery(run, tmp_path / "gallery.html")
    data = data_of(page)
    stages = {stage["name"]: stage for stage in data["stages"]}
    assert data["stages"][0]["modality"] == "image"
    assert set(stages) == {"pictures_samples", "pictures_guided", "texts_samples"}
    assert stages["pictures_guided"]["guidance"] == 3

    pictures = stages["pictures_samples"]
    store = Store.open(run / "pictures_samples")
    for i, sample in enumerate(pictures["samples"]):
        assert sample["class"] == NAMES[i % 2]
        assert np.shape(sample["surprise"]) == (4, 4)
        assert np.sum(sample["surprise"]) == pytest.approx(sample["nats"], abs=0.1)
        assert sample["nats"] == pytest.approx(-store.read("log_likelihood")[i])
        assert sample["tokens"] == store.read("tokens")[i].tolist()
        assert len(sample["near"]) == 3
    copy = pictures["samples"][3]["near"][0]
    assert (copy["training"], copy["distance"], copy["same"]) == (7, 0, 1)
    assert pictures["samples"][2]["near"][0]["distance"] > 0
    assert pictures["real"]["least"] > 0
    assert (pictures["among"], pictures["trained_on"]) == (20, 20)
    assert "7" in pictures["training"]


def test_training_pictures_of_every_set_are_searched(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets of which half the pictures are searched, and the page says so."""
    root = tmp_path / "two"
    shutil.copytree(run, root)
    shutil.copytree(root / "pictures_tokens", root / "more_tokens")
    path = root / "pictures_decoder" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["inputs"]["tokens"] = [{"path": "more_tokens"}, {"path": "pictures_tokens"}]
    path.write_text(json.dumps(manifest))
    data = data_of(write_gallery(root / "pictures_samples", tmp_path / "all.html"))
    (stage,) = data["stages"]
    assert (stage["among"], stage["trained_on"]) == (40, 40)
    assert [n["training"] for n in stage["samples"][3]["near"][:2]] == [7, 27]
    monkeypatch.setattr(gallery, "TRAINING_PICTURES", 20)
    data = data_of(write_gallery(root / "pictures_samples", tmp_path / "half.html"))
    (stage,) = data["stages"]
    assert (stage["among"], stage["trained_on"]) == (20, 40)


def test_texts_with_their_surprise_and_copies(run: Path, tmp_path: Path) -> None:
    data = data_of(write_gallery(run / "texts_samples", tmp_path / "gallery.html"))
    (stage,) = data["stages"]
    for i, sample in enumerate(stage["samples"]):
        text = (run / f"texts_samples/text/{i:05d}.txt").read_bytes().decode()
        assert "".join(sample["pieces"]).startswith(text)
        assert sample["pieces"][:2] == ["", "é"]
        assert len(sample["pieces"]) == len(sample["surprise"])
        x = torch.from_numpy(
            Store.open(run / "texts_samples").read("tokens")[i : i + 1].astype(int)
        )
        nats = -load(run / "texts").log_prob(x)[0].detach().numpy()[: len(sample["surprise"])]
        np.testing.assert_allclose(sample["surprise"], nats, atol=0.01)
        # The prompt holds training text; what the model wrote after it does not.
        assert sample["copied"] == 0
        assert sample["prompt"] == 23


def test_missing_training_data_is_said(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    shutil.copytree(run, root)
    shutil.rmtree(root / "pictures_tokens")
    shutil.rmtree(root / "texts_raw")
    stages = data_of(write_gallery(root))["stages"]
    assert (root / "gallery.html").is_file()
    assert [s["neighbours"].split()[2] for s in stages] == ["tokens", "tokens", "texts"]


def test_a_folder_of_the_command_sample(run: Path, tmp_path: Path) -> None:
    """The same page as of a stage, with the neighbours that the model's lineage leads to."""
    folder = sample_folder(run / "pictures", tmp_path / "drawn", Config(number=6))
    with pytest.raises(ArtifactError, match="name the model with --model"):
        write_gallery(folder)
    with pytest.raises(LineageError, match="samples and model do not match"):
        write_gallery(folder, model=run / "texts")
    [stage] = data_of(write_gallery(folder, model=run / "pictures"))["stages"]
    made = data_of(write_gallery(run / "pictures_samples", tmp_path / "stage.html"))["stages"][0]
    assert {**stage, "name": ""} == {**made, "name": ""}
    assert len(stage["samples"][0]["near"]) > 0
    with pytest.raises(ArtifactError, match="leave --model out"):
        write_gallery(run, model=run / "pictures")


def test_a_folder_without_samples_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no samples there"):
        write_gallery(tmp_path)
    with pytest.raises(ArtifactError, match="no samples there"):
        write_gallery(run / "pictures")
    with pytest.raises(ArtifactError, match="no such folder"):
        write_gallery(tmp_path / "nothing")


@pytest.mark.browser
def test_a_browser_opens_it_without_a_complaint(run: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on the path (apt-get install chromium)")
    page = write_gallery(run, tmp_path / "gallery.html")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    switches += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-dev-shm-usage"]
    switches += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [chromium, *switches, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    dom = done.stdout
    assert "<title>Samples of tiny</title>" in dom
    assert dom.count('aria-pressed="true"') == 1
    assert dom.count('aria-pressed="false"') == 5
    assert "Only memorised?" in dom
    for choice in ("Guidance", "Class", "Order"):
        assert f">{choice}<" in dom
