"""Codecs and a model on one axis: sizes recomputed by hand, everything decoded."""

import bz2
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from chainrule.jobs import evaluate, scoreboard
from chainrule.jobs.scoreboard import Config
from chainrule.pipeline.artifact import write_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.audio import encode_flac
from chainrule.pipeline.data.reader import ShardError
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.evaluation import codecs
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.stage import StageFailed
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer

TEXTS = ["some text that repeats, repeats and repeats. " * 12, "another document. " * 20]


def shards(folder, modality, members):
    folder.mkdir()
    for number, split in enumerate(("train", "validation")):
        with ShardWriter(folder, number, split) as shard:
            for i, member in enumerate(members):
                shard.write(key_of(10 * number + i), {**member, "json": {}})
    finish(folder, kind="raw", modality=modality, shards=2)
    return folder


@pytest.fixture
def texts(tmp_path):
    return shards(tmp_path / "texts", "text", [{"txt": text.encode()} for text in TEXTS])


@pytest.fixture
def model(tmp_path):
    tokenizer = ByteTokenizer()
    decoder = build(
        "gpt2-debug", seed=0, vocabulary_size=258, context=32, layers=1, width=16, heads=2
    )
    folder = tmp_path / "model"
    tokenizer.save(folder / "tokenizer")
    about = {"kind": "bytes", "fingerprint": tokenizer.fingerprint, "path": "tokenizer"}
    save(decoder, folder, {"modality": "text", "classes": None, "grid": None, "tokenizer": about})
    return folder


def test_text(texts, model, tmp_path):
    out = tmp_path / "out"
    lines = scoreboard.scoreboard([model], texts, out, Config(primed=True))
    found = json.loads((out / "scoreboard.json").read_text())
    rows = {(row["name"], row["way"]): row for row in found["rows"]}
    joined = "".join(TEXTS).encode()
    assert found["units"] == len(joined)
    assert rows["bzip2", "joined"]["coded_bytes"] == len(bz2.compress(joined, 9))
    assert rows["bzip2", "alone"]["coded_bytes"] == sum(
        len(bz2.compress(t.encode(), 9)) for t in TEXTS
    )
    primed = len(bz2.compress(joined + joined, 9)) - len(bz2.compress(joined, 9))
    assert rows["bzip2", "primed"]["coded_bytes"] == primed
    assert rows["xz", "primed"]["bits"] < rows["xz", "joined"]["bits"]
    mine = rows["model", "static"]
    assert mine["verified"]
    assert mine["bits_with_model"] > mine["bits"] > 0
    assert mine["model_bytes"] == (model / "weights.safetensors").stat().st_size
    assert [row["bits"] for row in found["rows"]] == sorted(r["bits"] for r in found["rows"])
    assert lines[len(found["rows"]) + 2] == ""
    assert lines[-3:] == [f"- {name}: {said}" for name, said in found["columns"].items()]
    assert (out / "scoreboard.png").exists()
    assert sorted(p.name for p in out.iterdir()) == [
        "scoreboard.json",
        "scoreboard.md",
        "scoreboard.png",
    ]
    with pytest.raises(RequestError, match="already"):
        scoreboard.scoreboard([model], texts, out)


def test_a_models_size_is_that_of_the_whole_container(texts, model, tmp_path, monkeypatch):
    written = []
    write = scoreboard.write_container

    def kept(path, *rest):
        written.append(write(path, *rest))
        assert path.stat().st_size == written[0]
        return written[0]

    monkeypatch.setattr(scoreboard, "write_container", kept)
    scoreboard.scoreboard([model], texts, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scoreboard.json").read_text())
    [mine] = [row for row in found["rows"] if row["model_bytes"]]
    assert mine["coded_bytes"] == written[0]
    assert mine["bits"] == 8 * written[0] / found["units"]
    assert mine["bits_with_model"] == 8 * (written[0] + mine["model_bytes"]) / found["units"]
    # untrained, it codes none: what is no figure of the model's is not given as one
    assert mine["stored"] == found["files"]
    assert mine["ideal_bits"] is None
    assert mine["decode_per_second"] is None


def test_images_alone_and_as_an_atlas(tmp_path):
    rng = np.random.default_rng(0)
    members, images = [], []
    for _ in range(5):
        image = np.repeat(rng.integers(0, 256, (6, 8), dtype=np.uint8), 2, axis=0)
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        members.append({"png": stream.getvalue()})
        images.append(image)
    data = shards(tmp_path / "images", "image", members)
    lines = scoreboard.scoreboard([], data, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scoreboard.json").read_text())
    assert found["unit"] == "bits/dim"
    assert found["units"] == 5 * 12 * 8
    rows = {(row["name"], row["way"]): row for row in found["rows"]}
    for name in ("PNG", "WebP"):
        assert rows[name, "joined"]["bits"] < rows[name, "alone"]["bits"]
        assert rows[name, "alone"]["verified"]
    assert any("WebP" in line for line in lines)


def test_an_atlas_holds_every_image_once():
    images = [np.full((2, 3, 1), i + 1, dtype=np.uint8) for i in range(5)]
    sheet = codecs.atlas(images)
    assert sheet.shape == (4, 9, 1)
    for i in range(5):
        top, left = i // 3 * 2, i % 3 * 3
        assert (sheet[top : top + 2, left : left + 3] == i + 1).all()
    assert (sheet[2:, 6:] == 0).all()


@pytest.mark.parametrize("name", ["gzip", "bzip2", "xz", "zstd", "brotli", "PPMd (order 6)"])
def test_byte_codecs_give_back_what_they_took(name):
    codec = {codec.name: codec for codec in codecs.byte_codecs()}[name]
    text = "".join(TEXTS).encode()
    for data in (b"", b"x", bytes(range(256)) * 3, "ü 世界".encode(), text):
        assert codec.decode(codec.encode(data)) == data
    assert len(codec.encode(text)) < len(text) / 4


@pytest.mark.parametrize("name", ["PNG", "WebP", "JPEG XL"])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_codecs_give_back_what_they_took(name, channels):
    codec = {codec.name: codec for codec in codecs.image_codecs()}[name]
    smooth = np.add.outer(np.arange(24), np.arange(32))[..., None].repeat(channels, -1)
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, channels))
    for image in (smooth.astype(np.uint8), noise.astype(np.uint8)):
        assert codecs.same(image, codec.decode(codec.encode(image)))


