"""pretokenize: shard i from shard i alone, resumed byte for byte, gated, counted."""

import io
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from chainrule.jobs import ingest, pretokenize
from chainrule.pipeline import cli
from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.config import RequestError, result_settings
from chainrule.pipeline.data.reader import Sample, ShardError, Shards
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.pipeline_file import load_pipeline
from chainrule.pipeline.stage import Stage, StageFailed
from chainrule.tokenizers import interface
from chainrule.tokenizers.autoencoder import to_pixels
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.health import measure
from chainrule.tokenizers.interface import Tokenizer
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer
from chainrule.tokenizers.views import Views
from chainrule.tokenizers.vqvae import VQVAESettings, VQVAETokenizer


def ingested(folder: Path, **settings: Any) -> Artifact:
    config = ingest.Config.model_validate(settings)
    stage = Stage(name="data", pipeline="test", job="ingest", folder=folder, fingerprint="raw")
    ingest.main(config, stage)
    return Artifact(folder, {"fingerprint": "raw-fingerprint", "stage": "data"})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("digits")
    source = {"kind": "sklearn-digits"}
    return ingested(folder, source=source, validation=0.15, samples_per_shard=300)


def small_vqvae(**facts: Any) -> VQVAETokenizer:
    torch.manual_seed(0)
    settings = VQVAESettings(downsampling=2, codebook_size=300, hidden=8, dim=4)
    return VQVAETokenizer(settings, 1, (8, 8), facts=facts)


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("vqvae")
    small_vqvae().save(folder)
    return Artifact.bare(folder)


def saved(tokenizer: Tokenizer, folder: Path) -> Artifact:
    tokenizer.save(folder)
    return Artifact.bare(folder)


