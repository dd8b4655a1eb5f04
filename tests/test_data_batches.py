"""Batches: the same global order for any ranks, workers and restarts; mixtures; the ledger."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainrule.jobs import verify as verify_job
from chainrule.pipeline.artifact import ArtifactError
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data import ledger
from chainrule.pipeline.data.batches import Batch, Loader, Mixture, mixture_of, sequential
from chainrule.pipeline.data.reader import ShardError
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.data.vocabulary import Vocabulary, join

IMAGE = {"size": 64, "ranges": {"image": [0, 64]}, "specials": {}}
TEXT = {
    "size": 258,
    "ranges": {"text": [0, 256], "specials": [256, 258]},
    "specials": {"bos": 256, "eos": 257},
}


def image_tokens(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 64, (4, 4)).astype(np.uint8)


def text_tokens(i: int) -> np.ndarray:
    generator = np.random.default_rng(1000 + i)
    tokens = generator.integers(0, 256, int(generator.integers(1, 90))).astype(np.uint16)
    return np.append(tokens, np.uint16(257))


def write_set(folder: Path, samples: int, modality: str, per_shard: int = 50) -> Path:
    folder.mkdir()
    shards = -(-samples // per_shard)
    for number in range(shards):
        with ShardWriter(folder, number, "train") as shard:
            for i in range(number * per_shard, min((number + 1) * per_shard, samples)):
                tokens = image_tokens(i) if modality == "image" else text_tokens(i)
                meta = {"label": i % 10} if modality == "image" else {"bytes": len(tokens)}
                shard.write(key_of(i), {"tokens.npy": tokens, "json": meta}, tokens.size)
    finish(
        folder,
        kind="tokens",
        modality=modality,
        shards=shards,
        classes=[str(i) for i in range(10)] if modality == "image" else None,
        vocabulary=IMAGE if modality == "image" else TEXT,
        tokenizer={"fingerprint": f"of-{modality}", "kind": "test"},
        grid=[4, 4] if modality == "image" else None,
        source="none",
    )
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return TokenSet.open(write_set(tmp_path_factory.mktemp("a") / "images", 130, "image"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return TokenSet.open(write_set(tmp_path_factory.mktemp("b") / "text", 120, "text"))


def take(loader: Loader, n: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(n)]


def test_an_image_batch_holds_whole_samples_and_their_labels(images: TokenSet) -> None:
    (batch,) = take(Loader(mixture_of([images]), 12), 1)
    assert batch.x.shape == (12, 16)
    assert batch.x.dtype == torch.int64
    assert batch.mask is None
    assert batch.documents is None
    assert batch.cond is not None
    assert batch.tokens == 12 * 16
    for row, (piece,) in enumerate(batch.ids):
        assert np.array_equal(batch.x[row].numpy(), image_tokens(piece.sample).reshape(-1))
        assert batch.cond[row] == piece.sample % 10


def test_a_text_batch_holds_pieces_of_documents(text: TokenSet) -> None:
    for batch in take(Loader(mixture_of([text], context=32), 8), 20):
        assert batch.documents is not None
        assert batch.mask is not None
        assert batch.cond is None
        for row, pieces in enumerate(batch.ids):
            at = 0
            for number, piece in enumerate(pieces):
                end = at + piece.stop - piece.start
                expected = text_tokens(piece.sample)[piece.start : piece.stop]
                assert np.array_equal(batch.x[row, at:end].numpy(), expected)
                assert (batch.documents[row, at:end] == number).all()
                at = end
            assert batch.mask[row, :at].all()
            assert not batch.mask[row, at:].any()
            assert (batch.documents[row, at:] == -1).all()
            assert (batch.x[row, at:] == 257).all()


@pytest.mark.parametrize("which", ["images", "text", "both"])
def test_ranks_workers_and_restarts_do_not_change_the_order(
    which: str, images: TokenSet, text: TokenSet
) -> None:
    sets = {"images": [images], "text": [text], "both": [text, images]}[which]
    mixture = mixture_of(sets, context=16, seed=3)
    whole = [batch.x for batch in take(Loader(mixture, 12, workers=0), 30)]
    for world_size in (1, 2, 3, 4):
        for workers in (0, 1, 3):
            parts = [
                take(Loader(mixture, 12, rank, world_size, step=10, workers=workers), 5)
                for rank in range(world_size)
            ]
            for step in range(5):
                joined = torch.cat([parts[rank][step].x for rank in range(world_size)])
                assert torch.equal(joined, whole[10 + step])
                assert parts[0][step].step == 10 + step


def test_each_sample_once_an_epoch_also_where_batches_straddle_epochs(images: TokenSet) -> None:
    batches = take(Loader(mixture_of([images], seed=1), 12), 33)
    drawn = [piece for batch in batches for (piece,) in batch.ids]
    for epoch in range(3):
        of_epoch = [piece.sample for piece in drawn if piece.epoch == epoch]
        assert sorted(of_epoch) == list(range(130))
    first = [piece.sample for piece in drawn[:130]]
    assert first != [piece.sample for piece in drawn[130:260]]


def test_micro_batches_are_the_batch_in_parts(text: TokenSet) -> None:
    (batch,) = take(Loader(mixture_of([text], context=32), 12), 1)
    parts = batch.split(3)
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert [piece for part in parts for piece in part.ids] == batch.ids
    assert [part.position for part in parts] == [0, 4, 8]
    assert sum(part.tokens for part in parts) == batch.tokens
    with pytest.raises(ValueError, match="12 rows do not split into 5"):
        batch.split(5)


def test_state_is_two_integers_and_resumes(images: TokenSet) -> None:
    mixture = mixture_of([images])
    ramp = [(0, 4), (5, 8), (9, 12)]
    with Loader(mixture, ramp) as loader:
        for _ in range(7):
            next(loader)
        state = loader.state()
        assert state == {"step": 7, "position": 4 * 5 + 8 * 2}
        expected = [next(loader) for _ in range(5)]
    for resumed in (Loader(mixture, ramp, **state), Loader(mixture, ramp, step=7)):
        for batch, other in zip(take(resumed, 5), expected, strict=True):
            assert torch.equal(batch.x, other.x)
            assert len(batch.x) == (8 if batch.step < 9 else 12)


def test_passing_over_a_window_moves_the_position_alone(images: TokenSet) -> None:
    mixture = mixture_of([images])
    with Loader(mixture, 8) as loader:
        next(loader)
        loader.skip(24)
        assert loader.state() == {"step": 1, "position": 32}
        assert torch.equal(next(loader).x, mixture.batch(32, 8).x)


def test_a_mixture_keeps_weights_epochs_and_one_vocabulary(
    images: TokenSet, text: TokenSet
) -> None:
    mixture = mixture_of([text, images], context=16, weights=[0.7, 0.3], seed=5)
    assert mixture.vocabulary.as_dict() == {
        "size": 256 + 64 + 2,
        "ranges": {"text": [0, 256], "image": [256, 320], "specials": [320, 322]},
        "specials": {"bos": 320, "eos": 321},
    }
    batches = take(Loader(mixture, 10), 100)
    drawn = [piece for batch in batches for row in batch.ids for piece in row[:1]]
    assert sum(piece.set == 0 for piece in drawn) == 700
    for batch in batches[:10]:
        assert batch.cond is not None
        for row, pieces in enumerate(batch.ids):
            if pieces[0].set == 1:
                expected = image_tokens(pieces[0].sample).reshape(-1).astype(int) + 256
                assert np.array_equal(batch.x[row].numpy(), expected)
                assert batch.cond[row] == pieces[0].sample % 10
            else:
                assert batch.cond[row] == -1
    assert mixture.epochs(1000)[1] == 300 / 130
    of_first = [p.sample for p in drawn if p.set == 1 and p.epoch == 0]
    assert sorted(of_first) == list(range(130))


def test_joint_vocabulary_shares_specials_and_numbers_ranges() -> None:
    first = Vocabulary(size=4, ranges={"image": (0, 4)})
    text = Vocabulary.model_validate(TEXT)
    joint, tables = join([text, first, first])
    assert list(joint.ranges) == ["text", "image", "image-1", "specials"]
    assert tables[1].tolist() == [256, 257, 258, 259]
    assert tables[2].tolist() == [260, 261, 262, 263]
    assert tables[0][257] == joint.specials["eos"] == joint.size - 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_goes_through_each_row_once(text: TokenSet, world_size: int) -> None:
    mixture = mixture_of([text], context=32, shuffle=False)
    rows = len(mixture.members[0].rows)
    ranks = [list(sequential(mixture, 24, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    pieces = [piece for batches in ranks for b in batches for row in b.ids for piece in row]
    assert len(pieces) == len(set(pieces))
    assert sum(b.tokens for batches in ranks for b in batches) == text.tokens
    assert rows % 24  # the last batch is short
    if world_size == 1:
        assert len(ranks[0][-1].x) == rows % 24


def test_a_rank_without_a_row_of_the_last_batch_gets_a_masked_one(images: TokenSet) -> None:
    mixture = mixture_of([images], shuffle=False)  # 130 rows: 16 batches of 8, then 2 rows
    last = [list(sequential(mixture, 8, rank, 4))[-1] for rank in range(4)]
    assert [batch.tokens for batch in last] == [0, 16, 0, 16]
    assert all(len(batch.x) == 1 for batch in last)


def test_wrong_requests_are_refused_by_name(images: TokenSet, text: TokenSet) -> None:
    with pytest.raises(RequestError, match="a batch of 10 rows does not divide by 3 ranks"):
        Loader(mixture_of([images]), 10, 0, 3)
    with pytest.raises(RequestError, match="differ in length; say a context"):
        mixture_of([text])
    with pytest.raises(RequestError, match="2 weights for 1 sets"):
        mixture_of([images], weights=[1, 2])
    with pytest.raises(RequestError, match="steps must start at 0 and rise"):
        Loader(mixture_of([images]), [(3, 8)])
    with pytest.raises(ArtifactError, match="split 'validation' is empty"):
        TokenSet.open(images.shards.folder, "validation")


def test_a_damaged_sample_stops_or_is_masked_out(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "images", 60, "image")
    shard = folder / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[512 * 2 + 100] ^= 1  # sample 50, the first of the second shard
    shard.write_bytes(data)
    with (
        Loader(mixture_of([TokenSet.open(folder)]), 60) as loader,
        pytest.raises(ShardError, match=r"shard-000001.tar: altered.*sample is 00000050"),
    ):
        next(loader)
    tokens = TokenSet.open(folder, on_damage="skip-and-count")
    batch = mixture_of([tokens]).batch(0, 60)
    assert tokens.damaged == 1
    assert batch.mask is not None
    assert batch.tokens == 59 * 16
    row = next(r for r, (piece,) in enumerate(batch.ids) if piece.sample == 50)
    assert not batch.mask[row].any()


@pytest.mark.parametrize("recorded", [True, False])
def test_ids_past_the_vocabulary_are_refused(tmp_path: Path, recorded: bool) -> None:
    """Before a sample is read, or when it is, in sets written before shards had the record."""
    folder = write_set(tmp_path / "images", 20, "image")
    index = json.loads((folder / "index.json").read_text())
    largest = max(int(image_tokens(i).max()) for i in range(20))
    assert index["shards"][0]["largest_id"] == largest
    index["vocabulary"] = {"size": 50, "ranges": {"image": [0, 50]}, "specials": {}}
    if not recorded:
        del index["shards"][0]["largest_id"]
    (folder / "index.json").write_text(json.dumps(index))
    if recorded:
        words = rf"shard-000000.tar: holds token {largest}, the vocabulary has 50"
        with pytest.raises(ShardError, match=words):
            TokenSet.open(folder)
        return
    tokens = TokenSet.open(folder)
    with pytest.raises(ShardError, match=r"sample \d+ holds token \d+, the vocabulary has 50"):
        list(map(tokens.__getitem__, range(20)))


def test_long_documents_are_read_by_the_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainrule.pipeline.data.tokens.CACHE", 0)
    folder = tmp_path / "long"
    folder.mkdir()
    tokens = np.arange(60_000, dtype=np.uint16) % 257
    with ShardWriter(folder, 0, "train") as shard:
        shard.write(key_of(0), {"tokens.npy": tokens, "json": {}}, tokens.size)
    finish(
        folder,
        kind="tokens",
        modality="text",
        shards=1,
        vocabulary=TEXT,
        tokenizer={"fingerprint": "t", "kind": "test"},
        grid=None,
    )
    mixture = mixture_of([TokenSet.open(folder)], context=100, seed=2)
    for _ in range(2):  # whole and checked the first time, by the piece the second
        for batch in (mixture.batch(0, 600), mixture.batch(600, 600)):
            for row, pieces in enumerate(batch.ids):
                held = np.concatenate([tokens[piece.start : piece.stop] for piece in pieces])
                assert np.array_equal(batch.x[row].numpy(), held)


# The ledger


def record_steps(folder: Path, mixture: Mixture, steps: range, world_size: int, batch: int) -> None:
    for rank in range(world_size):
        loader = Loader(mixture, batch, rank, world_size, step=steps.start, workers=0)
        with ledger.Ledger(folder, rank) as book, loader:
            for _ in steps:
                book.record(next(loader))


@pytest.mark.parametrize("which", ["images", "text", "both"])
def test_ledger_proves_kills_and_other_world_sizes(
    which: str, images: TokenSet, text: TokenSet, tmp_path: Path
) -> None:
    """1, 2, 3, 1 ranks; each start goes back to a checkpoint and redoes what followed."""
    sets = {"images": [images], "text": [text], "both": [text, images]}[which]
    mixture = mixture_of(sets, context=16, weights=[1, 2] if which == "both" else None)
    ledger.write_header(tmp_path, mixture)
    for steps, ranks in (
        (range(12), 1),
        (range(10, 25), 2),
        (range(20, 44), 3),
        (range(40, 60), 1),
    ):
        ledger.rewind(tmp_path, steps.start)
        record_steps(tmp_path, mixture, steps, ranks, 12)
    lines: list[str] = []
    assert verify_job.main(tmp_path, lines.append)
    assert lines[-1] == "samples skipped 0, repeated 0"
    findings = ledger.verify(ledger.read(tmp_path))
    assert sum(found.rows for found in findings) == 60 * 12
    assert len({found.set for found in findings}) == len(sets)


def test_ledger_counts_what_was_skipped_repeated_and_misplaced(
    images: TokenSet, tmp_path: Path
) -> None:
    mixture = mixture_of([images])
    ledger.write_header(tmp_path, mixture)
    record_steps(tmp_path, mixture, range(5), 1, 10)
    record_steps(tmp_path, mixture, range(4, 6), 1, 10)  # step 4 again: no rewind
    record_steps(tmp_path, mixture, range(8, 10), 1, 10)  # steps 6 and 7 never
    (found,) = ledger.verify(ledger.read(tmp_path))
    assert (found.skipped, found.repeated, found.misplaced) == (20, 10, 0)
    lines: list[str] = []
    assert not verify_job.main(tmp_path, lines.append)
    assert lines == [
        "images epoch 0: 80/130 rows, skipped 20, repeated 10",
        "steps 8 of 10, rows 80, samples 80; missing: 7-8; twice: 5",
        "samples skipped 20, repeated 10",
    ]


def test_ledger_sees_another_order(images: TokenSet, tmp_path: Path) -> None:
    ledger.write_header(tmp_path, mixture_of([images]))
    record_steps(tmp_path, mixture_of([images], seed=1), range(13), 1, 10)
    (found,) = ledger.verify(ledger.read(tmp_path))
    assert found.skipped == found.repeated == 0  # an epoch in another order
    assert found.misplaced > 100
    assert not found.good


def test_ledger_sees_a_document_consumed_in_part(text: TokenSet, tmp_path: Path) -> None:
    mixture = mixture_of([text], context=32)
    ledger.write_header(tmp_path, mixture)
    record_steps(tmp_path, mixture, range(len(mixture.members[0].rows)), 1, 1)
    path = tmp_path / "rank-0000.ledger"
    records = np.fromfile(path, ledger.RECORD)
    records["stop"][17] -= 1
    records["crc"] = ledger.checksums(records)
    records.tofile(path)
    (found,) = ledger.verify(ledger.read(tmp_path))
    assert (found.skipped, found.repeated, found.misplaced) == (1, 0, 1)


def test_a_torn_ledger_loses_its_last_record_alone(images: TokenSet, tmp_path: Path) -> None:
    mixture = mixture_of([images])
    ledger.write_header(tmp_path, mixture)
    record_steps(tmp_path, mixture, range(3), 1, 10)
    path = tmp_path / "rank-0000.ledger"
    os.truncate(path, path.stat().st_size - 5)
    assert len(ledger.read(tmp_path, unfinished=True).records) == 29
    with pytest.raises(ledger.LedgerDamaged, match="rank-0000.ledger: record 29 is cut: 51 of 56"):
        ledger.read(tmp_path)
    ledger.rewind(tmp_path, 2)
    record_steps(tmp_path, mixture, range(2, 4), 1, 10)
    assert all(found.good for found in ledger.verify(ledger.read(tmp_path)))


def damaged(folder: Path, change: Callable[[bytearray], object], name: str) -> str:
    """What `verify` says, in one line, of a copy of the ledger whose bytes `change` altered."""
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    data = bytearray((copy / name).read_bytes())
    change(data)
    (copy / name).write_bytes(data)
    lines: list[str] = []
    assert not verify_job.main(copy, lines.append)
    (line,) = lines
    assert str(copy / name) in line
    assert "--force" in line
    return line


def flip(data: bytearray, at: int) -> None:
    data[at] ^= 4


def test_a_hole_or_a_flipped_bit_in_a_ledger_is_named(images: TokenSet, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    ledger.write_header(folder, mixture_of([images]))
    record_steps(folder, mixture_of([images]), range(13), 1, 10)
    ranks, size = "rank-0000.ledger", ledger.RECORD.itemsize
    for record in (0, 17, 129):
        for byte in range(size):
            line = damaged(folder, lambda data, at=record * size + byte: flip(data, at), ranks)
            assert f"record {record} of 130 was altered" in line

    def cut(start: int, stop: int) -> str:
        return damaged(folder, lambda data: data.__delitem__(slice(start, stop)), ranks)

    assert f"record {2000 // size} of" in cut(2000, 2500)
    assert "record 3 of 128" in cut(3 * size, 5 * size)  # whole records
    assert "record 129 is cut" in cut(130 * size - 7, 130 * size)
    for name in ("sets.json", "set-0.lengths.npy"):
        whole = len((folder / name).read_bytes())
        for at in (whole // 2, whole - 3):
            damaged(folder, lambda data, at=at: flip(data, at), name)
        damaged(folder, lambda data, at=at: data.__delitem__(slice(at, None)), name)
        damaged(folder, bytearray.clear, name)


def test_a_damaged_record_stops_no_training(
    images: TokenSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = mixture_of([images])
    ledger.write_header(tmp_path, mixture)
    record_steps(tmp_path, mixture, range(6), 1, 10)
    path = tmp_path / "rank-0000.ledger"
    data = bytearray(path.read_bytes())
    flip(data, 3 * ledger.RECORD.itemsize)  # of step 0, which now seems to be another
    path.write_bytes(data)
    ledger.rewind(tmp_path, 4)
    assert "record 3 was altered" in caplog.text
    record_steps(tmp_path, mixture, range(4, 6), 1, 10)
    with pytest.raises(ledger.LedgerDamaged, match="record 3 of 60"):
        ledger.read(tmp_path)


def unguarded(folder: Path) -> None:
    """Make of a ledger what the format before was."""
    header = json.loads((folder / "sets.json").read_text()) | {"format": 1}
    del header["crc"]
    for entry in header["sets"]:
        del entry["lengths_crc"]
    (folder / "sets.json").write_text(json.dumps(header))
    for path in folder.glob("rank-*.ledger"):
        records = np.fromfile(path, ledger.RECORD)
        records["crc"] = 0
        records.tofile(path)


def test_a_ledger_of_the_format_before_is_read_and_gone_on_with(
    images: TokenSet, tmp_path: Path
) -> None:
    mixture = mixture_of([images])
    folder = tmp_path / "kept"
    ledger.write_header(folder, mixture)
    record_steps(folder, mixture, range(5), 1, 10)
    unguarded(folder)
    lines: list[str] = []
    assert verify_job.main(folder, lines.append)
    assert "ledger format 1, of an earlier version, has no checksums" in lines[0]
    assert lines[-2:] == ["steps 5 of 5, rows 50, samples 50", "samples skipped 0, repeated 0"]
    hole = damaged(folder, lambda data: data.__delitem__(slice(2000, 2500)), "rank-0000.ledger")
    assert "record 35 of" in hole

    ledger.write_header(folder, mixture)
    ledger.rewind(folder, 4)
    record_steps(folder, mixture, range(4, 6), 1, 10)
    lines.clear()
    assert verify_job.main(folder, lines.append)
    assert lines[-2] == "steps 6 of 6, rows 60, samples 60"
    assert len(lines) == 3
    header = json.loads((folder / "sets.json").read_text()) | {"format": 3}
    (folder / "sets.json").write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match="ledger format 3, this version reads 1 and 2"):
        ledger.read(folder)


def test_a_window_passed_over_is_neither_skipped_nor_repeated(
    images: TokenSet, tmp_path: Path
) -> None:
    mixture = mixture_of([images])
    ledger.write_header(tmp_path, mixture)
    with ledger.Ledger(tmp_path, 0) as book, Loader(mixture, 10) as loader:
        for _ in range(3):
            book.record(next(loader))
        state = loader.state()
        book.pass_over(mixture, state["position"], 20, state["step"])
        loader.skip(20)
        for _ in range(3):
            book.record(next(loader))
    (found,) = ledger.verify(ledger.read(tmp_path))
    assert found.good
    assert found.passed_over == 20


def test_a_ledger_of_another_order_is_not_gone_on_with(images: TokenSet, tmp_path: Path) -> None:
    ledger.write_header(tmp_path, mixture_of([images]))
    ledger.write_header(tmp_path, mixture_of([images]))
    with pytest.raises(ArtifactError, match="another data order"):
        ledger.write_header(tmp_path, mixture_of([images], seed=2))
    with pytest.raises(ArtifactError, match="elsewhere: no such folder"):
        verify_job.main(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ArtifactError, match="no ledger; run the stage with ledger: true"):
        verify_job.main(tmp_path / "elsewhere")


KILLED = """
import sys
from pathlib import Path
from chainrule.pipeline.data import ledger
from chainrule.pipeline.data.batches import Loader, mixture_of
from chainrule.pipeline.data.tokens import TokenSet
mixture = mixture_of([TokenSet.open(sys.argv[1])])
folder = Path(sys.argv[2])
ledger.write_header(folder, mixture)
with ledger.Ledger(folder, 0) as book, Loader(mixture, 4, workers=2) as loader:
    for batch in loader:
        book.record(batch)
        print(batch.step, flush=True)
