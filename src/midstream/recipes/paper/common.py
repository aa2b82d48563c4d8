"""What the paper's experiments share: labels, notes, the curve of each number of epochs."""

from collections.abc import Sequence

from midstream.recipes.scales import Scale

SHARE_LABEL = "captions in the image-text stage (% of tokens)"


def curve_of(epochs: Sequence[int]) -> str | None:
    """The axis that tells curves apart: epochs where there are several."""
    return "epochs" if len(epochs) > 1 else None


def notes_of(at: Scale) -> tuple[str, ...]:
    """What a reader must know of the scale."""
    if at.name != "pocket":
        return ()
    return (
        "Pocket scale: a generated world and models of some 200,000 parameters. It shows how the "
        "study works and which way its curves run there; it says nothing about the paper's models.",
    )
