"""A worker that only pretends: `fake_worker.py STORE`, or with the file of one stage's work.

It speaks the protocol, notes in `notes.jsonl` when stages begin and end, and behaves as the file
`acts/STAGE` beside the store says: fail, kill, exit, meet, lie, or wait until the file is gone.
`acts/startup` keeps it from starting.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from midstream.study.stages import Stage, stage_from_json
from midstream.study.store import Ledger, Stopped

MADE = {"kind": "caption", "num_examples": 1, "num_tokens": 9, "num_images": 1}


def note(store: Path, what: str, stage: Stage) -> None:
    with (store / "notes.jsonl").open("a") as stream:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        stream.write(json.dumps([what, stage.name, os.getpid(), gpus]) + "\n")


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def stop(*_: object) -> None:
    raise Stopped("asked to stop")


def meet(store: Path, stage: Stage) -> None:
    (store / f"here-{stage.name}").touch()
    until = time.monotonic() + 60
    while len(list(store.glob("here-*"))) < 2:
        if time.monotonic() > until:
            raise TimeoutError("nobody came")
        time.sleep(0.01)


def run(store: Path, stage: Stage) -> None:
    ledger, act = Ledger(store), store.parent / "acts" / stage.name
    asked = act.read_text() if act.is_file() else ""
    for parent in stage.parents:
        assert ledger.is_done(parent), parent.name
    with ledger.open_stage(stage) as work:
        note(store, "begin", stage)
        match asked:
            case "fail":
                raise ValueError("bad luck")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
            case "meet":
                meet(store, stage)
            case "wait":
                numbers = {"done": 0.5, "tokens_seen": 1, "total_tokens": 2, "loss": 1.0}
                say(event="progress", stage=stage.name, tokens_per_second=3.0, note="", **numbers)
                while act.is_file():
                    time.sleep(0.1)
        work.finish({"weights_digest": "w", "seconds": 1.0, "distinct_images": 1, **MADE})
    if asked == "lie":
        (ledger.folder(stage) / "SUCCESS").unlink()


def main() -> None:
    """Run the stages that come in, or the one of the file."""
    given = Path(sys.argv[1])
    work = json.loads(given.read_text()) if given.is_file() else {"store": sys.argv[1]}
    store = Path(work["store"])
    startup = store.parent / "acts" / "startup"
    if startup.is_file():
        if startup.read_text() == "say":
            say(event="fault", error="there is no such device")
        sys.exit(3)
    print("a library says hello", flush=True)
    print("and complains", file=sys.stderr, flush=True)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    say(event="ready")
    for line in [json.dumps(work)] if "stage" in work else sys.stdin:
        stage = stage_from_json(json.dumps(json.loads(line)["stage"]))
        say(event="started", stage=stage.name)
        state, error = "done", None
        try:
            run(store, stage)
        except Stopped:
            state = "stopped"
        except Exception as problem:
            state, error = "failed", f"{type(problem).__name__}: {problem}"
        note(store, "end", stage)
        say(event="finished", stage=stage.name, state=state, error=error)
    if "stage" in work and state == "failed":
        sys.exit(1)


if __name__ == "__main__":
    main()
