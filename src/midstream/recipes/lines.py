"""What the studies share: lines, scales, sources, public models; K, I, U as in `paper_scale.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from midstream.config import (
    AdamW,
    AnyDecoderConfig,
    Budget,
    Caption,
    ContinuedCosine,
    Evaluation,
    ExpectedSource,
    Mixture,
    PatchProjection,
    PublicFolder,
    Rows,
    ShareUnit,
    TokenizerFile,
    Training,
    WarmupCosine,
)
from midstream.core.identity import WorldFingerprint, world_fingerprint
from midstream.study.imported import as_imported
from midstream.study.stages import (
    PLANNED,
    Continue,
    ContinueFrom,
    EncoderStage,
    Evaluate,
    Finetune,
    FromScratch,
    FuseEncoders,
    Imported,
    LoadDecoder,
    Prepare,
    Pretrain,
    TrainEncoder,
)
from midstream.study.studies import Figure, Line, Study

# Every schedule but the fine-tuning's ends here (run records of the paper).
END_RATE = 3e-5
# The text run has no rate to continue there, so that it is warmed up again (paper, section 3.1).
REWARMED = (0.0, 1.0)


def image_text_schedule(completion: float, rewarm_rate: float) -> WarmupCosine | ContinuedCosine:
    """Re-warmed where the text schedule has no rate to continue: at 0 % and 100 % (paper, 3.1)."""
    if completion in REWARMED:
        return WarmupCosine(peak_rate=rewarm_rate, end_rate=END_RATE, warmup_fraction=0.05)
    return ContinuedCosine(end_rate=END_RATE)


def finetuning(
    budget: Budget, rows: Rows, *, rate: float, seed: int, encoder_rate_factor: float | None
) -> Training:
    """Fine-tuning on conversations, as Prismatic's: its own schedule, matrices decay alone."""
    return Training(
        budget=budget,
        rows=rows,
        optimizer=AdamW(weight_decay=0.1, decay="matrices", z_loss=0.0),
        schedule=WarmupCosine(peak_rate=rate, end_rate=0.0, warmup_fraction=0.05),
        encoder_rate_factor=encoder_rate_factor,
        seed=seed,
    )


def finetuned_line(
    continued: Continue,
    budget: Budget,
    rate: float,
    asked: Evaluation,
    completion: float,
    rows: Rows | None = None,
) -> Line:
    """Fine-tune and evaluate an image-text model, in its own rows or these, with its own seed.

    An encoder that the image-text stage trains is trained here too.
    """
    before = continued.training
    factor, seed = before.encoder_rate_factor, before.seed
    training = finetuning(
        budget, rows or before.rows, rate=rate, seed=seed, encoder_rate_factor=factor
    )
    tuned = Finetune(start=continued, training=training)
    return Line(
        name=f"text {completion:.0%}, seed {seed}",
        axes={"text_completion": completion * 100, "seed": seed},
        result=Evaluate(of=tuned, evaluation=asked),
    )


def text_only(asked: Evaluation) -> Evaluation:
    """The same evaluation without its visual tasks."""
    return Evaluation(text_tasks=asked.text_tasks, limit=asked.limit)


def arrival_of(
    text: Pretrain,
    encoder: TrainEncoder,
    completions: Sequence[float],
    seeds: Sequence[int],
    *,
    pictures: Mixture,
    talks: Budget,
    rows: Rows,
    rewarm_rate: float,
    finetune_rate: float,
    asked: Evaluation,
    finetune_rows: Rows | None = None,
) -> dict[str, Any]:
    """The fields of a study of when images arrive.

    Each start, once a seed, is continued on `pictures`, fine-tuned on `talks` (in rows of its own
    where they are given) and evaluated.
    """
    lines = tuple(
        finetuned_line(
            Continue(
                data=text.data,
                encoder=encoder,
                decoder=text.decoder,
                start=ContinueFrom(stage=text, completion=completion)
                if completion
                else FromScratch(),
                training=Training(
                    budget=pictures,
                    rows=rows,
                    schedule=image_text_schedule(completion, rewarm_rate),
                    seed=seed,
                ),
            ),
            talks,
            finetune_rate,
            asked,
            completion,
            finetune_rows,
        )
        for completion, seed in product(completions, seeds)
    )
    return {
        "question": "After what share of text training should a language model first see images?",
        "lines": lines,
        "figure": Figure(
            x="text_completion",
            x_label="text training done before the first image (%)",
            hollow=(0.0, 100.0),
        ),
        "baselines": {"text only, 100%": Evaluate(of=text, evaluation=text_only(asked))},
    }


Encoder = EncoderStage | PatchProjection
COMPLETIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
DATACOMP_DR = "DataComp-DR"
# Text sources and their shares of the text, which add up to 1.
TextMixture = tuple[tuple[str, float], ...]


class CaptionSet(NamedTuple):
    """A source of captions, and which of a picture's captions is seen."""

    source: str
    caption: Caption = "original"


