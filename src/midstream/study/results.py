"""What a stage leaves in its `results.json`, one model a kind of stage (`docs/store.md`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from midstream.config import Caption
from midstream.core.tokens import TokenCount, counted

Number = float | int
# Examples, their text tokens, and the sum of the squares of those, by class of length.
Lengths = tuple[tuple[Number, Number, Number], ...]
# More different numbers of views are told by their ends.
MOST_TIMES = 4


class _Part(BaseModel):
    """Fields without a default are in the files of every version; a default is what its absence
    meant. Keys of a later version are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def unknown_keys(self) -> list[str]:
        """The keys that this version does not know, as `sources.news.colour`."""
        found = list(self.model_extra or ())
        for name, value in self:
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for key, part in parts:
                if isinstance(part, _Part):
                    where = f"{name}.{key}" if key else name
                    found += [f"{where}.{each}" for each in part.unknown_keys()]
        return found


class StageResult(_Part):
    """Of every stage: its own time, and the largest memory up to its end.

    `memory_of`: "processes" are resident sets, of all ranks together; "device" is what torch's
    allocator held of a GPU, on the rank where it was most.
    """

    seconds: float
    peak_memory_bytes: int = 0
    memory_of: Literal["processes", "device"] = "processes"
    tracking: dict[str, Any] = {}


class WeightsResult(StageResult):
    """Of a stage that leaves weights."""

    weights_digest: str


class WorldResult(StageResult):
    """Of PrepareWorld."""

    holds: tuple[str, ...] = ()


class TokenizerResult(StageResult):
    """Of PrepareTokenizer."""

    vocab_size: int
    tokenizer_sha256: str


class SourceResult(StageResult):
    """Of PrepareSource: counts of the training split; None where an older version did not count."""

    source: str = ""
    kind: str
    num_examples: int
    num_tokens: Number
    num_images: int
    num_targets: Number | None = None
    distinct_images: int | None = None
    lengths: dict[str, Lengths] | None = None
    # Longest example without and with a picture: its tokens, and in later versions where it stands.
    longest: dict[str, Any] = {}
    captions: dict[str, int] | None = None
    # The counts with other captions than the pictures' own.
    seen: dict[str, dict[str, Any]] = {}
    validation: dict[str, Any] = {}
    records: int = 0
    rejects: dict[str, int] = {}
    dropped_turns: dict[str, int] = {}
    unread: dict[str, Any] = {}
    fingerprint: str = ""

    def with_caption(self, caption: Caption) -> "SourceResult | None":
        """As counted with this caption of each picture; None where some pictures lack it."""
        if caption == "original":
            return self
        # Results from before captions were counted know of none but the own ones.
        if (self.captions or {}).get("synthetic", 0) < self.num_examples:
            return None
        return SourceResult.model_validate(self.model_dump() | self.seen[caption])


class EncoderResult(WeightsResult):
    """Of TrainEncoder; `retrieval` is the share of held-apart captions whose picture is found."""

    steps: int
    first_loss: float
    final_loss: float
    num_parameters: int
    retrieval: float
    retrieval_chance: float


class TowersResult(WeightsResult):
    """Of LoadEncoder and FuseEncoders; `unused` names the tensors that no features are made of."""

    num_parameters: int = 0
    unused: tuple[str, ...] = ()
    imported_from: tuple[str, ...] = ()


class ImportedResult(WeightsResult):
    """Of LoadDecoder and LoadModel; None where the import tells no position in a run."""

    tokens_seen_before: int | None = None
    last_rate: float | None = None
    imported_from: tuple[str, ...] = ()


class PictureViews(_Part):
    """How often a stage shows the pictures of a source, by their bytes: `distinct` of them,
    `views` in all; each of `times` is [views, how many pictures have so many]."""

    distinct: int
    views: int
    times: tuple[tuple[int, int], ...]

    @property
    def words(self) -> str:
        """For a reader."""
        if not self.distinct:
            return "no picture is seen"
        told = f"{self.distinct:,} pictures, {self.views / self.distinct:,.2f} views each"
        if len(self.times) > MOST_TIMES:
            return f"{told}: {self.times[0][0]:,} to {self.times[-1][0]:,}"
        each = (f"{number:,} seen {counted(times, 'time')}" for times, number in self.times)
        return f"{told}: {', '.join(each)}"


