"""Visual benchmarks: reader, wording, scorer, chance level; and what answers them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Protocol, runtime_checkable

from midstream.eval import scoring
from midstream.eval.aggregate import BENCHMARKS, VISUAL_CHANCE
from midstream.eval.readers.examples import VisualExample
from midstream.eval.scoring import Numbers

__all__ = ["VISUAL_FORMATS", "Answerer", "VisualExample", "VisualFormat"]

Score = Callable[[str, Any], float]


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

    def choose(
        self,
        prompts: Sequence[str],
        images: Sequence[Path | None],
        choices: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """For each prompt the log-probability of each of its answers as the reply: of their first
        tokens where these differ from one another, else of the whole answers."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the continuation's log-probability, and whether greedy
        decoding would give it."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text."""
        ...

    def generate_until(
        self, contexts: Sequence[str], stops: Sequence[Sequence[str]], max_new_tokens: Sequence[int]
    ) -> list[str]:
        """Greedy continuations of plain texts, each up to the first of its stops."""
        ...


@dataclass(frozen=True)
class VisualFormat:
    """A benchmark's files, wording and metric, a row of benchmarks.toml; `{question}` stands in
    both prompts.

    `parses` says whether the scorer can read an answer at all; what it cannot read is wrong and
    counted. `fixed`: "answers", where a choice is made among the examples' `choices` (an example
    without any is answered freely), "letters" where among the letters of these, None where answers
    are free. `variants` are other people's scorers of the same answers, by whose they are.
    `summarise` adds numbers over all examples; `note` says what is odd about a score, if anything.
    """

    name: str
    metric: str
    read: Callable[..., list[VisualExample]]
    official_prompt: str
    score: Score
    files: tuple[str, ...]
    published: str
    licence: str
    short_prompt: str = "{question}"
    fixed: Literal["answers", "letters"] | None = None
    variants: Mapping[str, Score] = field(default_factory=dict)
    summarise: Callable[[Sequence[str], Sequence[VisualExample]], Numbers] | None = None
    note: Callable[[Sequence[str], Sequence[VisualExample]], str | None] | None = None
    parses: Callable[[str], bool] = lambda _prediction: True

    @property
    def chance(self) -> float:
        """What guessing scores on the official data."""
        return VISUAL_CHANCE[self.name][0]

    def prompt(self, question: str, wording: str) -> str:
        """The user's message: `wording` is "official", "short", or a template of its own."""
        known = {"official": self.official_prompt, "short": self.short_prompt}
        return known.get(wording, wording).replace("{question}", question)

    def details(self, predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
        """Numbers beside the score: other people's scorers, the benchmark's own further ones, and
        the score by each kind of question ("answer_type=number")."""
        pairs = list(zip(predictions, examples, strict=True))
        found: Numbers = {
            name: scoring.mean([score(text, e.gold) for text, e in pairs])
            for name, score in self.variants.items()
        }
        if self.summarise is not None:
            found |= self.summarise(predictions, examples)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for text, example in pairs:
            for kind, value in example.kinds.items():
                by_kind[f"{kind}={value}"].append(self.score(text, example.gold))
        return found | {kind: scoring.mean(values) for kind, values in sorted(by_kind.items())}


def _format(name: str, row: Mapping[str, Any]) -> VisualFormat:
    """A row of benchmarks.toml, functions in place of their names."""
    scorers = {key: row[key] for key in ("score", "summarise", "note", "parses") if key in row}
    changed = {
        "read": resolve_name(f"midstream.eval.readers.{row['read']}"),
        "files": tuple(row["files"]),
        "official_prompt": BENCHMARKS["prompts"][row["official_prompt"]],
        "variants": {who: getattr(scoring, own) for who, own in row.get("variants", {}).items()},
    }
    changed |= {key: getattr(scoring, own) for key, own in scorers.items()}
    return VisualFormat(name=name, **{**row, **changed})


VISUAL_FORMATS: dict[str, VisualFormat] = {
    name: _format(name, row) for name, row in BENCHMARKS["visual"].items()
}
