"""Shots: training questions with their answers that stand before a question, as earlier turns.

The protocol is OpenFlamingo's in this project's layout: a seeded pool of 2,048 training questions,
shots drawn from it for each question or once for all, zero shots as two of them without pictures.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from midstream.config import Evaluation
from midstream.config.training import pool_of
from midstream.data.examples import IMAGE_MARK
from midstream.eval.benchmark_records import Shot, VisualExample, plain_words
from midstream.eval.continuous import target
from midstream.eval.find_task import VisualTask, read_visual_task
from midstream.eval.tasks import VISUAL_FORMATS

# Training questions that shots are drawn from (OpenFlamingo).
POOL = 2048
# A written answer behind shots ends where the next turn would begin.
STOPS = ("\n", "In:", "Out:", "Question:", "question:")


@dataclass(frozen=True)
class Shots:
    """The shots before each question; how many training questions are left out because they, or
    their pictures, are asked about; and how many are in the pool."""

    before: tuple[tuple[Shot, ...], ...]
    excluded: int
    pool: int


def read_pool(world: Path, name: str) -> Sequence[VisualExample]:
    """The training questions of a benchmark: the task `<name>_train` of a world, or the training
    split's official files in a folder of that name.

    Raises FileNotFoundError where there are none, ValueError for another format's.
    """
    pool = pool_of(name)
    if (world / "world.json").is_file():
        return read_visual_task(world, pool, shuffled=False).examples
    places = (world / "bench" / pool, world / pool)
    folder = next((path for path in places if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"shots for {name}: {places[-1]} does not exist; put the training split's official "
            "files there, or ask without shots (published.table1: --set shots=null)"
        )
    return VISUAL_FORMATS[name].read(folder)


def read_shots(
    world: Path,
    task: VisualTask,
    evaluation: Evaluation,
    file_digest: Callable[[Path], str],
) -> Shots | None:
    """The shots of a task; None where the evaluation asks for none.

    A training question that is asked itself (its id and words), or shares a picture with one that
    is (its bytes), is left out and counted, as one without an answer is left out. Raises ValueError
    where too few are left, and what `read_pool` raises.
    """
    few = evaluation.few_shot
    if few is None:
        return None
    asked = {(e.example_id, plain_words(e.question)) for e in task.examples}
    seen = {file_digest(path) for example in task.examples for path in example.pictures}
    wording = evaluation.wordings.get(task.name, evaluation.prompts)
    found = list(read_pool(world, task.name))
    random.Random(f"{few.seed} shots {task.name}").shuffle(found)
    pool: list[Shot] = []
    excluded = 0
    for example in found:
        if len(pool) == POOL:
            break
        itself = (example.example_id, plain_words(example.question)) in asked
        if itself or any(file_digest(path) in seen for path in example.pictures):
            excluded += 1
            continue
        reply = target(task.format, example, evaluation.letters, spelt_as_gold=True).gold
        if reply is not None:
            question = task.format.prompt(example.question, wording)
            pool.append(Shot(question, reply, example.pictures))
    number = few.num_before
    if len(pool) < number:
        raise ValueError(
            f"shots for {task.name}: {len(pool)} training questions are left, {number} are wanted "
            f"({excluded} of {len(found):,} are asked themselves or show what is asked about); "
            "give the training split's files, or fewer shots"
        )
    if not few.num_shots:
        pool = [Shot(one.question.replace(IMAGE_MARK, ""), one.reply, ()) for one in pool]
    same = tuple(pool[:number])
    before = [same] * len(task.examples)
    if few.draw == "each":
        draws = (f"{few.seed} shots {task.name} {e.example_id}" for e in task.examples)
        before = [tuple(random.Random(draw).sample(pool, number)) for draw in draws]
    return Shots(tuple(before), excluded, len(pool))


def up_to_stop(text: str) -> str:
    """A written answer up to the first stop word."""
    places = [text.find(stop) for stop in STOPS if stop in text]
    return text[: min(places)] if places else text