def run(
    folder: Path, data: Artifact, tokenizer: Artifact, rank: int = 0, world_size: int = 1, **s: Any
) -> Stage:
    stage = Stage(
        name="tokens",
        pipeline="test",
        job="pretokenize",
        folder=folder,
        fingerprint="p",
        inputs={"data": [data], "tokenizer": [tokenizer]},
        rank=rank,
        world_size=world_size,
    )
    pretokenize.main(pretokenize.Config.model_validate(s), stage)
    return stage


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def quiet(
    digits: Artifact, vqvae: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("quiet")
    run(folder, digits, vqvae)
    return contents(folder)


def test_token_shards_carry_tokens_labels_and_lineage(
    digits: Artifact, vqvae: Artifact, tmp_path: Path
) -> None:
    stage = run(tmp_path, digits, vqvae)
    tokenizer = interface.load(vqvae.folder)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["kind"] == "tokens"
    assert index["grid"] == [4, 4]
    assert index["tokenizer"] == {"fingerprint": tokenizer.fingerprint, "kind": "vqvae"}
    assert index["source"] == "raw-fingerprint"
    assert index["classes"] == [str(i) for i in range(10)]
    assert index["vocabulary"]["size"] == 300
    assert stage.summary["train_tokens"] == 1527 * 16
    assert stage.summary["validation_samples"] == 270
    raw, tokens = Shards.open(digits.folder), TokenSet.open(tmp_path, "validation")
    for i in (0, 7, 269):
        sample = raw.read("validation", i)
        assert sample is not None
        array, meta = tokens[i]
        assert array.dtype == np.uint16
        assert meta == sample.meta
        assert np.array_equal(array, tokenizer.encode([sample.image()])[0])
    assert set(contents(tmp_path)) == {
        "index.json",
        "skipped.jsonl",
        *(entry["name"] for entry in index["shards"]),
        *(entry["offsets"] for entry in index["shards"]),
    }


@pytest.mark.parametrize(("cut", "shards"), [(150, 0), (450, 1), (1350, 4), (1650, 6)])
def test_killed_after_any_shard_it_ends_byte_for_byte(
    cut: int,
    shards: int,
    quiet: dict[str, bytes],
    digits: Artifact,
    vqvae: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, made = Sample.raw, []

    def raw(self: Sample, modality: str) -> Any:
        if len(made) >= cut:
            raise MemoryError
        made.append(self.key)
        return whole(self, modality)

    with monkeypatch.context() as patch:
        patch.setattr(Sample, "raw", raw)
        with pytest.raises(MemoryError):
            run(tmp_path, digits, vqvae)
    assert len(list(tmp_path.glob("shard-*.entry.json"))) == shards
    run(tmp_path, digits, vqvae)
    assert contents(tmp_path) == quiet


def test_killed_while_the_index_is_written_it_ends_the_same(
    quiet: dict[str, bytes],
    digits: Artifact,
    vqvae: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, digits, vqvae)
    run(tmp_path, digits, vqvae)
    assert contents(tmp_path) == quiet


def test_three_workers_in_any_order_write_what_one_writes(
    quiet: dict[str, bytes], digits: Artifact, vqvae: Artifact, tmp_path: Path
) -> None:
    failures: list[BaseException] = []

    def worker(rank: int) -> None:
        try:
            run(tmp_path, digits, vqvae, rank, 3, patience_s=60)
        except BaseException as error:  # noqa: BLE001 (shown by the assertion below)
            failures.append(error)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in (0, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contents(tmp_path) == quiet


def test_processes_that_decode_change_no_byte(
    quiet: dict[str, bytes], digits: Artifact, vqvae: Artifact, tmp_path: Path
) -> None:
    run(tmp_path, digits, vqvae, workers=2)
    assert contents(tmp_path) == quiet


def test_rank_0_names_the_shard_that_a_worker_never_wrote(
    digits: Artifact, vqvae: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(StageFailed, match=r"shard 1 \(one of 3\) was not written"):
        run(tmp_path, digits, vqvae, 0, 2, patience_s=0.01)
    assert not (tmp_path / "index.json").exists()


# --- the gate ---------------------------------------------------------------------------

COLLAPSED = {
    "codebook_size": 300,
    "codebook_usage": 0.02,
    "codebook_perplexity": 3.1,
    "usage_of_reachable": 0.02,
}


def test_a_collapsed_codebook_is_refused_unless_accepted(digits: Artifact, tmp_path: Path) -> None:
    tokenizer = saved(small_vqvae(health=COLLAPSED), tmp_path / "tokenizer")
    message = (
        r"collapsed codebook: 2\.0% of 300 codes used \(perplexity 3\.1\).*0\.25\n"
        "train it.*--accept-collapsed"
    )
    with pytest.raises(StageFailed, match=message):
        run(tmp_path / "out", digits, tokenizer)
    assert list((tmp_path / "out").glob("shard*")) == []
    run(tmp_path / "low", digits, tokenizer, minimum_usage=0.01)
    run(tmp_path / "meant", digits, tokenizer, accept_collapsed=True)
    # it lets the stage run and decides nothing of what it writes
    meant, plain = (pretokenize.Config(accept_collapsed=accept) for accept in (True, False))
    assert result_settings(meant) == result_settings(plain)


def test_the_command_accepts_a_collapsed_codebook_on_the_record(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        """
        name: p
        stages:
          data: {job: ingest, source: {kind: sklearn-digits}}
          tokenizer:
            {job: train_tokenizer, inputs: {data: data}, tokenizer: {kind: palette, colours: 2}}
          tokens:
            job: pretokenize
            inputs: {data: data, tokenizer: tokenizer}
            minimum_usage: 1.0
        """
    )
    plain = cli._load(path, None, None, accept_collapsed=False)
    accepting = cli._load(path, ["tokens.batch_size=8"], None, accept_collapsed=True)
    assert not plain.stages["tokens"].merged()["accept_collapsed"]
    assert accepting.stages["tokens"].merged()["accept_collapsed"]  # what config.yaml records
    assert accepting.stages["tokens"].config.batch_size == 8  # type: ignore[attr-defined]
    assert "tokens.accept_collapsed=true" in accepting.overrides  # what a stage's ranks are told
    assert accepting.stages["tokenizer"].merged() == plain.stages["tokenizer"].merged()
    path.write_text("name: p\nstages: {data: {job: ingest, source: {kind: sklearn-digits}}}\n")
    with pytest.raises(RequestError, match=r"--accept-collapsed: .* has no pretokenize stage"):
        cli._load(path, None, None, accept_collapsed=True)


def test_one_collapsed_level_of_a_residual_codebook_is_refused(
    digits: Artifact, tmp_path: Path
) -> None:
    settings = VQVAESettings.model_validate(
        {
            "downsampling": 2,
            "codebook_size": 16,
            "hidden": 8,
            "dim": 4,
            "quantizer": {"kind": "residual", "depth": 2},
        }
    )
    torch.manual_seed(0)
    model = VQVAETokenizer(settings, 1, (8, 8))
    images = [sample.image() for sample in Shards.open(digits.folder).iterate("validation")]
    z = model.model.encoder(to_pixels(np.stack(images)))
    model.model.quantizer.start(z, torch.Generator().manual_seed(0))
    second = model.model.quantizer.levels[1]  # type: ignore[index, union-attr]
    second.codebook[1:] = 1e3  # type: ignore[index, operator, union-attr]
    model.facts["health"] = measure(model, [images])
    tokenizer = saved(model, tmp_path / "tokenizer")
    with pytest.raises(StageFailed, match=r"collapsed codebook: level 2: 6\.2% of 16 codes"):
        run(tmp_path / "out", digits, tokenizer)


def test_an_altered_tokenizer_is_refused(digits: Artifact, tmp_path: Path) -> None:
    tokenizer = saved(small_vqvae(), tmp_path / "tokenizer")
    weights = tokenizer.folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StageFailed, match="altered: card.json states fingerprint"):
        run(tmp_path / "out", digits, tokenizer)


def test_the_modality_must_be_the_tokenizers(digits: Artifact, tmp_path: Path) -> None:
    tokenizer = saved(ByteTokenizer(), tmp_path / "tokenizer")
    with pytest.raises(StageFailed, match="holds image; the tokenizer .* is one of text"):
        run(tmp_path / "out", digits, tokenizer)


# --- views ------------------------------------------------------------------------------


def test_ten_crops_are_baked_in_and_recorded(digits: Artifact, tmp_path: Path) -> None:
    tokenizer = saved(PixelTokenizer(PixelSettings()), tmp_path / "tokenizer")
    views = {"crops": "five", "size": 6, "flip": True}
    stage = run(tmp_path / "out", digits, tokenizer, views=views)
    assert stage.summary["train_samples"] == 10 * 1527
    assert stage.summary["validation_samples"] == 270
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["views"] == views
    assert index["grid"] == [6, 6]
    raw = Shards.open(digits.folder).read("train", 3)
    assert raw is not None
    image = raw.image()[:, :, 0]
    tokens = TokenSet.open(tmp_path / "out", "train")
    seen = set()
    for i in range(30, 40):
        array, meta = tokens[i]
        assert meta["label"] == raw.meta["label"]
        top, left, height, width = meta["crop"]
        window = image[top : top + height, left : left + width]
        assert np.array_equal(array, window[:, ::-1] if meta.get("flip") else window)
        seen.add((top, left, meta.get("flip", False)))
    assert len(seen) == 10
    _, meta = TokenSet.open(tmp_path / "out", "validation")[0]
    assert meta["crop"] == [1, 1, 6, 6]
    with pytest.raises(StageFailed, match=r"8x8 is smaller than views\.size 9"):
        run(tmp_path / "large", digits, tokenizer, views={"crops": "center", "size": 9})
    with pytest.raises(ValidationError, match="size is for crops"):
        Views(crops="five")


# --- what cannot be used ----------------------------------------------------------------


def odd_pictures(folder: Path, odd: int, apart: int = 1) -> Artifact:
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(40):
        shape = (9, 8) if i in range(0, odd * apart, apart) else (8, 8)
        pixels = generator.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02d}.png")
    source = {"kind": "image-folder", "path": str(folder / "pictures"), "channels": 1}
    return ingested(folder / "data", source=source, validation=0.25, samples_per_shard=10)


def test_an_unusable_sample_is_skipped_by_name_and_counted(vqvae: Artifact, tmp_path: Path) -> None:
    data = odd_pictures(tmp_path, 1)
    stage = run(tmp_path / "out", data, vqvae, max_skipped=0.05)
    assert stage.summary["skipped"] == 1
    [line] = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert skipped["where"] == "00.png"
    assert "9x8: not divisible by the downsampling 2" in skipped["reason"]
    assert stage.summary["train_samples"] + stage.summary["validation_samples"] == 39


def test_too_many_unusable_samples_stop_the_stage(vqvae: Artifact, tmp_path: Path) -> None:
    data = odd_pictures(tmp_path, 8)
    with pytest.raises(StageFailed, match=r"not divisible.*\n\d of 40 .* max_skipped is 0\.05"):
        run(tmp_path / "out", data, vqvae, max_skipped=0.05)
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_set_of_which_no_training_sample_is_usable_is_refused(
    vqvae: Artifact, tmp_path: Path
) -> None:
    data = odd_pictures(tmp_path, 40)
    message = r"not divisible.*\nno training sample of .*data could be used"
    with pytest.raises(StageFailed, match=message):
        run(tmp_path / "out", data, vqvae, max_skipped=1.0)
    assert not (tmp_path / "out" / "index.json").exists()


def test_workers_that_each_skip_few_enough_are_counted_together(
    vqvae: Artifact, tmp_path: Path
) -> None:
    data = odd_pictures(tmp_path, 3, apart=12)
    out = tmp_path / "out"
    shards = Shards.open(data.folder)
    odd = [
        sum(sample.image().shape[0] == 9 for sample in shards.iterate_shard(number))
        for number in range(len(shards.entries))
    ]
    assert {sum(odd[0::2]), sum(odd[1::2])} == {1, 2}  # each within the 2 of 40 allowed
    run(out, data, vqvae, 1, 2, max_skipped=0.05)
    with pytest.raises(StageFailed, match=r"not divisible.*\n3 of 40 .* max_skipped is 0\.05"):
        run(out, data, vqvae, 0, 2, max_skipped=0.05)
    assert not (out / "index.json").exists()
    run(out, data, vqvae, 0, 2, max_skipped=0.075)
    assert json.loads((out / "index.json").read_text())["skipped"] == 3


def test_a_raw_shard_that_was_altered_is_named(
    digits: Artifact, vqvae: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(digits.folder, folder)
    shard = folder / "shard-000002.tar"
    os.chmod(shard, 0o644)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 255
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=r"shard-000002\.tar.*make the shards again$"):
        run(tmp_path / "out", Artifact.bare(folder), vqvae)
    assert len(list((tmp_path / "out").glob("shard-*.entry.json"))) == 2


# --- other modalities -------------------------------------------------------------------


def test_documents_end_with_eos_and_count_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    texts = {f"{i}.txt": f"Zoë wrote {i} lines\n" * i for i in range(12)}
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text)
    source = {"kind": "text", "path": str(tmp_path / "texts")}
    data = ingested(tmp_path / "data", source=source, validation=0.25)
    run(tmp_path / "out", data, saved(ByteTokenizer(), tmp_path / "tokenizer"))
    tokens = TokenSet.open(tmp_path / "out", "train")
    total = 0
    for i in range(tokens.samples):
        array, meta = tokens[i]
        assert array[-1] == tokens.vocabulary.specials["eos"]
        assert (array[:-1] < 256).all()
        assert meta["bytes"] == len(array) - 1
        total += meta["bytes"]
    assert tokens.raw_bytes == total
    assert tokens.grid is None


def test_pixels_of_colour_images_and_waves(tmp_path: Path) -> None:
    import soundfile
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    (tmp_path / "waves").mkdir()
    generator = np.random.default_rng(0)
    for i in range(8):
        pixels = generator.integers(0, 256, (4, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
        wave = generator.integers(-20000, 20000, 50 + i).astype(np.int16)
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, 8000, format="WAV", subtype="PCM_16")
        (tmp_path / "waves" / f"{i}.wav").write_bytes(buffer.getvalue())
    pictures = {"kind": "image-folder", "path": str(tmp_path / "pictures")}
    data = ingested(tmp_path / "images", source=pictures, validation=0.25)
    run(tmp_path / "planes", data, saved(PixelTokenizer(PixelSettings()), tmp_path / "pixels"))
    planes = TokenSet.open(tmp_path / "planes", "train")
    assert planes.grid == (3, 4, 6)
    sample = Shards.open(data.folder).read("train", 0)
    assert sample is not None
    assert np.array_equal(planes[0][0], sample.image().transpose(2, 0, 1))

    waves = {"kind": "audio-folder", "path": str(tmp_path / "waves"), "sample_rate": 8000}
    data = ingested(tmp_path / "audio", source=waves, validation=0.25)
    lossless = MuLawTokenizer(MuLawSettings(bits=16), 8000)
    run(tmp_path / "codes", data, saved(lossless, tmp_path / "mulaw"))
    codes = TokenSet.open(tmp_path / "codes", "train")
    sample = Shards.open(data.folder).read("train", 0)
    assert sample is not None
    assert np.array_equal(lossless.decode([codes[0][0]])[0], sample.audio()[0])
    other = saved(MuLawTokenizer(MuLawSettings(), 16000), tmp_path / "other")
    with pytest.raises(StageFailed, match="8000 Hz.*16000 Hz"):
        run(tmp_path / "mismatch", data, other)


def test_bench_measures_the_job_against_its_encoder(
    digits: Artifact, vqvae: Artifact, tmp_path: Path
) -> None:
    config = pretokenize.Config()
    [row] = pretokenize.bench(digits.folder, vqvae.folder, config, samples=400, rounds=1)
    assert row["samples"] == 600
    assert row["job/bare"] == pytest.approx(row["job/s"] / row["bare/s"])
    collapsed = saved(small_vqvae(health=COLLAPSED), tmp_path)
    assert pretokenize.bench(digits.folder, collapsed.folder, config, samples=10, rounds=1)


@pytest.mark.parametrize(
    ("data", "inputs", "said"),
    [
        ("plain", "tokenizer: pixels", None),
        ("plain", "tokenizer: words", "'d' holds image; the tokenizer of stage 'words' .bytes. is"),
        ("plain", "tokenizer: pixels, captions: words", "'d' holds no captions, the stage has"),
        ("titled", "tokenizer: pixels", "'d' holds captions: give the stage a tokenizer of text"),
        ("titled", "tokenizer: pixels, captions: words", None),
        ("titled", "tokenizer: pixels, captions: pixels", "'pixels' is a tokenizer of image; capt"),
        ("text", "tokenizer: words", "views: stage 'd' holds text; views are for images"),
    ],
)
def test_sets_and_tokenizers_that_do_not_fit_are_refused_before_anything_runs(
    tmp_path: Path, data: str, inputs: str, said: str | None
) -> None:
    kind = "python-stdlib" if data == "text" else "sklearn-digits"
    titles = ", caption_templates: ['{class}']" if data == "titled" else ""
    views = ", views: {flip: true}" if data == "text" else ""
    path = tmp_path / "unfit.yaml"
    path.write_text(
        "name: unfit\nstages:\n"
        f"  d: {{job: ingest, source: {{kind: {kind}}}{titles}}}\n"
        "  pixels: {job: train_tokenizer, inputs: {data: d}, tokenizer: {kind: pixels}}\n"
        "  words: {job: train_tokenizer, inputs: {data: d}, tokenizer: {kind: bytes}}\n"
        f"  t: {{job: pretokenize, inputs: {{data: d, {inputs}}}{views}}}\n"
    )
    pipeline = load_pipeline(path, runs=tmp_path)
    if said is None:
        pipeline.check(["t"])
        return
    with pytest.raises(RequestError, match=said):
        pipeline.check(["t"])
