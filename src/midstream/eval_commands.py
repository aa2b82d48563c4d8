"""`midstream eval` and `midstream score`: their options; the work is done by a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A world, or a folder with the benchmarks' official files (docs/evaluation.md); "
        "without it the world that a stage was trained with.",
    ),
]


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CKPT...",
            help="Stages' folders, milestones, exported folders or other Hugging Face models; with "
            "--show folders of results.",
        ),
    ] = None,
    data: Data = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A task; may be repeated. All that are there without."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where results and predictions go.")] = Path(
        "evaluations"
    ),
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first examples of each task's seeded order.")
    ] = None,
    slim: Annotated[
        bool, typer.Option("--slim", help="1,024 examples of each split of a visual task.")
    ] = False,
    prompts: Annotated[str, typer.Option(help="official or short.")] = "official",
    fixed_answers: Annotated[
        str, typer.Option(help="Yes/no and letters by probability, by text, or both.")
    ] = "probability",
    letters: Annotated[str, typer.Option(help="Options by letter or by likelihood.")] = "letter",
    box_frame: Annotated[str, typer.Option(help="Boxes as shares of picture or square.")] = (
        "picture"
    ),
    blind: Annotated[
        bool, typer.Option("--blind", help="Ask again with another question's picture.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a model's folder brings.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error as well.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="Say which tasks there are, and what is missing.")
    ] = False,
    show: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Print N examples of each task.")
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="With --show: those that are wrong.")] = (
        False
    ),
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Where two folders of results differ, and by how much."),
    ] = None,
) -> None:
    """Evaluate models on benchmarks' official files; list benchmarks, show or compare results."""
    evaluation = {
        "limit": limit,
        "slim": slim,
        "prompts": prompts,
        "fixed_answers": fixed_answers,
        "letters": letters,
        "box_frame": box_frame,
        "blind": blind,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    request: dict[str, Any] = {"data": None if data is None else str(data), "tasks": task or []}
    request |= {"debug": debug}
    if listing:
        request |= {"action": "list"}
    elif diff is not None:
        request |= {"action": "diff", "folders": [str(path) for path in diff], "count": show or 3}
    elif show is not None:
        request |= {"action": "show", "folders": models or [], "count": show, "wrong": wrong}
    else:
        request |= {
            "action": "evaluate",
            "models": models or [],
            "out": str(out),
            "evaluation": evaluation,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
    _process(request)


def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help="A visual benchmark.")],
    predictions: Annotated[
        Path,
        typer.Option(help="JSON lines, a JSON list or object, or a table (.tsv, .csv, .xlsx)."),
    ],
    data: Annotated[Path, typer.Option(help="The folder of the official annotations.")],
    split: Annotated[
        str | None, typer.Option(help="The predictions are of this split alone.")
    ] = None,
    missing_as_wrong: Annotated[
        bool, typer.Option("--missing-as-wrong", help="Questions without a prediction are wrong.")
    ] = False,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Leave out predictions of no question here.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Score a file of predictions without a model; the pictures may be absent."""
    _process(
        {
            "action": "score",
            "task": task,
            "predictions": str(predictions),
            "data": str(data),
            "split": split,
            "missing_as_wrong": missing_as_wrong,
            "ignore_unknown": ignore_unknown,
            "json": as_json,
        }
    )


COMMANDS: dict[str, Callable[..., None]] = {"eval": evaluate, "score": score}


def _process(request: dict[str, Any]) -> None:
    """Run the process, all cores its own; leaves with its exit code where that is not 0."""
    # Not at the head of the file: `midstream --help` does not wait for it.
    from midstream.config import Machine
    from midstream.study.workers import worker_environment

    environment = worker_environment(Machine(threads=os.cpu_count() or 1))
    # Whether hubs are asked is the user's choice: a model or a task may have to come from one.
    offline = os.environ.get("HF_HUB_OFFLINE")
    environment.pop("HF_HUB_OFFLINE", None)
    environment |= {} if offline is None else {"HF_HUB_OFFLINE": offline}
    # The harness's own bars, between ours.
    environment["TQDM_DISABLE"] = "1"
    ended = subprocess.run(
        [sys.executable, "-m", "midstream.evaluate_model"],
        input=json.dumps(request).encode(),
        env=environment,
        check=False,
    )
    if ended.returncode:
        raise typer.Exit(ended.returncode)
