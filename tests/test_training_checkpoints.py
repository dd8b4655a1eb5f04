"""Checkpoints: complete or absent, damaged ones named, the right ones kept."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chainrule.pipeline.artifact import ArtifactError, read_json
from chainrule.pipeline.stage import StageFailed
from chainrule.pipeline.training import checkpoints
from chainrule.pipeline.training.checkpoints import (
    Checkpoint,
    CheckpointDamaged,
    CheckpointWriter,
    average,
    newest,
    step_folder,
    steps_in,
)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {
        "model/weight": torch.full((3, 4), float(step)),
        "exp_avg/weight": torch.full((3, 4), 0.5 * step),
    }


def save(writer: CheckpointWriter, step: int, best: int | None = None) -> None:
    writer.save(step, tensors_of(step), {"step": step}, best)
    writer.wait()


def test_what_is_saved_is_read_back(tmp_path):
    save(CheckpointWriter(tmp_path), 7)
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.names("model") == ["weight"]
    ((name, tensor),) = found.tensors("exp_avg")
    assert name == "weight"
    assert torch.equal(tensor, torch.full((3, 4), 3.5))
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert list(found.tensors("ema")) == []


def test_the_newest_some_multiples_and_the_best_are_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        save(writer, step, best=3 if step >= 3 else None)
    assert steps_in(tmp_path) == [3, 4, 8, 9, 10]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_same_state_same_bytes(tmp_path):
    for name in "ab":
        save(CheckpointWriter(tmp_path / name), 1)
    files = [
        {p.name: p.read_bytes() for p in step_folder(tmp_path / name, 1).iterdir()} for name in "ab"
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("file", ["state-00000.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, caplog, file, damage):
    writer = CheckpointWriter(tmp_path)
    save(writer, 1)
    save(writer, 2)
    path = step_folder(tmp_path, 2) / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x41
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()
    found = newest(tmp_path)
    if damage == "flip" and file == "checkpoint.json" and found is not None and found.step == 2:
        # A flipped letter inside a number or name that nothing contradicts cannot be seen;
        # the middle of this manifest is a hash or a name, so it is.
        pytest.fail("an altered manifest was taken")
    assert found is not None
    assert found.step == 1
    assert "step-00000002" in caplog.text
    assert "the checkpoint before it is taken" in caplog.text


def test_none_at_all_is_none_and_none_whole_is_an_error(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "absent") is None
    save(CheckpointWriter(tmp_path), 1)
    (step_folder(tmp_path, 1) / "checkpoint.json").unlink()
    with pytest.raises(CheckpointDamaged, match="none of 1 checkpoints is whole"):
        newest(tmp_path)


def test_others_may_read_what_others_may_read_else(tmp_path):
    before = os.umask(0o027)
    try:
        save(CheckpointWriter(tmp_path), 1)
    finally:
        os.umask(before)
    for path in step_folder(tmp_path, 1).iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path.name


def test_a_newer_format_is_refused(tmp_path):
    save(CheckpointWriter(tmp_path), 1)
    path = step_folder(tmp_path, 1) / "checkpoint.json"
    path.write_text(json.dumps({**read_json(path), "format": 99}))
    with pytest.raises(CheckpointDamaged, match="format 99, this version reads 1"):
        Checkpoint.open(step_folder(tmp_path, 1))


def test_a_full_disk_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    save(writer, 1)

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    writer.save(2, tensors_of(2), {"step": 2}, None)
    with pytest.raises(StageFailed, match=r"no space left.*the checkpoint of step 1 is intact"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_ranks_share_the_writing(tmp_path):
    writers = [CheckpointWriter(tmp_path, rank, 2) for rank in range(2)]
    writers[0].save(5, {"model/a": torch.ones(2)}, {"step": 5}, None)
    assert newest(tmp_path) is None  # the other part is missing still
    writers[1].save(5, {"model/b": torch.zeros(2)}, {"step": 5}, None)
    for writer in writers:
        writer.wait()
    found = newest(tmp_path)
    assert found is not None
    assert sorted(found.names("model")) == ["a", "b"]
    assert sorted(set(found.index.values())) == [
        "state-00000.safetensors",
        "state-00001.safetensors",
    ]


def test_rank_0_does_not_wait_for_ever(tmp_path):
    writer = CheckpointWriter(tmp_path, 0, 2, parts_within_s=0.05)
    writer.save(1, tensors_of(1), {"step": 1}, None)
    with pytest.raises(StageFailed, match=r"ranks \[1\] did not write their part of step 1"):
        writer.wait()


def test_giving_up_ends_the_wait_for_other_ranks(tmp_path):
    writer = CheckpointWriter(tmp_path, 0, 2)
    writer.save(1, tensors_of(1), {"step": 1}, None)
    with pytest.raises(StageFailed):
        writer.give_up()


KILLED = """
import os, sys, torch
from pathlib import Path
from chainrule.pipeline.training.checkpoints import CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), keep=1)
big = {f"model/{i}": torch.full((250_000,), 1.0) for i in range(8)}
print("ready", flush=True)
for step in range(1, 10_000):
    writer.save(step, {k: v * step for k, v in big.items()}, {"step": step}, None)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_saves(tmp_path):
    """After a SIGKILL at any instant the newest checkpoint is whole, and none is lost."""
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        begun = 0
        for line in process.stdout:
            if line.strip() == "ready":
                continue
            begun = int(line)
            if begun > 2 + attempt:
                break
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        found = newest(tmp_path)
        assert found is not None
        # save(n) waits until n - 1 is published.
        assert found.step >= begun - 1
        for _, tensor in found.tensors("model"):
            assert torch.equal(tensor, torch.full((250_000,), float(found.step)))
        for path in tmp_path.glob("step-*"):
            Checkpoint.open(path)


