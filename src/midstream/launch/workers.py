"""Processes of their own: a worker that trains, the ranks of a stage, those of several machines;
and those that commands start, one for each piece of work: `python -m midstream.work NAME`.

The latter get a request on standard input as one line of JSON, and answer with JSON lines.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from midstream.config import Machine
from midstream.core.storage import num_cores, read_json, write_json
from midstream.core.tokens import counted
from midstream.study.label import label
from midstream.study.lease import LOG, STALE_SECONDS, heartbeat_of, is_held
from midstream.study.stages import Stage, stage_from_json

Event = dict[str, Any]
# What a process ends with that was asked to stop and can be continued (EX_TEMPFAIL).
STOPPED_EXIT_CODE = 75
# Of a process that refused to start, as for any error that the user can put right.
REFUSED_EXIT_CODE = 2
# How long an idle worker has to leave after the end of its input.
LEAVE_SECONDS = 20.0
# How long the ranks of a node that was told to end may take for their step and its checkpoint.
SHUTDOWN_SECONDS = 600
# What node 0 says to the others: of which launch, the ranks to start, the exit code to leave with.
NODES = "nodes.json"
# How long a node waits for node 0 to come, and for it to show itself again.
COME_SECONDS, GONE_SECONDS = 1800.0, STALE_SECONDS / 2
_LOOK_SECONDS = 1.0
# In a worker's environment: the process that started it, without which it does not go on.
LAUNCHER = "MIDSTREAM_LAUNCHER"
# In a process's environment: the GPUs that it sees.
VISIBLE = "CUDA_VISIBLE_DEVICES"
# What CUDA takes there; Slurm's NoDevFiles is none.
_GPU = re.compile(r"\d+|(GPU|MIG)-\S+")
# What launchers of ranks set (torchrun, Kubeflow, Accelerate): of the process that they started.
OF_RANKS = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_\w+"
)


class Worker:
    """A worker process; `stage` is what it runs, or will run once it is ready.

    What it works for (the "store", the "machine") stands in the file `work` (`write_work`). It is
    given a line of JSON on standard input: the "stage", and whether a frozen encoder's outputs are
    kept on disk ("features": stored | live | auto). It answers on standard output with JSON lines:
    {"event": "ready"}, then for each stage "started", "progress" (stage, done, tokens_seen,
    total_tokens, loss, tokens_per_second, note) and "finished" (stage, state: done | failed |
    stopped, error). The end of its input ends it. What it prints on standard error, and any line
    that is no event, goes to `log`.

    Where it `is_group` it is torchrun with the ranks of one stage, which stands in the file too.
    The first rank speaks as above; every rank says {"event": "rank", "rank", "pid"} at its start,
    and {"event": "fault", "error"} if one was lost.

    It sees the `gpus` alone, or all that this process sees where none are named. Its events, and at
    its end {"event": "exit", "code"}, go to `put` from a thread of its own.
    """

    def __init__(
        self,
        number: int,
        work: Path,
        log: Path,
        machine: Machine,
        put: Callable[[tuple["Worker", Event]], None],
        is_group: bool,
        command: Sequence[str] | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        self.number, self.work, self.log, self.is_group = number, work, log, is_group
        self.pids: dict[int, int] = {}
        self.fault: str | None = None
        self.stage: Stage | None = None
        self.ready = False
        own = group_command(machine, work) if is_group else worker_command(work)
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                list(command or own),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=worker_environment(machine)
                | {LOG: str(self.log.absolute())}
                | ({VISIBLE: ",".join(gpus)} if gpus else {}),
                # Ctrl-C goes to the launcher alone, which asks the workers to stop.
                start_new_session=True,
            )
        assert self.process.stdin is not None
        self._input = self.process.stdin
        self._put = put
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, daemon=True).start()

    def send(self, features: str = "auto") -> None:
        """Hand over its stage; a group has it already."""
        assert self.stage is not None
        if self.is_group:
            return
        # A worker that has died cannot read: its exit event follows and settles the stage.
        with suppress(BrokenPipeError):
            self._input.write(work_line(self.stage, features).encode())
            self._input.flush()

    def close(self) -> None:
        """Tell it that no stage follows."""
        with suppress(BrokenPipeError):
            self._input.close()

    def signal(self, number: int) -> None:
        """Send it a signal if it still lives; SIGKILL to every rank, others to the first.

        The first rank tells the others at the next step. torchrun would pass a signal on as well,
        but ends ranks that take their time.
        """
        if self.process.poll() is not None:
            return
        if number == signal.SIGKILL or not self.pids:
            self.process.send_signal(number)
        to = self.pids.values() if number == signal.SIGKILL else list(self.pids.values())[:1]
        for pid in to:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def note(self, event: Event) -> bool:
        """Keep what a rank says of itself; whether it was that."""
        if event["event"] == "rank":
            self.pids[event["rank"]] = event["pid"]
            self.pids = dict(sorted(self.pids.items()))
        elif event["event"] == "fault":
            self.fault = self.fault or event["error"]
        return event["event"] in ("rank", "fault")

    def why(self, code: int, remedy: str) -> str:
        """What is said of a stage that it ran when it ended with this code."""
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        error = self.fault or f"its worker process {self.process.pid} ended with {how}"
        killed = f"; the system kills processes when memory runs out: {remedy}"
        return error + (killed if code == -signal.SIGKILL else "")

    def leave(self) -> None:
        """Wait until it has left; one that does not is killed after LEAVE_SECONDS."""
        try:
            self.process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = event_of(line)
            if event is None:
                # On a full disk the line is lost, and what follows it is still read.
                with suppress(OSError), self.log.open("ab") as log:
                    log.write(line)
            elif not self.note(event):
                self._put((self, event))

    def _wait(self) -> None:
        code = self.process.wait()
        # What it started may outlive it, with its output open.
        self._reader.join(LEAVE_SECONDS)
        self._put((self, {"event": "exit", "code": code}))


def event_of(line: bytes) -> Event | None:
    """The event that a line is, if it is one."""
    with suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return event
    return None


def work_line(stage: Stage, features: str = "auto") -> str:
    """What a worker is given to do, as it reads it."""
    return json.dumps({"stage": stage.model_dump(mode="json"), "features": features}) + "\n"


def write_work(path: Path, store: Path, machine: Machine, line: str | None = None) -> Path:
    """Write what a worker works for, and with `line` the one stage of its ranks."""
    given = {} if line is None else json.loads(line)
    place = machine if line is not None else machine.alone()
    whole = {"store": str(store.absolute()), "machine": place.model_dump(mode="json"), **given}
    write_json(path, whole)
    return path


def worker_command(work: Path) -> list[str]:
    """The command of a worker. It takes a file: torchrun takes options for its own."""
    return [sys.executable, "-m", "midstream.work.worker", str(work)]


def group_command(machine: Machine, work: Path) -> list[str]:
    """The command of the ranks of one stage on this node."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(machine.ranks), "--max-restarts", "0"]
    # By default torchrun dies of SIGUSR1 and leaves its ranks behind, and kills them after 30 s.
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    command += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    if machine.nodes == 1:
        command += ["--standalone"]
    else:
        assert machine.master is not None, "several nodes know it"
        host, _, port = machine.master.rpartition(":")
        command += ["--nnodes", str(machine.nodes), "--node-rank", str(machine.node)]
        command += ["--master-addr", host, "--master-port", port]
    return [*command, *worker_command(work)[1:]]


