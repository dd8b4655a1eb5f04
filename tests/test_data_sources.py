"""Sources: which inputs there are, what each becomes, and what is said of those that fail."""

import gzip
import io
import json
import os
import re
import shutil
import socket
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from pydantic import ValidationError

from chainrule.jobs.ingest import Config
from chainrule.pipeline.config import explain
from chainrule.pipeline.data.arrays import Arrays, Idx, SklearnDigits
from chainrule.pipeline.data.audio import AudioFolder, decode
from chainrule.pipeline.data.images import ImageFolder, Sprites
from chainrule.pipeline.data.parquet import ParquetText
from chainrule.pipeline.data.reader import Sample
from chainrule.pipeline.data.sources import Source, SourceError, Unreadable, split
from chainrule.pipeline.data.text import PythonStdlib, Text
from chainrule.pipeline.sources import source_digest


def texts(source: Source) -> list[str]:
    return [source.read(i).members["txt"].decode() for i in range(len(source))]


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 3), value).save(path)


# Splits


def test_the_split_is_by_seed_exact_and_in_order() -> None:
    source = SklearnDigits(kind="sklearn-digits").open()
    parts = split(source, 0.15, 0, False)
    assert {name: len(numbers) for name, numbers in parts.items()} == {
        "train": 1527,
        "validation": 270,
    }
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))
    assert (np.diff(parts["validation"]) > 0).all()
    again, other = split(source, 0.15, 0, False), split(source, 0.15, 1, False)
    assert np.array_equal(again["validation"], parts["validation"])
    assert not np.array_equal(other["validation"], parts["validation"])
    tail = split(source, 0.15, 0, True)["validation"]
    assert np.array_equal(tail, np.arange(1527, 1797))
    assert len(split(source, 0.0, 0, False)["validation"]) == 0


# Files and classes


