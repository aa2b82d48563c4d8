"""Visual benchmarks: reader, prompt, scorer, chance level; and what answers them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from midstream.eval import readers, scoring
from midstream.eval.readers import VisualExample

__all__ = ["VISUAL_FORMATS", "Answerer", "VisualExample", "VisualFormat"]


@runtime_checkable
class Answerer(Protocol):
    """A model as the evaluation sees it. `prompts` are the user's message alone: the turn's
    "In: ... Out:" and the separators are added inside."""

    @property
    def weights_digest(self) -> str:
        """Stands for the weights that answer."""
        ...

    def generate(self, prompts: Sequence[str], images: Sequence[Path | None]) -> list[str]:
        """Greedy answers, one a prompt; None is a prompt without a picture."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the continuation's log-probability, and whether greedy
        decoding would give it."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text."""
        ...


@dataclass(frozen=True)
class VisualFormat:
    """A benchmark's files, wording and metric; `{question}` stands in both prompts.

    `parses` says whether the scorer can read an answer at all; what it cannot read is wrong and
    counted. `chance` is what guessing scores on the official data (paper, Table 8); a world states
    its own.
    """

    name: str
    metric: str
    read: Callable[[Path], list[VisualExample]]
    official_prompt: str
    short_prompt: str
    score: Callable[[str, Any], float]
    chance: float
    parses: Callable[[str], bool] = lambda _prediction: True

    def prompt(self, question: str, wording: str) -> str:
        """The user's message for a question, in the "official" or the "short" wording."""
        template = {"official": self.official_prompt, "short": self.short_prompt}[wording]
        return template.replace("{question}", question)


_BRIEFLY = "{question}\nAnswer the question using a single word or phrase."
_BOX = (
    'Please provide the bounding box coordinate of the region this sentence describes: "{question}"'
)


def _is_box(prediction: str) -> bool:
    return scoring.parse_box(prediction) is not None


def _questions(
    name: str,
    metric: str,
    read: Callable[[Path], list[VisualExample]],
    score: Callable[[str, Any], float],
    chance: float,
) -> VisualFormat:
    return VisualFormat(name, metric, read, _BRIEFLY, "{question}", score, chance)


def _boxes(
    name: str, read: Callable[[Path], list[VisualExample]], threshold: float
) -> VisualFormat:
    return VisualFormat(
        name=name,
        metric=f"accuracy at IoU {threshold}",
        read=read,
        official_prompt=_BOX,
        short_prompt="Where is {question}?",
        score=partial(scoring.box_accuracy, threshold=threshold),
        chance=0.0,
        parses=_is_box,
    )


_TABLE = (
    _questions("vqav2", "VQA accuracy", readers.read_vqav2, scoring.vqa_accuracy, 0.25),
    _questions("gqa", "exact match", readers.read_gqa, scoring.gqa_exact_match, 0.25),
    _questions("textvqa", "VQA accuracy", readers.read_textvqa, scoring.textvqa_accuracy, 0.0),
    _questions("pope", "accuracy", readers.read_pope, scoring.pope_accuracy, 0.5),
    _boxes("refcoco", readers.read_refcoco, 0.5),
    _boxes("ocid_ref", readers.read_ocid_ref, 0.25),
)
VISUAL_FORMATS: dict[str, VisualFormat] = {row.name: row for row in _TABLE}
