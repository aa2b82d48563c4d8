"""One sentence about the data, and the words that its numbers are put in."""

from dataclasses import dataclass
from typing import Literal

from midstream.report.pairs import Gap
from midstream.report.spread import Difference
from midstream.report.words import points, signed

Verdict = Literal["agrees", "disagrees", "undecided", "no interval", "not measured", "decided"]
VERDICTS: dict[Verdict, str] = {
    "agrees": "our data agree",
    "disagrees": "our data disagree",
    "decided": "the data decide",
    "undecided": "the data do not decide",
    "no interval": "no interval: one seed",
    "not measured": "not measured",
}


# Two repetitions can agree to the last digit by chance, and their interval is then a point.
LEAST_REPETITIONS = 3


def decides(gap: Difference) -> bool | None:
    """Whether a difference is told from zero: its interval leaves zero out, and rests on three
    repetitions at least. None where there is no interval."""
    if gap.exceeds_spread is None:
        return None
    return gap.exceeds_spread and min(gap.n) >= LEAST_REPETITIONS


@dataclass(frozen=True)
class Finding:
    """One sentence about the data, under the claim (and its source) that it answers, if any."""

    claim: str | None
    source: str
    verdict: Verdict
    sentence: str
    difference: Difference | None = None
    examples: Gap | None = None

    @property
    def verdict_words(self) -> str:
        """The verdict as it stands on a page."""
        return VERDICTS[self.verdict]


def higher(gap: Difference) -> str:
    """A difference as so many points higher or lower."""
    return f"{points(abs(gap.mean))} points {'lower' if gap.mean < 0 else 'higher'}"


def interval_words(gap: Difference) -> str:
    """The interval of a difference, or why there is none."""
    first, second = gap.n
    n = f"{first}" if first == second else f"{first} and {second}"
    paired = "paired" if gap.paired else "not paired"
    repetitions = f"{n} repetition{'s' if n != '1' else ''}"
    if gap.low is None or gap.high is None:
        return f"no interval: {repetitions}"
    return f"95 % interval {signed(gap.low)} to {signed(gap.high)}, {paired}, {repetitions}"
