"""verify: read the ledger of a pretrain run; samples skipped and repeated, by set and epoch.

    chainrule verify runs/quickstart/digits_decoder

Prints a line for each epoch of each set and the sums. True when every sample was consumed
exactly once an epoch, in the order that the settings promise.
"""

from collections.abc import Callable
from pathlib import Path

from chainrule.pipeline.artifact import ArtifactError, partial_folder
from chainrule.pipeline.data import ledger


def main(run: Path, echo: Callable[[str], object] = print) -> bool:
    """Check the ledger in `run` (a pretrain artifact, finished or not, or its ledger folder)."""
    candidates = [run / "ledger", partial_folder(run) / "ledger", run]
    folder = next((path for path in candidates if (path / "sets.json").is_file()), None)
    if folder is None:
        raise ArtifactError(f"{run}: no ledger; run the stage with ledger: true to have it written")
    findings = ledger.verify(folder)
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
    skipped = sum(found.skipped for found in findings)
    repeated = sum(found.repeated for found in findings)
    echo(f"samples skipped {skipped}, repeated {repeated}")
    return all(found.good for found in findings)