def worker_environment(machine: Machine) -> dict[str, str]:
    """This process's environment with the workers' thread counts, no downloads unless
    HF_HUB_OFFLINE=0 asks for them, no modules of the folder where it runs (a user's `random.py`),
    and nothing of the rank that this process may be."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **{name: value for name, value in os.environ.items() if not OF_RANKS.fullmatch(name)},
        **dict.fromkeys(threads, str(machine.threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        LAUNCHER: str(os.getpid()),
    }


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes.

    What is set there already counts; else all that the driver lists. None without a driver.
    """
    if VISIBLE in os.environ:
        names = [name.strip() for name in os.environ[VISIBLE].split(",")]
        # CUDA ends the list at the first name that is none.
        ends = [at for at, name in enumerate(names) if not _GPU.fullmatch(name)]
        return tuple(names[: ends[0] if ends else None])
    if shutil.which("nvidia-smi") is None:
        return ()
    # By identifier: the driver's numbers and CUDA's may differ in their order.
    asked = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return tuple(answer.stdout.split()) if answer.returncode == 0 else ()


def gpu_shares(machine: Machine) -> list[tuple[str, ...]]:
    """Each worker's own GPUs, one for each of its ranks; empty where stages run on the CPU.

    Raises ValueError where there are fewer GPUs than the workers need.
    """
    gpus = () if machine.device == "cpu" else visible_gpus()
    if not gpus and machine.device == "cuda" and VISIBLE in os.environ:
        raise ValueError(
            f"device cuda is asked for, and {VISIBLE}={os.environ[VISIBLE]!r} leaves no GPU; "
            "unset it, or give --device cpu"
        )
    if not gpus:
        return [()] * machine.workers
    need = machine.workers * machine.ranks
    if need > len(gpus):
        most = len(gpus) // machine.ranks
        remedy = f"give --workers {most}" if most else f"give --ranks {len(gpus)} or fewer"
        raise ValueError(
            f"{counted(machine.workers, 'worker')} with {counted(machine.ranks, 'rank')} each need "
            f"{need} GPUs of their own, this process sees {len(gpus)} ({', '.join(gpus)}); "
            f"{remedy}, or --device cpu"
        )
    return [gpus[at : at + machine.ranks] for at in range(0, need, machine.ranks)]


