"""Counts: of tokens by kind, exactly divided, and in words."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any


@dataclass(frozen=True)
class TokenCount:
    """Positions by what they hold, and how many of them are targets.

    text, caption, instruct, interleaved: text positions by the kind of their source, separators
    included.
    image: patch positions. pad: positions that hold nothing. target: positions with a loss; these
    are among the others and not counted again in `total`.
    """

    text: int = 0
    caption: int = 0
    instruct: int = 0
    image: int = 0
    pad: int = 0
    target: int = 0
    interleaved: int = 0

    @property
    def seen(self) -> int:
        """Positions that are not padding; the unit of budgets and schedules."""
        return self.text + self.caption + self.instruct + self.interleaved + self.image

    @property
    def total(self) -> int:
        """All positions."""
        return self.seen + self.pad

    def __add__(self, other: "TokenCount") -> "TokenCount":
        return TokenCount(**{name: own + getattr(other, name) for name, own in vars(self).items()})


def shown_name(num_pictures: int) -> str:
    """What examples with so many pictures are counted under in a source's index."""
    return {0: "plain", 1: "image"}.get(num_pictures, f"{num_pictures} images")


def num_shown(name: str) -> int:
    """The pictures of each example that is counted under a `shown_name`."""
    known = {shown_name(number): number for number in range(2)}
    return known[name] if name in known else int(name.partition(" ")[0])


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide `total` by `shares` into whole numbers that add up to it, by largest remainder.

    Exact for any float shares; a tie goes to the name that comes first in the alphabet.
    Raises ValueError for a negative share or shares that do not add up to 1 (within 1e-9).
    """
    if any(share < 0 for share in shares.values()):
        raise ValueError(f"shares cannot be negative: {dict(shares)}")
    whole = sum((Fraction(share) for share in shares.values()), Fraction(0))
    if abs(whole - 1) > Fraction(1, 10**9):
        raise ValueError(f"shares add up to {float(whole)}, not to 1: {dict(shares)}")
    exact = {name: total * Fraction(share) / whole for name, share in shares.items()}
    parts = {name: int(value) for name, value in exact.items()}
    remainder = {name: exact[name] - parts[name] for name in exact}
    by_remainder = sorted(exact, key=lambda name: (-remainder[name], name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


UNKNOWN = "unknown"


def counted(number: int, one: str, several: str | None = None) -> str:
    """A count in words: "1 seed", "1,024 seeds"; `several` where an s is not enough."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def name_some(names: Iterable[str], most: int, between: str = ", ") -> str:
    """The first `most` names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return between.join(listed[:most]) + more


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The hint at the known name that a person may have meant, if there is one."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}? " if near else ""


def quantity(value: float | int | None) -> str:
    """A number in three digits with a unit, such as 1.25 G; None is unknown."""
    if value is None:
        return UNKNOWN
    for place, unit in enumerate("ZEPTGMk"):
        # 999.7 is 1 k, as it is written in three digits.
        if value >= 0.9995 * (size := 1000.0 ** (7 - place)):
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def span(values: Sequence[float | int], told: Callable[[Any], str] = quantity) -> str:
    """The least and the largest of some numbers: "1.2 M to 3 M", "5" of equal ones, or "none"."""
    ends = [told(end) for end in (min(values), max(values))] if values else ["none"]
    return " to ".join(dict.fromkeys(ends))


def rounded(value: float | int, least: float = 0.0) -> str:
    """A number in two digits, or whole: 0.036, 99, 8,096; "<0.01" where it is below `least`."""
    if 0 < value < least:
        return f"<{least:g}"
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def duration(seconds: float | int) -> str:
    """Seconds as a person says them, two units at most: 42 s, 3 min, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
