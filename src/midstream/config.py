"""Every option there is, as frozen models that check themselves and start nothing."""

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from midstream.identity import Placement

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Config(BaseModel):
    """A frozen model; an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _suggest(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                near = get_close_matches(key, cls.model_fields, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else ""
                known = ", ".join(cls.model_fields)
                raise ValueError(f"{cls.__name__} has no field {key!r}; {hint} fields: {known}")
        return values


# ---------------------------------------------------------------------------------- the model


class DecoderConfig(Config):
    """An OpenLM decoder (open_lm/model.py; recipe of DCLM-1B: qk-norm, gain-only LayerNorm)."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    vocab_size: Positive = 50432
    qk_norm: bool = True
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    @model_validator(mode="after")
    def _divides(self) -> "DecoderConfig":
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_heads "
                f"{self.num_heads}, since rotary embeddings turn pairs of channels"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        """Width of SwiGLU: two thirds of 4x, rounded up to a multiple of 256."""
        return 256 * -(-int(8 * self.hidden_size / 3) // 256)

    @property
    def num_parameters(self) -> int:
        """All parameters, both embedding matrices included."""
        d, qk = self.hidden_size, 2 * self.hidden_size if self.qk_norm else 0
        layer = 4 * d * d + 3 * d * self.ffn_size + 2 * d + qk
        return self.num_layers * layer + d + 2 * self.vocab_size * d


Colour = tuple[float, float, float]


class ImageTransform(Config):
    """How a picture becomes pixels: fitted to a square, then (value - mean) / std by channel.

    letterbox: padded to a square with the mean's colour, then resized; square: resized, whatever
    its shape; crop: resized by its shorter side, the middle cut out.
    """

    size: Positive
    resize: Literal["letterbox", "square", "crop"] = "letterbox"
    mean: Colour = (0.5, 0.5, 0.5)
    std: Colour = (0.5, 0.5, 0.5)


class EncoderConfig(Config):
    """A SigLIP vision tower (`transformers.SiglipVisionModel`).

    `feature_layer` picks the hidden states that the projector sees: -1 is the last block's output,
    -2 the second to last as Prismatic takes it; the final norm is not applied. Features are rounded
    to `feature_dtype`, whether they are stored or computed anew (int8: one scale a patch).
    """

    image_size: Positive
    patch_size: Positive
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    intermediate_size: Positive
    feature_layer: int = -2
    resize: Literal["letterbox", "square", "crop"] = "letterbox"
    pixel_mean: Colour = (0.5, 0.5, 0.5)
    pixel_std: Colour = (0.5, 0.5, 0.5)
    feature_dtype: Literal["bfloat16", "int8"] = "bfloat16"

    @property
    def transform(self) -> ImageTransform:
        """How pictures become this encoder's pixels."""
        return ImageTransform(
            size=self.image_size, resize=self.resize, mean=self.pixel_mean, std=self.pixel_std
        )

    @model_validator(mode="after")
    def _fits(self) -> "EncoderConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_heads}")
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(
                f"feature_layer {self.feature_layer} must lie in -{self.num_layers}..-1"
            )
        return self

    @property
    def num_patches(self) -> int:
        """Patch features per image: the length of an image in a row."""
        return (self.image_size // self.patch_size) ** 2


class ProjectorConfig(Config):
    """Encoder width -> 4x -> decoder width with GELU (2 layers, the paper's wording), or with a
    third linear layer at decoder width (3 layers, Prismatic's fused projector)."""

    num_layers: Literal[2, 3] = 2


class VLMConfig(Config):
    """Decoder, and how it sees: without `encoder` it is a plain language model."""

    decoder: DecoderConfig
    encoder: EncoderConfig | None = None
    projector: ProjectorConfig = ProjectorConfig()


# ------------------------------------------------------------------------------------ the data


class PocketWorld(Config):
    """The generated world (`data/worlds/pocket.py`): how much of each thing, and its seed."""

    kind: Literal["pocket"] = "pocket"
    seed: int = 0
    num_documents: Positive = 14_000
    num_captions: Positive = 6_000
    num_conversations: Positive = 10_000
    num_questions: Positive = 200
    num_text_items: Positive = 200


class SmallReal(Config):
    """Small real data sets in their owners' layout (`data/worlds/small_real.py`).

    `fingerprint` stands for the bytes under `root`; a preparation refuses other bytes.
    """

    # What under `root` the world is made of, and what its fingerprint covers.
    FILES: ClassVar[tuple[str, ...]] = (
        "text_novels/*.txt",
        "text_wikitext2/valid.txt",
        "text_web_wiki/c4_demo.jsonl",
        "text_web_wiki/wiki_demo.txt",
        "caption_flickr8k/captions.txt",
        "caption_flickr8k/match_pairs.tsv",
        "caption_flickr8k/images/*.jpg",
        "caption_noto_emoji/captions.csv",
        "caption_noto_emoji/72/*.png",
        "vqa_easy/train/questions.json",
        "vqa_easy/train/images/*.png",
        "vqa_easy/test/questions.json",
        "vqa_easy/test/images/*.png",
        "vqa_daquar/data_train.csv",
        "vqa_daquar/images/*.jpg",
        "bench_text/llm_foundry/arc_easy.jsonl",
        "bench_text/llm_foundry/copa.jsonl",
        "bench_text/piqa/valid.jsonl",
        "bench_text/piqa/valid-labels.lst",
    )

    kind: Literal["small_real"] = "small_real"
    root: Annotated[Path, Placement]
    fingerprint: str
    seed: int = 0
    num_questions: Positive = 400


class PublicFolder(Config):
    """A user's own folder in the public formats (see `docs/data.md` for its layout).

    More bad records than `max_reject_fraction` of a source stop its preparation; fewer are left
    out, counted and listed. `caption` picks among a picture's captions (`midstream prepare`).
    """

    kind: Literal["folder"] = "folder"
    root: Annotated[Path, Placement]
    fingerprint: str
    max_reject_fraction: Fraction = 0.001
    validation_fraction: Fraction = 0.0
    caption: Literal["original", "synthetic", "random"] = "original"


World = Annotated[PocketWorld | SmallReal | PublicFolder, Field(discriminator="kind")]


class TrainedTokenizer(Config):
    """A byte-level BPE trained on the world's own text, captions and conversations."""

    kind: Literal["trained"] = "trained"
    vocab_size: Positive


class TokenizerFile(Config):
    """A `tokenizers` JSON file, known by its sha256."""

    kind: Literal["file"] = "file"
    path: Annotated[Path, Placement]
    sha256: str


Tokenizer = Annotated[TrainedTokenizer | TokenizerFile, Field(discriminator="kind")]


class Share(Config):
    """A named source and its share of a token budget (all its tokens that are not padding)."""

    source: str
    share: Fraction


Sampling = Literal["permutation", "replacement"]


class Mixture(Config):
    """Exact shares of a budget of tokens; a source may be repeated `max_epochs` times.

    by="sequences" (OpenLM's weights): shares are of the `total_tokens // row_length` sequences; one
    is an example with a picture, a conversation, or a row's length of text. sampling="replacement"
    (the paper's runs): every draw is from the whole source, and `max_epochs` sets no limit.
    """

    kind: Literal["mixture"] = "mixture"
    total_tokens: Positive
    shares: Annotated[tuple[Share, ...], Field(min_length=1)]
    max_epochs: Positive = 1
    by: Literal["tokens", "sequences"] = "tokens"
    sampling: Sampling = "permutation"

    @model_validator(mode="after")
    def _whole(self) -> "Mixture":
        names = [share.source for share in self.shares]
        if len(set(names)) != len(names):
            raise ValueError(f"a source is named twice: {names}")
        if abs(sum(share.share for share in self.shares) - 1) > 1e-9:
            raise ValueError(f"shares add up to {sum(s.share for s in self.shares)}, not to 1")
        return self


class Epochs(Config):
    """Every example of the sources, `epochs` times."""

    kind: Literal["epochs"] = "epochs"
    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    epochs: Positive

    @model_validator(mode="after")
    def _distinct(self) -> "Epochs":
        if len(set(self.sources)) != len(self.sources):
            raise ValueError(f"a source is named twice: {list(self.sources)}; raise epochs instead")
        return self


class Amount(Config):
    """A source and how much of it: either tokens, patches included, or whole passes."""

    source: str
    tokens: Positive | None = None
    epochs: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> "Amount":
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError(f"source {self.source!r} needs either tokens or epochs")
        return self


class Amounts(Config):
    """Absolute amounts; the total follows. A source may be repeated `max_epochs` times."""

    kind: Literal["amounts"] = "amounts"
    amounts: Annotated[tuple[Amount, ...], Field(min_length=1)]
    max_epochs: Positive = 1
    sampling: Sampling = "permutation"

    @model_validator(mode="after")
    def _distinct(self) -> "Amounts":
        names = [amount.source for amount in self.amounts]
        if len(set(names)) != len(names):
            raise ValueError(f"a source is named twice: {names}")
        if self.sampling == "replacement" and any(amount.epochs for amount in self.amounts):
            raise ValueError(
                "epochs are whole passes; with replacement there are none: give tokens"
            )
        return self


Budget = Annotated[Mixture | Amounts | Epochs, Field(discriminator="kind")]


class Rows(Config):
    """How examples become rows of `row_length` positions, `batch_rows` of which make a step.

    joined: documents joined by end-of-text and cut at the row length, no document mask (OpenLM).
    filled: examples side by side, kept apart by segments, as full as they fit.
    padded: one image example a row and padding behind it, text rows as in `joined` (the paper).
    """

    row_length: Positive
    batch_rows: Positive
    layout: Literal["joined", "filled", "padded"] = "filled"


# -------------------------------------------------------------------------------- the training


class AdamW(Config):
    """`decay` says which weights decay: all of them (OpenLM), or matrices only (Prismatic)."""

    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.033
    decay: Literal["all", "matrices"] = "all"
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    z_loss: Annotated[float, Field(ge=0)] = 1e-4


class WarmupCosine(Config):
    """Linear warm-up to `peak_rate` over a share of the stage's tokens, then half a cosine."""

    kind: Literal["warmup_cosine"] = "warmup_cosine"
    peak_rate: Rate
    end_rate: Rate = 0.0
    warmup_fraction: Fraction = 0.0


class ContinuedCosine(Config):
    """Half a cosine from the parent schedule's own rate at the checkpoint down to `end_rate`."""

    kind: Literal["continued_cosine"] = "continued_cosine"
    end_rate: Rate = 3e-5


Schedule = Annotated[WarmupCosine | ContinuedCosine, Field(discriminator="kind")]


class Training(Config):
    """What every training stage needs beside its data and its start."""

    budget: Budget
    rows: Rows
    optimizer: AdamW = AdamW()
    schedule: Schedule
    seed: int = 0
    checkpoint_every_steps: Annotated[Positive, Placement] = 500


class ContrastiveTraining(Config):
    """Training of a SigLIP encoder by the sigmoid image-text loss on a caption source."""

    source: str
    text_hidden_size: Positive
    text_num_layers: Positive
    max_text_tokens: Positive = 48
    batch_images: Positive = 128
    num_steps: Positive
    schedule: WarmupCosine
    weight_decay: float = 0.01
    seed: int = 0


# ------------------------------------------------------------------------------ the evaluation


class Evaluation(Config):
    """Which benchmarks, how many examples of each, and how they are asked.

    `visual_tasks` name folders under the world's `bench/`, `text_tasks` files under its
    `text_tasks/`; both stand in its `world.json`. `limit` takes the first examples of a seeded
    order. `prompts` chooses the benchmarks' published wording (official) or the bare question
    (short).
    """

    visual_tasks: tuple[str, ...] = ()
    text_tasks: tuple[str, ...] = ()
    limit: Positive | None = None
    prompts: Literal["official", "short"] = "official"
    blind: bool = True
    max_new_tokens: Positive = 32
    batch_size: Annotated[Positive, Placement] = 64


class Machine(Config):
    """Where work runs; no part of any identity."""

    workers: Positive = 2
    threads: Positive = 1
    micro_batch_rows: Positive | None = None
    # Processes that build rows and decode pictures ahead of each training process.
    data_workers: Annotated[int, Field(ge=0)] = 0
    # Whether a frozen encoder's outputs are kept on disk; auto: where that pays (`midstream plan`).
    features: Literal["auto", "stored", "live"] = "auto"
    max_feature_gib: Annotated[float, Field(ge=0)] = 64.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
