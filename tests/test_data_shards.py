"""Shards: deterministic, readable by webdataset alone, and no damage goes unseen."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from chainrule.pipeline.artifact import ArtifactError
from chainrule.pipeline.data.reader import ShardError, Shards, decode_npy
from chainrule.pipeline.data.shards import ShardWriter, encode_member, finish, finished, key_of
from chainrule.pipeline.data.tar import header


def content(i: int) -> dict[str, object]:
    return {
        "png": hashlib.sha512(str(i).encode()).digest() * (1 + i % 20),
        "json": {"label": i, "class": "ü"},
    }


def write(folder: Path, shards: int = 3, per_shard: int = 20) -> Path:
    folder.mkdir()
    for number in range(shards):
        with ShardWriter(folder, number, "train" if number < shards - 1 else "validation") as shard:
            for i in range(number * per_shard, (number + 1) * per_shard):
                if i == 7:
                    shard.skip("image", "7.png", "damaged")
                else:
                    shard.write(key_of(i), content(i))
    finish(folder, kind="raw", modality="image", shards=shards, classes=["a"])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "shards")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_bytes_depend_on_content_alone(folder: Path, tmp_path: Path) -> None:
    os.utime(folder / "shard-000000.tar", (0, 0))
    assert contents(folder) == contents(write(tmp_path / "again"))
    with tarfile.open(folder / "shard-000000.tar") as archive:
        for member in archive:
            owner = (member.uid, member.gid, member.uname, member.gname, member.mtime)
            assert owner == (0, 0, "", "", 0)
            assert member.mode == 0o444


def test_the_tar_is_the_one_that_webdataset_writes(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    rng = np.random.default_rng(0)
    samples = [
        {"tokens.npy": rng.bytes(int(size)), "json": b"{}", "png": rng.bytes(3)}
        for size in (0, 1, 511, 512, 513, 70_000)
    ]
    with open(tmp_path / "theirs.tar", "wb") as file:
        options = {"user": "", "group": "", "mode": 0o444, "mtime": 0, "encoder": False}
        theirs = TarWriter(file, compress=False, **options)
        for number, members in enumerate(samples):
            theirs.write({"__key__": key_of(number), **members})
        theirs.close()
    with ShardWriter(tmp_path, 0, "train") as shard:
        for number, members in enumerate(samples):
            shard.write(key_of(number), members)
    assert (tmp_path / "shard-000000.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    for name, size in (("a" * 101, 1), ("ü.png", 1), ("a.png", 8 << 30)):
        with pytest.raises(ValueError, match="no member of a tar"):
            header(name, size)


# webdataset leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_alone_reads_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDS_SECURE", "1")
    import webdataset

    names = [str(folder / f"shard-{number:06d}.tar") for number in range(2)]
    found = list(webdataset.WebDataset(names, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [key_of(i) for i in range(40) if i != 7]
    assert found[3]["png"] == content(3)["png"]
    assert json.loads(found[3]["json"]) == content(3)["json"]


def test_index_says_what_is_there(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    assert [entry["samples"] for entry in index["shards"]] == [19, 20, 20]
    assert [entry["split"] for entry in index["shards"]] == ["train", "train", "validation"]
    assert index["skipped"] == 1
    for entry in index["shards"]:
        data = (folder / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    line = json.loads((folder / "skipped.jsonl").read_text())
    assert line == {"what": "image", "where": "7.png", "reason": "damaged"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        *(f"shard-{n:06d}.{kind}" for n in range(3) for kind in ("offsets.npy", "tar")),
        "skipped.jsonl",
    ]


def test_samples_in_order_and_at_random(folder: Path) -> None:
    shards = Shards.open(folder)
    assert (shards.count("train"), shards.count("validation")) == (39, 20)
    numbers = [i for i in range(40) if i != 7]
    in_order = list(shards.iterate("train"))
    assert [sample.key for sample in in_order] == [key_of(i) for i in numbers]
    for place in (0, 6, 7, 18, 19, 38):
        sample = shards.read("train", place)
        assert sample is not None
        assert sample.members["png"] == content(numbers[place])["png"]
        assert sample.meta == {"label": numbers[place], "class": "ü"}
    assert [s.key for s in shards.iterate("train", 25)] == [key_of(i) for i in numbers[25:]]
    for outside in (39, -1):
        with pytest.raises(IndexError):
            shards.read("train", outside)
    shards.close()
    assert shards.read("validation", 0) is not None


def test_samples_may_lack_members(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, "train") as shard:
        shard.write(key_of(0), {"wav": b"w", "json": {}})
        shard.write(key_of(5), {"flac": b"ff", "json": {}})
    finish(tmp_path, kind="raw", modality="audio", shards=1)
    first, second = Shards.open(tmp_path).iterate("train")
    assert (first.members, second.members) == (
        {"wav": b"w", "json": b"{}"},
        {"flac": b"ff", "json": b"{}"},
    )


def test_an_interrupted_shard_is_absent_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, 0, "train")
    shard.__enter__().write(key_of(0), content(0))
    shard.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(tmp_path.iterdir()) == []
    assert finished(tmp_path, 0) is None
    with pytest.raises(ArtifactError, match=r"shard-000000.tar: not finished"):
        finish(tmp_path, kind="raw", modality="image", shards=1)
    with ShardWriter(tmp_path, 0, "train") as shard:
        shard.write(key_of(0), content(0))
    entry = finished(tmp_path, 0)
    assert entry is not None
    assert entry["samples"] == 1
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    assert finished(tmp_path, 0) is None


def test_finish_may_be_cut_and_done_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    entries = tmp_path / "b"
    entries.mkdir()
    for number in range(3):
        with ShardWriter(entries, number, "train" if number < 2 else "validation") as shard:
            for i in range(number * 20, (number + 1) * 20):
                if i == 7:
                    shard.skip("image", "7.png", "damaged")
                else:
                    shard.write(key_of(i), content(i))
    kept = (entries / "shard-000001.entry.json").read_bytes()
    (entries / ".shard-000002.entry.json.77.tmp").write_text("{")  # a killed attempt's
    finish(entries, kind="raw", modality="image", shards=3, classes=["a"])
    (entries / "shard-000001.entry.json").write_bytes(kept)  # killed before it was removed
    finish(entries, kind="raw", modality="image", shards=3, classes=["a"])
    assert contents(entries) == contents(folder)


def test_keys_rise_and_validation_comes_last(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, "train") as shard:
        shard.write(key_of(3), content(0))
        with pytest.raises(ValueError, match="key '00000003' after '00000003'"):
            shard.write(key_of(3), content(0))
    for number, split in ((0, "validation"), (1, "train")):
        with ShardWriter(tmp_path, number, split) as shard:
            shard.write(key_of(number), content(0))
    with pytest.raises(ArtifactError, match="a train shard comes after"):
        finish(tmp_path, kind="raw", modality="image", shards=2)


@pytest.mark.parametrize("cut", ["at a member", "in a header", "in a sample", "to nothing"])
def test_a_truncated_shard_is_named_with_its_first_bad_sample(folder: Path, cut: str) -> None:
    path = folder / "shard-000001.tar"
    start = 0
    with tarfile.open(path) as archive:
        start = archive.getmember(f"{key_of(25)}.json").offset
    at = {"at a member": start, "in a header": start + 100, "in a sample": start + 513}.get(cut, 0)
    os.truncate(path, at)
    bad = 20 if cut == "to nothing" else 25
    with pytest.raises(ShardError) as error:
        Shards.open(folder)
    assert f"shard-000001.tar: truncated to {at} bytes" in str(error.value)
    assert f"first bad sample is {key_of(bad)} ({bad - 20} of 20)" in str(error.value)
    shards = Shards.open(folder, "skip-and-count")
    keys = [sample.key for sample in shards.iterate("train")]
    assert keys == [key_of(i) for i in range(bad) if i != 7]
    assert shards.damaged == 40 - bad


def test_every_flipped_bit_is_seen(folder: Path) -> None:
    """One bit anywhere in the shard: in a sample, its name, its padding, the tar's end."""
    path = folder / "shard-000000.tar"
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    spots = [*generator.integers(0, len(whole), 60).tolist(), 0, len(whole) - 1]
    for spot in spots:
        damaged = bytearray(whole)
        damaged[spot] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match="shard-000000.tar: altered"):
            list(Shards.open(folder).iterate("train"))
    path.write_bytes(whole)
    assert len(list(Shards.open(folder).iterate("train"))) == 39


