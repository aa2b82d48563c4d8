"""`midstream prepare --slurm`: a source made by an array of tasks and finished by one job.

What is made lies beside the source (`data/prepare_source.py`); `slurm.json` there says which jobs
are its own, so that this process may end at any time.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from midstream.config import SlurmSettings
from midstream.core.storage import read_json, write_bytes, write_json
from midstream.core.tokens import counted
from midstream.data.prepare_source import SourcePlan, only_one, unread_of
from midstream.data.shard_state import TaskShare, lacking
from midstream.launch import slurm_job
from midstream.launch.slurm_job import Entry, Job, JobBook, Patience
from midstream.launch.submission import WorkJob, num_tasks, refusals, require_slurm, submit

Done = TypeVar("Done")
Progress = Callable[[float, str], None]
# The request of a task, or with None of the job that finishes, as JSON.
RequestOf = Callable[[TaskShare | None], str]
FINISH = "finish"
# The numbers of the shards that were finished when the jobs were submitted.
KEPT = "kept.json"
# A shared disk may show what a job has written a while after the job has ended.
LATE_SECONDS = 30.0


def tokenizer_for(plan: SourcePlan) -> Path:
    """The plan's tokenizer where all jobs read it, whatever the name that it was asked for by."""
    path = plan.job.out / "slurm" / f"tokenizer-{plan.job.tokenizer[:16]}.json"
    if not path.is_file():
        write_bytes(path, plan.tokenizer)
    return path


