"""The works that read a user's data: `midstream prepare`, and benchmarks before a study runs."""

import os
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from midstream.config import OWN_RULE, Config, SlurmSettings, begin_of_text_named
from midstream.core.storage import write_bytes
from midstream.data.examples import TextCodec
from midstream.data.formats.files import is_url
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.shard_state import TaskShare
from midstream.data.tokenise import open_tokenizer
from midstream.eval.few_shot import read_pool
from midstream.eval.find_task import (
    other_pictures,
    read_choice_task,
    read_visual_task,
    require_share,
)
from midstream.eval.text import TextTask
from midstream.study.stages import PrepareSource
from midstream.study.store import Ledger
from midstream.work.protocol import Channel, Request

if TYPE_CHECKING:
    from midstream.data.prepare_source import SourcePlan

# Of a task's pictures all are looked for, and so many decoded: always the same ones.
NUM_DECODED = 64


class PrepareRequest(Request):
    """The arguments of `midstream prepare`."""

    section: Section
    sources: tuple[str, ...]
    out: Path
    tokenizer: str
    options: ReadOptions
    max_rejects: float
    validation: float
    workers: int
    begin_of_text: str = OWN_RULE
    copy_pictures: bool = False
    share: TaskShare | None = None
    slurm: SlurmSettings | None = None


def prepare(request: PrepareRequest, channel: Channel) -> dict[str, Any]:
    """Prepare the source, here or by jobs; returns its counts (see `prepare_source` for them and
    the errors, `OnSlurm.run` for those of jobs)."""
    # Not at the head of the file: it imports torch, and tasks are read without.
    from midstream.data.prepare_source import prepare_source

    if request.slurm is not None:
        return _prepare_on_slurm(request, request.slurm, channel)
    with _tokenizer_of(request) as tokenizer_file:
        return prepare_source(
            _plan_of(request, tokenizer_file),
            workers=request.workers,
            max_reject_fraction=request.max_rejects,
            progress=partial(channel.progress, "preparing"),
            notice=print,
        )


def prepare_units(request: PrepareRequest, channel: Channel) -> dict[str, int]:
    """Make the request's share of a source's shards; returns their numbers (`make_share`)."""
    from midstream.data.prepare_source import make_share

    with _tokenizer_of(request) as tokenizer_file:
        return make_share(
            _plan_of(request, tokenizer_file),
            workers=request.workers,
            max_reject_fraction=request.max_rejects,
            progress=partial(channel.progress, "preparing"),
        )


class ShareRequest(Request):
    """A share of the source that a study's stage prepares, and the processes that make it."""

    store: Path
    stage: PrepareSource
    share: TaskShare
    workers: int


def prepare_share(request: ShareRequest, channel: Channel) -> dict[str, int]:
    """Make a share of the shards of a stage whose parents are done (`make_world_share`)."""
    from midstream.data.prepare import make_world_share, tokenizer_path
    from midstream.work.open_model import world_root

    ledger, stage = Ledger(request.store), request.stage
    if ledger.is_done(stage):
        return {}
    return make_world_share(
        stage.world,
        world_root(stage, ledger),
        stage.source,
        tokenizer_path(ledger.folder(stage.tokenizer)),
        ledger.folder(stage),
        share=request.share,
        workers=request.workers,
        progress=partial(channel.progress, "preparing"),
    )


@contextmanager
def _tokenizer_of(request: PrepareRequest) -> Iterator[Path]:
    """The tokenizer that was asked for, as a file while the block runs."""
    from midstream.data.prepare_source import canonical_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        opened = open_tokenizer(request.tokenizer)
        begins = begin_of_text_named(opened, request.begin_of_text, request.tokenizer)
        codec = TextCodec(opened).beginning_with(begins)
        write_bytes(Path(folder) / "tokenizer.json", canonical_tokenizer(codec))
        yield Path(folder) / "tokenizer.json"


def _plan_of(request: PrepareRequest, tokenizer_file: Path) -> "SourcePlan":
    from midstream.data.prepare_source import plan_source

    return plan_source(
        request.section,
        request.sources,
        request.out,
        tokenizer_file=tokenizer_file,
        options=request.options,
        root=common_folder(request.sources),
        validation_fraction=request.validation,
        by_command=True,
        copy_pictures=request.copy_pictures,
        share=request.share,
    )


