"""A real Slurm on this machine: two nodes, preemption, short timers, count-only GPUs.

Started in a folder with a short path (munge's socket must stay under 108 bytes), as root or
not, and taken down by process id. Tests skip with a reason where Slurm is missing, and fail
there instead if CHAINRULE_CLUSTER=required (which is what continuous integration says).
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db")
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve without /etc/hosts

SLURM_CONF = """
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SrunPortRange={srun_first}-{srun_last}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={top}/run/munge.sock,cred_expire=5
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool/%n
SlurmctldPidFile={top}/run/slurmctld.pid
SlurmdPidFile={top}/run/slurmd.%n.pid
SlurmctldLogFile={top}/log/slurmctld.log
SlurmdLogFile={top}/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
MinJobAge={job_age}
MaxArraySize=5
EnforcePartLimits=ALL
MailProg=/bin/true
KillWait=5
CompleteWait=0
OverTimeLimit=0
UnkillableStepTimeout=20
MessageTimeout=10
TCPTimeout=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
{accounting}
JobCompType=jobcomp/filetxt
JobCompLoc={top}/log/jobcomp.log
GresTypes=gpu
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=batch Default=YES PriorityTier=10 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent PriorityTier=100 PreemptMode=OFF
"""
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={top}/run/munge.sock"""
SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={top}/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={top}/log/slurmdbd.log
PidFile={top}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageUser=root
StorageHost=localhost
StorageLoc=slurm_acct
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8 Sockets=1 "
    "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=100000 Gres=gpu:h100:8 State=UNKNOWN"
)


