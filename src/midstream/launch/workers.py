"""The processes that train: a worker, the ranks of a stage, several machines.

A worker: a long-lived process that runs one stage after the other.

What it works for (the "store", the "machine") stands in `worker-N.json`. The launcher writes a line
of JSON to a worker's standard input: the "stage", and whether a frozen encoder's outputs are kept
on disk ("features": stored | live | auto). The worker answers on standard output with JSON lines:
{"event": "ready"}, then for each stage "started", "progress" (stage, done, tokens_seen,
total_tokens, loss, tokens_per_second, note) and "finished" (stage, state: done | failed | stopped,
error). The end of its input ends a worker. What it prints on standard error, and any line that is
no event, goes to `worker-N.log` in the store.

Where a training stage has several ranks, its worker is torchrun with as many processes, for this
one stage, which stands in `worker-N.json` too. The first rank speaks as above; every rank says
{"event": "rank", "rank", "pid"} at its start, and {"event": "fault", "error"} if one was lost.

Several machines train one stage: node 0 launches, the others join it through the store.

The store lies on a disk that all nodes see. Node 0 says there, in `nodes.json`, which stage's ranks
are to be started, and rewrites the file as a sign of life; the other nodes start their share of
them. What the ranks then say to each other goes over the network.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

from midstream.config import Machine
from midstream.core.storage import read_json, write_bytes, write_json
from midstream.core.tokens import counted
from midstream.cost.graph import PlanRow
from midstream.study.label import label
from midstream.study.progress import LOG
from midstream.study.stages import Stage, stage_from_json

Event = dict[str, Any]
# How long an idle worker has to leave after the end of its input.
LEAVE_SECONDS = 20.0
# How long the ranks of a node that was told to end may take for their step and its checkpoint.
SHUTDOWN_SECONDS = 600
# In a worker's environment: the process that started it, without which it does not go on.
LAUNCHER = "MIDSTREAM_LAUNCHER"
# In a process's environment: the GPUs that it sees.
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Worker:
    """A worker process; `row` is the stage it runs, or will run once it is ready.

    It works for what the file `work` says (`write_work`), and is the ranks of one stage where it
    `is_group`. It sees the `gpus` alone, or all that this process sees where none are named. Its
    events, and at its end {"event": "exit", "code"}, go to `put` from a thread of
    its own.
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
        self.row: PlanRow | None = None
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
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, features: str = "auto") -> None:
        """Hand over the stage of `row`; a group has it already."""
        assert self.row is not None
        if self.is_group:
            return
        # A worker that has died cannot read: its exit event follows and settles the stage.
        with suppress(BrokenPipeError):
            self._input.write(work_line(self.row.stage, features).encode())
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
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                if not self.note(event):
                    self._put((self, event))
            else:
                with self.log.open("ab") as log:
                    log.write(line)
        self._put((self, {"event": "exit", "code": self.process.wait()}))


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
    """This process's environment with the workers' thread counts, and no downloads unless
    HF_HUB_OFFLINE=0 asks for them."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(threads, str(machine.threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "PYTHONUNBUFFERED": "1",
        LAUNCHER: str(os.getpid()),
    }


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes.

    What is set there already counts; else all that the driver lists. None without a driver.
    """
    if VISIBLE in os.environ:
        names = [name.strip() for name in os.environ[VISIBLE].split(",")]
        # CUDA ends the list at the first name that is none.
        ends = [at for at, name in enumerate(names) if name in ("", "-1")]
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


# Node 0 gives a sign this often, and is taken for gone after so long without one.
SIGN_SECONDS = 5.0
GONE_SECONDS = 60.0
# How long a node waits for node 0 to come.
COME_SECONDS = 1800.0
_LOOK_SECONDS = 1.0


