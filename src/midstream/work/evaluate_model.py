"""The work of `midstream eval`: models asked the benchmarks of a world or of a folder."""

import difflib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from midstream.config import Evaluation, Machine
from midstream.config.training import pool_of
from midstream.core.identity import digest, hub_folders, kept_digests, listed_tasks, published_files
from midstream.core.storage import num_cores, remove_folder, require_writable, write_json
from midstream.eval.answers import (
    ANSWERS_VERSION,
    BATCHES_AT_ONCE,
    EvaluationStopped,
    KeptAnswers,
    NotNumbers,
    earlier_tasks,
    results_of,
)
from midstream.eval.benchmark import evaluate
from midstream.eval.tasks import HARNESS_TASKS, VISUAL_FORMATS, Answerer
from midstream.eval.text import manager
from midstream.launch.terminal import out
from midstream.study.store import Stopped
from midstream.work.protocol import Channel, Request, in_a_line, is_ours
from midstream.work.show_scores import find_place, print_scores


class EvaluateRequest(Request):
    """Models by folder or name, and how they are asked; `evaluation` are fields of `Evaluation`."""

    models: tuple[str, ...]
    out: Path
    evaluation: dict[str, Any]
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    device: str = "auto"
    trust_remote_code: bool = False


class ModelFailed(ValueError):  # noqa: N818 - the error itself is the cause
    """A model, or a library on its behalf, raised an error; the text is the model's and its."""


def evaluate_all(request: EvaluateRequest, channel: Channel) -> None:
    """Evaluate the models one by one and print their scores; ModelFailed names the one that fails.

    Raises Stopped where the channel says so: the answers so far are kept.
    """
    if not request.models:
        raise ValueError("name a model: a stage's folder, an exported one, or one of a hub")
    if (data := request.data) is not None and not data.is_dir():
        told = "is a file" if data.exists() else "does not exist"
        raise FileNotFoundError(
            f"{data} {told}; --data is a world or the folder of benchmarks' files"
        )
    if request.out.exists() and not request.out.is_dir():
        raise ValueError(f"{request.out} is no folder; give another --out")
    require_writable(request.out)
    names = list(dict.fromkeys(request.models))
    for name in names[1:]:
        # A name that is none is told before hours of work on those before it.
        with _failures_named(name):
            _check_named(name, request)
    rows = {}
    # A model's weights are read whole, so their digests are kept.
    with kept_digests(request.out / ".digests.sqlite"):
        for name in names:
            try:
                with _failures_named(name):
                    rows[name] = _evaluate_one(name, request, channel)
            except EvaluationStopped as reason:
                raise Stopped(str(reason)) from None
    print_scores(rows, out())


def _evaluate_one(name: str, request: EvaluateRequest, channel: Channel) -> dict[str, Any]:
    """A model's results, written into their folder, and a line about them."""
    from midstream.eval.transformers_answerer import TransformersAnswerer

    answerer, data = _open_model(name, request)
    evaluation = _asked(request, data)
    if isinstance(answerer, TransformersAnswerer):
        if evaluation.visual_tasks:
            answerer.check_pictures()
        if evaluation.text_tasks:
            answerer.check_texts()
    about = {
        "model": name,
        "data": str(data.resolve()),
        "weights_digest": answerer.weights_digest,
        "evaluation": digest(evaluation),
        "answers_version": ANSWERS_VERSION,
    }
    # Two models may have one name, and one model may be asked in several ways.
    stem = Path(os.path.abspath(name)).name
    folder = request.out / f"{stem}-{digest(about)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is being written by another evaluation; wait until it ends, or give another "
            "--out"
        ) from None
    with held:
        answers = KeptAnswers(
            answerer,
            folder / "answers",
            at_once=evaluation.batch_size * BATCHES_AT_ONCE,
            settings=str(evaluation.max_new_tokens),
            should_stop=lambda: channel.stopping,
        )
        # Whatever folder a task's result lies in, the same question has the same answer.
        done = earlier_tasks(sorted(request.out.glob("*")))
        note = partial(channel.progress, name)
        row = evaluate(answers, evaluation, data, folder, note, done=done) | {"about": about}
        path = folder / "results.json"
        if results_of(path) != row:
            write_json(path, row)
        remove_folder(folder / "answers")
    kept = [
        f"{task} (of {time.strftime('%Y-%m-%d %H:%M', time.localtime(when))})"
        for task, found in row["tasks"].items()
        if found["key"] in done
        for when in [done[found["key"]].predictions.stat().st_mtime]
    ]
    told = f"; as before: {', '.join(kept)}" if kept else ""
    print(f"{name}: {folder}{told}")
    return row


@contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """Raise ModelFailed for what a model's or a library's code raises; ours say what is wrong."""
    try:
        yield
    except (EvaluationStopped, ValidationError):
        raise
    except NotNumbers as error:
        raise ModelFailed(f"{name}: {error}") from None
    except Exception as error:
        if is_ours(error) and isinstance(error, ValueError | OSError):
            raise
        raise ModelFailed(f"{name}: {in_a_line(error)} (--debug shows where)") from error


def _is_stage(path: Path) -> bool:
    return (path / "stage.json").is_file() or path.parent.name == "milestones"


def _check_named(name: str, request: EvaluateRequest) -> None:
    """Raises what opening the model would, without its weights."""
    from midstream.eval.foreign_model import open_config

    if _is_stage(path := Path(name)) and not path.is_dir():
        kept = ", ".join(sorted(one.name for one in path.parent.glob("*"))) or "nothing"
        raise FileNotFoundError(f"{name} is not there; {path.parent} holds {kept}")
    if not _is_stage(path):
        open_config(name, {"trust_remote_code": request.trust_remote_code})


def _open_model(name: str, request: EvaluateRequest) -> tuple[Answerer, Path]:
    """A model by its folder or its name, and the data that it is asked about."""
    from midstream.train.parallel import set_up

    machine = Machine.model_validate(
        {"device": request.device, "threads": num_cores(), "workers": 1}
    )
    device = set_up(machine).device
    path, data = Path(name), request.data
    options = {key: request.evaluation[key] for key in ("max_new_tokens", "batch_size")}
    if _is_stage(path):
        from midstream.work.evaluate_stage import answerer_of
        from midstream.work.open_model import open_model, world_root

        opened = open_model(path, device)
        if data is None:
            data = world_root(opened.stage.data, opened.ledger)
        return answerer_of(opened, **options), data
    if data is None:
        raise ValueError(f"{name} is no stage of a store: say with --data what it is asked about")
    from midstream.eval.transformers_answerer import TransformersAnswerer

    trusted = request.trust_remote_code
    return TransformersAnswerer(name, device, trust_remote_code=trusted, **options), data


def _asked(request: EvaluateRequest, data: Path) -> Evaluation:
    """The named tasks by kind, or all that the data holds."""
    names, seen = list(request.tasks), [*VISUAL_FORMATS]
    if (data / "world.json").is_file():
        visual, text = (listed_tasks(data, kind) for kind in ("visual_tasks", "text_tasks"))
        # Questions that shots are drawn from are asked where they are named.
        pools = set(map(pool_of, visual))
        own = [name for name in visual if name not in pools]
        names = names or [*own, *text, *hub_folders(data)]
        chosen, seen = [name for name in names if name in visual], [*seen, *visual]
    else:
        here = [name for name in VISUAL_FORMATS if find_place(data, name) is not None]
        local = [name for name in HARNESS_TASKS if published_files(data, name)]
        names = names or [*here, *local, *hub_folders(data)]
        text = dict.fromkeys(HARNESS_TASKS)
        chosen = [name for name in names if name in VISUAL_FORMATS]
    if not names:
        raise ValueError(
            f"{data} holds no task that is known; see midstream eval --list, or name the task that "
            "its files are of (--task)"
        )
    known = set(VISUAL_FORMATS) | set(text) | set(HARNESS_TASKS)
    unknown = [name for name in names if name not in chosen and name not in known]
    # The harness knows many more than stand here; a slip of the pen it would not find.
    near = partial(difflib.get_close_matches, possibilities=seen, n=1)
    slips = [name for name in unknown if near(name.lower())]
    chosen += [name for name in slips if name not in manager().task_index]
    rest = [name for name in names if name not in chosen]
    return Evaluation.model_validate(
        {**request.evaluation, "visual_tasks": chosen, "text_tasks": rest}
    )
