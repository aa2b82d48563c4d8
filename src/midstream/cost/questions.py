"""What an evaluation asks: questions, pictures and positions, counted where its files were read."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from midstream.config import PocketWorld, PublicFolder, SmallReal
from midstream.core.storage import read_json
from midstream.cost.known import Number
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger

# Tokens of a question with its prompt, and of a text item with one of its answers.
PROMPT_TOKENS, TEXT_ITEM_TOKENS = 48, 64
# Tokens of a fixed answer that is weighed, and characters of a token where texts were read.
ANSWER_TOKENS, CHARACTERS = 2, 4
# A slim evaluation's questions of each split of a visual task.
SLIM_QUESTIONS = 1024
# Questions of a whole task that no table has the size of, and answers of a text item there.
WHOLE_TASK, TEXT_ITEM_CHOICES = 5000, 2


class VisualSize(NamedTuple):
    """Questions of a visual task, the splits that a slim evaluation takes its part of each, the
    fixed answers of a question (0: it is written), the pictures of a question."""

    questions: int
    splits: int = 1
    answers: int = 0
    pictures: float = 1.0


class TextSize(NamedTuple):
    """Items of a text task, and how many answers each is asked with (BIG-bench's: the chance's)."""

    items: int
    choices: int


# Whole official splits as vlm-evaluation (TRI-ML) and lm-evaluation-harness ask them, and as the
# authors of benchmarks of several pictures count them, for plans made before any is at hand.
VISUAL_SIZES: Mapping[str, VisualSize] = {
    "vqav2": VisualSize(214_354),
    "okvqa": VisualSize(5_046),
    "gqa": VisualSize(12_578),
    "textvqa": VisualSize(5_000),
    "textvqa_ocr": VisualSize(5_000),
    "vizwiz": VisualSize(4_319),
    "pope": VisualSize(8_910, splits=3, answers=2),
    "refcoco": VisualSize(10_834),
    "refcoco_plus": VisualSize(10_758),
    "refcocog": VisualSize(4_896),
    "ocid_ref": VisualSize(18_342, splits=3),
    "vsr": VisualSize(1_222, answers=2),
    "tallyqa": VisualSize(38_589, splits=2, answers=16),
    "ai2d": VisualSize(15_501, splits=2, answers=4),
    "coco_captions": VisualSize(5_000),
    "flickr30k": VisualSize(1_000),
    "nlvr2": VisualSize(6_967, answers=2, pictures=2),
    "muirbench": VisualSize(2_600, answers=4, pictures=11_264 / 2_600),
}
# Questions of releases that are whole, too: POPE's since October 2023, NLVR2's development set,
# AI2D's test set, which is all that tables of the hub hold.
_OTHER_SIZES = {"pope": 9_000, "nlvr2": 6_982, "ai2d": 3_088}
TEXT_SIZES: Mapping[str, TextSize] = {
    "agieval_sat_en": TextSize(206, 4),
    "arc_easy": TextSize(2_376, 4),
    "bigbench_conceptual_combinations_multiple_choice": TextSize(103, 4),
    "bigbench_cs_algorithms_multiple_choice": TextSize(1_320, 4),
    "boolq": TextSize(3_270, 2),
    "copa": TextSize(100, 2),
    "hellaswag": TextSize(10_042, 4),
    "mathqa": TextSize(2_985, 5),
    "piqa": TextSize(1_838, 2),
    "pubmedqa": TextSize(500, 3),
}

# What was read of benchmarks, in a store: by the request, the digest of the files and their size.
NOTE = "benchmarks.json"
# By the request as JSON: what `task_size` and `text_size` of `work/read_data.py` count.
Sizes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Asked:
    """One task as it is asked in all its passes: positions and pictures that are read, positions
    that have logits, and pairs of positions that see each other, a causal mask taken for none."""

    positions: Number
    pictures: Number
    written: Number
    squares: Number
    counted: bool


def published_size(task: str, count: int) -> int:
    """How many questions a task's official files have: `count`, which were read, where these are
    of another whole release or no table says."""
    known = count == _OTHER_SIZES.get(task) or task not in VISUAL_SIZES
    return count if known else VISUAL_SIZES[task].questions


def requests_of(stage: Evaluate) -> Iterator[dict[str, Any]]:
    """What `midstream.work.read_data` is asked for the tasks of an evaluation of a user's data."""
    world, asked = stage.of.data.world, stage.evaluation
    if not isinstance(world, PublicFolder) or world.fingerprint is None:
        return
    own = {"world": str(world.root), "limit": asked.limit}
    for name in asked.visual_tasks:
        how = {"slim": asked.slim, "blind": asked.blind, "shots": asked.few_shot is not None}
        yield own | {"task": name, "kind": "visual", **how}
    for name in asked.text_tasks:
        yield own | {"task": name, "kind": "text"}