def test_the_class_of_a_picture_is_its_subfolder(tmp_path: Path) -> None:
    for name in ("cat/2.png", "cat/deep/1.png", "ant/1.png", ".hidden/1.png", "cat/.x.png"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    source = ImageFolder(kind="image-folder", path=tmp_path).open()
    assert [source.where(i) for i in range(len(source))] == [
        "ant/1.png",
        "cat/2.png",
        "cat/deep/1.png",
    ]
    assert source.classes == ["ant", "cat"]
    assert source.read(1).members["json"] == {"source": "cat/2.png", "label": 1, "class": "cat"}


def test_a_folder_without_subfolders_has_no_classes(tmp_path: Path) -> None:
    picture(tmp_path / "1.PNG")
    source = ImageFolder(kind="image-folder", path=tmp_path).open()
    assert source.classes is None
    assert source.read(0).members["json"] == {"source": "1.PNG"}
    picture(tmp_path / "cat" / "2.png")
    with pytest.raises(SourceError, match=r"1.PNG: lies beside the class folders"):
        ImageFolder(kind="image-folder", path=tmp_path).open()


def test_classes_by_pattern_and_splits_by_folder(tmp_path: Path) -> None:
    for name in ("train/7_a.png", "train/3_b.png", "test/7_c.png"):
        picture(tmp_path / name)
    source = ImageFolder(
        kind="image-folder",
        path=tmp_path,
        class_pattern=r"^(\d)_",
        splits={"train": "train", "test": "validation"},
    ).open()
    assert source.classes == ["3", "7"]
    parts = split(source, None, 0, False)
    assert [source.where(int(i)) for i in parts["validation"]] == ["test/7_c.png"]
    given = {"kind": "image-folder", "path": tmp_path, "splits": {"train": "train"}}
    with pytest.raises(ValidationError, match="the source's `splits` say what is held out"):
        Config(source=given, validation=0.34)
    with pytest.raises(SourceError, match=r"class_pattern '\(x\)' finds no group"):
        ImageFolder(kind="image-folder", path=tmp_path, class_pattern="(x)").open()
    picture(tmp_path / "other" / "1.png")
    with pytest.raises(SourceError, match=r"other/1.png: not below one of the split folders"):
        ImageFolder(kind="image-folder", path=tmp_path, splits={"train": "train"}).open()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_tar_is_read_as_its_folder(tmp_path: Path, suffix: str) -> None:
    for name in ("a/1.png", "b/1.png"):
        picture(tmp_path / "folder" / name, ord(name[0]))
    path = tmp_path / f"pictures{suffix}"
    with tarfile.open(path, "w" if suffix == ".tar" else "w:gz") as archive:
        archive.add(tmp_path / "folder", ".")
        link = tarfile.TarInfo("b/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    settings = ImageFolder(kind="image-folder", path=path)
    packed, plain = settings.open(), ImageFolder(kind="image-folder", path=path.parent / "folder")
    assert settings.files() == [path]
    assert [packed.read(i) for i in range(2)] == [plain.open().read(i) for i in range(2)]
    assert len(packed) == 2
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(SourceError, match="not a whole tar"):
        settings.open()


@pytest.mark.parametrize("kind", [ImageFolder, AudioFolder, Text])
def test_missing_and_empty_folders_are_one_line(kind: type, tmp_path: Path) -> None:
    name = {ImageFolder: "image-folder", AudioFolder: "audio-folder", Text: "text"}[kind]
    for method in ("open", "files"):
        with pytest.raises(SourceError) as missing:
            getattr(kind(kind=name, path=tmp_path / "none"), method)()
        with pytest.raises(SourceError) as empty:
            getattr(kind(kind=name, path=tmp_path), method)()
        assert str(missing.value) == f"{tmp_path / 'none'}: no such file or folder"
        assert str(empty.value).startswith(f"{tmp_path}: no files that end in")
        assert str(empty.value).endswith("the folder is empty")
        assert "\n" not in str(empty.value)


def places(source: Source) -> list[str]:
    return [source.where(i) for i in range(len(source))]


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    root, beside = tmp_path / "root", tmp_path / "beside"
    for path in (
        root / "cat/1.png",
        root / "dog/deep/2.png",
        beside / "3.png",
        beside / "in/4.png",
    ):
        picture(path)
    (root / "ant").symlink_to(root / "cat")  # read as cat
    (root / "cat" / "again").symlink_to(root)  # a circle
    (root / "cat" / "same.png").symlink_to("1.png")
    (root / "fox").symlink_to(beside)
    (root / "gnu").symlink_to(beside)  # read as fox
    (beside / "in" / "up").symlink_to(beside)
    (root / ".hidden").symlink_to(tmp_path)
    settings = ImageFolder(kind="image-folder", path=root)
    wanted = ["cat/1.png", "cat/same.png", "dog/deep/2.png", "fox/3.png", "fox/in/4.png"]
    assert places(settings.open()) == wanted
    assert settings.open().classes == ["cat", "dog", "fox"]
    assert settings.files() == [root / name for name in wanted]
    (tmp_path / "link").symlink_to(root)
    assert places(ImageFolder(kind="image-folder", path=tmp_path / "link").open()) == wanted


def test_a_folder_beside_that_holds_the_tree_adds_what_is_beside(tmp_path: Path) -> None:
    picture(tmp_path / "root" / "a" / "1.png")
    picture(tmp_path / "other" / "2.png")
    (tmp_path / "root" / "up").symlink_to(tmp_path)
    source = ImageFolder(kind="image-folder", path=tmp_path / "root").open()
    assert places(source) == ["a/1.png", "up/other/2.png"]


def test_what_is_no_file_is_unreadable_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere.png")
    (tmp_path / "c.png").symlink_to("c.png")
    os.mkfifo(tmp_path / "d.png")
    monkeypatch.chdir(tmp_path)  # a socket's path has 100 letters
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("e.png")
    (tmp_path / "f.png").symlink_to("/dev/zero")
    source = ImageFolder(kind="image-folder", path=tmp_path).open()
    faults = [
        "a link to nowhere.png, which is not there",
        "Too many levels of symbolic links",
        "a named pipe, not a file",
        "a socket, not a file",
        "a device, not a file",
    ]
    assert source.read(0).members["json"] == {"source": "a.png"}
    for i, fault in enumerate(faults, 1):
        with pytest.raises(Unreadable, match=fault):
            source.read(i)
    for suffix in (".txt", ".jsonl", ".txt.gz"):
        os.mkfifo(tmp_path / f"x{suffix}")
    documents = Text(kind="text", path=tmp_path, document="line").open()
    assert places(documents) == ["x.jsonl", "x.txt", "x.txt.gz"]
    for i in range(3):
        with pytest.raises(Unreadable, match="a named pipe, not a file"):
            documents.read(i)
    os.mkfifo(tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"x\.parquet: a named pipe, not a file"):
        ParquetText(kind="parquet-text", path=tmp_path).open()
    with pytest.raises(SourceError, match=r"d\.png: not a whole PNG \(a named pipe"):
        Sprites(kind="sprites", path=tmp_path, pattern="d.png").open()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "pictures")
    picture(tmp_path / "pictures" / "a" / "1.png")
    os.makedirs(folder + b"/caf\xe9")
    for name in (b"/a/\xe9\\.png", b"/caf\xe9/1.png"):
        shutil.copy(folder + b"/a/1.png", folder + name)
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        archive.add(tmp_path / "pictures", ".")
    for path in (tmp_path / "pictures", tmp_path / "pictures.tar"):
        source = ImageFolder(kind="image-folder", path=path).open()
        assert places(source) == ["a/1.png", r"a/\xe9\\.png", r"caf\xe9/1.png"]
        assert source.classes == ["a", r"caf\xe9"]
        assert source.read(0).members["json"]["class"] == "a"
        for i in (1, 2):
            with pytest.raises(Unreadable, match="its name is not UTF-8; rename it"):
                source.read(i)


def test_the_hash_of_sources_takes_what_is_no_file_by_its_name(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    cache = tmp_path / "runs" / ".sources" / "data.json"
    cache.parent.parent.mkdir()
    settings = ImageFolder(kind="image-folder", path=tmp_path / "in")
    found = [source_digest(settings.files(), cache)]
    (tmp_path / "in" / "b.png").symlink_to("nowhere.png")
    (tmp_path / "in" / "c.png").symlink_to("c.png")
    os.mkfifo(tmp_path / "in" / "d.png")
    os.link(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/\xe9.png")
    found.append(source_digest(settings.files(), cache))
    assert source_digest(settings.files(), cache) == found[1]
    cache.unlink()
    assert source_digest(settings.files(), cache) == found[1]
    picture(tmp_path / "in" / "nowhere.png", 7)  # the link leads somewhere now
    found.append(source_digest(settings.files(), cache))
    assert len(set(found)) == 3


# Settings


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ({"kind": "image-folder", "size": 0}, "'source.size': a side has at least one pixel"),
        ({"kind": "image-folder", "size": -4}, "a side has at least one pixel"),
        ({"kind": "image-folder", "size": [0, 32]}, "a side has at least one pixel"),
        ({"kind": "parquet-images", "size": 0}, "a side has at least one pixel"),
        ({"kind": "sprites", "size": [32, 0]}, "a side has at least one pixel"),
        ({"kind": "sprites", "pattern": ""}, "'source.pattern': a file name with"),
        ({"kind": "sprites", "pattern": "/*.png"}, "'source.pattern': a file name with"),
        ({"kind": "image-folder", "class_pattern": "("}, "'source.class_pattern': not a regular"),
        ({"kind": "audio-folder", "class_pattern": "("}, "not a regular expression: missing \\)"),
        ({"kind": "audio-folder", "seconds": float("inf")}, "should be a finite number"),
    ],
)
def test_settings_that_cannot_work_are_refused(source: dict[str, Any], fault: str) -> None:
    given = {"source": {"path": "pictures", **source}}
    with pytest.raises(ValidationError) as error:
        Config.model_validate(given)
    (line,) = [line for _, line in explain(error.value, Config, given)]
    assert re.search(fault, line)


# Arrays


def test_sklearn_digits() -> None:
    from sklearn.datasets import load_digits

    source = SklearnDigits(kind="sklearn-digits").open()
    digits = load_digits()
    raw = source.read(5)
    image = Sample("0", raw.members).image()
    assert np.array_equal(np.round(image[..., 0] / (255 / 16)), digits.images[5])
    assert raw.members["json"] == {"source": "digits[5]", "label": 5, "class": "5"}
    assert [path.name for path in SklearnDigits(kind="sklearn-digits").files()] == ["digits.csv.gz"]


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def test_idx_with_its_own_split(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(np.array([1, 0, 2], np.uint8)))
    )
    settings = Idx(kind="idx", path=tmp_path)
    source = settings.open()
    assert source.split_of(0) is None
    assert np.array_equal(Sample("0", source.read(2).members).image()[..., 0], images[2])
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:1])))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([2], np.uint8)))
    source = settings.open()
    assert split(source, None, 0, False)["validation"].tolist() == [3]
    assert source.read(3).members["json"]["label"] == 2
    assert len(settings.files()) == 4
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images)[:-1])
    with pytest.raises(SourceError, match=r"59 bytes for shape \[3, 4, 5\]"):
        settings.open()
    (tmp_path / "train-images-idx3-ubyte").unlink()
    with pytest.raises(SourceError, match="no train-images-idx3-ubyte or .gz"):
        settings.files()


