"""A real Slurm of one machine in a temporary folder: munge, the controller, one node.

Debian's packages `slurm-wlm` and `munge` are enough; it runs as root, on loopback, without systemd
or control groups. `close` ends every process it has started.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

NEEDED = (
    "setpriv",
    "munged",
    "munge",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "squeue",
    "sinfo",
    "scontrol",
)
# A daemon ends with the process that has started it, also where that is killed.
TIED = ("setpriv", "--pdeathsig", "TERM")
MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
READY_SECONDS = 60.0
CPUS = 2

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Requeued jobs start again after seconds, not two minutes.
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=30
MinJobAge=300
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000
PartitionName=ci Nodes=ALL Default=YES MaxTime=01:00:00 State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=01:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Unavailable(Exception):  # noqa: N818 - a reason to skip
    """Why there can be no Slurm here."""


class OneNodeSlurm:
    """The daemons, their environment (`SLURM_CONF`), and ways to disturb them."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in NEEDED if shutil.which(name) is None]
        if missing:
            raise Unavailable(f"no {', '.join(missing)} here (Debian: slurm-wlm, munge)")
        if os.geteuid() != 0:
            raise Unavailable("a Slurm for the tests is started by root")
        self.folder = folder
        self.munged: subprocess.Popen[bytes] | None = None
        self.controller: subprocess.Popen[bytes] | None = None
        self.node: subprocess.Popen[bytes] | None = None
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self._start_munge()
            self._write()
            self.start_controller()
            self.node = self._daemon("slurmd", "-D", "-N", "n1")
            self._wait(self._is_idle, "the node did not come up")
        except BaseException:
            self.close()
            raise

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(
            command, env=os.environ | self.environment, check=True, capture_output=True, text=True
        ).stdout

    def start_controller(self) -> None:
        """Start it, or start it again with the state it had."""
        self.controller = self._daemon("slurmctld", "-D")

    def kill_controller(self) -> None:
        """As a crash would."""
        assert self.controller is not None
        self.controller.kill()
        self.controller.wait()

    def job_processes(self, job: str) -> dict[int, str]:
        """Command lines by process id of everything that belongs to a job (123 or 123_4)."""
        array, _, task = job.partition("_")
        wanted = {f"SLURM_JOB_ID={job}"}
        if task:
            wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                values = set(
                    (process / "environ").read_bytes().decode(errors="replace").split("\0")
                )
                if wanted <= values:
                    words = (process / "cmdline").read_bytes().split(b"\0")
                    found[int(process.name)] = b" ".join(words).decode(errors="replace")
        return found

    def close(self) -> None:
        """End all jobs and daemons; what does not leave is killed."""
        if self.controller is not None and self.controller.poll() is None:
            with suppress(subprocess.SubprocessError):
                self.ask("scancel", "--user", "root")
                self._wait(lambda: not self.ask("squeue", "--noheader").strip(), "jobs stay", 15.0)
        daemons = [one for one in (self.node, self.controller, self.munged) if one is not None]
        for daemon in daemons:
            if daemon.poll() is None:
                daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """What still runs with this Slurm's configuration: step daemons of killed nodes."""
        mine, found = f"SLURM_CONF={self.folder}/slurm.conf".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (process / "environ").read_bytes().split(b"\0")
                name = (process / "cmdline").read_bytes()
                if mine in environment and b"slurm" in name:
                    found.append(int(process.name))
        return found

    def _start_munge(self) -> None:
        """The system's munge where it answers, else one of our own."""
        if MUNGE_SOCKET.exists() and _munge_answers(MUNGE_SOCKET):
            self.socket = MUNGE_SOCKET
            return
        place = self.folder / "munge"
        place.mkdir(parents=True)
        key, self.socket = place / "munge.key", place / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        place.chmod(0o755)
        command = [*TIED, "munged", "--foreground", "--force", f"--socket={self.socket}"]
        command += [f"--key-file={key}", f"--pid-file={place}/munged.pid"]
        command += [f"--seed-file={place}/munged.seed", f"--log-file={place}/munged.log"]
        with (place / "output").open("wb") as stream:
            self.munged = subprocess.Popen(command, stdout=stream, stderr=stream)
        try:
            self._wait(lambda: _munge_answers(self.socket), "munge does not answer", 15.0)
        except AssertionError as reason:
            raise Unavailable(f"{reason}: {(place / 'output').read_text().strip()}") from None

    def _write(self) -> None:
        for name in ("state", "log", "spool/n1"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        held = [socket.socket(), socket.socket()]
        for one in held:
            one.bind(("127.0.0.1", 0))
        controller, port = (one.getsockname()[1] for one in held)
        for one in held:
            one.close()
        host = socket.gethostname().partition(".")[0]
        values = {"host": host, "controller": controller, "folder": self.folder, "port": port}
        text = CONFIGURATION.format(**values, munge=self.socket, cpus=CPUS)
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, *command: str) -> "subprocess.Popen[bytes]":
        with (self.folder / "log" / f"{command[0]}.out").open("ab") as stream:
            return subprocess.Popen(
                [*TIED, *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=clean(os.environ) | self.environment,
                start_new_session=True,
            )

    def _is_idle(self) -> bool:
        try:
            states = self.ask("sinfo", "--noheader", "--Node", "--format=%T").split()
        except subprocess.CalledProcessError:
            return False
        return bool(states) and set(states) == {"idle"}

    def _wait(
        self, condition: Callable[[], bool], told: str, seconds: float = READY_SECONDS
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{told} within {seconds:.0f} s ({self.folder}/log)"
            time.sleep(0.2)


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what a job around us would pass on."""
    return {name: value for name, value in environment.items() if not name.startswith("SLURM_")}


def _munge_answers(place: Path) -> bool:
    asked = subprocess.run(["munge", "--no-input", f"--socket={place}"], capture_output=True)
    return asked.returncode == 0
