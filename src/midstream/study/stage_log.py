"""The part of a process's log that belongs to one stage."""

from collections import deque
from pathlib import Path

from midstream.study.ledger import Ledger
from midstream.study.progress import own_part
from midstream.study.stage import Stage

_PIECE_BYTES = 2**20


class StageLog:
    """What the process that ran a stage last printed meanwhile, read on as it grows.

    A stage of an earlier version, or one that no launcher started, has no log of its own.
    """

    def __init__(self, ledger: Ledger, stage: Stage) -> None:
        status = ledger.status(stage)
        self.name = stage.name
        self.path: Path | None = None
        if status.get("log"):
            self.path = ledger.store / status["log"]  # an absolute path stays one
        self._at = int(status.get("log_start") or 0)
        self._ended = False
        self._open = b""
        self._mine = False

    def describe(self) -> str:
        """Where it lies, or why there is none."""
        if self.path is None:
            return "log: the stage's process had no log file of its own"
        if not self.path.is_file():
            return f"log: {self.path} is not there any more"
        return f"log: {self.path}, from byte {self._at:,}"

    def tail(self, number: int) -> list[str]:
        """The last `number` lines that are there now."""
        return list(deque(self.more(), maxlen=number))

    def more(self) -> list[str]:
        """The whole lines that came since the last call."""
        if self.path is None or not self.path.is_file() or self._ended:
            return []
        found: list[str] = []
        with self.path.open("rb") as stream:
            stream.seek(self._at)
            while piece := stream.read(_PIECE_BYTES):
                self._at += len(piece)
                whole, newline, self._open = (self._open + piece).rpartition(b"\n")
                mine, self._ended = own_part(whole + newline, self.name, begun=self._mine)
                self._mine = self._mine or bool(mine)
                found += mine.decode(errors="replace").splitlines()
                if self._ended:
                    break
        return found
