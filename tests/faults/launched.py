"""`midstream run` as a process of its own, on several ranks, with ways to look into it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tiny
from midstream.study.stages import Evaluate, Pretrain
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study


def long_run(total_tokens: int) -> Pretrain:
    """A text run with a checkpoint now and then."""
    budget = tiny.mixture(total_tokens, web=1.0).model_copy(update={"max_epochs": 64})
    return tiny.text_run(budget=budget, checkpoint_every_steps=25)


# Long enough to be met along the way: a hundred steps.
LONG = long_run(80_000)
# Never seen to its end.
ENDLESS = long_run(640_000)
TEXT_TASKS = tiny.EVALUATION.model_copy(update={"visual_tasks": ()})
RESULT = Evaluate(of=LONG, evaluation=TEXT_TASKS)
DEADLINE_SECONDS = 240.0


def recipe(folder: Path, stage: Pretrain = LONG) -> str:
    """A recipe file whose study has the one line."""
    result = Evaluate(of=stage, evaluation=TEXT_TASKS)
    line = Line(name="line", axes={"x": 1}, result=result)
    study = Study(name="lost", question="?", lines=(line,), figure=Figure(x="x", x_label="x"))
    file = folder / "recipe.py"
    if file.is_file():
        return f"{file}:study"
    (folder / "study.json").write_text(study.model_dump_json())
    file.write_text(
        "from pathlib import Path\n"
        "from midstream.study.studies import Study\n\n\n"
        "def study() -> Study:\n"
        "    file = Path(__file__).parent / 'study.json'\n"
        "    return Study.model_validate_json(file.read_bytes())\n"
    )
    return f"{file}:study"


def launch(ledger: Ledger, *options: str, stage: Pretrain = LONG) -> "subprocess.Popen[str]":
    """Start the command; its ranks are silent for at most six seconds."""
    command = [sys.executable, "-m", "midstream.cli.app", "run", recipe(ledger.store, stage)]
    command += ["--store", str(ledger.store), "--workers", "1", "--device", "cpu"]
    command += ["--machine", "rank_timeout_seconds=6", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]", seconds: float = DEADLINE_SECONDS) -> str:
    """Wait until it has ended; what it has printed."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(process.communicate()[0]) from None


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Until it holds; fails with the command's words if that ends before, or never."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)


def has_steps(ledger: Ledger, number: int, stage: Pretrain = LONG) -> Callable[[], bool]:
    """Whether this many steps have been noted."""
    path = ledger.folder(stage) / "metrics.jsonl"
    return lambda: path.is_file() and path.read_bytes().count(b"\n") >= number


def ranks(launcher: int) -> dict[int, int]:
    """The process ids of the ranks below a launcher, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            values = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it has gone meanwhile
            continue
        named = dict(value.partition(b"=")[::2] for value in values)
        mine = named.get(b"MIDSTREAM_LAUNCHER") == str(launcher).encode()
        if mine and b"RANK" in named and b"midstream.work.worker" in words:
            found[int(named[b"RANK"])] = int(process.name)
    return found


def agent(launcher: int) -> int:
    """The process id of torchrun below a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in children:
        if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise AssertionError(f"no torchrun among {children}")


def losses(ledger: Ledger) -> list[float]:
    """The loss of each step."""
    path = ledger.folder(LONG) / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]