def test_an_altered_sample_is_named_also_at_random_access(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as archive:
        spot = archive.getmember(f"{key_of(11)}.png").offset_data
    damaged = bytearray(path.read_bytes())
    damaged[spot] ^= 1
    path.write_bytes(damaged)
    shards = Shards.open(folder)
    assert shards.read("train", 9) is not None
    with pytest.raises(ShardError, match=r"altered; the first bad sample is 00000011 \(10 of 19\)"):
        shards.read("train", 10)
    counting = Shards.open(folder, "skip-and-count")
    assert counting.read("train", 10) is None
    assert len(list(counting.iterate_shard(0))) == 18
    assert counting.damaged == 2


def test_altered_offsets_and_missing_files_are_named(folder: Path) -> None:
    offsets = folder / "shard-000000.offsets.npy"
    whole = offsets.read_bytes()
    offsets.write_bytes(whole[:-8])
    with pytest.raises(ShardError, match="shard-000000.offsets.npy: unreadable"):
        Shards.open(folder).read("train", 0)
    damaged = bytearray(whole)
    damaged[128] ^= 1  # the key of the first sample
    offsets.write_bytes(damaged)
    with pytest.raises(ShardError, match="shard-000000.offsets.npy: altered"):
        list(Shards.open(folder).iterate_shard(0))
    offsets.write_bytes(whole)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(ShardError, match="shard-000002.tar: missing"):
        Shards.open(folder)
    with pytest.raises(ArtifactError, match="no index.json"):
        Shards.open(folder.parent)


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "pipe:id", "shard-1.tar"])
def test_no_path_leads_out_of_the_folder(folder: Path, name: str) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["name"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="is no shard name"):
        Shards.open(folder)


def test_no_link_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.tar"
    (folder / "shard-000000.tar").rename(outside)
    (folder / "shard-000000.tar").symlink_to(outside)
    with pytest.raises(ShardError, match="leads out of its folder"):
        Shards.open(folder)


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("exploited",))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Exploit()], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps(Exploit())):
        with pytest.raises(ValueError, match="npy"):
            decode_npy(data)
    with ShardWriter(tmp_path, 0, "train") as shard:
        shard.write(key_of(0), {"pyd": pickle.dumps(Exploit()), "json": {}})
    finish(tmp_path, kind="raw", modality="image", shards=1)
    (sample,) = Shards.open(tmp_path).iterate("train")
    assert set(sample.members) == {"pyd", "json"}
    assert not Path("exploited").exists()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float32"])
def test_npy_members_round_trip(dtype: str) -> None:
    for shape in ((0,), (5,), (4, 3), (3, 2, 2)):
        array = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
        data = encode_member("tokens.npy", array)
        found = decode_npy(data)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        with pytest.raises(ValueError, match="npy"):
            decode_npy(data[:-1] if array.size else data[:-2])
    with pytest.raises(ValueError, match="not integers"):
        decode_npy(encode_member("tokens.npy", np.array(["a"])))