def noted(ledger: Ledger | None) -> Mapping[str, dict[str, Any]]:
    """What a store's note says of benchmarks: by request `digest` and `size`; of earlier versions,
    which counted nothing, nothing."""
    path = None if ledger is None else ledger.store / NOTE
    if path is None or not path.is_file():
        return {}
    return _note(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _note(path: Path, changed: int) -> Mapping[str, dict[str, Any]]:
    return {key: one for key, one in read_json(path).items() if isinstance(one, dict)}


def asked_of(stage: Evaluate, ledger: Ledger | None, sizes: Sizes) -> list[Asked]:
    """The tasks of an evaluation; `sizes` are those read just now, others are the store's."""
    read: dict[tuple[str, str], Mapping[str, Any]] = {}
    for request in requests_of(stage):
        key, name = json.dumps(request), request["task"]
        known = noted(ledger).get(key, {})
        if key in sizes:
            read[request["kind"], name] = sizes[key]
        elif known and known["digest"] == stage.of.data.world.benchmark_part(name):
            read[request["kind"], name] = known["size"]
    asked = stage.evaluation
    return [
        *(_visual(stage, task, read.get(("visual", task))) for task in asked.visual_tasks),
        *(_text(stage, task, read.get(("text", task))) for task in asked.text_tasks),
    ]


def _visual(stage: Evaluate, task: str, read: Mapping[str, Any] | None) -> Asked:
    asked, model = stage.evaluation, stage.of.model
    if read is None:
        questions, size = _questions(stage, task)
        pictures: Number = questions * size.pictures
        tokens, answers = questions * PROMPT_TOKENS, questions * size.answers
        several = size.pictures > 1
    else:
        questions, pictures, answers = read["questions"], read["pictures"], read["answers"]
        tokens, several = round(read["characters"] / CHARACTERS), read["several"]
    weighed = asked.fixed_answers != "text" and answers > 0
    # As it is, with other pictures, with its own in another order; and once more as a text.
    passes = 1 + (1 + several if asked.blind else 0)
    as_text = passes if not weighed else int(asked.fixed_answers == "both")
    chosen = passes if weighed else 0
    replies = chosen * answers * ANSWER_TOKENS + as_text * questions * asked.max_new_tokens
    passes = max(passes, chosen + as_text)
    # Shots are training questions, which are taken to be as long as those that are asked.
    few, reads = asked.few_shot, questions
    before = tokens_before = pictures_before = 0.0
    if few is not None and questions:
        shot = tokens / questions + ANSWER_TOKENS
        tokens_before = few.num_before * shot
        pictures_before = few.num_shots * pictures / questions
        before = tokens_before + pictures_before * model.image_tokens
        if few.draw == "once":
            # What a batch begins with is read once.
            reads = -(-questions // asked.batch_size)
    own = pictures * model.image_tokens + tokens
    positions = passes * (own + reads * before) + replies
    each = before + (own + replies / passes) / max(questions, 1)
    return Asked(
        positions=positions,
        pictures=passes * (pictures + reads * pictures_before),
        written=replies + passes * questions,
        squares=positions * each,
        counted=read is not None,
    )


def _questions(stage: Evaluate, task: str) -> tuple[int, VisualSize]:
    """How many of a visual task are asked: of the world's own number, else of the published one."""
    world, limit = stage.of.data.world, stage.evaluation.limit
    size = VISUAL_SIZES.get(task, VisualSize(WHOLE_TASK))
    if isinstance(world, PocketWorld | SmallReal):
        whole = world.num_questions
    else:
        slim = SLIM_QUESTIONS * size.splits if stage.evaluation.slim else size.questions
        whole = min(size.questions, slim)
    return min(whole, limit or whole), size


def _text(stage: Evaluate, task: str, read: Mapping[str, Any] | None) -> Asked:
    world, limit = stage.of.data.world, stage.evaluation.limit
    size = TEXT_SIZES.get(task, TextSize(WHOLE_TASK, TEXT_ITEM_CHOICES))
    if isinstance(world, PocketWorld | SmallReal):
        own = world.num_text_items if isinstance(world, PocketWorld) else world.num_questions
        size = TextSize(own, TEXT_ITEM_CHOICES)
    each: Number = TEXT_ITEM_TOKENS
    counted = read is not None and read["items"] is not None
    if read is not None and counted:
        size = TextSize(read["items"], size.choices)
        if read["choices"]:
            choices, each = read["choices"], read["characters"] / read["choices"] / CHARACTERS
            return _weighed(choices, each, counted)
    return _weighed(min(size.items, limit or size.items) * size.choices, each, counted)


def _weighed(choices: Number, each: Number, counted: bool) -> Asked:
    positions = choices * each
    return Asked(positions, 0, positions, positions * each, counted)
