"""Files under a real, small, trained decoder: there and back, refused where they must be."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from chainrule.jobs import compress, decompress
from chainrule.jobs.compress import CompressError, compress_files
from chainrule.jobs.decompress import decompress_file
from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.coding import container
from chainrule.pipeline.coding.archive import contract
from chainrule.pipeline.coding.blocks import Layout
from chainrule.pipeline.coding.header import Entry, Header
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.stage import Stage
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer

LETTERS = b"etaoin shrdlu,\n"
CHAIN = np.random.default_rng(7).dirichlet(np.full(len(LETTERS), 0.15), len(LETTERS))


def prose(n: int, seed: int) -> bytes:
    """A Markov chain of letters, about 2 bits each: a decoder learns it, zstd does not."""
    rng = np.random.default_rng(seed)
    at, written = 0, bytearray()
    for _ in range(n):
        at = rng.choice(len(LETTERS), p=CHAIN[at])
        written.append(LETTERS[at])
    return bytes(written)


def trained(steps: int = 150, seed: int = 0, context: int = 32):
    """A byte-level decoder that has seen such prose, for about 3 seconds."""
    model = build(
        "gpt2-debug", seed=seed, vocabulary_size=258, context=context, layers=1, width=32, heads=2
    )
    data = torch.tensor(list(prose(20_000, seed=100)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - context, (16,), generator=generator)
        x = torch.stack([data[s : s + context] for s in starts])
        loss = -model.log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def folder_of(model, tokenizer, path, **card):
    tokenizer.save(path / "tokenizer")
    save(
        model,
        path,
        {
            "modality": tokenizer.modality,
            "vocabulary": tokenizer.vocabulary,
            "grid": None,
            "classes": None,
            "tokenizer": {
                "kind": tokenizer.kind,
                "fingerprint": tokenizer.fingerprint,
                "path": "tokenizer",
            },
            **card,
        },
    )
    return path


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return folder_of(trained(), ByteTokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "prose.txt").write_bytes(prose(1500, seed=1))
    (folder / "other.txt").write_bytes(prose(700, seed=2))
    (folder / "binary.bin").write_bytes(np.random.default_rng(0).bytes(500))
    (folder / "empty").write_bytes(b"")
    return sorted(folder.iterdir())


def test_files_come_back_at_the_models_own_price(model_folder, files, tmp_path):
    out = tmp_path / "files.cr"
    reports = compress_files(model_folder, files, out, layout=Layout(rows=4, least_row=200))
    by_name = {r.name: r for r in reports}
    assert by_name["prose.txt"].how == "model (bytes)"
    assert by_name["prose.txt"].bits_per_byte < 4
    for r in reports:
        if r.ideal_bytes is not None:
            assert r.coded_bytes <= r.ideal_bytes * 1.001 + 64
    assert by_name["binary.bin"].how == "raw"
    assert "larger under the model" in by_name["binary.bin"].why
    restored = tmp_path / "restored"
    targets = decompress_file(out, model_folder, restored)
    assert [t.name for t in targets] == [f.name for f in files]
    for file in files:
        assert (restored / file.name).read_bytes() == file.read_bytes()
    lines = list(compress.printed(reports, out.stat().st_size))
    assert len(lines) == len(files) + 1
    assert "bits a byte" in lines[0]


def images(tmp_path, number: int, *channels: int):
    """Noise, 8 x 8: what no codec shrinks, so that models untrained code it."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = tmp_path / f"{i:05d}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, *channels), dtype=np.uint8)).save(path)
        yield path