def test_npz_and_sprites(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 3, 3)).astype(np.uint8)
    labels = np.array([0, 1, 1, 0])
    np.savez(tmp_path / "a.npz", images=images, y=labels)
    source = Arrays(
        kind="arrays", path=tmp_path / "a.npz", labels="y", classes=["no", "yes"]
    ).open()
    assert source.read(1).members["json"]["class"] == "yes"
    Image.fromarray(images.reshape(4, 6, 3)).save(tmp_path / "sheet_0.png")
    (tmp_path / "labels.txt").write_text("0\n1\n1\n0\n")
    sprites = Sprites(kind="sprites", path=tmp_path, size=(2, 3), labels="labels.txt").open()
    for i in range(4):
        assert np.array_equal(Sample("0", sprites.read(i).members).image(), images[i])
        assert np.array_equal(Sample("0", source.read(i).members).image(), images[i])
    (tmp_path / "labels.txt").write_text("0\n1\n")
    with pytest.raises(SourceError, match="2 labels for 4 images"):
        Sprites(kind="sprites", path=tmp_path, size=(2, 3), labels="labels.txt").open()
    with pytest.raises(SourceError, match="no array 'x'; it holds images, y"):
        Arrays(kind="arrays", path=tmp_path / "a.npz", images="x").open()
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(SourceError, match="without pickle"):
        Arrays(kind="arrays", path=tmp_path / "o.npy").open()


