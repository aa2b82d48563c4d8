"""What the paper's experiments share: labels, the curve of each number of epochs, claims."""

from collections.abc import Sequence

from midstream.recipes.scales import Scale
from midstream.study.studies import Claim, Line

SHARE_LABEL = "captions in the image-text stage (% of tokens)"
SEQUENCES_LABEL = "captions in the image-text stage (% of sequences)"


def share_label(at: Scale) -> str:
    """What an axis of shares counts."""
    return SEQUENCES_LABEL if at.by == "sequences" else SHARE_LABEL


def curve_of(epochs: Sequence[int]) -> str | None:
    """The axis that tells curves apart: epochs where there are several."""
    return "epochs" if len(epochs) > 1 else None


def decidable(claims: Sequence[Claim], lines: Sequence[Line]) -> tuple[Claim, ...]:
    """The claims that have lines on both sides."""
    return tuple(
        claim
        for claim in claims
        if all(
            any(place.items() <= line.axes.items() for line in lines)
            for place in (claim.higher, claim.lower)
        )
    )
