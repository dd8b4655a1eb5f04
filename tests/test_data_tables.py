"""Tables of real numbers: CSV as spreadsheets and people write it, and arrays."""

from pathlib import Path

import numpy as np
import pytest

from chainrule.pipeline.data.arrays import Table
from chainrule.pipeline.data.reader import Sample
from chainrule.pipeline.data.sources import Source, SourceError, Unreadable
from chainrule.tokenizers.standardize import StandardizeTokenizer


def opened(path: Path, content: str | bytes, **settings: object) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Table(kind="table", path=path, **settings).open()  # type: ignore[arg-type]


def rows(source: Source) -> list[list[float]]:
    return [Sample("0", source.read(i).members).values().tolist() for i in range(len(source))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.csv"


def test_columns_are_chosen_by_name(path: Path) -> None:
    source = opened(path, "a,b,c\n1,2,x\n3,,y\n5,10,z\n", columns=["b", "a"])
    assert Sample("0", source.read(2).members).values().tolist() == [10.0, 5.0]
    with pytest.raises(Unreadable, match="missing or not finite"):
        source.read(1)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfa,b\r\n1,2\r\n3,4\r\n",
        b"a,b\n1,2\n\n3,4\n\n",
        b'"a","b"\n"1","2"\n 3 , 4 \n',
        b"a,b\n1,2,\n3,4,,\n",
    ],
    ids=["as spreadsheets write it", "blank lines", "quotes and spaces", "commas at the end"],
)
def test_what_people_write(path: Path, content: bytes) -> None:
    assert rows(opened(path, content, columns=["a", "b"])) == [[1, 2], [3, 4]]
    path = path.with_suffix(".CSV")
    assert rows(opened(path, content)) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("word", ["", "NA", "n/a", "NaN", "null", "?"])
def test_words_for_a_missing_value(path: Path, word: str) -> None:
    with pytest.raises(Unreadable, match="missing or not finite"):
        opened(path, f"a,b\n1,{word}\n").read(0)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "t.csv: is empty"),
        ("a,b\n", "no rows below its first line"),
        ("1,2\n3,4\n", "first line is numbers"),
        ("a;b\n3;4\n", "separated by commas, not 'a;b'"),
        ("a,b,c\n1,2,x\n", "line 2: column 'c' holds 'x', no number; name those that do"),
        ("a,b\n1,2\n3,4,5\n", "line 3: 3 values, the first line names 2"),
        ("a,b\n1\n", "line 2: 1 values, the first line names 2"),
        ("a,a\n1,2\n", "2 columns are named 'a'"),
        (b"a,\xfc\n1,2\n", "not UTF-8; save it as CSV in UTF-8"),
    ],
)
def test_what_is_no_table_is_said(path: Path, content: str | bytes, fault: str) -> None:
    with pytest.raises(SourceError, match=fault):
        opened(path, content)


def test_a_blank_line_of_one_column_is_a_missing_value(path: Path) -> None:
    source = opened(path, "a\n1\n\n3\n")
    assert len(source) == 3
    with pytest.raises(Unreadable, match="missing"):
        source.read(1)


def test_a_column_that_is_not_there_names_the_nearest(path: Path) -> None:
    with pytest.raises(SourceError, match="no column 'heigth'; did you mean 'height'"):
        opened(path, "height,b\n1,2\n", columns=["heigth"])


def test_other_files_are_not_taken_for_arrays(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"t.tsv: a table is a .csv, .npy or .npz"):
        opened(tmp_path / "t.tsv", "a\tb\n1\t2\n")


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[1.0, 4], [3, 8]]))
    scaled = Table(kind="table", path=tmp_path / "t.npy", standardize=True).open()
    assert rows(scaled) == [[-1.0, -1.0], [1.0, 1.0]]


def test_large_numbers_keep_their_differences(path: Path) -> None:
    """Seconds since 1970: float32 would make steps of 128 of them."""
    times = [1_700_000_000.0 + i for i in range(100)]
    source = opened(path, "time\n" + "".join(f"{t:.1f}\n" for t in times))
    read = [Sample("0", source.read(i).members).values() for i in range(100)]
    tokenizer = StandardizeTokenizer.train(read)
    coded = tokenizer.encode(read)
    assert len({float(row[0]) for row in coded}) == 100
    back = [float(row[0]) for row in tokenizer.decode(coded)]
    assert np.abs(np.array(back) - times).max() < 1e-4