"""


def test_sigkill_keeps_every_record(images: TokenSet, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(images.shards.folder), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as lines:
        last = 0
        for line in lines:
            last = int(line)
            if last >= 40:
                os.kill(process.pid, signal.SIGKILL)
                break
    process.wait()
    records = ledger.read(tmp_path, unfinished=True).records
    assert int(records["step"].max()) >= last
    done = int(records["step"].max()) // 10 * 10
    ledger.rewind(tmp_path, done)
    record_steps(tmp_path, mixture_of([images]), range(done, done + 70), 1, 4)
    assert all(found.good for found in ledger.verify(ledger.read(tmp_path)))


def test_prefetching_hides_the_fetch(images: TokenSet) -> None:
    """A step that takes longer than a fetch waits for nothing."""
    mixture = mixture_of([images])
    with Loader(mixture, 12, workers=1) as loader:
        next(loader)
        before = loader.stalled
        for _ in range(5):
            deadline = time.perf_counter() + 0.02
            while time.perf_counter() < deadline:
                torch.ones(64, 64) @ torch.ones(64, 64)
            next(loader)
        assert loader.stalled - before < 0.02
    assert not [p for p in multiprocessing.active_children() if p.name.startswith("loader")]


class Slow:
    """A mixture of batches that take `seconds` each to fetch."""

    def __init__(self, mixture: Mixture, seconds: float) -> None:
        self._batch, self._seconds = mixture.batch(0, 4), seconds

    def batch(self, *_: int) -> Batch:
        time.sleep(self._seconds)
        return self._batch


def waits(mixture: Mixture, fetch_s: float, step_s: float, workers: int, steps: int) -> list[float]:
    """Seconds that each `next` waited."""
    found = []
    slow: Any = Slow(mixture, fetch_s)
    with Loader(slow, 4, workers=workers) as loader:
        before = 0.0
        for _ in range(steps):
            next(loader)
            found.append(loader.stalled - before)
            before = loader.stalled
            time.sleep(step_s)
    return found


def test_a_step_waits_for_the_first_batch_alone(images: TokenSet) -> None:
    """Two workers fetch in 15 ms each what a step of 20 ms takes one of."""
    _, *rest = waits(mixture_of([images]), 0.015, 0.020, 2, 40)
    # Sleeps only oversleep where a machine is loaded, and then both sides do.
    assert sum(wait > 0.002 for wait in rest) <= 2, rest
    assert sum(rest) < 0.02 * 40 * 0.020


def test_a_loader_that_is_too_slow_is_seen_to_be(images: TokenSet) -> None:
    """One worker of 30 ms for steps of 10 ms: two thirds of the time is waiting."""
    found = waits(mixture_of([images]), 0.030, 0.010, 1, 12)
    assert sum(found[5:]) > 7 * 0.015  # what was fetched ahead is used up


def test_batches_are_put_into_page_locked_memory(
    images: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    with Loader(mixture_of([images]), 12, workers=0, pin=True) as loader:
        batch = next(loader)
    assert batch.cond is not None
    assert any(tensor is batch.x for tensor in pinned)
    assert any(tensor is batch.cond for tensor in pinned)
    with Loader(mixture_of([images]), 12, workers=0) as loader:
        pinned.clear()
        next(loader)
    assert pinned == []
