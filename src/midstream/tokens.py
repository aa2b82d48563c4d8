"""Counting tokens by kind, and dividing a budget exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class TokenCount:
    """Positions by what they hold, and how many of them are targets.

    text, caption, instruct: text positions by the kind of their source, separators included.
    image: patch positions. pad: positions that hold nothing. target: positions with a loss; these
    are among the others and not counted again in `total`.
    """

    text: int = 0
    caption: int = 0
    instruct: int = 0
    image: int = 0
    pad: int = 0
    target: int = 0

    @property
    def seen(self) -> int:
        """Positions that are not padding; the unit of budgets and schedules."""
        return self.text + self.caption + self.instruct + self.image

    @property
    def total(self) -> int:
        """All positions."""
        return self.seen + self.pad

    def __add__(self, other: "TokenCount") -> "TokenCount":
        return TokenCount(
            text=self.text + other.text,
            caption=self.caption + other.caption,
            instruct=self.instruct + other.instruct,
            image=self.image + other.image,
            pad=self.pad + other.pad,
            target=self.target + other.target,
        )


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
