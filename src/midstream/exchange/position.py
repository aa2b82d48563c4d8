"""Where a checkpoint stands in its run, out of what the user, the files and the table say."""

import math

from midstream.study.imported import Position

NUMBERS = ("tokens_seen", "total_tokens", "rate", "peak_rate", "end_rate")


def settle(given: Position, checkpoint: Position, known: Position) -> tuple[Position, list[str]]:
    """One position out of what the user gave, the checkpoint's files and the table say, in this
    order; and a sentence for each number that a source lower down has otherwise.

    Raises ValueError where the numbers contradict each other.
    """
    sources = {"given": given, "checkpoint": checkpoint, "known family": known}
    numbers: dict[str, int | float] = {}
    origins: dict[str, str] = {}
    conflicts = []
    for name in NUMBERS:
        for source, position in sources.items():
            value = getattr(position, name)
            if value is None:
                continue
            if name not in numbers:
                numbers[name], origins[name] = value, source
            elif not math.isclose(value, numbers[name], rel_tol=1e-3):
                conflicts.append(
                    f"{name} is {numbers[name]:,} ({origins[name]}); {source} says {value:,}"
                )
    _check(numbers)
    return Position.model_validate(numbers | {"origins": origins}), conflicts


def _check(numbers: dict[str, int | float]) -> None:
    for low, high in (("tokens_seen", "total_tokens"), ("rate", "peak_rate")):
        if low in numbers and high in numbers and numbers[low] > numbers[high]:
            raise ValueError(
                f"{low} {numbers[low]:,} is above {high} {numbers[high]:,}; give them with "
                f"--{low.replace('_', '-')} and --{high.replace('_', '-')}"
            )
