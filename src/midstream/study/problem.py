"""Something that is wrong with a study before it runs, and the list that is made of several."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

# wrong: with the study or its data. lacking: what this machine does not have. Either is refused by
# `run`. doubtful: rests on what the recipe expects of its data; it is told and runs all the same.
Level = Literal["wrong", "lacking", "doubtful"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True)
class Problem:
    """What is wrong, how it is put right, and the names of the stages that it concerns.

    Problems of one `key` are one problem; that of the greatest `weight` says it for all.
    """

    what: str
    remedy: str
    stages: tuple[str, ...] = ()
    level: Level = "wrong"
    key: str = ""
    weight: float | int = 0

    def __str__(self) -> str:
        more = len(self.stages) - 1
        where = f" [{self.stages[0]}{f' and {more:,} more' if more else ''}]" if self.stages else ""
        return f"{self.what}; {self.remedy}{where}"


def merged(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """One problem for all of a key (of a text, where there is none), the gravest level first."""
    found: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        key = (problem.level, problem.key or f"{problem.what}; {problem.remedy}")
        other = found.get(key, problem)
        stages = tuple(dict.fromkeys((*other.stages, *problem.stages)))
        graver = problem if problem.weight > other.weight else other
        found[key] = replace(graver, stages=stages)
    return tuple(sorted(found.values(), key=lambda problem: LEVELS.index(problem.level)))


def refused(found: Sequence[Problem]) -> tuple[Problem, ...]:
    """Those that keep `run` from starting."""
    return tuple(problem for problem in found if problem.level != "doubtful")
