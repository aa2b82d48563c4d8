"""The commands about models: import, export, chat, eval, score.

`midstream eval` and `midstream score`: their options; the work is done by a process.

The commands about single models: bring one in, hand one out, talk to one.

Each starts a process of its own, since these commands import no torch.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path, typer.Option(help="The folder to write, whole or not at all.")]
Model = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT", help="A stage's folder in a store, or a milestone of a text run in it."
    ),
]


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="An OpenLM epoch_N.pt, a Hugging Face folder or a hub name: a language model or a "
            "vision tower.",
        ),
    ],
    out: Out,
    revision: Annotated[
        str | None, typer.Option(help="A hub revision, such as step71000 or stage1-step10000.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Of a whole vision-language model: model (all), decoder or encoder."),
    ] = None,
    allow_same_weights: Annotated[
        bool,
        typer.Option(
            "--allow-same-weights",
            help="Take a revision that holds the weights of another step of its run.",
        ),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_FILE", help="The model's tokenizer, if not beside it."),
    ] = None,
    add_token: Annotated[
        list[str] | None, typer.Option(help="A further special token; may be repeated.")
    ] = None,
    pad_vocab_to: Annotated[
        int, typer.Option(min=1, help="The vocabulary's rows become a multiple of this.")
    ] = 64,
    tokens_seen: Annotated[
        int | None, typer.Option(min=0, help="Tokens that the checkpoint was trained on.")
    ] = None,
    total_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the whole run it comes from.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.0, help="The learning rate at the checkpoint.")
    ] = None,
    peak_rate: Annotated[float | None, typer.Option(min=0.0, help="The run's peak.")] = None,
    end_rate: Annotated[float | None, typer.Option(min=0.0, help="The run's end.")] = None,
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads, where an OpenLM file does not tell.")
    ] = None,
) -> None:
    """Bring in somebody's checkpoint: a language model from the middle of a run, or an encoder."""
    request = {
        "source": source,
        "out": str(out),
        "revision": revision,
        "part": part,
        "allow_same_weights": allow_same_weights,
        "tokenizer": tokenizer,
        "add_tokens": add_token or [],
        "pad_vocab_to": pad_vocab_to,
        "tokens_seen": tokens_seen,
        "total_tokens": total_tokens,
        "rate": rate,
        "peak_rate": peak_rate,
        "end_rate": end_rate,
        "num_heads": num_heads,
    }
    _process(["midstream.exchange", "import"], request)


def export_model(
    checkpoint: Model,
    out: Out,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave out what a model sees with.")
    ] = False,
) -> None:
    """Write a Hugging Face folder that loads where Midstream is not installed."""
    request = {"checkpoint": str(checkpoint), "out": str(out), "text_only": text_only}
    _process(["midstream.exchange", "export"], request)


def chat(
    checkpoint: Model,
    image: Annotated[Path | None, typer.Option(help="A picture to talk about.")] = None,
    web: Annotated[bool, typer.Option("--web", help="A page instead of the terminal.")] = False,
    port: Annotated[int, typer.Option(min=0, help="The page's port; 0 takes a free one.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the tokens that make up this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws the answers where temperature is not 0.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Talk to a model, about a picture if you like."""
    request = {
        "checkpoint": str(checkpoint),
        "image": None if image is None else str(image),
        "web": web,
        "port": port,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "device": device,
    }
    # Standard input is the user's.
    _process(["midstream.chat", "--request", json.dumps(request)], None)


COMMANDS: dict[str, Callable[..., None]] = {
    "import": import_model,
    "export": export_model,
    "chat": chat,
}


def _process(module: list[str], request: dict[str, Any] | None) -> None:
    """Run a module of ours, all cores its own; leaves with its exit code where that is not 0."""
    # Not at the head of the file: `midstream --help` waits for neither.
    from midstream.config import Machine
    from midstream.launch.workers import worker_environment

    environment = worker_environment(Machine(threads=os.cpu_count() or 1))
    # Whether hubs are asked is the user's choice: a checkpoint may have to come from one.
    offline = os.environ.get("HF_HUB_OFFLINE")
    environment.pop("HF_HUB_OFFLINE")
    environment |= {} if offline is None else {"HF_HUB_OFFLINE": offline}
    command = [sys.executable, "-m", *module]
    stdin = None if request is None else subprocess.PIPE
    with subprocess.Popen(command, stdin=stdin, env=environment) as process:
        # Ctrl-C is for the process, which knows what it means; then wait for it to end.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.communicate(None if request is None else json.dumps(request).encode())
        finally:
            signal.signal(signal.SIGINT, before)
    if process.returncode:
        raise typer.Exit(process.returncode)


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
    _evaluating(request)


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
    _evaluating(
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


EVAL_COMMANDS: dict[str, Callable[..., None]] = {"eval": evaluate, "score": score}


def _evaluating(request: dict[str, Any]) -> None:
    """Run the process, all cores its own; leaves with its exit code where that is not 0."""
    # Not at the head of the file: `midstream --help` does not wait for it.
    from midstream.config import Machine
    from midstream.launch.workers import worker_environment

    environment = worker_environment(Machine(threads=os.cpu_count() or 1))
    # Whether hubs are asked is the user's choice: a model or a task may have to come from one.
    offline = os.environ.get("HF_HUB_OFFLINE")
    environment.pop("HF_HUB_OFFLINE", None)
    environment |= {} if offline is None else {"HF_HUB_OFFLINE": offline}
    # The harness's own bars, between ours.
    environment["TQDM_DISABLE"] = "1"
    ended = subprocess.run(
        [sys.executable, "-m", "midstream.work.evaluate_model"],
        input=json.dumps(request).encode(),
        env=environment,
        check=False,
    )
    if ended.returncode:
        raise typer.Exit(ended.returncode)
