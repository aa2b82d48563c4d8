"""A stage whose job waits or runs: what the job has said, and what was told of it."""

from dataclasses import dataclass

from midstream.study.cluster.job_events import JobFiles, events_since
from midstream.study.graph import PlanRow
from midstream.study.label import label
from midstream.study.ledger import Ledger
from midstream.study.workers import Event

# Reasons for waiting that need no word: the job's turn comes.
ORDINARY = {"", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit"}
# What a job says when it is begun again.
AGAIN = ("requeued", "restarted")


@dataclass
class Queued:
    """A stage whose job waits or runs, and what was told of it."""

    row: PlanRow
    offset: int = 0
    is_started: bool = False
    # When the stage had last ended before this job.
    told_before: str | None = None
    # Its job ended well though it is not done: a shared disk may be late.
    doubted: bool = False
    reason: str = ""

    def skip_what_is_old(self, ledger: Ledger) -> None:
        """What earlier jobs have said is not told again."""
        name = self.row.stage.name
        _, self.offset = events_since(JobFiles(ledger.store, name).events, 0)
        self.told_before = ledger.status(self.row.stage).get("ended")

    def news(self, ledger: Ledger) -> list[Event]:
        """That the stage has begun, and its last progress, where they are new."""
        path = JobFiles(ledger.store, self.row.stage.name).events
        events, self.offset = events_since(path, self.offset)
        told = []
        begun = [event for event in events if event["event"] == "started"]
        if begun and not self.is_started:
            self.is_started = True
            told.append(begun[-1])
        told += [event for event in events if event["event"] == "progress"][-1:]
        told += [
            {"event": "note", "text": f"{label(self.row.stage)} is {event['event']}: {why}"}
            for event in events
            if (why := event.get("why") or event.get("error")) and event["event"] in AGAIN
        ]
        return told

    def waits_for(self, reason: str) -> bool:
        """Whether a job waits for something out of the ordinary that was not told yet."""
        new, self.reason = reason != self.reason, reason
        return new and reason not in ORDINARY