class Announcer:
    """What node 0 says to the others; `tell` and `end` change it, a thread keeps it fresh."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said: dict[str, Any] = {
            "launch": uuid4().hex,
            "number": 0,
            "work": None,
            "code": None,
        }
        self._lock, self._over = threading.Lock(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell(self, work: Path) -> None:
        """Every node starts its ranks of this work."""
        self._said |= {"number": self._said["number"] + 1, "work": str(work.absolute())}
        self._write()

    def end(self, code: int) -> None:
        """Every node leaves with this exit code."""
        self._said |= {"code": code}
        self._write()

    def close(self) -> None:
        """No more signs of life."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SIGN_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            write_json(self._path, self._said)


@contextmanager
def announcer(store: Path, machine: Machine) -> Iterator[Announcer | None]:
    """Node 0's; None for one node. An error on node 0 ends the others with exit code 1."""
    if machine.nodes == 1:
        yield None
        return
    said = Announcer(store / "nodes.json")
    try:
        yield said
    except BaseException:
        said.end(1)
        raise
    finally:
        said.close()


def join(store: Path, machine: Machine, on_note: Callable[[str], None]) -> int:
    """Start this node's ranks whenever node 0 says so; returns node 0's exit code.

    SIGTERM, SIGINT and SIGUSR1 go to the ranks, which stop all others at the next step. Raises
    TimeoutError where node 0 does not come, or has gone without a word.
    """
    path, mine = store / "nodes.json", store / f".node-{machine.node}"
    ranks: subprocess.Popen[bytes] | None = None
    done: tuple[str, int] | None = None

    def forward(number: int, _frame: FrameType | None) -> None:
        if ranks is not None and ranks.poll() is None:
            ranks.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    on_note(f"node {machine.node} of {machine.nodes} waits for node 0 in {path}")
    try:
        for said in _signs(path, mine):
            task = (said["launch"], said["number"])
            if said["code"] is not None:
                return int(said["code"])
            if said["work"] is None or task == done:
                continue
            if ranks is not None:
                ranks.wait()
            done, work = task, Path(said["work"])
            stage = stage_from_json(json.dumps(read_json(work)["stage"]))
            on_note(f"node {machine.node} trains {label(stage)}")
            ranks = _start(store, machine, work)
    finally:
        if ranks is not None:
            _end(ranks)
        mine.unlink(missing_ok=True)
    raise AssertionError("signs end with an error")


def _start(store: Path, machine: Machine, work: Path) -> "subprocess.Popen[bytes]":
    with (store / f"node-{machine.node}.log").open("ab") as log:
        return subprocess.Popen(
            group_command(machine, work),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=worker_environment(machine),
            start_new_session=True,
        )


def _end(ranks: "subprocess.Popen[bytes]") -> None:
    """They end by themselves once node 0's have; else they are killed."""
    with suppress(subprocess.TimeoutExpired):
        ranks.wait(GONE_SECONDS)
    if ranks.poll() is None:
        ranks.kill()
        ranks.wait()


def _signs(path: Path, mine: Path) -> Iterator[dict[str, Any]]:
    """What node 0 says, again and again, while it gives signs of life."""
    fresh_at: float | None = None
    since = time.monotonic()
    while True:
        time.sleep(_LOOK_SECONDS)
        with suppress(FileNotFoundError, json.JSONDecodeError):
            said = read_json(path)
            # Both times are those of the disk's clock.
            write_bytes(mine, b"")
            if os.stat(mine).st_mtime - os.stat(path).st_mtime < GONE_SECONDS / 2:
                fresh_at = time.monotonic()
                yield said
                continue
        now = time.monotonic()
        if fresh_at is None and now - since > COME_SECONDS:
            raise TimeoutError(f"node 0 has not come in {COME_SECONDS:.0f} s; it writes {path}")
        if fresh_at is not None and now - fresh_at > GONE_SECONDS:
            raise TimeoutError(
                f"node 0 has gone: {path} has not changed for {now - fresh_at:.0f} s"
            )