def _prepare_on_slurm(
    request: PrepareRequest, settings: SlurmSettings, channel: Channel
) -> dict[str, Any]:
    from midstream.work.prepare_on_slurm import OnSlurm, tokenizer_for

    with _tokenizer_of(request) as tokenizer_file:
        plan = _plan_of(request, tokenizer_file)
    # In a job no name is looked up in this folder, nor on a hub.
    there = request.model_copy(
        update={
            "sources": plan.sources,
            "out": plan.job.out,
            "options": plan.job.options,
            "tokenizer": str(tokenizer_for(plan)),
            "begin_of_text": OWN_RULE,
            "workers": settings.resources("prepare_source").cpus or 1,
            "slurm": None,
        }
    )

    def request_of(share: TaskShare | None) -> str:
        return there.model_copy(update={"share": share}).model_dump_json()

    return OnSlurm(plan, request_of, settings, partial(channel.progress, "preparing")).run()


class JoinRequest(Request):
    """The arguments of `midstream join captions`."""

    pictures: str
    captions: str
    out: Path
    workers: int


def join(request: JoinRequest, channel: Channel) -> dict[str, int]:
    """Join captions with pictures; returns what was joined and lost (see `join_captions`)."""
    from midstream.data.join_captions import join_captions

    return join_captions(
        request.pictures,
        request.captions,
        request.out,
        workers=request.workers,
        progress=partial(channel.progress, "joining"),
    )


def common_folder(sources: Sequence[str]) -> str:
    """The deepest folder that holds all local sources; empty where there is none."""
    folders = []
    for source in sources:
        if not is_url(source):
            path = os.path.abspath(source)
            folders.append(path if os.path.isdir(path) else os.path.dirname(path))
    return os.path.commonpath(folders) if folders else ""


class TaskRequest(Config):
    """A task as an evaluation reads it."""

    world: Path
    task: str
    kind: Literal["visual", "text"]
    limit: int | None
    slim: bool = False
    blind: bool = False
    shots: bool = False


class ReadTasksRequest(Request):
    """Tasks, in the order in which they are answered."""

    tasks: tuple[TaskRequest, ...]


def read_tasks(request: ReadTasksRequest, channel: Channel) -> None:
    """Answer each task with {"event": "finished", "stage", "state", "error", "size"}."""
    for task in request.tasks:
        state, error, size = "done", None, None
        try:
            size = read(task)
        except (ValueError, OSError) as reason:
            state, error = "failed", str(reason)
        channel.say("finished", stage=task.task, state=state, error=error, size=size)


def read(request: TaskRequest) -> dict[str, Any]:
    """Read a task to its last line as an evaluation does, and decode some of its pictures; returns
    its size, which a plan prices it by.

    Of a visual task `questions, pictures, characters` of all prompts in the benchmark's own words,
    fixed `answers` of all, and whether it has `several` pictures a question; of a text task
    `items`, and over all of them `choices` and `characters`, each choice with its query: None where
    only the harness can tell.
    Raises FileNotFoundError or ValueError for what is missing or malformed.
    """
    if request.kind == "text":
        asked = read_choice_task(request.world, request.task, request.limit)
        require_share(asked)
        return _text_size(asked)
    task = read_visual_task(request.world, request.task, request.limit, slim=request.slim)
    if request.blind:
        other_pictures(task)
    if request.shots:
        read_pool(request.world, request.task)
    decode_some({one for example in task.examples for one in example.pictures}, request.task)
    examples, fixed = task.examples, task.format.fixed is not None
    prompts = (task.format.prompt(one.question, "official") for one in examples)
    return {
        "questions": len(examples),
        "pictures": sum(len(one.pictures) for one in examples),
        "characters": sum(map(len, prompts)),
        "answers": sum(len(one.choices) for one in examples) if fixed else 0,
        "several": any(one.more for one in examples),
    }


def _text_size(task: TextTask) -> dict[str, Any]:
    docs = task.docs or ()
    size = {"items": None if task.docs is None else len(docs), "choices": None, "characters": None}
    if not all({"query", "choices"} <= doc.keys() for doc in docs):
        return size
    both = [(doc["query"], doc["choices"]) for doc in docs]
    characters = sum(len(query) + len(choice) for query, choices in both for choice in choices)
    return size | {"choices": sum(len(choices) for _, choices in both), "characters": characters}


def decode_some(pictures: Iterable[Path], name: str) -> None:
    """Decode a seeded sample of a task's pictures; ValueError names one that cannot be."""
    paths = sorted(pictures)
    for path in random.Random(f"0 decoded {name}").sample(paths, min(NUM_DECODED, len(paths))):
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, ValueError, SyntaxError) as reason:
            raise ValueError(
                f"task {name}: picture {path} cannot be decoded ({reason}); replace the file"
            ) from None