# Text


def test_documents_are_files_lines_or_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    content = "one\r\ntwo\n\n\n three\t\n\u2581\U0001f600"
    path.write_bytes(content.encode())
    settings = {"kind": "text", "path": path}
    assert texts(Text(**settings).open()) == [content]
    lines = Text(**settings, document="line").open()
    assert texts(lines) == ["one\r", "two", " three\t", "\u2581\U0001f600"]
    assert lines.where(2) == "a.txt, line 5"
    paragraphs = Text(**settings, document="paragraph").open()
    assert texts(paragraphs) == ["one\r\ntwo\n", " three\t\n\u2581\U0001f600"]


@pytest.mark.parametrize("most", [4, 7, 30, 1000])
def test_cut_documents_join_to_the_whole(tmp_path: Path, most: int) -> None:
    content = "".join(f"line {i} äöü \U0001f600\n" * (i % 3) + "x" * (i % 40) for i in range(50))
    path = tmp_path / "a.txt"
    path.write_text(content)
    source = Text(kind="text", path=path, document_bytes=most).open()
    pieces = texts(source)
    assert "".join(pieces) == content
    assert all(len(piece.encode()) <= most for piece in pieces)


def test_json_lines_name_their_faults(tmp_path: Path) -> None:
    lines = ['{"text": "a\\u00e9"}', "", '{"body": "b"}', "{", '{"text": 3}', '{"text": "\\ud800"}']
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    source = Text(kind="text", path=path).open()
    assert len(source) == 5
    assert source.read(0).members["txt"].decode() == "aé"
    for i, fault in ((1, "no field 'text'"), (2, "not JSON"), (3, "is a int"), (4, "surrogate")):
        with pytest.raises(Unreadable, match=fault):
            source.read(i)
    assert source.where(1) == "a.jsonl, line 3"
    body = Text(kind="text", path=path, field="body").open()
    assert body.read(1).members["txt"] == b"b"


