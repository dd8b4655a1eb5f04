"""Figures of real small models on shards, against the same sums done by hand."""

import io
import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from chainrule.jobs import evaluate
from chainrule.jobs.evaluate import Config
from chainrule.pipeline.artifact import Artifact, LineageError
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.data.stored_images import store
from chainrule.pipeline.evaluation.held_out import Encoded, label_of, labelled_images
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.stage import Stage, StageFailed
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer
from chainrule.tokenizers.vqvae import VQVAESettings, VQVAETokenizer

TEXTS = {
    "train": ["a first text of some length, " * 4, "and a second"],
    "validation": ["held out: short", "ü and 世界 " * 12, "x"],
}


def raw_texts(folder):
    folder.mkdir()
    for number, split in enumerate(TEXTS):
        with ShardWriter(folder, number, split) as shard:
            for i, text in enumerate(TEXTS[split]):
                data = text.encode()
                shard.write(key_of(10 * number + i), {"txt": data, "json": {}}, 0, len(data))
    finish(folder, kind="raw", modality="text", shards=2)
    return folder


def token_texts(folder, fingerprint=None):
    tokenizer = ByteTokenizer()
    folder.mkdir()
    for number, split in enumerate(TEXTS):
        with ShardWriter(folder, number, split) as shard:
            for i, text in enumerate(TEXTS[split]):
                tokens = np.append(tokenizer.encode([text])[0], np.uint16(257))
                meta = {"bytes": len(text.encode())}
                members = {"tokens.npy": tokens, "json": meta}
                shard.write(key_of(10 * number + i), members, len(tokens), meta["bytes"])
    finish(
        folder,
        kind="tokens",
        modality="text",
        shards=2,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"kind": "bytes", "fingerprint": fingerprint or tokenizer.fingerprint},
        grid=None,
    )
    return folder


