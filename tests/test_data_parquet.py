"""Parquet: texts and pictures by row, as files on a hub have them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from chainrule.pipeline.data.parquet import ParquetImages, ParquetText
from chainrule.pipeline.data.reader import Sample
from chainrule.pipeline.data.sources import SourceError, Unreadable, split


def write(path: Path, columns: dict[str, Any], rows: int = 2, notes: Any = None) -> Path:
    """In row groups of so many rows."""
    table = pa.table(columns)
    if notes is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(notes)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def texts(path: Path, **more: Any) -> Any:
    return ParquetText(kind="parquet-text", path=path, **more).open()


def pictures(path: Path, **more: Any) -> Any:
    return ParquetImages(kind="parquet-images", path=path, **more).open()


def test_texts_of_several_files_and_row_groups(tmp_path: Path) -> None:
    first = ["zero", "one\n", "", "třï 🦙", "four"]
    write(tmp_path / "b.parquet", {"text": ["five", "six"], "n": [1, 2]}, rows=1)
    write(tmp_path / "a.parquet", {"n": range(5), "text": first})
    source = texts(tmp_path)
    found = [source.read(i) for i in (6, 0, 3, 5, 1, 2, 4)]  # in any order
    assert [raw.members["txt"].decode() for raw in found] == [
        "six", "zero", "třï 🦙", "five", "one\n", "", "four",
    ]  # fmt: skip
    assert found[2].members["json"] == {"source": "a.parquet, row 3", "bytes": 10}
    assert found[2].raw_bytes == 10
    assert (len(source), source.where(6)) == (7, "b.parquet, row 1")
    assert len(texts(tmp_path / "b.parquet")) == 2
    large = pa.array(first[:2], pa.large_string())
    path = write(tmp_path / "c.parquet", {"body": large})
    assert texts(path, text="body").read(1).members["txt"] == b"one\n"


def test_rows_without_a_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x", None, "y"]})
    source = texts(path)
    with pytest.raises(Unreadable, match="column 'text' is null"):
        source.read(1)
    assert source.read(2).members["txt"] == b"y"
    data = bytearray(path.read_bytes())
    at = data.index(b"y", 4)
    data[at] = 0xFF  # in an uncompressed page it is the text; elsewhere the page is damaged
    path.write_bytes(data)
    with pytest.raises(Unreadable, match=r"damaged|not UTF-8"):
        texts(path).read(2)


@pytest.mark.parametrize(
    ("columns", "given", "fault"),
    [
        (
            {"body": ["x"], "n": [1]},
            {},
            r"a.parquet: no column 'text' \(it has: body, n\); name .* source.text",
        ),
        ({"text": [1]}, {}, r"column 'text' is int64; wanted is string or large_string"),
        ({"text": pa.array([], pa.string())}, {}, "holds no rows"),
        ({"text": ["x"]}, {"splits": {"train": "train"}}, "begins with none of splits"),
    ],
)
def test_texts_that_cannot_be_are_one_line(
    columns: Any, given: Any, fault: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(SourceError, match=fault) as error:
        texts(tmp_path, **given)
    assert "\n" not in str(error.value)


def test_files_that_are_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder"):
        texts(tmp_path / "none")
    with pytest.raises(SourceError, match=r"no files that end in \.parquet"):
        texts(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"a\.parquet: not whole Parquet") as error:
        texts(tmp_path)
    assert "\n" not in str(error.value)


def test_splits_by_the_names_of_files(tmp_path: Path) -> None:
    """As the hub lays them out."""
    write(tmp_path / "data" / "train-00000-of-00002.parquet", {"text": ["a", "b"]})
    write(tmp_path / "data" / "train-00001-of-00002.parquet", {"text": ["c"]})
    write(tmp_path / "data" / "test-00000-of-00001.parquet", {"text": ["d"]})
    source = texts(tmp_path, splits={"data/train": "train", "data/test": "validation"})
    found = split(source, None, 0, False)
    assert found["validation"].tolist() == [0]
    assert found["train"].tolist() == [1, 2, 3]
    assert source.read(0).members["txt"] == b"d"


def test_pictures_with_their_classes(tmp_path: Path) -> None:
    images = [{"bytes": picture(n), "path": f"{n}.png"} for n in (7, 8, 9)]
    notes = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    path = write(tmp_path / "a.parquet", {"image": images, "label": [1, 0, 1]}, notes=notes)
    source = pictures(path, label="label")
    assert source.classes == ["cat", "dog"]
    raw = source.read(2)
    assert raw.members["json"] == {"source": "a.parquet, row 2", "label": 1, "class": "dog"}
    assert (Sample("0", raw.members).image() == 9).all()
    assert pictures(path).classes is None
    assert pictures(path, size=2, channels=1).read(0).members["json"] == {
        "source": "a.parquet, row 0"
    }
    # without notes, or with too few names in them, numbers are names
    plain = {"image": [picture(1), picture(2)], "fine": [3, 0]}
    assert pictures(write(tmp_path / "b.parquet", plain), label="fine").classes == list("0123")
    named = {"image": [picture(1), picture(2)], "kind": ["b", "a"]}
    source = pictures(write(tmp_path / "c.parquet", named), label="kind")
    assert source.classes == ["a", "b"]
    assert source.read(0).members["json"]["label"] == 1


def test_pictures_with_captions(tmp_path: Path) -> None:
    images = [picture(n) for n in range(3)]
    path = write(tmp_path / "a.parquet", {"image": images, "text": ["one", "two", None]})
    source = pictures(path, caption="text")
    assert source.read(1).members["json"]["captions"] == ["two"]
    with pytest.raises(Unreadable, match="column 'text' holds no text"):
        source.read(2)
    lists = {"image": images, "texts": [["a", "b"], ["c"], []]}
    source = pictures(write(tmp_path / "b.parquet", lists), caption="texts")
    assert source.read(0).members["json"]["captions"] == ["a", "b"]
    with pytest.raises(Unreadable, match="holds no text"):
        source.read(2)
    with pytest.raises(ValueError, match="label and caption: a model is given one"):
        pictures(path, caption="text", label="label")


@pytest.mark.parametrize(
    ("columns", "given", "fault"),
    [
        ({"picture": [b"x"]}, {}, r"no column 'image' \(it has: picture\)"),
        ({"image": ["x"]}, {}, "column 'image' is string; wanted is"),
        ({"image": [b"x"], "label": [0.5]}, {"label": "label"}, "column 'label' is double"),
        ({"image": [b"x"], "label": [-1]}, {"label": "label"}, "row 0: column 'label' is -1"),
        (
            {"image": [b"x", b"y"], "label": [1, None]},
            {"label": "label"},
            "row 1: column 'label' is null",
        ),
    ],
)
def test_pictures_that_cannot_be(columns: Any, given: Any, fault: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(SourceError, match=fault):
        pictures(path, **given)


def test_pictures_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "x.png"}, {"bytes": b"no picture", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    source = pictures(write(tmp_path / "a.parquet", {"image": pa.array(rows, kind)}))
    with pytest.raises(Unreadable, match="column 'image' holds no bytes"):
        source.read(0)
    with pytest.raises(Unreadable, match="not a picture"):
        source.read(1)