def test_invalid_utf8_is_named_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"b\xffd")
    source = Text(kind="text", path=tmp_path).open()
    with pytest.raises(Unreadable, match=r"not UTF-8 \(invalid start byte at byte 1\)"):
        source.read(1)
    assert texts(Text(kind="text", path=tmp_path, invalid="replace").open())[1] == "b\ufffdd"


def test_packed_files_and_files_larger_than_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zstandard

    monkeypatch.setattr("chainrule.pipeline.data.text.CHUNK", 50)
    lines = [json.dumps({"text": "x" * (i % 37), "n": i}) for i in range(40)]
    content = ("\n".join(lines) + "\n").encode()
    packed = {
        "a.jsonl": content,
        "b.jsonl.gz": gzip.compress(content),
        "c.jsonl.zst": zstandard.compress(content[:300]) + zstandard.compress(content[300:]),
    }
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
    source = Text(kind="text", path=tmp_path).open()
    assert texts(source) == 3 * ["x" * (i % 37) for i in range(40)]
    assert source.where(45) == "b.jsonl.gz, line 6"
    for name in ("b.jsonl.gz", "c.jsonl.zst"):
        (tmp_path / name).write_bytes(packed[name][:-9])
        source = Text(kind="text", path=tmp_path / name).open()
        with pytest.raises(Unreadable, match="damaged"):
            source.read(0)


def test_empty_texts_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(SourceError, match="holds no documents"):
        Text(kind="text", path=tmp_path).open()


def test_the_standard_library_is_itself() -> None:
    settings = PythonStdlib(kind="python-stdlib")
    source = settings.open()
    names = [source.where(i) for i in range(len(source))]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not any("/test/" in name or "site-packages" in name for name in names)
    total = sum(source.read(i).raw_bytes for i in range(len(source)))
    assert 8e6 < total < 20e6
    assert len(settings.files()) == len(source)
    decoder = source.read(names.index("json/decoder.py"))
    assert decoder.members["txt"].decode() == Path(json.decoder.__file__).read_text()


# Audio


def tone(rate: int, seconds: float = 0.25) -> np.ndarray:
    t = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)


def test_recordings_become_mono_16_bits_at_one_rate(tmp_path: Path) -> None:
    exact = np.random.default_rng(0).integers(-32768, 32768, 500).astype(np.int16)
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "0.wav", exact, 8000)
    soundfile.write(tmp_path / "a" / "1.flac", np.stack([tone(16000), -tone(16000)], 1), 16000)
    soundfile.write(tmp_path / "a" / "2.wav", tone(22050), 22050, subtype="FLOAT")
    soundfile.write(tmp_path / "a" / "3.ogg", tone(44100), 44100)
    source = AudioFolder(kind="audio-folder", path=tmp_path, sample_rate=8000).open()
    found = [Sample("0", source.read(i).members).audio() for i in range(4)]
    assert all(rate == 8000 for _, rate in found)
    assert np.array_equal(found[0][0], exact)
    assert np.abs(found[1][0]).max() <= 1  # opposite channels cancel
    for samples, error in ((found[2][0], 60), (found[3][0], 2000)):
        middle = slice(200, 1800)
        expected = tone(8000) * 32768
        assert len(samples) == 2000
        assert np.abs(samples[middle] - expected[middle]).max() < error
    assert source.read(0).members["json"] == {
        "source": "a/0.wav",
        "sample_rate": 8000,
        "samples": 500,
        "label": 0,
        "class": "a",
    }


