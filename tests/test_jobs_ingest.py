"""ingest: what a stage leaves, what it skips, where it stops, and that it resumes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from PIL import Image

from chainrule.jobs import ingest
from chainrule.pipeline.data.reader import Shards
from chainrule.pipeline.data.sources import SourceError
from chainrule.pipeline.stage import Stage, StageFailed


def run(folder: Path, **settings: Any) -> dict[str, Any]:
    config = ingest.Config.model_validate(settings)
    stage = Stage(name="data", pipeline="test", job="ingest", folder=folder, fingerprint="f")
    ingest.main(config, stage)
    return stage.summary


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (9, 7, 3)).astype(np.uint8)).save(path)
    return tmp_path / "pictures"


def test_digits_as_the_quickstart_takes_them(tmp_path: Path) -> None:
    summary = run(
        tmp_path / "out",
        source={"kind": "sklearn-digits"},
        validation=0.15,
        seed=0,
        samples_per_shard=500,
    )
    assert summary == {"train": 1527, "validation": 270, "skipped": 0, "shards": 5}
    shards = Shards.open(tmp_path / "out")
    assert shards.classes == [str(digit) for digit in range(10)]
    labels = [sample.meta["label"] for sample in shards.iterate("validation")]
    assert np.bincount(labels).min() > 15
    sample = shards.read("train", 0)
    assert sample is not None
    assert sample.image().shape == (8, 8, 1)
    keys = [sample.key for split in ("train", "validation") for sample in shards.iterate(split)]
    assert len(set(keys)) == 1797


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_writes_the_same_bytes(
    pictures: Path, tmp_path: Path, workers: int
) -> None:
    settings: dict[str, Any] = {
        "source": {"kind": "image-folder", "path": str(pictures), "size": 5},
        "samples_per_shard": 9,
    }
    run(tmp_path / "one", **settings)
    run(tmp_path / "many", **settings, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_what_an_earlier_attempt_finished_is_kept(pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "source": {"kind": "image-folder", "path": str(pictures)},
        "samples_per_shard": 10,
    }
    run(tmp_path / "whole", **settings)
    again = tmp_path / "again"
    config = ingest.Config.model_validate(settings)
    source = config.source.open()
    parts = ingest.sources.split(source, None, 0, False)
    again.mkdir()
    for number, (split, inputs) in list(enumerate(ingest._shards(parts, 10)))[:3]:
        ingest._write(config, source, again, number, split, inputs)
    (again / ".shard-000003.tar.tmp").write_bytes(b"half a shard")
    kept = (again / "shard-000001.tar").stat().st_ino
    run(again, **settings)
    assert (again / "shard-000001.tar").stat().st_ino == kept
    assert contents(again) == contents(tmp_path / "whole")


KILLED = """
import json, sys
from pathlib import Path
from chainrule.jobs import ingest
from chainrule.pipeline.stage import Stage
config = ingest.Config.model_validate(json.loads(sys.argv[2]))
stage = Stage(name="d", pipeline="t", job="ingest", folder=Path(sys.argv[1]), fingerprint="f")
ingest.main(config, stage)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "source": {"kind": "image-folder", "path": str(pictures), "size": 160},
        "samples_per_shard": 4,
    }
    run(tmp_path / "whole", **settings)
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(killed), json.dumps(settings)])
    while not (killed / "shard-000004.entry.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "index.json").exists()
    run(killed, **settings)
    assert contents(killed) == contents(tmp_path / "whole")


def test_unreadable_pictures_are_named_and_counted(pictures: Path, tmp_path: Path) -> None:
    (pictures / "a" / "00.png").write_bytes(b"no picture")
    whole = (pictures / "b" / "01.png").read_bytes()
    (pictures / "b" / "01.png").write_bytes(whole[:100])
    source = {"kind": "image-folder", "path": str(pictures)}
    with pytest.raises(StageFailed) as error:
        run(tmp_path / "strict", source=source)
    first, second = str(error.value).splitlines()
    assert first in (
        f"{pictures}: a/00.png: not a picture of a known format "
        "(PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM)",
        f"{pictures}: b/01.png: damaged: image file is truncated",
    )
    assert second == (
        "1 of 60 images could not be used so far, max_skipped is 0.01; mend or remove them, or "
        "raise max_skipped"
    )
    assert not (tmp_path / "strict" / "index.json").exists()
    summary = run(tmp_path / "lax", source=source, max_skipped=0.05)
    assert (summary["skipped"], summary["train"] + summary["validation"]) == (2, 58)
    lines = (tmp_path / "lax" / "skipped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["where"] for line in lines) == ["a/00.png", "b/01.png"]
    assert sum(1 for _ in Shards.open(tmp_path / "lax").iterate("train")) == summary["train"]


def test_mending_the_picture_mends_the_stage(pictures: Path, tmp_path: Path) -> None:
    """The shard that held the unreadable picture is read again; the others are kept."""
    broken = pictures / "b" / "59.png"
    whole = broken.read_bytes()
    settings: dict[str, Any] = {
        "source": {"kind": "image-folder", "path": str(pictures)},
        "samples_per_shard": 10,
    }
    run(tmp_path / "whole", **settings)
    broken.write_bytes(b"")
    with pytest.raises(StageFailed, match=r"59\.png"):
        run(tmp_path / "out", **settings)
    broken.write_bytes(whole)
    run(tmp_path / "out", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_all_unreadable_is_a_failure_whatever_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"")
    with pytest.raises(StageFailed, match="no input could be read"):
        run(
            tmp_path / "out",
            source={"kind": "image-folder", "path": str(tmp_path / "in")},
            max_skipped=1,
        )


def test_missing_sources_are_refused_before_and_after_the_start(tmp_path: Path) -> None:
    config = ingest.Config.model_validate(
        {"source": {"kind": "image-folder", "path": str(tmp_path / "none")}}
    )
    with pytest.raises(SourceError, match="none: no such (file or )?folder"):
        ingest.source_files(config)
    with pytest.raises(SourceError, match="none: no such (file or )?folder"):
        run(tmp_path / "out", **config.model_dump())


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ({"kind": "image-foldr", "path": "x"}, "image-foldr"),
        ({"kind": "image-folder"}, "path"),
        ({"kind": "image-folder", "path": "x", "sizes": 3}, "sizes"),
        ({"kind": "text", "path": "x", "document": "page"}, "document"),
    ],
)
def test_wrong_settings_are_named(source: dict[str, Any], fault: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=fault):
        ingest.Config.model_validate({"source": source})


