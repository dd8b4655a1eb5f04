"""Why an attempt at a job ended, read off the job's log: what the script said, and what Slurm did.

The log of a job is appended to by every attempt. The batch script writes a line at the start
of each and, where it lives to see it, one at the end (`slurm/run_stage.sh`); Slurm's own daemons
write there too what they do to a job. A script that went without a word went with its node.
"""

import re
from pathlib import Path

LOG_VARIABLE = "CHAINRULE_LOG"
TAIL_BYTES = 1 << 20
"""So much of the end of a log is read: the stacks of a hang are long."""

NODE_FAILURE = "node failure"
HAND = "requeue by hand"
_OF_SLURM = {
    "NODE FAILURE": NODE_FAILURE,
    "PREEMPTION": "preemption",
    "JOB REQUEUE": HAND,
    "TIME LIMIT": "time limit",
}
_BEGIN = re.compile(r"^=== job (\S+), attempt (\d+) on \S+ at ", re.M)
_ASKED = re.compile(r"^=== job \S+: exit (\d+), requeued at \S+: (.+)$", re.M)
_END = re.compile(r"^=== job \S+: exit (\d+) at ", re.M)
_DUE = re.compile(r"CANCELLED AT \S+ DUE TO ([A-Z ]+)")
_HANG = re.compile(r"^rank \d+: no step for \d+ s", re.M)
_MEMORY = re.compile(r"[Oo]ut [Oo]f [Mm]emory|oom-kill")


def reason_of_restart(log: Path, attempt: int) -> str | None:
    """Why attempt number `attempt` of a job ended; None where its log does not tell."""
    said = _said_by(log, attempt)
    if said is None:
        return None
    asked = _ASKED.search(said)
    if asked is None:
        due = [_OF_SLURM.get(found.strip(), found.strip().lower()) for found in _DUE.findall(said)]
        return due[0] if due else NODE_FAILURE
    code, why = int(asked[1]), asked[2]
    if why != "exit":  # the script heard a signal of the job's, or was told of a preemption
        return why
    if _HANG.search(said):
        return "hang"
    if _MEMORY.search(said):
        return "out of memory"
    if code > 128:
        return f"a rank was killed (signal {code - 128})"
    return "the ranks were told to stop"


def exit_code(log: Path) -> int | None:
    """With what the job's script ended at last; None where it did not live to say it."""
    text = tail(log) or ""
    ends, begins = list(_END.finditer(text)), list(_BEGIN.finditer(text))
    if not ends or (begins and begins[-1].start() > ends[-1].start()):
        return None
    return int(ends[-1][1])


def tail(log: Path) -> str | None:
    """The end of a log, a megabyte at most; None where it cannot be read."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return None


def _said_by(log: Path, attempt: int) -> str | None:
    """The part of the log that an attempt wrote, as far as the end of the log reaches back."""
    text = tail(log)
    if text is None:
        return None
    begins = list(_BEGIN.finditer(text))
    for number, begin in enumerate(begins):
        if int(begin[2]) == attempt:
            end = begins[number + 1].start() if number + 1 < len(begins) else len(text)
            return text[begin.end() : end]
        if int(begin[2]) > attempt:
            return text[: begin.start()] if number == 0 else None
    return None