def test_recordings_that_cannot_be_used(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(8000, 1.0), 8000, format="FLAC")
    (tmp_path / "cut.flac").write_bytes(buffer.getvalue()[:-3000])
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "long.wav", tone(8000, 3.0), 8000)
    nothing = np.zeros(0, np.float32)
    soundfile.write(tmp_path / "none.wav", nothing, 8000)
    soundfile.write(buffer := io.BytesIO(), tone(8000), 8000, format="WAV", subtype="PCM_16")
    (tmp_path / "short.wav").write_bytes(buffer.getvalue()[:-1000])
    source = AudioFolder(kind="audio-folder", path=tmp_path, max_seconds=2.0).open()
    faults = ("damaged|truncated", "damaged", "too long: 3 s", "no sound", "3000 of 4000 bytes")
    for i, fault in enumerate(faults):
        with pytest.raises(Unreadable, match=fault):
            source.read(i)


@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "GSM610"), ("WAV", "G721_32"), ("AIFF", "GSM610")]
)
def test_recordings_in_codecs_that_cannot_seek(format: str, subtype: str) -> None:
    soundfile.write(buffer := io.BytesIO(), tone(8000, 2.0), 8000, format=format, subtype=subtype)
    samples = decode(buffer.getvalue(), 8000, 3600)
    assert 16000 <= len(samples) < 16000 + 320  # a last block may be filled up
    assert np.abs(samples[400:15600] - tone(8000, 2.0)[400:15600] * 32768).mean() < 700
    with pytest.raises(Unreadable, match="too long: 2 s"):
        decode(buffer.getvalue(), 8000, 1)
    with pytest.raises(Unreadable, match="truncated"):
        decode(buffer.getvalue()[:-1000], 8000, 3600)


@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT")]
)
def test_recordings_cut_anywhere_are_refused(format: str, subtype: str) -> None:
    soundfile.write(buffer := io.BytesIO(), tone(8000, 1.0), 8000, format=format, subtype=subtype)
    whole = buffer.getvalue()
    assert len(decode(whole, 8000, 3600)) == 8000
    for share in (0.3, 0.5, 0.9, 0.99):
        with pytest.raises(Unreadable, match=r"truncated: \d+ of \d+ bytes of sound"):
            decode(whole[: int(share * len(whole))], 8000, 3600)


def test_an_aiff_that_was_written_to_a_pipe() -> None:
    """SoX leaves the size of the longest sound there is."""
    soundfile.write(buffer := io.BytesIO(), tone(8000), 8000, format="AIFF", subtype="PCM_16")
    whole = bytearray(buffer.getvalue())
    at = whole.index(b"SSND")
    whole[at + 4 : at + 8] = struct.pack(">I", 0x7F000000 + 8)
    assert len(decode(bytes(whole), 8000, 3600)) == 2000


def test_recordings_of_one_length(tmp_path: Path) -> None:
    sound = np.arange(1, 501, dtype=np.int16)
    soundfile.write(tmp_path / "short.wav", sound[:100], 1000)
    soundfile.write(tmp_path / "whole.wav", sound, 1000)
    source = AudioFolder(kind="audio-folder", path=tmp_path, sample_rate=1000, seconds=0.3).open()
    found = [Sample("0", source.read(i).members) for i in range(2)]
    assert found[0].audio()[0].tolist() == [*range(1, 101), *[0] * 200]
    assert found[1].audio()[0].tolist() == [*range(1, 301)]
    assert [f.members["json"]["recorded"] for f in found] == [100, 500]