class OnSlurm:
    """One source prepared by jobs; `run` does it, or goes on with what was submitted before."""

    def __init__(
        self, plan: SourcePlan, request_of: RequestOf, settings: SlurmSettings, progress: Progress
    ) -> None:
        self.plan, self.request_of, self.settings = plan, request_of, settings
        self.progress, self.out = progress, plan.job.out
        self.asked = settings.resources("prepare_source")
        digest = hashlib.sha256(request_of(None).encode()).hexdigest()
        self.name, self.book = f"midstream-prepare-{digest[:12]}", JobBook.of(self.out)
        # Held while jobs are looked for and submitted.
        self.lock = FileLock(self.out / "slurm" / "lock")
        job = plan.job
        # Of each shard: what a task publishes it as, and where it lies in the source.
        self.names = {item.number: (item.key, job.folder(item.number).name) for item in plan.wanted}
        # Numbers of the shards that are finished, as far as this process knows.
        self.done: set[int] = set()
        self.patience, self.told_last = Patience(print), ""

    def run(self) -> dict[str, Any]:
        """Submit what lacks, or find its jobs again, and follow them; returns the source's counts.

        Tasks that were killed are submitted again as `restarts` allows, unless they were cancelled.
        Raises ValueError with what the finishing job says, or why a task ended; without Slurm, for
        what it does not have, and if jobs of another preparation of the source are in its queue.
        """
        require_slurm([self.asked])
        unread_of(self.plan, print)
        (self.out / "slurm").mkdir(parents=True, exist_ok=True)
        restarts = self.settings.restarts
        while True:
            self._patiently(self._find_or_submit)
            ended = self._follow()
            told = self._told(FINISH, ended[FINISH])
            if told is not None and told["event"] == "done":
                self._forget()
                result: dict[str, Any] = told["result"]
                return result
            if told is not None and told["event"] == "failed":
                raise ValueError(told["error"])
            why = self._why(ended)
            # A job that waited for one that failed is none that somebody cancelled.
            cancelled = (
                job is not None and job.state == "CANCELLED" and job.reason != slurm_job.NEVER
                for job in ended.values()
            )
            if any(cancelled) or not restarts:
                raise ValueError(f"{why}; what is finished stays: the same command goes on")
            restarts -= 1
            print(f"{why}; it is submitted again")

    def _find_or_submit(self) -> None:
        """Find the jobs of an earlier call in the queue, or submit what lacks.

        Another call that begins at the same time waits, and finds what this one has submitted.
        """
        with self.lock:
            self.book = JobBook.of(self.out)
            self.book.drop_unsure()
            if self._is_queued():
                return
            # Such as a command without --slurm.
            with only_one(self.out):
                pass
            self._submit()

    def _forget(self) -> None:
        """The jobs that were followed are not asked for again; those of a later call are."""
        with self.lock:
            now = JobBook.of(self.out)
            if now.entries == self.book.entries:
                now.forget(*now.entries)

    def _is_queued(self) -> bool:
        """Whether jobs of an earlier call are in the queue; ValueError if they do otherwise."""
        jobs, entries = slurm_job.queue(), self.book.entries.values()
        mine = [one for one in entries if (job := one.among(jobs)) is not None and job.is_live]
        if not mine:
            return False
        others = sorted(one.job or "" for one in mine if one.name != self.name)
        if others:
            raise ValueError(
                f"{self.out} is being prepared otherwise by jobs {' '.join(others)}; give the same "
                f"options as then, or end them: scancel {' '.join(others)}"
            )
        self.done |= set(read_json(self.out / "slurm" / KEPT))
        print(f"{counted(len(mine), 'job')}, submitted before, followed again")
        return True

    def _submit(self) -> None:
        """The tasks that have something to do as an array, and the job that waits for them."""
        self.book.forget(*self.book.entries)
        wanted = self.plan.wanted
        lack = lacking(self.plan.job, wanted)
        self.done = self.names.keys() - {item.number for item in lack}
        write_json(self.out / "slurm" / KEPT, sorted(self.done))
        count = min(num_tasks(self.settings), len(wanted))
        # Without room for one the job that finishes makes all.
        numbers = {item.number % count for item in lack} if count else ()
        shares = [TaskShare(number, count) for number in sorted(numbers)]
        self.book.note({key: Entry(self.name, None) for key in ("tasks", FINISH)})
        works = {
            f"task-{share.index}": self._work(f"task-{share.index}", share) for share in shares
        }
        with refusals(self.book, f"the jobs of {self.out}"):
            ids = self._hand_over(list(works.values()), None) if works else []
            array = ids[0].partition("_")[0] if ids else None
            after = f"afterok:{array}" if array else None
            last = self._hand_over([self._work(FINISH, None)], after)
        entries = dict(zip([*works, FINISH], [*ids, *last], strict=True))
        self.book.entries = {}
        self.book.note({key: Entry(self.name, job) for key, job in entries.items()})
        print(
            f"{len(lack):,} of {len(wanted):,} shards are made by {counted(len(works), 'task')}"
            + (f" of job {array}" if array else "")
            + f", job {last[0]} finishes; they go on without this command, which follows them "
            f"again. To end them: scancel {' '.join(filter(None, (array, last[0])))}"
        )

    def _work(self, key: str, share: TaskShare | None) -> WorkJob:
        told = self.out / "slurm" / f"{key}.json"
        told.unlink(missing_ok=True)
        name = "prepare-units" if share else "prepare"
        return WorkJob(name, self.request_of(share), told)

    def _hand_over(self, works: list[WorkJob], after: str | None) -> list[str]:
        jobs, cpus = self.out / "slurm" / "jobs", self.asked.cpus or 1
        return submit(
            jobs, self.settings, self.asked, self.name, works, nodes=1, cpus=cpus, after=after
        )

    def _follow(self) -> dict[str, Job | None]:
        """Tell how far it is until all jobs have ended; returns how they ended, by entry."""
        ended: dict[str, Job | None] = {}
        while True:
            jobs = self._patiently(slurm_job.queue)
            states: dict[str, str] = {}
            for key, one in self.book.entries.items():
                job = one.among(jobs)
                is_known = key in ended or (job is not None and job.state == "COMPLETED")
                if not is_known and (job is None or not job.is_live):
                    job = slurm_job.ended_job(one.job or "", one.name, job)
                if job is not None and job.is_live:
                    states[key] = job.state
                    ended.pop(key, None)  # it was put back meanwhile
                else:
                    ended.setdefault(key, job)
            self._tell(states)
            if not states:
                return ended
            time.sleep(self.settings.poll_seconds)

    def _tell(self, states: Mapping[str, str]) -> None:
        job, number = self.plan.job, len(self.names)
        made = set(os.listdir(job.units)) if job.units.is_dir() else set()
        # Before that job has begun they may be of another preparation.
        is_finishing = states.get(FINISH) == "RUNNING" and job.shards.is_dir()
        there = set(os.listdir(job.shards)) if is_finishing else set()
        self.done |= {n for n, (key, name) in self.names.items() if key in made or name in there}
        counts = Counter(state.lower() for state in states.values())
        told = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()))
        note = f"{len(self.done):,} of {number:,} shards; jobs: {told or 'all ended'}"
        if note != self.told_last:
            self.told_last = note
            self.progress(len(self.done) / number, note)

    def _told(self, key: str, job: Job | None) -> dict[str, Any] | None:
        """The last event of a job's work; None where it did not come to that."""
        path = self.out / "slurm" / f"{key}.json"
        end = time.monotonic() + LATE_SECONDS
        while job is not None and job.state == "COMPLETED" and not path.is_file():
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        found: dict[str, Any] | None = read_json(path) if path.is_file() else None
        return found

    def _why(self, ended: dict[str, Job | None]) -> str:
        """Which jobs did not end well, and why the first of them."""
        told_by = {key: self._told(key, job) for key, job in ended.items()}
        good = {
            key for key, told in told_by.items() if told is not None and told["event"] == "done"
        }
        tasks = [key for key in ended if key not in good and key != FINISH]
        first = (tasks or [FINISH])[0]
        job, told = ended[first], told_by[first]
        if told is not None and told.get("error"):
            why = str(told["error"])
        elif job is not None:
            why = job.sentence()
        else:
            why = f"Slurm no longer knows job {self.book.entries[first].job}"
        number = f"{len(tasks):,} of {len(ended) - 1:,} tasks" if tasks else "the job that finishes"
        logs = self.out / "slurm" / "jobs" / f"{self.book.entries[first].job}_0_log.out"
        return f"{number} did not end well; {first.replace('-', ' ')}: {why} ({logs})"

    def _patiently(self, ask: Callable[[], Done]) -> Done:
        """What Slurm answers, however long that takes."""
        while True:
            with self.patience.asking():
                return ask()
            time.sleep(self.settings.poll_seconds)