def workers_with_gpus(machine: Machine) -> Machine:
    """The machine with no more workers than have GPUs, and with one at least."""
    gpus = () if machine.device == "cpu" else visible_gpus()
    most = max(len(gpus) // machine.ranks, 1) if gpus else machine.workers
    return machine.model_copy(update={"workers": min(machine.workers, most)})


def join(store: Path, machine: Machine, on_note: Callable[[str], None]) -> int:
    """Start this node's ranks whenever node 0 says so; returns node 0's exit code.

    The ranks meet by torchrun's rendezvous. SIGTERM, SIGINT and SIGUSR1 go to them, and they stop
    all others at the next step. Raises TimeoutError where node 0 does not come, or has gone
    without a word.
    """
    ranks: subprocess.Popen[bytes] | None = None
    task = None

    def forward(number: int, _frame: FrameType | None) -> None:
        if ranks is not None and ranks.poll() is None:
            ranks.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    on_note(f"node {machine.node} of {machine.nodes} waits for node 0 in {store / NODES}")
    try:
        for said in _said(store):
            if said["code"] is not None:
                return int(said["code"])
            if said["work"] is None or said["task"] == task:
                continue
            if ranks is not None:
                ranks.wait()
            task, work = said["task"], Path(said["work"])
            stage = stage_from_json(json.dumps(read_json(work)["stage"]))
            on_note(f"node {machine.node} trains {label(stage)}")
            with (store / f"node-{machine.node}.log").open("ab") as log:
                ranks = subprocess.Popen(
                    group_command(machine, work),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=worker_environment(machine),
                    start_new_session=True,
                )
    finally:
        # They end by themselves once node 0's have; else they are killed.
        if ranks is not None:
            with suppress(subprocess.TimeoutExpired):
                ranks.wait(GONE_SECONDS)
            if ranks.poll() is None:
                ranks.kill()
                ranks.wait()
    raise AssertionError("what node 0 says ends with an error")


def _said(store: Path) -> Iterator[dict[str, Any]]:
    """What the launcher that holds the store says, again and again."""
    lock, launch, seen_at, patience = store / "launch.lock", None, time.monotonic(), COME_SECONDS
    while time.monotonic() - seen_at < patience:
        time.sleep(_LOOK_SECONDS)
        with suppress(FileNotFoundError, json.JSONDecodeError):
            if is_held(lock):
                launch = read_json(heartbeat_of(lock))["token"]
                seen_at, patience = time.monotonic(), GONE_SECONDS
            # What an earlier launch has said is none of ours.
            if launch is not None and (said := read_json(store / NODES))["launch"] == launch:
                yield said
    come = "has not come" if launch is None else "has gone: nobody holds"
    raise TimeoutError(f"node 0 {come} {lock} for {patience:.0f} s")


# What a work's last event is called, by the code that its process ends with; else "failed".
ENDS = {0: "done", STOPPED_EXIT_CODE: "stopped"}


@dataclass(frozen=True)
class Work:
    """A function of a request and a channel (`midstream.work.protocol`), as module:function.

    A work that `has_terminal` is the user's partner: its request is an argument, it prints its
    errors, and its exit code is its answer. One that stops `when_asked` does so at its next step,
    others at once. One that `resumes` goes on where it was when it is asked again.
    """

    target: str
    has_terminal: bool = False
    when_asked: bool = False
    resumes: bool = False


WORKS: Mapping[str, Work] = {
    "prepare": Work("midstream.work.read_data:prepare", resumes=True),
    "prepare-units": Work("midstream.work.read_data:prepare_units", resumes=True),
    "prepare-share": Work("midstream.work.read_data:prepare_share", resumes=True),
    "join": Work("midstream.work.read_data:join", resumes=True),
    "read-tasks": Work("midstream.work.read_data:read_tasks"),
    "show-data": Work("midstream.work.show_data:show_data"),
    "profile": Work("midstream.work.profile_stage:profile"),
    "evaluate": Work("midstream.work.evaluate_model:evaluate_all", when_asked=True, resumes=True),
    "list-tasks": Work("midstream.work.show_scores:list_tasks"),
    "show-examples": Work("midstream.work.show_scores:show_examples"),
    "show-differences": Work("midstream.work.show_scores:show_differences"),
    "score": Work("midstream.work.show_scores:score_file"),
    "import": Work("midstream.exchange.import_model:serve"),
    "export": Work("midstream.exchange.export:serve"),
    "chat": Work("midstream.chat.talk:chat", has_terminal=True),
}


def ask(
    name: str,
    request: Mapping[str, Any],
    *,
    show: Callable[[Event], None],
    environment: Mapping[str, str] | None = None,
    stderr: int | None = None,
) -> Event:
    """Have a work done in a process of its own; `show` gets its events but for the last one.

    Returns that: {"event": "done", "result"}, {"event": "failed", "error"} or {"event": "stopped"},
    with the exit "code". Ctrl-C is left to the process; the end of this one stops it as well.
    """
    work, line = WORKS[name], json.dumps(request, default=str)
    command = [sys.executable, "-m", "midstream.work", name, *([line] if work.has_terminal else [])]
    pipe = None if work.has_terminal else subprocess.PIPE
    last: Event | None = None
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=stderr,
        text=True,
        env=dict(hub_environment() if environment is None else environment),
    ) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            if process.stdin is not None and process.stdout is not None:
                with suppress(BrokenPipeError):
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                for event in map(json.loads, process.stdout):
                    if event["event"] in ("done", "failed", "stopped"):
                        last = event
                    else:
                        show(event)
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    if work.has_terminal and code >= 0:
        last = {"event": ENDS.get(code, "failed"), "error": None}
    if last is None:
        how = f"signal {-code}" if code < 0 else f"exit code {code} and no result"
        last = {"event": "failed", "error": f"{name} ended with {how}; run the same again"}
    return last | {"code": code if code >= 0 else 1}


def hub_environment(threads: int | None = None) -> dict[str, str]:
    """Of a process with so many threads, or all cores; whether it asks hubs is the user's choice
    (HF_HUB_OFFLINE)."""
    found = worker_environment(Machine(threads=threads or num_cores()))
    if "HF_HUB_OFFLINE" not in os.environ:
        del found["HF_HUB_OFFLINE"]
    return found