S = TypeVar("S", Pretrain, TrainEncoder)
# What repetitions draw anew beside fine-tuning, outermost first.
Level = Literal["encoder", "text", "image-text"]
LEVELS: tuple[Level, ...] = get_args(Level)


def reseeded(stage: S, seed: int) -> S:
    """A training stage whose order and first weights are drawn with another seed."""
    training = stage.training.model_copy(update={"seed": seed})
    return stage.model_copy(update={"training": training})


@dataclass(frozen=True)
class Scale:
    """One size of the whole study.

    `text` is the text run, or the imported checkpoints along one by their completion; `text_rates`
    are (tokens, rate) along the run that those are from, for figures. `interleaved` is the source
    of documents with pictures among their text ("": none), `talks` are further conversations of
    fine-tuning, `most_pictures` what a conversation shows at most. `captions` maps the paper's
    names of caption sets to sources and the caption seen, `encoders` its names of encoders.
    `text_sources` is the text of the image-text stage. `by` is what shares of the image-text stage
    are of. `image_text_seed` fixes that stage where repetitions differ in fine-tuning alone, as the
    paper's do; None: the whole line has the repetition's seed. `draws`: what repetitions draw anew
    beside that. `notes` are for a study's reader.
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
    draws: tuple[Level, ...] = ()
    by: ShareUnit = "tokens"
    sampling: Literal["permutation", "replacement"] = "permutation"
    max_epochs: int = 1
    end_rate: float = END_RATE
    text_rates: tuple[tuple[int, float], ...] = ()
    interleaved: str = ""
    talks: tuple[str, ...] = ()
    most_pictures: int = 1
    notes: tuple[str, ...] = ()
    others: Mapping[str, "Scale"] = field(default_factory=dict)

    @property
    def completions(self) -> tuple[float, ...]:
        """The shares of the text run that there are weights at, above 0."""
        return COMPLETIONS if isinstance(self.text, Pretrain) else tuple(self.text)

    def drawn(self, seed: int, levels: Sequence[Level] | None = None) -> "Scale":
        """With what its repetitions (or these levels) draw anew drawn with this seed.

        Raises ValueError for a text run or an encoder that is not trained here.
        """
        made = self
        for level in self.draws if levels is None else levels:
            if level == "image-text":
                made = replace(made, image_text_seed=seed)
            elif level == "text":
                if not isinstance(made.text, Pretrain):
                    raise ValueError(
                        f"the text run of {self.name} is given and cannot be drawn anew; leave "
                        "text out of draws, or give text='trained'"
                    )
                made = replace(made, text=reseeded(made.text, seed))
            else:
                towers = {name: self._encoder(one, seed) for name, one in made.encoders.items()}
                made = replace(made, encoders=towers)
        return made

    def _encoder(self, encoder: Encoder, seed: int) -> Encoder:
        if isinstance(encoder, FuseEncoders):
            towers = tuple(self._encoder(tower, seed) for tower in encoder.towers)
            return encoder.model_copy(update={"towers": towers})
        if isinstance(encoder, TrainEncoder):
            return reseeded(encoder, seed)
        if isinstance(encoder, PatchProjection):
            return encoder  # the image-text stage's own
        raise ValueError(
            f"an encoder of {self.name} is imported and cannot be drawn anew; leave encoder out of "
            "draws"
        )

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

    def study(
        self,
        name: str,
        question: str,
        lines: Sequence[Line],
        notes: tuple[str, ...] = (),
        **further: Any,
    ) -> Study:
        """A study of the paper's at this scale, with its notes and rates; `further` of `Study`."""
        return Study(
            name=f"paper.{name}.{self.name}",
            question=question,
            lines=tuple(lines),
            notes=(*notes, *self.notes),
            text_rates=self.text_rates,
            **further,
        )


# One source's name, or shares by source.
TextGiven = str | Mapping[str, float | int] | None
# K: DCLM-baseline, StarCoder and ProofPile in the text run, MathPile in the image-text stage
# (paper, 2.1.1 and 2.1.2; its appendix A names DCLM alone). I: 3.8T and 0.3T tokens put one behind
# the other (run records), so that DCLM is 92 %. U: how the rest is divided; about as the public
# sizes of StarCoder (250B tokens) and ProofPile-2 (55B) are.
_DCLM, _CODE, _MATHS = 0.92, 0.065, 0.015
TEXT_RUN: TextMixture = (("dclm", _DCLM), ("starcoder", _CODE), ("proofpile", _MATHS))
IMAGE_TEXT: TextMixture = (("dclm", _DCLM), ("starcoder", _CODE), ("mathpile", _MATHS))
# K: tokens of the text run's data as the records tokenised it.
_TEXT_TOKENS = 4_172_903_282_931


