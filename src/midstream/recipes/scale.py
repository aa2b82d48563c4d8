"""What one size of the study is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from midstream.config import (
    AdamW,
    DecoderConfig,
    Evaluation,
    PatchProjection,
    Rows,
    WarmupCosine,
)
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


@dataclass(frozen=True)
class Scale:
    """One size of the whole study.

    `text` is the text run, or the imported checkpoints along one by their completion. `captions`
    maps the paper's names of caption sets to sources, `encoders` its names of encoders.
    `image_text_seed` fixes the image-text stage where repetitions differ in fine-tuning alone, as
    the paper's do; None: the whole line has the repetition's seed.
    """

    name: str
    decoder: DecoderConfig
    data: Prepare
    text: Pretrain | Mapping[float, LoadDecoder]
    encoders: Mapping[str, Encoder]
    captions: Mapping[str, str]
    text_source: str
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
    sampling: str = "permutation"
    max_epochs: int = 1
    others: Mapping[str, "Scale"] = field(default_factory=dict)

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
                f"scale {self.name} has checkpoints at {known}, none at {completion:.0%}; give "
                "text='trained' for a text run of your own"
            )
        return {"stage": self.text[completion], "completion": 1.0}
