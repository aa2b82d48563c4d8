"""`slurm.json`: which job was given which stage, so that a launcher finds again what runs.

An entry is written before its job is submitted and gets the job's id after: a launcher that is
killed in between leaves an entry whose job is found by its name.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from midstream.storage import read_json, write_json
from midstream.study.cluster import scheduler


@dataclass(frozen=True)
class Entry:
    """A stage's job: the name it was submitted under, its id (12, or 12_3), its log.

    `restarts` counts how often the stage was begun again because its processes were killed.
    """

    name: str
    job: str | None
    log: str
    restarts: int = 0


@dataclass
class JobBook:
    """The entries by stage name; every change is on the disk when it returns."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Path) -> "JobBook":
        """The book of a store; empty where no job was ever submitted."""
        path = store / "slurm.json"
        kept = read_json(path)["jobs"] if path.is_file() else {}
        return cls(path, {name: Entry(**entry) for name, entry in kept.items()})

    def intend(self, entries: dict[str, Entry]) -> None:
        """Note what is about to be submitted."""
        self.entries |= entries
        self._write()

    def submitted(self, jobs: dict[str, tuple[str, str]]) -> None:
        """Note ids and logs by stage name."""
        for name, (job, log) in jobs.items():
            self.entries[name] = replace(self.entries[name], job=job, log=log)
        self._write()

    def forget(self, *names: str) -> None:
        """These stages have no job any more."""
        for name in names:
            self.entries.pop(name, None)
        self._write()

    def drop_unsure(self) -> None:
        """End jobs whose submission was cut off: they may miss what they are to do."""
        for name, entry in list(self.entries.items()):
            if entry.job is None:
                scheduler.cancel_named(entry.name)
                self.forget(name)

    def _write(self) -> None:
        write_json(self.path, {"jobs": {name: asdict(one) for name, one in self.entries.items()}})


def require_no_jobs(store: Path) -> None:
    """Raises ValueError if jobs of this store are in Slurm's queue, or may be."""
    book = JobBook.of(store)
    if not book.entries:
        return
    try:
        jobs = scheduler.queue()
    except (scheduler.Unreachable, FileNotFoundError) as reason:
        raise ValueError(
            f"{book.path} names {len(book.entries)} jobs of an earlier run with --slurm, and Slurm "
            f"does not say whether they are in its queue ({reason}); run where it answers, or "
            f"delete {book.path} if they are gone"
        ) from None
    names = {entry.name for entry in book.entries.values()}
    live = [job.id for job in jobs.values() if job.is_live and job.name in names]
    if live:
        raise ValueError(
            f"{len(live)} jobs of store {store} are in Slurm's queue; follow them with --slurm, or "
            f"end them: scancel {' '.join(live)}"
        )
