"""Submits stages to Slurm: a job each, equal ones as an array, each after its parents' jobs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from midstream.config import Machine, SlurmSettings
from midstream.study.cluster import scheduler
from midstream.study.cluster.job_book import Entry, JobBook
from midstream.study.cluster.job_events import JobFiles
from midstream.study.stage import Ranked, Stage
from midstream.study.workers import work_line, write_work

# The most jobs of one array (Slurm's own MaxArraySize is 1001 where nothing else is said).
MAX_ARRAY = 1000
# What sbatch says when the controller may come back; anything else is a refusal.
AWAY = ("Unable to contact", "Socket timed out", "Connection refused", "connect failure")
# What it says of a job that is to wait for one which the controller has just forgotten.
TOO_LATE = "dependency problem"


@dataclass(frozen=True)
class Task:
    """A stage that is to be submitted, after the jobs with the ids `after`."""

    stage: Stage
    features: str
    after: tuple[str, ...]
    restarts: int


class Submitter:
    """Turns tasks into jobs with the cluster's settings, and notes them in the book.

    `command` stands in for that of a worker, which its work file is added to.
    """

    def __init__(
        self,
        store: Path,
        machine: Machine,
        settings: SlurmSettings,
        book: JobBook,
        command: Sequence[str] | None = None,
    ) -> None:
        self.store, self.machine = store.absolute(), machine
        self.settings, self.book = settings, book
        self.command = tuple(command) if command else None

    def submit(self, tasks: Sequence[Task]) -> None:
        """Submit tasks that are ready or wait for jobs; what is equal becomes an array.

        Raises Unreachable if the controller is away, ValueError with sbatch's own words if it
        refuses; what was submitted before is in the book.
        """
        groups: dict[tuple[str, tuple[str, ...], int], list[Task]] = {}
        for task in tasks:
            key = (task.stage.kind, tuple(sorted(task.after)), task.restarts)
            groups.setdefault(key, []).append(task)
        for (kind, _, _), group in groups.items():
            for start in range(0, len(group), MAX_ARRAY):
                self._submit_array(kind, group[start : start + MAX_ARRAY])

    def machine_for(self, stage: Stage) -> Machine:
        """Where the stage's worker runs: its ranks on its nodes, or one process."""
        asked = self.settings.resources(stage.kind)
        if not isinstance(stage, Ranked):
            return self.machine.alone()
        ranks = asked.ranks or asked.gpus or self.machine.ranks
        nodes = asked.nodes or 1
        master = "set-in-the-job:0" if nodes > 1 else None
        values = {"ranks": ranks, "nodes": nodes, "master": master, "workers": 1}
        return Machine.model_validate(self.machine.model_dump() | values)

    def _submit_array(self, kind: str, tasks: Sequence[Task]) -> None:
        import submitit

        from midstream.study.cluster.slurm_job import StageJob

        name = f"midstream-{kind}-{uuid4().hex[:12]}"
        folder = self.store / "slurm" / "jobs" / name
        machine = self.machine_for(tasks[0].stage)
        functions = []
        for task in tasks:
            files = JobFiles(self.store, task.stage.name)
            work = work_line(task.stage, task.features)
            write_work(files.given, self.store, machine, work)
            left = max(0, self.settings.restarts - task.restarts)
            functions.append(
                StageJob(self.store, files.given, left, self.settings.port, self.command)
            )
        entries = {task.stage.name: Entry(name, None, str(folder), task.restarts) for task in tasks}
        self.book.intend(entries)
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**self._parameters(name, machine, tasks[0], len(tasks)))
        try:
            if len(tasks) == 1:
                jobs = [executor.submit(functions[0])]
            else:
                with executor.batch():
                    jobs = [executor.submit(function) for function in functions]
        except submitit.core.utils.FailedJobError as reason:
            text = " ".join(str(reason).split())
            # Without a word it was ended by a signal, as Ctrl-C sends one to all.
            if not text or any(sign in text for sign in (*AWAY, TOO_LATE)):
                raise scheduler.Unreachable(f"sbatch: {text}") from None
            self.book.forget(*entries)
            raise ValueError(
                f"sbatch refused {len(tasks)} {kind} jobs: {text}; change --slurm-set"
            ) from None
        self.book.submitted(
            {
                task.stage.name: (str(job.job_id), str(job.paths.stdout))
                for task, job in zip(tasks, jobs, strict=True)
            }
        )

    def _parameters(self, name: str, machine: Machine, task: Task, count: int) -> dict[str, object]:
        """What submitit makes its sbatch file of."""
        asked = self.settings.resources(task.stage.kind)
        cpus = asked.cpus or machine.ranks * (machine.threads + machine.data_workers)
        more: dict[str, object] = {
            "requeue": True,
            # What waits for a job that fails is cancelled, also where no launcher follows.
            "kill-on-invalid-dep": "yes",
            **({"mem": asked.memory} if asked.memory else {}),
            **asked.extra,
        }
        return {
            "job_name": name,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "time": asked.time_minutes,
            "nodes": machine.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": cpus,
            "gpus_per_node": asked.gpus or None,
            "signal_delay_s": self.settings.warn_seconds,
            "array_parallelism": self.settings.array_limit or count,
            "dependency": f"afterok:{':'.join(task.after)}" if task.after else None,
            "stderr_to_stdout": True,
            "wckey": None,
            "setup": list(self.settings.setup) or None,
            # A step does not take over its job's CPUs by itself.
            "srun_args": [f"--cpus-per-task={cpus}"],
            "additional_parameters": more,
        }
