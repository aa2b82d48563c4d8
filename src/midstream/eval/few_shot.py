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
from midstream.core.identity import listed_tasks
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
        if pool not in listed_tasks(world, "visual_tasks"):
            raise FileNotFoundError(
                f"shots for {name}: {world / 'world.json'} lists no task {pool!r}; add it "
                "(its training questions), or ask without shots"
            )
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
    is (its bytes), is left out and counted, as one without an answer is left out. Where that leaves
    too few, as of a small world's pictures, it stands before other questions alone if each has its
    own draw. Raises ValueError where too few are left, and what `read_pool` raises.
    """
    few = evaluation.few_shot
    if few is None:
        return None

    def signs(one: VisualExample) -> frozenset[str]:
        itself = f"{one.example_id} {plain_words(one.question)}"
        return frozenset((itself, *map(file_digest, one.pictures)))

    asked = list(map(signs, task.examples))
    asked_of = frozenset[str]().union(*asked)
    wording = evaluation.wordings.get(task.name, evaluation.prompts)
    found = list(read_pool(world, task.name))
    random.Random(f"{few.seed} shots {task.name}").shuffle(found)
    pool, shared = list[Shot](), list[tuple[Shot, frozenset[str]]]()
    for example in found:
        if len(pool) == POOL:
            break
        own = signs(example)
        reply = target(task.format, example, evaluation.letters, spelt_as_gold=True).gold
        question = task.format.prompt(example.question, wording)
        shown = example.pictures if few.num_shots else ()
        if not few.num_shots:
            question = question.replace(IMAGE_MARK, "")
        if own & asked_of:
            shared.append((Shot(question, reply or "", shown), own))
        elif reply is not None:
            pool.append(Shot(question, reply, shown))
    number = few.num_before
    before, least = [tuple(pool[:number])] * len(task.examples), len(pool)
    if few.draw == "each":
        draws = (f"{few.seed} shots {task.name} {e.example_id}" for e in task.examples)
        pools = [pool] * len(task.examples)
        if least < number:
            pools = [[*pool, *(s for s, own in shared if s.reply and not own & e)] for e in asked]
            least = min(map(len, pools))
        if least >= number:
            chosen = zip(draws, pools, strict=True)
            before = [tuple(random.Random(draw).sample(one, number)) for draw, one in chosen]
    if least < number:
        raise ValueError(
            f"shots for {task.name}: {least} training questions are left, {number} are wanted "
            f"({len(shared)} of {len(found):,} show what is asked); give the "
            "training split's files, or fewer shots"
        )
    return Shots(tuple(before), len(shared), least)


def up_to_stop(text: str) -> str:
    """A written answer up to the first stop word."""
    places = [text.find(stop) for stop in STOPS if stop in text]
    return text[: min(places)] if places else text
