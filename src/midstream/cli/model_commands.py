"""The options of the commands about models: import, export, chat, eval, score."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from midstream.cli import Device, MaxNewTokens, work

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
            help="An OpenLM epoch_N.pt, a Hugging Face folder or a hub name: a language model, a "
            "vision tower, a whole model, an adapter.",
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
    request = locals() | {"add_tokens": add_token or []}
    del request["add_token"]
    work("import", request)


def export_model(
    checkpoint: Model,
    out: Out,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave out what a model sees with.")
    ] = False,
) -> None:
    """Write a Hugging Face folder that loads where Midstream is not installed."""
    work("export", locals())


def chat(
    checkpoint: Model,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to talk about; may be repeated.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="A page instead of the terminal.")] = False,
    port: Annotated[int, typer.Option(min=0, help="The page's port; 0 takes a free one.")] = 0,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the tokens that make up this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Draws the answers where temperature is not 0.")] = 0,
    device: Device = "auto",
) -> None:
    """Talk to a model, about a picture if you like."""
    work("chat", locals() | {"image": image or []})


Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A world, or a folder with the benchmarks' official files (docs/evaluation.md); "
        "without it the world that a stage was trained with.",
    ),
]


Shots = Annotated[
    int | None,
    typer.Option(min=0, help="Training questions before each one; 0: two without their pictures."),
]


BoxFrame = Annotated[
    str, typer.Option(help="Boxes as shares of picture or of the square it is padded to (square).")
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
        typer.Option(
            metavar="NAME", help="A task, or several (a,b); may be repeated. Without: all there."
        ),
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
    box_frame: BoxFrame = "picture",
    blind: Annotated[
        bool, typer.Option("--blind", help="Ask again with another question's picture.")
    ] = False,
    shots: Shots = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 16,
    device: Device = "auto",
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
    given = locals()
    from midstream.launch.workers import hub_environment

    asked = "limit slim prompts fixed_answers letters box_frame blind max_new_tokens batch_size"
    tasks = [name.strip() for several in task or [] for name in several.split(",") if name.strip()]
    show_request = {"tasks": tasks, "count": show or 3, "debug": debug}
    if listing:
        work("list-tasks", {"data": data, "debug": debug})
    elif diff is not None:
        work("show-differences", show_request | {"folders": diff})
    elif show is not None:
        work("show-examples", show_request | {"folders": models or [], "wrong": wrong})
    else:
        # The harness's own bars would stand between ours.
        quiet = hub_environment() | {"TQDM_DISABLE": "1"}
        request = {name: given[name] for name in ("data", "out", "device", "trust_remote_code")}
        request |= {"models": models or [], "tasks": tasks, "debug": debug}
        evaluation = {name: given[name] for name in asked.split()}
        evaluation["few_shot"] = None if shots is None else {"num_shots": shots}
        request |= {"evaluation": evaluation}
        work("evaluate", request, quiet)


def score(
    task: Annotated[str, typer.Argument(metavar="TASK", help="A visual benchmark.")],
    predictions: Annotated[
        Path,
        typer.Option(
            help="JSON lines, a list or object, or a table (.tsv, .csv, .parquet, .xlsx)."
        ),
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
    box_frame: BoxFrame = "picture",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Score a file of predictions without a model; the pictures may be absent."""
    work("score", locals())


COMMANDS: dict[str, Callable[..., None]] = {
    "import": import_model,
    "export": export_model,
    "chat": chat,
    "eval": evaluate,
    "score": score,
}