class UnreducedShare(_Part):
    """What a stage took of one source in tokens before the connector's reduction."""

    planned_tokens: int
    realised_tokens: int
    largest_example_tokens: int


class SourceShare(_Part):
    """What a training stage took of one source; planned is None where the budget says otherwise.

    `unreduced` where it says so in tokens before the connector's reduction.
    """

    kind: str = ""
    planned_tokens: int | None
    planned_sequences: int | None = None
    unreduced: UnreducedShare | None = None
    realised_tokens: int
    examples: int | None = None
    epochs: float | None = None
    largest_example_tokens: int
    cut: dict[str, int] = {}
    seen: TokenCount | None = None
    # None of a source without pictures, of one too large to count (`data/lengths.py`), and as it
    # was before they were counted.
    pictures: PictureViews | None = None


class HeldOutResult(_Part):
    """Of a source's held-out examples: mean loss of their targets in nats, the same with other
    examples' pictures in place of their own (None without pictures), bits per byte of text."""

    loss: float | None
    bits_per_byte: float | None
    loss_other_picture: float | None
    num_targets: int
    num_examples: int


class TrainingResult(StageResult):
    """Of Pretrain, Continue and Finetune; `held_out` of the sources that hold something out."""

    weights_digest: str = ""
    tokens_seen: int
    steps: int = 0
    first_rate: float | None = None
    last_rate: float | None = None
    final_loss: float | None = None
    tokens: TokenCount = TokenCount()
    sources: dict[str, SourceShare] = {}
    pad_fraction: float = 0.0
    image_row_pad_fraction: float | None = None
    meters: dict[str, Any] = {}
    held_out: dict[str, HeldOutResult] = {}


class ContinuousOutcomes(_Part):
    """Means over a task's examples (docs/evaluation.md), and their standard errors by name; None
    where there is none, as in results of before they were measured."""

    bits_per_byte: float | None = None
    bits_per_character: float | None = None
    bits_per_token: float | None = None
    bits_gained: float | None = None
    correct_prob: float | None = None
    margin: float | None = None
    iou: float | None = None
    prob: float | None = None
    prob_chance: float | None = None
    stderr: dict[str, float | None] = {}


# Also the columns of predictions.
OUTCOMES: tuple[str, ...] = tuple(name for name in ContinuousOutcomes.model_fields)[:-1]


class TaskResult(_Part):
    """A benchmark's row; scores from 0 to 1, but of a text task without a chance level."""

    kind: Literal["vision", "text"]
    metric: str
    score: float | None
    chance: float | None
    num_examples: int
    blind: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    # Why the task is not whole; None where it is.
    shortened: str | None = None
    unparsable: int | None = None
    splits: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    continuous: ContinuousOutcomes = ContinuousOutcomes()
    key: str = ""
    format: str | None = None
    wording: str | None = None
    answered: str | None = None
    note: str | None = None


class StableScores(_Part):
    """Mean over the tasks of a kind of score minus chance, and of the probability of a right answer
    minus its chance (`prob`); None without such tasks."""

    vision: float | None = None
    vision_blind: float | None = None
    text: float | None = None
    vision_prob: float | None = None
    text_prob: float | None = None


class SuiteScore(_Part):
    """A published average; the score is None unless all of its tasks are there and whole."""

    score: float | None
    missing: tuple[str, ...] = ()
    shortened: tuple[str, ...] = ()


class EvaluationResult(StageResult):
    """Of Evaluate."""

    weights_digest: str = ""
    tasks: dict[str, TaskResult]
    stable: StableScores
    suites: dict[str, SuiteScore] = {}


RESULTS: Mapping[str, type[StageResult]] = {
    "prepare_world": WorldResult,
    "prepare_tokenizer": TokenizerResult,
    "prepare_source": SourceResult,
    "train_encoder": EncoderResult,
    "load_encoder": TowersResult,
    "fuse_encoders": TowersResult,
    "load_decoder": ImportedResult,
    "load_model": ImportedResult,
    "pretrain": TrainingResult,
    "continue": TrainingResult,
    "finetune": TrainingResult,
    "evaluate": EvaluationResult,
}

R = TypeVar("R", bound=StageResult)


def checked(kind: type[R], found: Mapping[str, Any], path: Path) -> R:
    """The results read from `path`; ValueError names the file and what is wrong in it."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"{path} holds no {kind.__name__} ({wrong}); delete its folder to run the stage again"
        ) from None
