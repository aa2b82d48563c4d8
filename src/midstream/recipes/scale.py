"""What one size of the study is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from midstream.config import (
    AdamW,
    AnyDecoderConfig,
    Caption,
    Evaluation,
    PatchProjection,
    Rows,
    WarmupCosine,
)
from midstream.recipes.line import END_RATE
from midstream.study.stage import (
    ContinueFrom,
    EncoderStage,
    FromScratch,
    LoadDecoder,
    Prepare,
    Pretrain,
)

Encoder = EncoderStage | PatchProjection
COMPLETIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
DATACOMP_DR = "DataComp-DR"
# Text sources and their shares of the text, which add up to 1.
TextMixture = tuple[tuple[str, float], ...]


class CaptionSet(NamedTuple):
    """A source of captions, and which of a picture's captions is seen."""

    source: str
    caption: Caption = "original"


@dataclass(frozen=True)
class Scale:
    """One size of the whole study.

    `text` is the text run, or the imported checkpoints along one by their completion; `text_rates`
    are (tokens, rate) along the run that those are from, for figures. `captions` maps the paper's
    names of caption sets to sources and the caption seen, `encoders` its names of encoders.
    `text_sources` is the text of the image-text stage. `by` is what shares of the image-text stage
    are of. `image_text_seed` fixes that stage where repetitions differ in fine-tuning alone, as the
    paper's do; None: the whole line has the repetition's seed. `notes` are for a study's reader.
    """

    name: str
    decoder: AnyDecoderConfig
    data: Prepare
    text: Pretrain | Mapping[float, LoadDecoder]
    encoders: Mapping[str, Encoder]
    captions: Mapping[str, CaptionSet]
    text_sources: TextMixture
    instruct_source: str
    image_text_tokens: int
    rewarm: WarmupCosine
    rows: Rows
    finetune_rows: Rows
    optimizer: AdamW
    finetune_rate: float
    asked: Evaluation
    seeds: tuple[int, ...] = (7,)
    image_text_seed: int | None = None
    by: Literal["tokens", "sequences"] = "tokens"
    sampling: Literal["permutation", "replacement"] = "permutation"
    max_epochs: int = 1
    end_rate: float = END_RATE
    text_rates: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()
    others: Mapping[str, "Scale"] = field(default_factory=dict)

    @property
    def completions(self) -> tuple[float, ...]:
        """The shares of the text run that there are weights at, above 0."""
        return COMPLETIONS if isinstance(self.text, Pretrain) else tuple(self.text)

    def start(self, completion: float) -> FromScratch | ContinueFrom:
        """The initialiser at 0, else the text run at that share of its tokens."""
        if not completion:
            return FromScratch()
        return ContinueFrom(**self.text_at(completion))

    def text_at(self, completion: float) -> dict[str, Pretrain | LoadDecoder | float]:
        """The stage whose weights stand at `completion`, and where in it, for `ContinueFrom`."""
        if isinstance(self.text, Pretrain):
            return {"stage": self.text, "completion": completion}
        if completion not in self.text:
            known = ", ".join(f"{share:.0%}" for share in self.text)
            raise ValueError(
                f"scale {self.name} has checkpoints at {known}, none at {completion:.0%}; import "
                "one there, or run the text of a size of the paper here (text='trained')"
            )
        return {"stage": self.text[completion], "completion": 1.0}
