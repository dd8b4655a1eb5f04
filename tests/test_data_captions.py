"""Captions of picture files: where they lie, whose they are, and what is said of faults."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from chainrule.pipeline.data.images import ImageFolder
from chainrule.pipeline.data.sources import SourceError, Unreadable


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def opened(path: Path, captions: Any) -> Any:
    return ImageFolder(kind="image-folder", path=path, captions=captions).open()


def meta(source: Any, i: int) -> dict[str, Any]:
    found: dict[str, Any] = source.read(i).members["json"]
    return found


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "squares"
    folder.mkdir()
    for i, word in enumerate(("dark", "grey", "light", "dark")):
        (folder / f"{i:03d}.png").write_bytes(png(i))
        (folder / f"{i:03d}.txt").write_text(f"a {word} square\n\n  {word} all over \n")
    source = opened(folder, "beside")
    assert source.classes is None
    assert meta(source, 1) == {
        "source": "001.png",
        "captions": ["a grey square", "grey all over"],
    }
    (folder / "001.txt").rename(folder / "001.TXT")
    assert meta(opened(folder, "beside"), 1)["captions"][1] == "grey all over"
    (folder / "002.txt").unlink()
    (folder / "003.txt").write_bytes(b"\xff\xfe")
    (folder / "000.txt").write_text(" \n")
    source = opened(folder, "beside")
    for i, words in ((0, "no caption"), (2, "no caption"), (3, "003.txt: not UTF-8")):
        with pytest.raises(Unreadable, match=words):
            source.read(i)


def coco(names: list[str]) -> dict[str, Any]:
    return {
        "images": [{"id": 10 * i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 10 * i, "caption": f"number {i}, {take} \n"}
            for take in ("once", "twice")
            for i in range(len(names))
        ],
    }


def test_cocos_annotations_in_the_tar_or_on_disk(tmp_path: Path) -> None:
    names = ["a.png", "b.png"]
    (tmp_path / "val.json").write_text(json.dumps(coco(names)))
    with tarfile.open(tmp_path / "coco.tar", "w") as tar:
        for name, data in (
            *((f"val2017/{name}", png(9)) for name in names),
            ("captions/val.json", json.dumps(coco(names)).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    for where in ("captions/val.json", tmp_path / "val.json"):
        source = opened(tmp_path / "coco.tar", where if isinstance(where, str) else [where])
        assert meta(source, 1)["captions"] == ["number 1, once", "number 1, twice"]
        settings = ImageFolder(
            kind="image-folder", path=tmp_path / "coco.tar", captions=[Path(where)]
        )
        on_disk = [] if isinstance(where, str) else [tmp_path / "val.json"]
        assert settings.files() == [tmp_path / "coco.tar", *on_disk]


def test_lines_of_file_name_and_text(tmp_path: Path) -> None:
    folder = tmp_path / "squares"
    for name in ("one/x.png", "two/x.png", "two/y.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(1))
    lines = folder / "metadata.jsonl"
    rows = [
        {"file_name": "one/x.png", "text": "first"},
        {"file_name": "./two/x.png", "caption": ["second", "again"]},
        {"file_name": "y.png", "text": "third"},
    ]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = opened(folder, ["metadata.jsonl"])
    assert [meta(source, i)["captions"] for i in range(3)] == [
        ["first"],
        ["second", "again"],
        ["third"],
    ]
    settings = ImageFolder(kind="image-folder", path=folder, captions=[lines])
    assert lines in settings.files()
    # Relative to its own folder; nothing for a picture of the same name elsewhere; lines that only
    # str.splitlines would cut; nothing where there is no text.
    of_two = folder / "two" / "metadata.jsonl"
    of_two.write_text(
        "\ufeff"
        + json.dumps({"file_name": "x.png", "text": "a line\u2028in two"}, ensure_ascii=False)
        + "\n"
        + json.dumps({"file_name": "three/y.png", "text": "of another"})
        + "\n"
        + json.dumps({"file_name": "y.png", "text": [None, "half \ud83c  an emoji"]})
    )
    source = opened(folder, ["two/metadata.jsonl"])
    assert meta(source, 1)["captions"] == ["a line in two"]
    assert meta(source, 2)["captions"] == ["half \ufffd an emoji"]
    with pytest.raises(Unreadable, match="no caption"):
        source.read(0)
    of_two.write_text(json.dumps({"file_name": "y.png", "text": None}))
    with pytest.raises(SourceError, match="holds no caption"):
        opened(folder, ["two/metadata.jsonl"])
    of_two.unlink()
    for row, words in (
        ({"file_name": "x.png", "text": "which?"}, "'x.png' is the name of 2 pictures"),
        ({"file": "x.png"}, r"metadata\.jsonl:1: not of the form of .*no 'text'"),
        ({"file_name": "x.png", "text": 3}, r"not of the form .*3 is no text"),
    ):
        lines.write_text(json.dumps(row))
        with pytest.raises(SourceError, match=words):
            opened(folder, [lines])
    lines.write_text("{")
    with pytest.raises(SourceError, match=r"metadata\.jsonl:1: not JSON"):
        opened(folder, [lines])
    lines.write_text(json.dumps({"file_name": "elsewhere.png", "text": "x"}))
    with pytest.raises(SourceError, match="no caption is of a picture .*'elsewhere.png'"):
        opened(folder, [lines])
    with pytest.raises(SourceError, match=r"none\.json: no such file, nor in"):
        opened(folder, [folder / "none.json"])


@pytest.mark.parametrize("given", ["besides", [Path("captions.csv")], [], 3])
def test_settings_of_captions_that_mean_nothing_are_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="captions"):
        ImageFolder(kind="image-folder", path=tmp_path, captions=given)