IMAGE_MODELS = {
    "imagegpt-debug": {"vocabulary_size": 256, "event_shape": [8, 8], "context": 64, "layers": 1},
    "pixelcnn-debug": {"event_shape": [8, 8], "vocabulary_size": 256},
    "gated-pixelcnn-debug": {"event_shape": [8, 8], "vocabulary_size": 256, "classes": 3},
    "pixelcnnpp-debug": {"vocabulary_size": 256},
    "made-debug": {"vocabulary_size": 256},  # 4 x 4: a picture is four tiles
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", IMAGE_MODELS)
def test_containers_of_image_models_are_their_bits_and_64_bytes(preset, tmp_path):
    """One picture alone, and many: bytes on disk, the name of each counted beside."""
    changes = IMAGE_MODELS[preset]
    names = [f"class {i}" for i in range(changes.get("classes", 0))] or None
    model = folder_of(
        build(preset, seed=0, **changes),
        PixelTokenizer(PixelSettings()),
        tmp_path / "model",
        classes=names,
    )
    pictures = list(images(tmp_path, 40, *([3] if preset == "pixelcnnpp-debug" else [])))
    for files, beside in ((pictures[:1], 64 + 9), (pictures, 64 + 40 * 7)):
        out = tmp_path / f"{len(files)}.cr"
        reports = compress_files(model, files, out)
        assert all(r.how == "model (png)" for r in reports)
        ideal = sum(r.ideal_bytes for r in reports)
        assert out.stat().st_size <= 1.001 * ideal + beside
        for target in decompress_file(out, model, tmp_path / f"back {len(files)}"):
            assert target.read_bytes() == (tmp_path / target.name).read_bytes()


def test_the_container_of_one_text_is_its_bits_and_64_bytes(model_folder, files, tmp_path):
    for layout in (Layout(), Layout(rows=3, least_row=77, overlap=0.25)):
        out = tmp_path / "one.cr"
        [report] = compress_files(model_folder, files[3:4], out, layout=layout, force=True)
        assert out.stat().st_size <= 1.001 * report.ideal_bytes + 64 + len("prose.txt")
        assert container.read(out).header.folder in ("", str(model_folder))


@pytest.mark.slow
def test_the_model_is_looked_for_where_it_lay_and_nearby(files, tmp_path, monkeypatch):
    """The hint is kept where there is room; a small container finds its model by fingerprint."""
    home = tmp_path / "home"
    small = folder_of(trained(steps=100), ByteTokenizer(), home / "runs" / "code" / "model")
    texts = [tmp_path / f"{i}.txt" for i in range(8)]
    for i, text in enumerate(texts):
        text.write_bytes(prose(600, seed=i))
    compress_files(small, texts, tmp_path / "many.cr")
    assert container.read(tmp_path / "many.cr").header.folder == str(small)
    assert len(decompress_file(tmp_path / "many.cr", None, tmp_path / "back")) == 8
    long = home / ("a long name " * 8)
    small.rename(long)
    compress_files(long, files[3:4], tmp_path / "one.cr")
    assert container.read(tmp_path / "one.cr").header.folder == ""
    monkeypatch.chdir(home)
    decompress_file(tmp_path / "one.cr", None, tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_bytes() == files[3].read_bytes()
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "away").mkdir()
    (tmp_path / "one.cr").rename(tmp_path / "away" / "one.cr")
    with pytest.raises(CompressError, match=r"model is not found.*--model"):
        decompress_file(tmp_path / "away" / "one.cr", None, tmp_path / "never.txt")


@pytest.mark.slow
def test_another_process_decodes_the_same(model_folder, files, tmp_path):
    out = tmp_path / "one.cr"
    compress_files(model_folder, files[3:4], out)
    restored = tmp_path / "again.txt"
    code = (
        "from pathlib import Path; from chainrule.jobs.decompress import decompress_file; "
        f"decompress_file(Path({str(out)!r}), None, Path({str(restored)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=model_folder)
    assert restored.read_bytes() == files[3].read_bytes()


def test_bad_requests_are_refused_and_leave_nothing(model_folder, files, tmp_path):
    out = tmp_path / "files.cr"
    with pytest.raises(CompressError, match="no files"):
        compress_files(model_folder, [], out)
    with pytest.raises(CompressError, match="nowhere.txt: cannot be read"):
        compress_files(model_folder, [tmp_path / "nowhere.txt"], out)
    with pytest.raises(CompressError, match="cannot be read"):
        compress_files(model_folder, [tmp_path], out)
    with pytest.raises(CompressError, match="given twice"):
        compress_files(model_folder, [files[0], files[0]], out)
    with pytest.raises(CompressError, match="no such folder"):
        compress_files(model_folder, files, tmp_path / "no" / "files.cr")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    out.write_bytes(b"precious")
    with pytest.raises(CompressError, match="exists"):
        compress_files(model_folder, files, out)
    with pytest.raises(CompressError, match="is one of the files to compress"):
        compress_files(model_folder, [*files, out], out, force=True)
    link = tmp_path / "link.cr"
    link.symlink_to(out)
    with pytest.raises(CompressError, match="is one of the files to compress"):
        compress_files(model_folder, [out], link, force=True)
    assert out.read_bytes() == b"precious"


def test_a_pipe_is_refused_and_not_waited_for(model_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CompressError, match="pipe: not a regular file"):
        compress_files(model_folder, [tmp_path / "pipe"], tmp_path / "pipe.cr")


def test_a_container_is_refused_before_anything_is_written(model_folder, files, tmp_path):
    out = tmp_path / "files.cr"
    compress_files(model_folder, files[2:], out)
    restored = tmp_path / "restored"
    restored.mkdir()
    other = folder_of(trained(steps=1, seed=5), ByteTokenizer(), tmp_path / "other")
    mine = Artifact.bare(model_folder).card["fingerprint"][:16]
    theirs = Artifact.bare(other).card["fingerprint"][:16]
    with pytest.raises(
        CompressError, match=f"{mine}.*{theirs}; name the right one with --model, or leave"
    ):
        decompress_file(out, other, restored)
    with pytest.raises(CompressError, match="not a model folder"):
        decompress_file(out, tmp_path, restored)
    damaged = tmp_path / "damaged.cr"
    data = bytearray(out.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CompressError, match="damaged"):
        decompress_file(damaged, model_folder, restored)
    assert list(restored.iterdir()) == []
    (restored / "prose.txt").write_text("precious")
    with pytest.raises(CompressError, match="exists"):
        decompress_file(out, model_folder, restored)
    assert [p.name for p in restored.iterdir()] == ["prose.txt"]
    assert (restored / "prose.txt").read_text() == "precious"
    (restored / "prose.txt").unlink()
    last = restored / files[-1].name
    last.mkdir()  # in the place of the last file: those before it are not written either
    with pytest.raises(RequestError, match="is a folder"):
        decompress_file(out, model_folder, restored, force=True)
    assert list(restored.iterdir()) == [last]
    with pytest.raises(RequestError, match="is a file, not a folder"):
        decompress_file(out, model_folder, out / "below")
    with pytest.raises(RequestError, match="is a folder"):
        compress_files(model_folder, files, restored, force=True)


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/../../b", "", "a//b"])
def test_names_that_lead_elsewhere_are_refused(model_folder, tmp_path, name):
    model = trained(steps=1)
    header = Header(contract(model), Layout().model_dump(), [], [Entry(name, 1, "raw")])
    path = tmp_path / "in" / "hostile.cr"
    path.parent.mkdir()
    container.write(path, header, [(b"x", b"", b"")])
    with pytest.raises(CompressError, match="refused"):
        decompress_file(path, model_folder, tmp_path / "in")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_settings_of_compress_are_obeyed_or_refused(model_folder, files, tmp_path, run):
    out, back = tmp_path / "one.cr", tmp_path / "back"
    given = ("compress", model_folder, files[3], "-o", out)
    for wrong, said in (
        ("device=nonsense", "'nonsense'"),
        ("device=cuda:77", "cuda:77"),
        ("dtype=float8", "dtype"),
        ("split=train", "--set split"),
        ("limit=3", "--set limit"),
        ("row=3", "'row'; did you mean 'rows'"),
    ):
        code, message = run(*given, "--set", wrong)
        assert code == 2, message
        assert said in message
        assert "Traceback" not in message
        assert not out.exists()
    code, message = run(*given, "--set", "dtype=bfloat16", "--set", "device=cpu", "--set", "rows=2")
    assert code == 0, message
    header = container.read(out).header
    assert header.contract["dtype"] == "bfloat16"
    assert header.contract["device"] == "cpu"
    assert header.layout["rows"] == 2
    code, message = run("decompress", out, "-m", model_folder, "-o", back, "--device", "nonsense")
    assert code == 2
    assert "'nonsense'" in message
    assert not back.exists()
    assert run("decompress", out, "-m", model_folder, "-o", back, "--device", "cpu")[0] == 0
    assert (back / "prose.txt").read_bytes() == files[3].read_bytes()


@pytest.mark.slow
def test_the_device_is_the_containers_unless_another_is_asked_for(
    model_folder, files, tmp_path, monkeypatch
):
    out = tmp_path / "one.cr"
    compress_files(model_folder, files[3:4], out, device="cpu")
    opened = []
    original = decompress.open_source

    def watched(folder, device, dtype):
        opened.append(device)
        return original(folder, "cpu", dtype)

    monkeypatch.setattr(decompress, "open_source", watched)
    decompress_file(out, model_folder, tmp_path / "a.txt")
    decompress_file(out, model_folder, tmp_path / "b.txt", device="auto")
    assert opened == ["cpu", "auto"]
    found = container.read(out)
    found.header.contract.update(device="cuda", accelerator="NVIDIA H200")
    container.write(out, found.header, found.streams)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompressError, match=r"NVIDIA H200.*--device cpu"):
        decompress_file(out, model_folder, tmp_path / "c.txt")
    decompress_file(out, model_folder, tmp_path / "c.txt", device="cpu")
    for key, wrong in (("device", "meta"), ("dtype", "nonsense")):
        found.header.contract.update({"device": "cpu", "dtype": "float32", key: wrong})
        container.write(out, found.header, found.streams)
        with pytest.raises(CompressError, match=wrong):
            decompress_file(out, model_folder, tmp_path / "d.txt")


def test_a_file_that_changes_while_it_is_read_is_refused(
    model_folder, files, tmp_path, monkeypatch
):
    import os

    path = files[3]
    real = os.fstat

    def grows(descriptor):
        found = real(descriptor)
        with open(path, "ab") as file:
            file.write(b"more")
        return found

    with monkeypatch.context() as patch:
        patch.setattr("chainrule.jobs.compress.os.fstat", grows)
        with pytest.raises(CompressError, match="changed while"):
            compress_files(model_folder, [path], tmp_path / "x.cr")
    assert not (tmp_path / "x.cr").exists()


def test_verification_catches_a_model_that_is_not_the_same_twice(model_folder, files, tmp_path):
    """A cursor with noise stands for floats that differ between encode and decode."""
    out = tmp_path / "files.cr"
    original = compress.open_source

    def noisy(*args):
        source = original(*args)
        cursor = source.model.cursor
        calls = iter(range(10**6))

        def another(batch, cond=None):
            with torch.no_grad():
                source.model.start.add_(0.3 * (next(calls) % 2))
            return cursor(batch, cond)

        source.model.cursor = another
        return source

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "open_source", noisy)
        with pytest.raises((CompressError, compress.ContainerError)):
            compress_files(model_folder, files[3:4], out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_a_model_without_a_discrete_head_or_a_tokenizer_is_refused(files, tmp_path):
    density = build("made-mog-debug", seed=0)
    save(density, tmp_path / "density", {"tokenizer": None})
    with pytest.raises(CompressError, match="no tokenizer"):
        compress_files(tmp_path / "density", files, tmp_path / "x.cr")
    folder_of(build("made-mog-debug", seed=0), ByteTokenizer(), tmp_path / "mog")
    with pytest.raises(CompressError, match="no discrete head"):
        compress_files(tmp_path / "mog", files, tmp_path / "x.cr")
    several = {"tokenizer": None, "tokenizers": [{"modality": "text"}, {"modality": "image"}]}
    save(trained(steps=1), tmp_path / "both", several)
    with pytest.raises(CompressError, match=r"several tokenizers \(text, image\)"):
        compress_files(tmp_path / "both", files, tmp_path / "x.cr")
    broken = trained(steps=1)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    folder_of(broken, ByteTokenizer(), tmp_path / "broken")
    with pytest.raises(CompressError, match="cannot code anything: .* not a distribution"):
        compress_files(tmp_path / "broken", files, tmp_path / "x.cr")
    assert not (tmp_path / "x.cr").exists()


def test_the_stage_codes_the_documents_of_a_split(model_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, split in enumerate(("train", "validation")):
        with ShardWriter(data, number, split) as shard:
            for i in range(3):
                text = prose(300 + 100 * i, seed=10 * number + i)
                shard.write(key_of(10 * number + i), {"txt": text, "json": {}}, 0, len(text))
    finish(data, kind="raw", modality="text", shards=2)
    stage = Stage(
        name="compression",
        pipeline="p",
        job="compress",
        folder=tmp_path / "out",
        fingerprint="",
        inputs={"model": [Artifact.bare(model_folder)], "data": [Artifact.bare(data)]},
    )
    compress.main(compress.Config(), stage)
    found = json.loads((stage.folder / "compression.json").read_text())
    assert found["files"] == found["files_by_model"] == 3
    assert found["original_bytes"] == 300 + 400 + 500
    assert abs(found["overhead"]) < 0.03  # three bytes a file are lost at its end
    assert found["coded_bits_per_byte"] < 4
    assert stage.summary["decode_bytes_per_second"] > 0
    decompress_file(stage.folder / "validation.cr", model_folder, tmp_path / "back")
    assert (tmp_path / "back" / f"{key_of(10)}.txt").read_bytes() == prose(300, seed=10)