REPUBLISHER = """
import os, signal, sys
from pathlib import Path
import torch
from chainrule.pipeline.training.checkpoints import CheckpointWriter

folder, at = Path(sys.argv[1]), int(sys.argv[2])
writer = CheckpointWriter(folder, asynchronous=False)
writer.save(5, {"model/weight": torch.zeros(3)}, {"step": 5}, None)
rename, renames = os.rename, []
def killed(*paths):
    if len(renames) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    renames.append(paths)
    rename(*paths)
os.rename = killed
if at == 2:
    import shutil
    shutil.rmtree = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
writer.save(5, {"model/weight": torch.ones(3)}, {"step": 5}, None)
"""


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        pytest.param(0, 0.0, id="before the old one is moved aside"),
        pytest.param(1, 0.0, id="between the two renames"),
        pytest.param(2, 1.0, id="before the old one is removed"),
    ],
)
def test_a_checkpoint_made_again_is_never_lost(tmp_path, at, expected):
    program = [sys.executable, "-c", REPUBLISHER, str(tmp_path), str(at)]
    assert subprocess.run(program, check=False).returncode == -signal.SIGKILL
    assert steps_in(tmp_path) == ([] if at == 1 else [5])
    CheckpointWriter(tmp_path)
    found = newest(tmp_path)
    assert found is not None
    ((_, weight),) = found.tensors("model")
    assert weight.tolist() == [expected] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005"]


def test_a_checkpoint_that_cannot_be_made_again_leaves_the_old_one(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, asynchronous=False)
    save(writer, 5)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if source.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StageFailed, match="the checkpoint of step 5 is intact"):
        writer.save(5, {}, {"step": 5}, None)
    assert Checkpoint.open(step_folder(tmp_path, 5)).names("model") == ["weight"]


def test_the_average_of_several(tmp_path):
    writer = CheckpointWriter(tmp_path)
    save(writer, 1)
    save(writer, 4)
    found = average([Checkpoint.open(step_folder(tmp_path, step)) for step in (1, 4)])
    assert torch.allclose(found["weight"], torch.full((3, 4), 2.5))
    writer.save(5, {"model/other": torch.ones(1)}, {"step": 5}, None)
    writer.wait()
    with pytest.raises(ArtifactError, match="other parameters"):
        average([Checkpoint.open(step_folder(tmp_path, step)) for step in (4, 5)])
