"""What Slurm must have; jobs handed to it with submitit; a job that has a work of ours done."""

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.config import SlurmResources, SlurmSettings
from midstream.core.storage import read_json, write_json
from midstream.core.tokens import nearest
from midstream.launch import workers
from midstream.launch.slurm_job import (
    JobBook,
    JobFailed,
    Unreachable,
    ask,
    columns,
    job_folder,
    queue_again,
)
from midstream.study.stages import PrepareSource, Stage

COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
# The partition that jobs get where none is named.
DEFAULT = "the default partition"
# The most jobs of one array (Slurm's own MaxArraySize is 1001 where nothing else is said).
MAX_ARRAY = 1000
# What sbatch says when the controller may come back, or of a job that is to wait for one which it
# has just forgotten; anything else is a refusal.
AWAY = (
    r"Unable to contact|Socket timed out|Connection refused|connect failure|dependency problem|"
    r"temporarily|Zero Bytes were transmitted|Message (receive|send) failure"
)
# By what sbatch says, the first that fits: the settings that may be at fault.
AT_FAULT = {
    r"MaxSubmit|array specification": "max_jobs",
    r"MaxWall|(?i:time limit is|time limit exceeds)": "time_minutes",
    r"Max(Cpu|GRES|Node|TRES|Mem)": "gpus, cpus, memory or nodes",
    r"submit limit": "max_jobs, time_minutes, or what a job asks for",
    r"(?i)account": "account",
    r"(?i)qos": "qos",
    r"(?i)memory": "memory",
    r"(?i)node configuration|gres|cpu count": "gpus, cpus, memory or constraint",
    r"(?i)partition": "partition",
}
# In sbatch's environment, values that go before those of a script, by the setting that it says them
# for; "": it always does.
SAID = {
    "JOB_NAME|OUTPUT|ERROR|OPEN_MODE|SIGNAL|(NO_)?REQUEUE|ARRAY_INX|EXPORT|WAIT|DEPENDENCY": "",
    "TIMELIMIT": "time_minutes",
    "PARTITION": "partition",
    "ACCOUNT": "account",
    "QOS": "qos",
    "CONSTRAINT": "constraint",
    r"MEM_PER_\w+": "memory",
    r"GPUS\w*|GRES": "gpus",
}
# So often a work that resumes is queued again at the end of its time; more than a source takes.
MAX_PIECES = 20


def require_slurm(asked: Iterable[SlurmResources]) -> None:
    """Raises ValueError where Slurm's commands or submitit are missing or do not answer, or a
    partition that is asked for does not exist or gives less time: a job would wait there for ever.
    """
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)} on the PATH: run this where jobs are submitted to Slurm, "
            "or leave --slurm out"
        )
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise ValueError(
            "jobs are submitted with submitit, which is not installed: "
            "pip install 'midstream[cluster]'"
        ) from None
    minutes: dict[str, float] = {}
    try:
        told = ask("sinfo", "--noheader", "--all", "--format=%P|%l")
    except Unreachable as reason:
        raise ValueError(f"{reason}; run the same command again once Slurm answers") from None
    for partition, limit in columns(told, 2):
        minutes[partition.removesuffix("*")] = limit_minutes(limit)
        if partition.endswith("*"):
            minutes[DEFAULT] = limit_minutes(limit)
    wanted = {(one.partition or DEFAULT, one.time_minutes or 0) for one in asked}
    # Those that somebody named first.
    for names, least in sorted(wanted, key=lambda pair: (pair[0] == DEFAULT, pair)):
        for name in names.split(","):
            if name in minutes and least > minutes[name]:
                place = name if name == DEFAULT else f"partition {name}"
                raise ValueError(
                    f"time_minutes is {least}, but {place} gives {minutes[name]:.0f}: ask for less "
                    "with --slurm-set time_minutes=N; a stage that needs longer goes on in the "
                    "next piece"
                )
            if name not in minutes and name != DEFAULT:
                known = sorted(minutes.keys() - {DEFAULT})
                raise ValueError(
                    f"Slurm has no partition {name!r}; {nearest(name, known)}it has "
                    f"{', '.join(known)}: choose one with --slurm-set partition=NAME"
                )


def limit_minutes(limit: str) -> float:
    """Minutes of a time as sinfo prints it: 2-12:00:00, 1:00:00, 30:00, infinite."""
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in parts):  # infinite, n/a
        return math.inf
    hours, minutes, seconds = [0.0, 0.0, *(float(part) for part in parts)][-3:]
    return (int(days) if dash else 0) * 1440 + hours * 60 + minutes + seconds / 60


class Refused(Exception):  # noqa: N818 - it says what sbatch says
    """sbatch does not take the jobs."""

    @property
    def remedy(self) -> str:
        """The option that may change that."""
        names = (name for said, name in AT_FAULT.items() if re.search(said, str(self)))
        return f"change --slurm-set {next(names, 'NAME=VALUE')}"


@contextmanager
def refusals(book: JobBook, what: str) -> Iterator[None]:
    """Within the block jobs that the book names are submitted; ValueError with sbatch's own words
    if it refuses, and those whose submission was cut off are ended."""
    try:
        yield
    except Refused as text:
        book.drop_unsure()
        raise ValueError(f"sbatch refused {what}: {text}; {text.remedy}") from None


