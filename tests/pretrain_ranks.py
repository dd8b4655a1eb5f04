"""Pretraining in processes that a test may kill: started from a server that has all imported.

Not a test file; used by `test_jobs_pretrain.py`.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.stage import REQUEUE, Stage, StageInterrupted

TEXT = {
    "size": 34,
    "ranges": {"text": [0, 32], "specials": [32, 34]},
    "specials": {"bos": 32, "eos": 33},
}
IMAGE = {"size": 8, "ranges": {"image": [0, 8]}, "specials": {}}


def write_tokens(
    folder: Path,
    modality: str,
    samples: int = 60,
    vocabulary: dict[str, Any] | None = None,
    tokenizer: dict[str, str] | None = None,
) -> Path:
    """A token artifact that can be learned: runs of rising ids, or grids of one value a label."""
    vocabulary = vocabulary or (TEXT if modality == "text" else IMAGE)
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "validation")):
        with ShardWriter(folder, number, split) as shard:
            for i in range(number * samples, (number + 1) * samples):
                generator = np.random.default_rng(i)
                if modality == "text":
                    start, length = generator.integers(32), generator.integers(4, 40)
                    eos = vocabulary["specials"]["eos"]
                    tokens = ((start + np.arange(length)) % 32).astype(np.uint16)
                    tokens = np.append(tokens, eos)
                    meta: dict[str, Any] = {"bytes": len(tokens)}
                else:
                    tokens = np.full((2, 3), i % 4, np.uint8)
                    tokens[0, 0] = 4 + generator.integers(4)
                    meta = {"label": i % 4}
                shard.write(key_of(i), {"tokens.npy": tokens, "json": meta}, tokens.size)
    finish(
        folder,
        kind="tokens",
        modality=modality,
        shards=2,
        classes=[str(i) for i in range(4)] if modality == "image" else None,
        vocabulary=vocabulary,
        tokenizer=tokenizer or {"fingerprint": f"of-{modality}", "kind": "test"},
        grid=[2, 3] if modality == "image" else None,
        source="none",
    )
    return folder


def stage_of(folder: Path, tokens: list[Path], rank: int = 0, world_size: int = 1) -> Stage:
    return Stage(
        name="decoder",
        pipeline="test",
        job="pretrain",
        folder=folder,
        fingerprint="f" * 64,
        inputs={"tokens": [Artifact.bare(path) for path in tokens]},
        rank=rank,
        world_size=world_size,
    )


def rank_main(
    folder: Path, tokens: list[Path], config: dict[str, Any], environment: dict[str, str]
) -> None:
    """One rank; exits 75 after an interruption, like the command line."""
    os.setpgid(0, 0) if environment["RANK"] == "0" else None
    os.environ.update(environment)
    import torch

    from chainrule.jobs import pretrain

    torch.set_num_threads(1)
    stage = stage_of(folder, tokens, int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    try:
        pretrain.main(pretrain.Config.model_validate(config), stage)
    except StageInterrupted:
        os._exit(REQUEUE)
    if stage.is_main:
        (folder / "summary.json").write_text(json.dumps(stage.summary))
    os._exit(0)


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["chainrule.jobs.pretrain", "accelerate", "deepspeed", "torch.distributed", __name__]
)


def start(
    folder: Path, tokens: list[Path], config: dict[str, Any], ranks: int = 1
) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started: list[BaseProcess] = []
    for rank in range(ranks):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(
            target=rank_main, args=(folder, tokens, config, environment), daemon=True
        )
        process.start()
        started.append(process)
    return started


def finish_all(processes: list[BaseProcess], within_s: float = 240) -> list[int | None]:
    """Exit codes."""
    until = time.monotonic() + within_s
    for process in processes:
        process.join(max(until - time.monotonic(), 0.1))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def signal_when(
    processes: list[BaseProcess], ready: Callable[[], bool], number: int, jitter_s: float = 0.0
) -> bool:
    """Send a signal to all once `ready()`, `jitter_s` later; whether they were still running."""
    while not ready():
        if all(process.exitcode is not None for process in processes):
            return False
        time.sleep(0.002)
    until = time.monotonic() + jitter_s
    while time.monotonic() < until:
        pass
    alive = any(process.exitcode is None for process in processes)
    for process in processes:
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, number)
    return alive


def steps_logged(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def losses_of(folder: Path) -> list[tuple[int, Any, Any]]:
    """(step, loss, gradient norm) of every line of the log, as written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


KILL = signal.SIGKILL