def test_text_counts_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(f"línea {i}\n" for i in range(100)))
    summary = run(
        tmp_path / "out",
        source={"kind": "text", "path": str(tmp_path / "in.txt"), "document": "line"},
        validation=0.1,
        validation_tail=True,
    )
    shards = Shards.open(tmp_path / "out")
    held_out = [sample.text() for sample in shards.iterate("validation")]
    assert held_out == [f"línea {i}" for i in range(90, 100)]
    assert shards.index["raw_bytes"]["validation"] == sum(len(t.encode()) for t in held_out)
    assert summary["validation_bytes"] == shards.index["raw_bytes"]["validation"]


def test_a_share_that_leaves_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("one text\n" * 20)
    source = {"kind": "text", "path": str(tmp_path / "in.txt")}
    with pytest.raises(StageFailed, match="validation 0.05: 1 document leaves none for validation"):
        run(tmp_path / "refused", source=source, validation=0.05)
    assert run(tmp_path / "warned", source=source)["validation"] == 0
    assert "source.document: paragraph" in capsys.readouterr().err
    assert run(tmp_path / "meant", source=source, validation=0)["validation"] == 0
    assert "leaves none" not in capsys.readouterr().err
    source["document"] = "line"
    assert run(tmp_path / "cut", source=source, validation=0.01)["validation"] == 1


def test_bad_names_links_and_pipes_are_inputs_like_others(pictures: Path, tmp_path: Path) -> None:
    folder = os.fsencode(pictures)
    (pictures / "a" / "loop.png").symlink_to("loop.png")
    (pictures / "a" / "nowhere.png").symlink_to("moved away.png")
    os.mkfifo(pictures / "a" / "pipe.png")
    shutil.copy(folder + b"/a/00.png", folder + b"/a/\xe9.png")
    settings: dict[str, Any] = {"source": {"kind": "image-folder", "path": str(pictures)}}
    with pytest.raises(StageFailed, match="could not be used so far.*mend or remove them"):
        run(tmp_path / "strict", **settings)
    assert run(tmp_path / "out", **settings, max_skipped=0.1)["skipped"] == 4
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert {line["where"]: line["reason"] for line in skipped} == {
        "a/loop.png": "Too many levels of symbolic links",
        "a/nowhere.png": "a link to moved away.png, which is not there",
        "a/pipe.png": "a named pipe, not a file",
        r"a/\xe9.png": "its name is not UTF-8; rename it",
    }


def test_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"PAR1\xff\xfe")
    with pytest.raises(StageFailed, match="Parquet; that is read by source.kind parquet-text"):
        run(tmp_path / "out", source={"kind": "text", "path": str(tmp_path)}, validation=0)


@pytest.mark.slow
def test_real_data_sets(shared_data: Path, tmp_path: Path) -> None:
    """Every kind of source on the real files that it is for."""
    mnist = tmp_path / "mnist"
    mnist.mkdir()
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copy(shared_data / "mnist" / name, mnist / name.replace("t10k", "train"))
    imagenet = shared_data / "imagenet_sample" / "imagenet_sample_250.tar"
    cases: list[tuple[dict[str, Any], int]] = [
        ({"kind": "idx", "path": str(mnist)}, 10_000),
        ({"kind": "image-folder", "path": str(imagenet), "size": 32}, 250),
        (
            {
                "kind": "sprites",
                "path": str(shared_data / "cifar10_lossless4k"),
                "labels": "labels.txt",
            },
            4000,
        ),
        (
            {
                "kind": "audio-folder",
                "path": str(shared_data / "ljspeech32" / "ljspeech32.tar.gz"),
                "sample_rate": 16000,
            },
            32,
        ),
        ({"kind": "text", "path": str(shared_data / "text" / "peps" / "peps_rst.tar.gz")}, 703),
        ({"kind": "arrays", "path": str(shared_data / "frey_faces" / "frey_faces.npz")}, 1965),
    ]
    for number, (source, samples) in enumerate(cases):
        summary = run(tmp_path / str(number), source=source)
        assert summary["train"] + summary["validation"] == samples
        assert summary["skipped"] == 0
