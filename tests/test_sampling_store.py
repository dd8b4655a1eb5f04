"""The store: whole shards, a missing one is not a blank one, nobody else's is touched."""

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from chainrule.pipeline.artifact import LineageError
from chainrule.pipeline.sampling.store import NAME, PARTS, Layout, Store, StoreError

ARRAYS = {"tokens": Layout((4,), "uint16"), "images": Layout((3, 3, 1), "uint8")}


def start(folder: Path, number: int = 25, model: str = "a" * 64, **settings: object) -> Store:
    return Store.start(
        folder,
        model=model,
        settings={"temperature": 1.0, **settings},
        number=number,
        samples_per_shard=10,
        arrays=ARRAYS,
    )


def values(rows: range) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(rows.start)
    return {
        "tokens": generator.integers(0, 500, (len(rows), 4)).astype("uint16"),
        "images": generator.integers(0, 256, (len(rows), 3, 3, 1)).astype("uint8"),
    }


def fill(store: Store, shards: list[int]) -> None:
    for shard in shards:
        store.write(shard, values(store.rows(shard)))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    import zarr

    store = start(tmp_path)
    fill(store, store.mine(0, 1))
    store.finish()
    assert not (tmp_path / PARTS).exists()
    tokens = np.concatenate([values(store.rows(s))["tokens"] for s in range(3)])
    np.testing.assert_array_equal(Store.open(tmp_path).read("tokens"), tokens)
    store = Store.open(tmp_path)
    for rows in (range(7, 13), [3, 24, 11], []):
        np.testing.assert_array_equal(store.read("tokens", rows), tokens[list(rows)])
    group = zarr.open_group(tmp_path / NAME, mode="r")
    assert group.metadata.zarr_format == 3
    assert group["images"].shards == (10, 3, 3, 1)
    assert group["images"].shape == (25, 3, 3, 1)


def test_writers_share_the_shards(tmp_path: Path) -> None:
    store = start(tmp_path, number=95)
    shares = [store.mine(rank, 4) for rank in range(4)]
    assert sorted(s for share in shares for s in share) == list(range(10))


def write_as_rank(folder: Path, rank: int) -> None:
    store = start(folder, number=95)
    fill(store, store.mine(rank, 3))


def test_processes_side_by_side_lose_no_row(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_as_rank, args=(tmp_path, r)) for r in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = start(tmp_path, number=95)
    store.finish()
    tokens = np.concatenate([values(store.rows(s))["tokens"] for s in range(10)])
    np.testing.assert_array_equal(Store.open(tmp_path).read("tokens"), tokens)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_missing_shard_is_known_to_be_missing(tmp_path: Path) -> None:
    store = start(tmp_path)
    fill(store, [0, 2])
    assert store.mine(0, 1) == [1]
    with pytest.raises(StoreError, match=r"shards \[1\] are missing"):
        store.finish()
    with pytest.raises(StoreError, match="no finished store"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match=r"shards \[1\] are missing and no other writer"):
        store.wait(patience_s=0.02, poll_s=0.01)


def test_a_blank_shard_is_not_a_missing_one(tmp_path: Path) -> None:
    store = start(tmp_path)
    for shard in range(3):
        zeros = {name: np.zeros_like(value) for name, value in values(store.rows(shard)).items()}
        store.write(shard, zeros)
    assert store.mine(0, 1) == []
    store.finish()
    store = Store.open(tmp_path)
    assert not store.read("tokens").any()
    (tmp_path / NAME / "tokens/c/1/0").unlink()
    with pytest.raises(StoreError, match=r"tokens/c/1/0: missing \(rows 10 to 20\)"):
        Store.open(tmp_path)


def test_started_again_it_fills_only_what_is_missing(tmp_path: Path) -> None:
    fill(start(tmp_path), [1])
    again = start(tmp_path)
    assert again.mine(0, 1) == [0, 2]
    before = (tmp_path / NAME / "tokens/c/1/0").stat().st_mtime_ns
    fill(again, again.mine(0, 1))
    again.finish()
    assert (tmp_path / NAME / "tokens/c/1/0").stat().st_mtime_ns == before
    assert start(tmp_path).mine(0, 1) == []


def test_a_damaged_shard_is_drawn_again_while_unfinished_and_named_later(tmp_path: Path) -> None:
    store = start(tmp_path)
    fill(store, [0, 1, 2])
    path = tmp_path / NAME / "images/c/2/0/0/0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert start(tmp_path).mine(0, 1) == [2]
    fill(store, [2])
    store.finish()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="images/c/2/0/0/0: altered"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="altered"):
        start(tmp_path)


def test_the_bytes_are_the_same_whoever_writes(tmp_path: Path) -> None:
    one, two = start(tmp_path / "one"), start(tmp_path / "two")
    fill(one, [0, 1, 2])
    fill(two, [2, 0, 1])
    for path in (tmp_path / "one" / NAME).rglob("*"):
        if path.is_file():
            twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
            assert path.read_bytes() == twin.read_bytes()


@pytest.mark.parametrize("finished", [False, True])
def test_the_store_of_another_model_is_refused_with_both_fingerprints(
    tmp_path: Path, finished: bool
) -> None:
    store = start(tmp_path)
    fill(store, [0, 1, 2])
    if finished:
        store.finish()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(LineageError, match="aaaaaaaa.*bbbbbbbb"):
        start(tmp_path, model="b" * 64)
    with pytest.raises(StoreError, match=r"temperature = 1.0, asked for 0.5"):
        start(tmp_path, temperature=0.5)
    with pytest.raises(StoreError, match="number 25, asked for 26"):
        start(tmp_path, number=26)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_store_without_its_manifest_is_nobodys(tmp_path: Path) -> None:
    fill(start(tmp_path), [0])
    shutil.rmtree(tmp_path / PARTS)
    with pytest.raises(StoreError, match="not known whose it is"):
        start(tmp_path)