def images(split: str) -> tuple[np.ndarray, list[int]]:
    """Digits of scikit-learn as uint8 (N, 8, 8, 1)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = slice(0, 120) if split == "train" else slice(120, 160)
    pixels = (digits.images[chosen] * 15).astype(np.uint8)[..., None]
    return pixels, digits.target[chosen].tolist()


def raw_images(folder):

    from PIL import Image

    folder.mkdir()
    for number, split in enumerate(("train", "validation")):
        with ShardWriter(folder, number, split) as shard:
            for i, (pixels, label) in enumerate(zip(*images(split), strict=True)):
                stream = io.BytesIO()
                Image.fromarray(pixels[:, :, 0]).save(stream, "PNG")
                members = {"png": stream.getvalue(), "json": {"label": label}}
                shard.write(key_of(1000 * number + i), members)
    finish(folder, kind="raw", modality="image", shards=2, classes=list("0123456789"))
    return folder


def token_images(folder, tokenizer):
    folder.mkdir()
    for number, split in enumerate(("train", "validation")):
        pixels, labels = images(split)
        with ShardWriter(folder, number, split) as shard:
            codes = tokenizer.encode(list(pixels))
            for i, (tokens, label) in enumerate(zip(codes, labels, strict=True)):
                members = {"tokens.npy": tokens, "json": {"label": label}}
                shard.write(key_of(1000 * number + i), members, tokens.size)
    finish(
        folder,
        kind="tokens",
        modality="image",
        shards=2,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
        grid=list(codes[0].shape),
        classes=list("0123456789"),
    )
    return folder


def model_folder(folder, tokenizer, spec, names=None, **changes):
    model = build(spec, seed=0, **changes)
    with torch.no_grad():  # away from uniform, so that order and classes matter
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    tokenizer.save(folder / "tokenizer")
    card = {
        "modality": tokenizer.modality,
        "vocabulary": tokenizer.vocabulary,
        "grid": None,
        "classes": names,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "path": "tokenizer",
        },
    }
    save(model, folder, card)
    return folder, model.eval()


def stage_of(folder, rank=0, world_size=1, **inputs):
    return Stage(
        name="evaluation",
        pipeline="p",
        job="evaluate",
        folder=folder,
        fingerprint="",
        inputs={role: [Artifact.bare(path)] for role, path in inputs.items()},
        rank=rank,
        world_size=world_size,
    )


def figures(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture
def text(tmp_path):
    folder, model = model_folder(
        tmp_path / "model", ByteTokenizer(), "gpt2-debug", vocabulary_size=258, context=16
    )
    return folder, model, token_texts(tmp_path / "tokens"), raw_texts(tmp_path / "raw")


def by_hand(model, stride: int) -> list[np.ndarray]:
    """Nats of each token of each held-out document, one element at a time."""
    found = []
    for text in TEXTS["validation"]:
        tokens = torch.tensor([*text.encode(), 257])
        nats = []
        for t in range(len(tokens)):
            # the window that scores t: the first, or the first later one that reaches it
            stop = 16 if t < 16 else 16 + stride * math.ceil((t - 15) / stride)
            start = max(0, min(stop, len(tokens)) - 16)
            with torch.no_grad():
                nats.append(-model.log_prob(tokens[None, start : t + 1])[0, -1].item())
        found.append(np.array(nats))
    return found


def test_text_figures_are_the_sums_they_say(text, tmp_path):
    folder, model, tokens, raw = text
    stage = stage_of(tmp_path / "out", model=folder, tokens=tokens, data=raw)
    evaluate.main(Config(batch_size=4, stride=5), stage)
    found = figures(stage.folder)
    expected = np.concatenate(by_hand(model, stride=5))
    size = sum(len(t.encode()) for t in TEXTS["validation"])
    words = sum(len(t.split()) for t in TEXTS["validation"])
    assert found["nats"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    assert found["perplexity_per_word"] == pytest.approx(math.exp(expected.sum() / words), rel=1e-3)
    assert found["tokens"] == len(expected)
    assert found["bytes"] == size
    assert found["exact"] == 1.0
    for name in ("gzip", "bzip2", "xz", "zstd"):
        assert found[f"{name}_bits_per_byte"] > found[f"{name}_joined_bits_per_byte"] > 0
    for name in ("nats", "bits_per_byte", "xz_bits_per_byte"):
        assert found[f"{name}.split"] == "validation"
        assert found[f"{name}.unit"]
    factors = zarr.open_group(str(stage.folder / "factors.zarr"), mode="r")
    np.testing.assert_allclose(np.asarray(factors["nats"]), expected, atol=1e-4)
    assert (stage.folder / "by_position.png").stat().st_size > 1000
    assert not (stage.folder / "factors").exists()
    curve = (stage.folder / "by_position.csv").read_text().splitlines()
    assert curve[0] == "position,nats"
    first = np.mean([nats[0] for nats in by_hand(model, stride=5)])
    assert float(curve[1].split(",")[1]) == pytest.approx(first, abs=1e-4)


def test_the_unigram_guess_counts_training_tokens(text, tmp_path):
    folder, _, tokens, _ = text
    stage = stage_of(tmp_path / "out", model=folder, tokens=tokens)
    evaluate.main(Config(factors=False), stage)
    found = figures(stage.folder)
    counts = np.ones(258)
    for t in TEXTS["train"]:
        np.add.at(counts, [*t.encode(), 257], 1)
    q = counts / counts.sum()
    held_out = [token for t in TEXTS["validation"] for token in [*t.encode(), 257]]
    assert found["unigram_nats_per_token"] == pytest.approx(-np.log(q[held_out]).mean())
    assert "xz_bits_per_byte" not in found  # no raw bytes were given
    assert not (stage.folder / "factors.zarr").exists()


def test_raw_data_alone_gives_the_same_likelihood(text, tmp_path):
    folder, _, tokens, raw = text
    for name, inputs in (("a", {"tokens": tokens, "data": raw}), ("b", {"data": raw})):
        evaluate.main(Config(), stage_of(tmp_path / name, model=folder, **inputs))
    first, second = figures(tmp_path / "a"), figures(tmp_path / "b")
    assert first == second


def test_several_ranks_and_a_restart_give_one_ranks_figures(text, tmp_path):
    folder, _, tokens, raw = text
    evaluate.main(Config(), stage_of(tmp_path / "one", model=folder, tokens=tokens, data=raw))
    for rank in (1, 2, 0):  # rank 0 last: it waits for the others
        stage = stage_of(tmp_path / "three", rank, 3, model=folder, tokens=tokens, data=raw)
        evaluate.main(Config(patience_s=0.1), stage)
    one, three = figures(tmp_path / "one"), figures(tmp_path / "three")
    assert one.keys() == three.keys()
    for name, value in one.items():
        assert three[name] == (
            pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        )

    calls = []
    original = evaluate.score_documents

    def dies(model, documents, stride, batch_size):
        for nats in original(model, documents, stride, batch_size):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            yield nats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "score_documents", dies)
        stage = stage_of(tmp_path / "killed", model=folder, tokens=tokens, data=raw)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(Config(), stage)
    scored = []

    def counts(model, documents, stride, batch_size):
        for nats in original(model, documents, stride, batch_size):
            scored.append(1)
            yield nats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "score_documents", counts)
        evaluate.main(
            Config(), stage_of(tmp_path / "killed", model=folder, tokens=tokens, data=raw)
        )
    assert len(scored) == 2  # one of three was kept
    resumed = figures(tmp_path / "killed")
    assert resumed["nats"] == pytest.approx(one["nats"], rel=1e-6)


def test_pixels_have_bits_per_dim_and_codes_do_not(tmp_path):
    tokenizer = PixelTokenizer(PixelSettings())
    tokens, raw = token_images(tmp_path / "tokens", tokenizer), raw_images(tmp_path / "raw")
    folder, model = model_folder(
        tmp_path / "model",
        tokenizer,
        "imagegpt-debug",
        list("0123456789"),
        vocabulary_size=256,
        event_shape=(8, 8),
        context=64,
        classes=10,
    )
    stage = stage_of(tmp_path / "out", model=folder, tokens=tokens, data=raw)
    evaluate.main(Config(batch_size=7), stage)
    found = figures(stage.folder)
    pixels, labels = images("validation")
    x = torch.from_numpy(pixels[..., 0].astype(np.int64))
    with torch.no_grad():
        nats = -model.log_prob(x, torch.tensor(labels)).double().numpy()
    assert found["nats"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["bits_per_dim"] == pytest.approx(nats.mean() / math.log(2), rel=1e-5)
    assert "given its class" in found["nats.unit"]
    three = nats[np.array(labels) == 3].mean()
    assert found["nats_per_token.class.3"] == pytest.approx(three, rel=1e-5)
    assert found["exact"] == 1.0
    assert found["psnr"] is None
    assert found["ssim"] == pytest.approx(1.0)

    lossy = VQVAETokenizer(
        VQVAESettings(downsampling=2, codebook_size=16, dim=4, hidden=8), 1, (8, 8)
    )
    codes = token_images(tmp_path / "codes", lossy)
    folder, model = model_folder(
        tmp_path / "coded",
        lossy,
        "imagegpt-debug",
        vocabulary_size=16,
        event_shape=(4, 4),
        context=16,
    )
    stage = stage_of(tmp_path / "out2", model=folder, tokens=codes, data=raw)
    evaluate.main(Config(), stage)
    found = figures(stage.folder)
    assert "bits_per_dim" not in found
    assert "token space" in found["bits_per_dim.note"]
    assert found["bits_per_token"] > 0
    assert 0 < found["psnr"] < 60
    assert 0 < found["codebook_usage"] <= 1
    assert found["code_bits_per_pixel"] == pytest.approx(4 / 4)
    assert (stage.folder / "reconstructions.png").exists()

    tokens_of_another = token_images(tmp_path / "again", tokenizer)
    with pytest.raises(LineageError, match="tokenizers of model and tokens"):
        evaluate.main(Config(), stage_of(tmp_path / "out3", model=folder, tokens=tokens_of_another))


def test_masks_of_a_made_are_scored_as_one_mixture(tmp_path):
    tokenizer = PixelTokenizer(PixelSettings(levels=2))
    tokens = token_images(tmp_path / "tokens", tokenizer)
    folder, model = model_folder(
        tmp_path / "model",
        tokenizer,
        {"family": "made", "event_shape": [8, 8], "masks": 3, "order_agnostic": True},
    )
    stage = stage_of(tmp_path / "out", model=folder, tokens=tokens)
    evaluate.main(Config(batch_size=7), stage)
    found = figures(stage.folder)
    pixels, _ = images("validation")
    x = torch.from_numpy(np.stack(tokenizer.encode(list(pixels))).astype(np.int64))
    with torch.no_grad():
        own, mixed = -model.log_prob(x).sum(1).mean(), -model.ensemble_log_prob(x).mean()
    assert found["nats_per_sample"] == pytest.approx(own.item(), rel=1e-5)
    assert found["ensemble_nats_per_sample"] == pytest.approx(mixed.item(), rel=1e-5)
    assert "3 masks" in found["ensemble_nats_per_sample.unit"]


def test_a_limit_takes_samples_from_all_over_the_split(tmp_path):
    """Folders are read class after class: the first ones would be of one class."""
    raw = Shards.open(raw_images(tmp_path / "raw"))
    assert raw.spread("validation", 7) == [0, 5, 11, 17, 22, 28, 34]
    assert raw.spread("validation", 1000) == raw.spread("validation") == list(range(40))
    pixels, _ = images("validation")
    few, of = labelled_images(raw, "validation", 7)
    assert (few == pixels[raw.spread("validation", 7)]).all()
    tokenizer = PixelTokenizer(PixelSettings(levels=4))
    held_out = Encoded(raw, tokenizer, "validation", 7)
    assert [label_of(held_out.meta(i)) for i in range(7)] == of.tolist()
    assert (held_out[6][0] == tokenizer.encode([pixels[34]])[0]).all()


def test_a_tokenizer_alone(tmp_path):
    tokenizer = PixelTokenizer(PixelSettings(levels=4))
    tokenizer.save(tmp_path / "tokenizer")
    raw = raw_images(tmp_path / "raw")
    stage = stage_of(tmp_path / "out", tokenizer=tmp_path / "tokenizer", data=raw)
    evaluate.main(Config(limit=10), stage)
    found = figures(stage.folder)
    pixels = images("validation")[0][::4]  # 10 of 40, from all over the split
    back = tokenizer.decode(tokenizer.encode(list(pixels)))
    error = np.mean((pixels.astype(float) - np.stack(back)) ** 2)
    assert found["mse"] == pytest.approx(error)
    assert found["codebook_usage"] == 1.0
    assert "nats" not in found


def test_a_tokenizer_of_pictures_of_several_sizes(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    generator = np.random.default_rng(0)
    with ShardWriter(raw, 0, "validation") as shard:
        for i, (height, width) in enumerate([(16, 16), (24, 16), (16, 24), (16, 16)]):
            picture = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
            shard.write(key_of(i), {**store(picture), "json": {}})
    finish(raw, kind="raw", modality="image", shards=1)
    PixelTokenizer(PixelSettings()).save(tmp_path / "tokenizer")
    stage = stage_of(tmp_path / "out", tokenizer=tmp_path / "tokenizer", data=raw)
    evaluate.main(Config(), stage)
    assert figures(stage.folder)["exact"] == 1.0
    with Image.open(stage.folder / "reconstructions.png") as sheet:
        assert sheet.size == (2 * 16 * 4, 3 * 16 * 4)  # the two that are alike
    settings = VQVAESettings(downsampling=16, codebook_size=8, hidden=8, dim=4)
    VQVAETokenizer(settings, 3, (16, 16)).save(tmp_path / "learned")
    stage = stage_of(tmp_path / "other", tokenizer=tmp_path / "learned", data=raw)
    with pytest.raises(StageFailed, match="'validation': image of 24x16: not divisible"):
        evaluate.main(Config(), stage)


def test_samples_are_named_by_a_classifier(tmp_path):
    raw = raw_images(tmp_path / "raw")
    pixels, labels = images("validation")
    samples = tmp_path / "samples"
    group = zarr.open_group(str(samples / "samples.zarr"), mode="w")
    drawn = group.create_array("images", shape=pixels.shape, dtype="uint8")
    drawn[:] = pixels
    asked = group.create_array("class", shape=(len(labels),), dtype="int64")
    asked[:] = np.array(labels)
    stage = stage_of(tmp_path / "out", samples=samples, data=raw)
    evaluate.main(Config(), stage)
    found = figures(stage.folder)
    # real digits in the place of samples: agreement is the classifier's own accuracy
    assert found["classifier_agreement"] == found["classifier_accuracy"] > 0.8
    assert found["classifier_agreement.split"] == "samples"


def test_a_probe_of_each_layer_stands_beside_pixels_and_random_weights(tmp_path):
    tokenizer = PixelTokenizer(PixelSettings(levels=16))
    raw = raw_images(tmp_path / "raw")
    folder, model = model_folder(
        tmp_path / "model",
        tokenizer,
        "imagegpt-debug",
        vocabulary_size=16,
        event_shape=(8, 8),
        context=64,
    )
    stage = stage_of(tmp_path / "out", model=folder, data=raw)
    evaluate.main(Config(probe={"train": 100}), stage)
    found = figures(stage.folder)
    layers = [found[f"probe_accuracy.layer.{i}"] for i in range(model.config.layers + 1)]
    assert found["probe_accuracy"] == max(layers)
    assert found["probe_accuracy_pixels"] > 0.7
    assert found["probe_accuracy_random.split"] == "validation"
    assert (stage.folder / "probe.png").exists()
    texts, _ = model_folder(
        tmp_path / "text", ByteTokenizer(), "gpt2-debug", vocabulary_size=258, context=16
    )
    stage = stage_of(tmp_path / "out2", model=texts, data=raw_texts(tmp_path / "texts"))
    with pytest.raises(StageFailed, match="probe"):
        evaluate.main(Config(probe={}), stage)


def test_what_cannot_be_evaluated_is_said(text, tmp_path):
    folder, _, tokens, _ = text
    with pytest.raises(StageFailed, match="nothing to evaluate"):
        evaluate.main(Config(), stage_of(tmp_path / "a", model=folder))
    other = tmp_path / "other"
    token_texts(other, fingerprint="f" * 64)
    with pytest.raises(LineageError, match="ffffffffffffffff"):
        evaluate.main(Config(), stage_of(tmp_path / "b", model=folder, tokens=other))
    with pytest.raises(StageFailed, match="holds image"):
        evaluate.main(
            Config(),
            stage_of(tmp_path / "c", model=folder, tokens=tokens, data=raw_images(tmp_path / "i")),
        )
    with pytest.raises(StageFailed, match="stride 17"):
        evaluate.main(Config(stride=17), stage_of(tmp_path / "d", model=folder, tokens=tokens))


@pytest.mark.parametrize("bits", [8, 16])
def test_sound_has_bits_a_sample(tmp_path, bits):
    tokenizer = MuLawTokenizer(MuLawSettings(bits=bits), 8000)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "validation")):
        with ShardWriter(tokens, number, split) as shard:
            for i, length in enumerate((50, 30)):
                sound = rng.integers(-32768, 32768, length).astype(np.int16)
                [codes] = tokenizer.encode([sound])
                members = {"tokens.npy": codes, "json": {"samples": length}}
                shard.write(key_of(10 * number + i), members, codes.size)
    finish(
        tokens,
        kind="tokens",
        modality="audio",
        shards=2,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint},
        grid=None,
    )
    folder, _ = model_folder(
        tmp_path / "model", tokenizer, "gpt2-debug", vocabulary_size=256, context=16
    )
    stage = stage_of(tmp_path / "out", model=folder, tokens=tokens)
    evaluate.main(Config(), stage)
    found = figures(stage.folder)
    nats = found["nats_per_sample"] * 2  # of both recordings, 80 samples of sound
    assert found["bits_per_audio_sample"] == pytest.approx(nats / math.log(2) / 80)


def test_classes_of_other_data_go_by_name(tmp_path):
    tokenizer = PixelTokenizer(PixelSettings())
    tokens = token_images(tmp_path / "tokens", tokenizer)
    spec = {"vocabulary_size": 256, "event_shape": (8, 8), "context": 64}
    names = list("9876543210x")
    folder, model = model_folder(
        tmp_path / "model", tokenizer, "imagegpt-debug", names, classes=11, **spec
    )
    stage = stage_of(tmp_path / "out", model=folder, tokens=tokens)
    evaluate.main(Config(batch_size=7), stage)
    pixels, labels = images("validation")
    x = torch.from_numpy(pixels[..., 0].astype(np.int64))
    with torch.no_grad():
        nats = -model.log_prob(x, 9 - torch.tensor(labels)).double().numpy()
    found = figures(stage.folder)
    assert found["nats"] == pytest.approx(nats.mean(), rel=1e-5)
    three = nats[np.array(labels) == 3].mean()
    assert found["nats_per_token.class.3"] == pytest.approx(three, rel=1e-5)

    folder, _ = model_folder(
        tmp_path / "fewer", tokenizer, "imagegpt-debug", list("012345678"), classes=9, **spec
    )
    with pytest.raises(StageFailed, match="has a class '9', which the model does not know .it kn"):
        evaluate.main(Config(), stage_of(tmp_path / "out2", model=folder, tokens=tokens))


def test_raw_data_of_another_modality_are_refused(text, tmp_path):
    folder, *_ = text
    stage = stage_of(tmp_path / "out", model=folder, data=raw_images(tmp_path / "i"))
    with pytest.raises(StageFailed, match="holds image, the model's tokenizer is one of text"):
        evaluate.main(Config(), stage)


# --- from the command line ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_another_request_is_refused(
    text, tmp_path, monkeypatch, run
):
    folder, *_ = text
    monkeypatch.setitem(TEXTS, "validation", [f"{i} held out, and long. " * 5 for i in range(150)])
    tokens = token_texts(tmp_path / "many")
    out = tmp_path / "figures"
    command = ["evaluate", folder, "--tokens", tokens, "--set", "batch_size=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "chainrule.pipeline", *map(str, command), "--out", str(out)],
        stderr=subprocess.DEVNULL,
    )
    growing = tmp_path / "figures.partial" / "factors" / "part-0-of-1.f32.partial"
    while not growing.exists() or growing.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.01)
    code, message = run(*command, "--out", out)
    assert code == 2
    assert f"process {process.pid}" in message
    process.kill()
    process.wait()
    assert not out.exists()
    for other in (["--set", "stride=3"], ["--data", raw_texts(tmp_path / "raw of many")]):
        code, message = run(*command, *other, "--out", out)
        assert code == 2
        assert re.search(
            r"figures\.partial: .*another request left \(other: .*(stride|data)", message
        )
    scored = []
    original = evaluate.score_documents

    def counts(*given):
        for nats in original(*given):
            scored.append(1)
            yield nats

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_documents", counts)
        code, message = run(*command, "--out", out)
    assert code == 0, message
    assert 0 < len(scored) < 150
    assert run(*command, "--out", tmp_path / "whole")[0] == 0
    assert figures(out) == figures(tmp_path / "whole")
    assert sorted(p.name for p in out.iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert not growing.parents[1].exists()
    code, message = run(*command, "--out", out)
    assert code == 2
    assert "is there already" in message


def test_probe_of_the_command_line_is_the_stages_setting(tmp_path, run):
    raw = raw_images(tmp_path / "raw")
    sizes = {"vocabulary_size": 16, "event_shape": (8, 8), "context": 64, "layers": 1}
    folder, _ = model_folder(
        tmp_path / "model", PixelTokenizer(PixelSettings(levels=16)), "imagegpt-debug", **sizes
    )
    stage = stage_of(tmp_path / "stage", model=folder, data=raw)
    evaluate.main(Config(probe={"train": 60}, factors=False), stage)
    command = ["evaluate", folder, "--data", raw, "--set", "factors=false", "--out"]
    code, message = run(*command, tmp_path / "a", "--probe", "--set", "probe.train=60")
    assert code == 0, message
    assert figures(tmp_path / "a") == figures(stage.folder)
    assert (tmp_path / "a" / "probe.png").exists()
    code, message = run(
        "evaluate", folder, "--tokens", tmp_path, "--probe", "--out", tmp_path / "b"
    )
    assert code == 2
    assert "--probe needs labelled images" in message