def test_flac_is_exact():
    (flac,) = codecs.audio_codecs(8000)
    rng = np.random.default_rng(0)
    samples = rng.integers(-32768, 32768, 3000).astype(np.int16)
    assert codecs.same(samples, flac.decode(flac.encode(samples)))
    tone = (9000 * np.sin(np.arange(8000) / 20)).astype(np.int16)
    assert len(flac.encode(tone)) < tone.nbytes / 2


def test_recordings_are_coded_by_the_model_not_stored(tmp_path):
    """Shards hold FLAC, which no form of a model takes: it is given the samples."""
    noise = np.random.default_rng(0).normal(0, 300, (3, 600))
    tones = (9000 * np.sin(np.arange(600) / 40) + noise).astype(np.int16)
    data = shards(tmp_path / "audio", "audio", [{"flac": encode_flac(t, 8000)} for t in tones])
    tokenizer = MuLawTokenizer(MuLawSettings(), sample_rate=8000)
    wavenet = build("wavenet-debug", seed=0, vocabulary_size=256, event_shape=[100])
    folder = tmp_path / "model"
    tokenizer.save(folder / "tokenizer")
    about = {"kind": "mulaw", "fingerprint": tokenizer.fingerprint, "path": "tokenizer"}
    save(wavenet, folder, {"modality": "audio", "classes": None, "tokenizer": about})
    scoreboard.scoreboard([folder], data, tmp_path / "out", Config(least_row=64))
    found = json.loads((tmp_path / "out" / "scoreboard.json").read_text())
    [mine] = [row for row in found["rows"] if row["ideal_bits"] is not None]
    assert mine["stored"] == 0
    codes = [tokenizer.encode([tone])[0] for tone in tones]
    of = np.bincount(tokenizer.encode([np.arange(-32768, 32768).astype(np.int16)])[0])
    places = sum(np.log2(of[code]).sum() for code in codes) / tones.size
    assert mine["ideal_bits"] == pytest.approx(places + 8, abs=0.5)  # untrained: 8 bits a code
    other = shards(tmp_path / "fast", "audio", [{"flac": encode_flac(t, 16000)} for t in tones])
    with pytest.raises(StageFailed, match="codes none of the 3 files; .*16000 Hz"):
        scoreboard.scoreboard([folder], other, tmp_path / "out2")


def test_a_model_of_something_else_is_refused(model, tmp_path):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(stream, "PNG")
    data = shards(tmp_path / "images", "image", [{"png": stream.getvalue()}])
    with pytest.raises(StageFailed, match="a model of text"):
        scoreboard.scoreboard([model], data, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(StageFailed, match="is empty"):
        scoreboard.scoreboard([], shards(tmp_path / "none", "image", []), tmp_path / "out2")


def test_every_model_is_looked_at_before_the_first_is_measured(texts, model, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    shutil.rmtree(other / "tokenizer")
    card = json.loads((other / "card.json").read_text())
    write_json(other / "card.json", {**card, "tokenizer": None})
    monkeypatch.setattr(scoreboard, "codec_rows", lambda files: pytest.fail("measured"))
    with pytest.raises(StageFailed, match="other: the model folder carries no tokenizer"):
        scoreboard.scoreboard([model, other], texts, tmp_path / "out")


def test_tokens_in_the_place_of_raw_data_are_named_as_such(texts, model, tmp_path):
    index = json.loads((texts / "index.json").read_text())
    write_json(texts / "index.json", {**index, "kind": "tokens"})
    with pytest.raises(ShardError, match="holds tokens, not raw samples; give the ingest"):
        scoreboard.scoreboard([model], texts, tmp_path / "out")
    with pytest.raises(ShardError, match=r"give the ingest artifact \(--tokens for these\)"):
        evaluate.evaluate_folder(model, tmp_path / "out", evaluate.Config(), data=texts)
    assert not list(tmp_path.glob("out*"))