class Cluster:
    """Slurm's daemons, in one folder."""

    checkout = TOP

    def __init__(self, top: Path, job_age_s: int = 86400, accounting: bool = False) -> None:
        """Slurm forgets an ended job after `job_age_s`; with `accounting` a slurmdbd does not."""
        self.top, self.job_age_s, self.accounting = top, job_age_s, accounting
        self.conf = top / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}
        self.held: dict[str, set[int]] = {}
        """slurmstepd processes of nodes that lost their slurmd: stopped, so as not to report."""
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.conf),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "OMP_NUM_THREADS": "1",
            "CHAINRULE_HOME": str(TOP),
        }

    def start(self) -> None:
        for folder in ("run", "state", "spool", "log", "dev"):
            (self.top / folder).mkdir()
        for i in range(8):  # count-only GPUs make a node invalid; links to /dev/null do not
            (self.top / "dev" / f"gpu{i}").symlink_to("/dev/null")
        gpus = f"AutoDetect=off\nName=gpu Type=h100 File={self.top}/dev/gpu[0-7]\n"
        (self.top / "gres.conf").write_text(gpus)
        ports = _free_ports(21 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=False)
        )
        self.conf.write_text(
            SLURM_CONF.format(
                top=self.top,
                user=getpass.getuser(),
                port=ports[0],
                srun_first=ports[len(NODES) + 1],
                srun_last=ports[-2],
                nodes=nodes,
                job_age=self.job_age_s,
                accounting=ACCOUNTING.format(top=self.top, port=ports[-1])
                if self.accounting
                else "AccountingStorageType=accounting_storage/none",
            )
        )
        key = self.top / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        run = self.top / "run"
        munged = ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"]
        munged += [f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
        munged += [f"--log-file={self.top}/log/munged.log", f"--seed-file={run}/munged.seed"]
        self._spawn("munged", munged)
        self.wait_until(lambda: (run / "munge.sock").exists(), 10, "munge's socket")
        if self.accounting:
            self._start_accounting(ports[-1])
        self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        for name in NODES:
            self.start_node(name)
        self.wait_until(
            lambda: (
                self.slurm("sinfo", "-h", "-N", "-o", "%t", check=False).split().count("idle")
                >= 2 * len(NODES)
            ),
            30,
            "idle nodes",
        )

    def _start_accounting(self, port: int) -> None:
        """MariaDB on a socket of its own, and slurmdbd in front of it."""
        data, socket_path, user = self.top / "db", self.top / "run" / "db.sock", getpass.getuser()
        make = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}"]
        make += ["--auth-root-authentication-method=socket", f"--auth-root-socket-user={user}"]
        subprocess.run([*make, "--skip-test-db"], check=True, capture_output=True, timeout=120)
        serve = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={socket_path}"]
        serve += ["--skip-networking", f"--user={user}", f"--pid-file={self.top}/run/db.pid"]
        self._spawn("mariadbd", serve)
        self.wait_until(socket_path.exists, 60, "MariaDB's socket")
        conf = self.top / "slurmdbd.conf"
        conf.write_text(SLURMDBD_CONF.format(top=self.top, user=user, port=port))
        conf.chmod(0o600)
        self.env["MYSQL_UNIX_PORT"] = str(socket_path)
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self.wait_until(lambda: not _is_free(port), 60, "slurmdbd")

    def start_node(self, name: str) -> None:
        _signal(self.held.pop(name, set()), signal.SIGKILL)
        self._spawn(name, ["slurmd", "-D", "-N", name, "-f", str(self.conf)])

    def kill_node(self, name: str, only_slurmd: bool = False) -> None:
        """SIGKILL a node's slurmd, and with it the steps and tasks that run there.

        With `only_slurmd` the tasks go on; a lost node does not report how they end (here srun
        of the job's next attempt may listen at the port where the last one did).
        """
        self.daemons[name].kill()
        self.daemons[name].wait()
        tasks = [p for p in self.processes() if f"SLURMD_NODENAME={name}" in _environment(p)]
        stepds = {_parent(p) for p in tasks} & set(self.processes("slurmstepd: "))
        if only_slurmd:
            _signal(stepds, signal.SIGSTOP)
            self.held[name] = stepds
            return
        # the daemons first, and all held: a lost node does not report how its tasks ended
        for number in (signal.SIGSTOP, signal.SIGKILL):
            _signal((*stepds, *tasks), number)

    def _spawn(self, name: str, command: list[str]) -> None:
        with open(self.top / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def slurm(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        said = self.slurm("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, job: str, states: Sequence[str], within_s: float = 120.0) -> str:
        """Wait until the job is in one of `states`; which."""
        self.wait_until(
            lambda: self.state(job) in states,
            within_s,
            f"job {job} in {states}",
            lambda: self.slurm("scontrol", "show", "job", job),
        )
        return self.state(job)

    @staticmethod
    def wait_until(
        condition: Callable[[], bool],
        within_s: float,
        what: str,
        explain: Callable[[], str] = lambda: "",
    ) -> None:
        """Poll until `condition` holds; AssertionError naming `what` after `within_s`."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if condition():
                return
            time.sleep(0.2)
        raise AssertionError(f"not within {within_s:.0f} s: {what} {explain()}")

    def processes(self, *words: str) -> list[int]:
        """Processes of this cluster whose command line holds all `words`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                mine = f"SLURM_CONF={self.conf}".encode() in (path / "environ").read_bytes()
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue
            if mine and all(word in command for word in words):
                found.append(int(path.name))
        return found

    def stop(self) -> None:
        """End jobs and daemons, by process id."""
        if "slurmctld" in self.daemons:
            self.slurm("scancel", "--user", getpass.getuser(), check=False)
        for process in reversed(self.daemons.values()):
            if process.poll() is None:
                process.terminate()
        for process in self.daemons.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.processes():
            if pid != os.getpid():
                os.kill(pid, signal.SIGKILL)


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _environment(pid: int) -> list[str]:
    return _read(Path(f"/proc/{pid}/environ")).decode(errors="replace").split("\0")


def _parent(pid: int) -> int:
    stat = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return int(stat[1]) if stat else 0


def _free_ports(number: int) -> list[int]:
    """`number` ports in a row that nothing listens on."""
    first = 17000
    while first < 32000:
        ports = list(range(first, first + number))
        if all(_is_free(port) for port in ports):
            return ports
        first += number
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def require(programs: Sequence[str], package: str) -> None:
    """Skip, or fail where the cluster is required, if one of the programs is missing."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if not missing:
        return
    reason = f"no Slurm here ({', '.join(missing)}: apt-get install {package})"
    if os.environ.get("CHAINRULE_CLUSTER") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def started(**options: Any) -> Iterator[Cluster]:
    top = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    cluster = Cluster(top, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(top, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    require(PROGRAMS, "slurm-wlm munge")
    with started() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def accounted_cluster() -> Iterator[Cluster]:
    """One that forgets ended jobs at once, and whose accounting remembers them."""
    require((*PROGRAMS, *ACCOUNTING_PROGRAMS), "slurm-wlm munge slurmdbd mariadb-server")
    with started(job_age_s=2, accounting=True) as cluster:
        yield cluster
