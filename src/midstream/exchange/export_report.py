"""What an export wrote, and how far it is from the model it was made from."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

MARK = "midstream_export.json"


@dataclass(frozen=True)
class ExportReport:
    """`kind`: a language model, stock Llava classes, or a modelling file of our own.

    `reason` says why this kind. `largest_difference` is that of any logit from Midstream's own, on
    one fixed prompt; `notes` say what else differs.
    """

    kind: Literal["text", "llava", "own"]
    architecture: str
    own_code: bool
    reason: str
    num_parameters: int
    largest_difference: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For the folder's mark."""
        return asdict(self)
