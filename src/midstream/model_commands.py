"""The commands about single models: bring one in, hand one out, talk to one.

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
    from midstream.study.workers import worker_environment

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
