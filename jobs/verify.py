"""verify: read the ledger of a pretrain run; samples skipped and repeated, by set and epoch.

    chainrule verify runs/quickstart/digits_decoder
    chainrule verify quickstart/digits_decoder

Prints a line for each epoch of each set, how much of the training the ledger covers, and the
sums. True when every sample was consumed exactly once an epoch, in the order that the settings
promise, and every step that was trained is there once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from chainrule.pipeline.artifact import MANIFEST, ArtifactError, partial_folder
from chainrule.pipeline.config import nearest
from chainrule.pipeline.data import ledger
from chainrule.pipeline.training.checkpoints import Checkpoint, CheckpointDamaged, steps_in

RUNS = Path("runs")
SHOWN = 5  # ranges of steps named in a line


@dataclass(frozen=True)
class Trained:
    """What a run says of itself, without its ledger."""

    steps: int
    """Steps that were trained; of an unfinished run, those that it goes on from."""
    rows: int | None
    """Rows that they consumed or passed over, where a checkpoint tells."""
    finished: bool


def main(run: Path, echo: Callable[[str], object] = print) -> bool:
    """Check the ledger in `run`: a pretrain artifact, finished or not, PIPELINE/STAGE below
    `runs`, or a ledger folder. ArtifactError where there is none."""
    folder = ledger_folder(run)
    trained = what_was_trained(folder.parent) if folder.name == "ledger" else None
    unfinished = trained is not None and not trained.finished
    try:
        book = ledger.read(folder, unfinished)
    except ledger.LedgerDamaged as error:
        echo(str(error))
        return False
    if not book.guarded:
        echo(
            f"{folder}: ledger format {ledger.UNGUARDED}, of an earlier version, has no checksums; "
            "an altered record that is still possible is not told from a good one"
        )
    ahead = 0
    if trained is not None and unfinished:
        ahead = len(np.unique(book.records["step"][book.records["step"] >= trained.steps]))
        book = book.before(trained.steps)
    findings = ledger.verify(book)
    for found in findings:
        line = (
            f"{found.set} epoch {found.epoch}: {found.rows}/{found.of} rows, "
            f"skipped {found.skipped}, repeated {found.repeated}"
        )
        if found.passed_over:
            line += f", passed over by policy {found.passed_over} rows"
        if found.misplaced:
            line += f", out of order {found.misplaced}"
        echo(line)
    line, covered = coverage(book, trained)
    if ahead:
        line += f"; {ahead} more past the last checkpoint, to be made again"
    echo(line)
    skipped = sum(found.skipped for found in findings)
    repeated = sum(found.repeated for found in findings)
    echo(f"samples skipped {skipped}, repeated {repeated}")
    return covered and all(found.good for found in findings)


def ledger_folder(run: Path) -> Path:
    """Where the ledger lies that `run` means; ArtifactError where there is none."""
    for there in (run, RUNS / run):
        for folder in (there / "ledger", partial_folder(there) / "ledger", there):
            if (folder / "sets.json").is_file():
                return folder
    if any(path.is_dir() for path in (run, RUNS / run)):
        raise ArtifactError(f"{run}: no ledger; run the stage with ledger: true to have it written")
    known = {
        path.parent.relative_to(RUNS).as_posix().removesuffix(".partial")
        for path in RUNS.glob("*/*/ledger")
    }
    raise ArtifactError(f"{run}: no such folder{nearest('/'.join(run.parts[-2:]), sorted(known))}")


def what_was_trained(run: Path) -> Trained | None:
    """As checkpoints, settings and metrics of the pretrain folder `run` say; None where nothing
    does."""
    finished = (run / MANIFEST).is_file()
    saved = _newest(run / "checkpoints")
    steps = [] if saved is None else [saved.step]
    if finished:  # an unfinished run goes on from its checkpoint, whatever was made since
        steps += _asked_and_logged(run)
    elif not steps and (run / "model.json").is_file():  # no checkpoint yet: it begins anew
        steps = [0]
    if not steps:
        return None
    exact = saved is not None and saved.step == max(steps)
    return Trained(max(steps), int(saved.state["position"]) if exact and saved else None, finished)


def _asked_and_logged(run: Path) -> list[int]:
    """Steps that config.yaml asks for and that metrics.jsonl ends with; ArtifactError names a file
    that is not as the stage wrote it."""
    readers: dict[str, Callable[[str], Any]] = {
        "config.yaml": lambda text: yaml.safe_load(text)["steps"],
        "metrics.jsonl": lambda text: json.loads(text.splitlines()[-1])["step"],
    }
    steps = []
    for name, reader in readers.items():
        try:
            steps.append(int(reader((run / name).read_text())))
        except FileNotFoundError:
            continue
        except (KeyError, TypeError, ValueError, IndexError, yaml.YAMLError):
            raise ArtifactError(f"{run / name}: altered or cut; {ledger.REMEDY}") from None
    return steps


def _newest(folder: Path) -> Checkpoint | None:
    for step in reversed(steps_in(folder)):
        try:
            return Checkpoint.open(folder / f"step-{step:08d}", verify=False)
        except CheckpointDamaged:
            continue
    return None


def coverage(book: ledger.Book, trained: Trained | None) -> tuple[str, bool]:
    """How many steps, rows and samples the ledger covers, and whether that is each one once."""
    steps = np.unique(book.records["step"])
    rows = len(np.unique(book.records["position"]))
    of_steps = trained.steps if trained is not None else int(steps.max(initial=-1)) + 1
    of_rows = trained.rows if trained is not None else None
    known = steps[steps < of_steps]
    line = f"steps {len(known)} of {of_steps}, rows {rows}"
    line += f" of {of_rows}" if of_rows is not None else ""
    line += f", samples {book.samples}"
    faults = {
        "missing": np.setdiff1d(np.arange(of_steps), known),
        "twice": book.twice,
        "never trained": steps[steps >= of_steps],
    }
    for fault, of_fault in faults.items():
        if len(of_fault):
            line += f"; {fault}: {ranges(of_fault + 1)}"  # counted from 1, as in metrics.jsonl
    whole = of_rows is None or rows == of_rows
    return line, whole and not any(len(of_fault) for of_fault in faults.values())


def ranges(steps: np.ndarray) -> str:
    """Ascending steps as "3-7, 9": a few of the ranges, and how many more there are."""
    parts = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)
    shown = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts[:SHOWN]]
    more = len(parts) - len(shown)
    return ", ".join(shown) + (f" and {more} more ranges" if more else "")
