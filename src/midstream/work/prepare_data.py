"""Prepares one source as a process of its own: `midstream prepare` starts it.

`python -m midstream.work.prepare_data` takes one line of JSON with the fields of `Request` on
standard input and answers with JSON lines on standard output: {"event": "notice", "note"} for what
a person should know, {"event": "progress", "done", "note"}, at last {"event": "done", "summary"},
{"event": "failed", "error"} or {"event": "stopped"}. The end of its input, SIGINT and SIGTERM stop
it; what it has finished stays.
"""

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from midstream.config import OWN_RULE, begin_of_text_named
from midstream.core.storage import write_bytes
from midstream.data.examples import TextCodec
from midstream.data.formats.files import is_url
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.prepare_source import canonical_tokenizer, prepare_source
from midstream.data.tokenise import open_tokenizer


@dataclass(frozen=True)
class Request:
    """The arguments of `midstream prepare`; `options` are the fields of `ReadOptions`."""

    section: Section
    sources: tuple[str, ...]
    out: str
    tokenizer: str
    options: dict[str, Any]
    max_rejects: float
    validation: float
    workers: int
    begin_of_text: str = OWN_RULE


def run(
    request: Request,
    progress: Callable[[float, str], None],
    notice: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Prepare the source; returns its counts (see `prepare_source` for them and the errors)."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_file = Path(folder) / "tokenizer.json"
        opened = open_tokenizer(request.tokenizer)
        begins = begin_of_text_named(opened, request.begin_of_text, request.tokenizer)
        codec = TextCodec(opened).beginning_with(begins)
        write_bytes(tokenizer_file, canonical_tokenizer(codec))
        return prepare_source(
            request.section,
            request.sources,
            Path(request.out),
            tokenizer_file=tokenizer_file,
            options=ReadOptions(**request.options),
            root=common_folder(request.sources),
            workers=request.workers,
            max_reject_fraction=request.max_rejects,
            validation_fraction=request.validation,
            progress=progress,
            notice=notice,
        )


def common_folder(sources: Sequence[str]) -> str:
    """The deepest folder that holds all local sources; empty where there is none."""
    folders = []
    for source in sources:
        if not is_url(source):
            path = os.path.abspath(source)
            folders.append(path if os.path.isdir(path) else os.path.dirname(path))
    return os.path.commonpath(folders) if folders else ""


def main() -> None:
    """The process of `midstream prepare`."""
    # The channel is ours alone: whatever a library prints goes to stderr.
    channel = sys.stdout
    sys.stdout = sys.stderr

    def say(event: str, **values: Any) -> None:
        try:
            channel.write(json.dumps({"event": event, **values}) + "\n")
            channel.flush()
        except BrokenPipeError:
            # Who asked is gone: nobody reads the rest, and the end of this process must not try.
            os.dup2(os.open(os.devnull, os.O_WRONLY), channel.fileno())
            raise KeyboardInterrupt from None

    def stop(_number: int, _frame: FrameType | None) -> None:
        # Once: what the first one ends is then cleaned up in peace.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def stop_with_parent() -> None:
        # Not through sys.stdin, whose lock a thread must not hold when the process ends.
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        request = Request(**json.loads(sys.stdin.readline()))
        threading.Thread(target=stop_with_parent, daemon=True).start()
        summary = run(
            request,
            lambda done, note: say("progress", done=done, note=note),
            lambda note: say("notice", note=note),
        )
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            say("stopped")
    except (ValueError, OSError) as reason:
        say("failed", error=str(reason))
    else:
        say("done", summary=summary)


if __name__ == "__main__":
    main()