def caption_sets(datacomp_dr: Caption, inputs: Path | None) -> dict[str, CaptionSet]:
    """The caption sets of Table 4 by their names there, the private one where it is at hand alone.

    DataComp-DR has five synthetic captions a picture and no text of its own (K); which of them the
    paper saw is U. The others have the texts that their pictures came with (I).
    """
    found = {
        "DataComp": CaptionSet("datacomp"),
        DATACOMP_DR: CaptionSet("datacompdr", datacomp_dr),
        "CC12M": CaptionSet("cc12m"),
    }
    if inputs is not None and (inputs / "data" / "captions" / "shutterstock").is_dir():
        found["Shutterstock"] = CaptionSet("shutterstock")
    return found


def text_mixture_of(given: TextGiven) -> TextMixture | None:
    """A user's text mixture; None where there is none.

    Raises ValueError for shares that are not positive or do not add up to 1.
    """
    if not given:
        return None
    shares = {given: 1.0} if isinstance(given, str) else dict(given)
    if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(
            f"text_mixture's shares are above 0 and add up to 1, these are {shares} and add up to "
            f"{sum(shares.values()):g}"
        )
    return tuple((source, float(share)) for source, share in shares.items())


_EXPECTED_FIELDS = ("name", "kind", "num_examples", "num_images", "num_tokens", "num_targets")


def expected_sources(*rows: tuple[str | int, ...]) -> tuple[ExpectedSource, ...]:
    """A table: name, kind, examples, pictures, text tokens and targets of each source."""
    named = (dict(zip(_EXPECTED_FIELDS, row, strict=True)) for row in rows)
    return tuple(map(ExpectedSource.model_validate, named))


def _captioned(name: str, pictures: int) -> tuple[str | int, ...]:
    return (name, "caption", pictures, pictures, 30 * pictures, 29 * pictures)


_DCLM_TOKENS = round(_DCLM * _TEXT_TOKENS)
_CODE_TOKENS, _MATHS_TOKENS = round(_CODE * _TEXT_TOKENS), round(_MATHS * _TEXT_TOKENS)
_TALKS = 624_610
# K: numbers of pictures (DataComp-1B and its DR, CC12M as on the hub, LLaVA's without text-only
# conversations) and of all text tokens. I: tokens by text source, from the shares. U: documents of
# a text source, MathPile's 9.5B tokens, caption length (30 tokens with its separators), text of a
# conversation (the 295 positions that 729 patches leave of 1,024, 120 of them answers).
# Shutterstock is private: as many as CC12M.
# OBELICS: documents, pictures and text tokens K (arXiv 2306.16527, abstract), with a separator
# behind each picture and an end of each document.
_PAGES, _PAGE_PICTURES, _PAGE_TOKENS = 141_000_000, 353_000_000, 115_000_000_000
EXPECTED = expected_sources(
    ("dclm", "text", 2_950_000_000, 0, _DCLM_TOKENS, _DCLM_TOKENS),
    ("starcoder", "text", 207_000_000, 0, _CODE_TOKENS, _CODE_TOKENS),
    ("proofpile", "text", 22_000_000, 0, _MATHS_TOKENS, _MATHS_TOKENS),
    ("mathpile", "text", 900_000, 0, 9_500_000_000, 9_500_000_000),
    _captioned("datacompdr", 1_280_000_000),
    _captioned("datacomp", 1_280_000_000),
    _captioned("cc12m", 10_970_000),
    _captioned("shutterstock", 10_970_000),
    ("llava", "instruct", _TALKS, _TALKS, 295 * _TALKS, 120 * _TALKS),
    (
        *("obelics", "interleaved", _PAGES, _PAGE_PICTURES),
        *(_PAGE_TOKENS + _PAGE_PICTURES + _PAGES, _PAGE_TOKENS + _PAGES),
    ),
)


def world(inputs: Path | None, tokenizer: Path | None) -> Prepare:
    """The world of `inputs`, in the tokens of its own tokenizer.json or of another file.

    Raises FileNotFoundError where `inputs` is given and the tokenizer is not there.
    """
    root = Path("data") if inputs is None else inputs / "data"
    path = tokenizer or root / "tokenizer.json"
    fingerprint: WorldFingerprint | None = None
    tokenizer_file = TokenizerFile(path=path, sha256=PLANNED)
    if inputs is not None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; `inputs` is the folder of docs/studies.md, its world "
                "has the tokenizer's file beside its sources"
            )
        fingerprint, tokenizer_file = world_fingerprint(root), TokenizerFile.read(path)
    return Prepare(
        world=PublicFolder(root=root, fingerprint=fingerprint),
        tokenizer=tokenizer_file,
        expected=EXPECTED,
    )


def imported(inputs: Path | None, part: str, name: str, source: str) -> Imported:
    """A folder of `midstream import` under `inputs`; planned where it is not there.

    A study that does not use a checkpoint or an encoder can be run without its folder. `source` is
    what an import makes it of; empty: nothing public.
    """
    folder = Path(part) / name if inputs is None else inputs / part / name
    if inputs is None or not folder.is_dir():
        return Imported(folder=folder, content=f"{PLANNED} {part}/{name}", source=source)
    return as_imported(folder).model_copy(update={"source": source})