@contextmanager
def submitting(asked: SlurmResources) -> Iterator[None]:
    """Within the block the environment is what jobs are to have: nothing of a job, or of ranks,
    that this process is part of, and no default of sbatch's where `asked` says otherwise."""
    said = (names for names, of in SAID.items() if not of or getattr(asked, of) is not None)
    others = [f"SBATCH_({'|'.join(said)})", workers.OF_RANKS.pattern]
    if "SLURM_JOB_ID" in os.environ:
        others.append(r"(?!SLURM_CONF\Z)(SLURM|SLURMD|SRUN|SUBMITIT)_\w+")
    before = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if any(re.fullmatch(pattern, name) for pattern in others)
    }
    try:
        yield
    finally:
        os.environ.update(before)


def submit(
    folder: Path,
    settings: SlurmSettings,
    asked: SlurmResources,
    name: str,
    functions: Sequence[Callable[[], None]],
    *,
    nodes: int,
    cpus: int,
    after: str | None = None,
) -> list[str]:
    """Submit functions that submitit pickles, as one job or as an array; returns the jobs' ids.

    `after` is what they wait for, as sbatch takes it. Raises Unreachable if the controller is away,
    Refused with sbatch's words if it takes none.
    """
    import submitit

    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=MAX_PIECES)
    executor.update_parameters(
        job_name=name,
        **asked.model_dump(include={"partition", "account", "qos", "constraint"}),
        time=asked.time_minutes,
        nodes=nodes,
        ntasks_per_node=1,
        cpus_per_task=cpus,
        gpus_per_node=asked.gpus or None,
        signal_delay_s=settings.warn_seconds,
        array_parallelism=settings.array_limit or len(functions),
        dependency=after,
        stderr_to_stdout=True,
        wckey=None,
        # A module in the folder of the command (`random.py`) stands in for none of the job's.
        setup=["export PYTHONSAFEPATH=1", *settings.setup],
        # A step does not take over its job's CPUs by itself.
        srun_args=[f"--cpus-per-task={cpus}"],
        additional_parameters={
            "requeue": True,
            # What waits for a job that fails is cancelled, also where no launcher follows.
            "kill-on-invalid-dep": "yes",
            **({"mem": asked.memory} if asked.memory else {}),
            # As submitit spells its own, which they may replace.
            **{name.replace("-", "_"): value for name, value in asked.extra.items()},
        },
    )
    try:
        with submitting(asked), executor.batch() if len(functions) > 1 else nullcontext():
            jobs = [executor.submit(function) for function in functions]
    except submitit.core.utils.FailedJobError as reason:
        text = " ".join(str(reason).split())
        # Without a word it was ended by a signal, as Ctrl-C sends one to all.
        if not text or re.search(AWAY, text):
            raise Unreachable(f"sbatch: {text}") from None
        raise Refused(text) from None
    return [str(job.job_id) for job in jobs]


@dataclass(frozen=True)
class WorkJob:
    """Has the work `name` of `launch/workers.py` done, one that resumes; called in the job.

    `request` is JSON. The work's last event is in the file `told` before the job ends. Warned
    before its time ends, or told to stop, the job has Slurm queue it again.
    """

    name: str
    request: str
    told: Path

    def __call__(self) -> None:
        self.told.unlink(missing_ok=True)
        # The work's process is told as well, and may not yet be able to say that it stops.
        signals: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _frame: signals.append(number))
        environment = workers.hub_environment(threads=1)
        request = json.loads(self.request)
        last = workers.ask(self.name, request, show=_print, environment=environment)
        write_json(self.told, last)
        if last["event"] == "stopped" or (signals and last["event"] != "done"):
            import submitit

            queue_again(submitit.JobEnvironment().job_id, self.name, "told to stop")
        if last["event"] != "done":
            raise JobFailed(last.get("error") or last["event"])

    def checkpoint(self) -> Any:
        """What submitit queues again when it is warned."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def num_tasks(settings: SlurmSettings) -> int:
    """The most tasks of a source: what an array may hold, with room for the job that finishes."""
    asked = settings.resources("prepare_source").tasks or MAX_ARRAY
    return min(asked, MAX_ARRAY, settings.max_jobs - 1)


def tasks_before(stage: Stage, settings: SlurmSettings) -> int:
    """How many tasks go before a stage's job: a source's, where `tasks` asks for them."""
    asks = isinstance(stage, PrepareSource) and settings.resources(stage.kind).tasks
    return num_tasks(settings) if asks else 0


def shares_of(stage: Stage, store: Path, count: int, workers: int) -> list[WorkJob]:
    """What the `count` tasks before the job of a source's stage do, each in `workers` processes."""
    place = job_folder(store, stage.name)
    for path in place.glob(task_file("*")):  # of earlier ones
        path.unlink()
    given = {"store": str(store), "stage": stage.model_dump(mode="json"), "workers": workers}
    shares = ({"index": index, "count": count} for index in range(count))
    return [
        WorkJob("prepare-share", json.dumps(given | {"share": share}), place / task_file(index))
        for index, share in enumerate(shares)
    ]


def task_file(index: int | str) -> str:
    """Where a task of a source says how it ended, in the folder of the source's stage."""
    return f"task-{index}.json"


def tasks_told(folder: Path, count: int) -> str:
    """How many of `count` tasks did not end well, and why the first of them; empty if all did."""
    paths = [folder / task_file(index) for index in range(count)]
    told = [read_json(path) if path.is_file() else {} for path in paths]
    bad = [index for index, one in enumerate(told) if one.get("event") != "done"]
    if not bad:
        return ""
    why = told[bad[0]].get("error") or "it did not say why"
    return f"{len(bad):,} of {count:,} tasks did not end well: task {bad[0]}: {why}"


def _print(event: workers.Event) -> None:
    if event["event"] == "progress":
        print(f"{event['stage']} {event['done']:.1%}: {event['note']}", flush=True)
    else:
        print(event.get("text", event), end="", flush=True)
