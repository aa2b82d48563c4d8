"""What the parts of `gpu.py` measure: stages of two sizes over a generated world, and small ones
for the way without a card; and where a part keeps what it has."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream.config import (
    DECODERS,
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Machine,
    Mixture,
    PocketWorld,
    Rows,
    Share,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.core.storage import read_json, write_json
from midstream.recipes.paper_scale import SIGLIP
from midstream.study.stages import Continue, FromScratch, Prepare, Pretrain, Trained, TrainEncoder
from midstream.study.store import Ledger
from midstream.work.profile_stage import WARM_STEPS
from midstream.work.run_stage import StageRunner

# Of the tokens of an image-text step.
PICTURE_SHARE = 0.25


def _data(world: PocketWorld, vocab_size: int) -> Prepare:
    tokenizer = TrainedTokenizer(vocab_size=vocab_size, sources=("web", "pictures"))
    return Prepare(world=world, tokenizer=tokenizer)


def _encoder(data: Prepare, config: EncoderConfig) -> TrainEncoder:
    """An encoder of this shape: a step of training gives it weights without a download."""
    return TrainEncoder(
        data=data,
        encoder=config,
        training=ContrastiveTraining(
            source="pictures",
            text_hidden_size=32,
            text_num_layers=1,
            max_text_tokens=128,
            batch_images=8,
            num_steps=1,
            schedule=WarmupCosine(peak_rate=1e-4),
        ),
    )


@dataclass(frozen=True)
class Size:
    """What is measured: models, data, rows of a step, and how often.

    `heads` are rows, heads and channels of the attention that is measured alone.
    """

    decoders: dict[str, DecoderConfig]
    data: Prepare
    encoder: TrainEncoder
    rows: Rows
    threads: int = 8
    data_workers: int = 6
    steps: int = 4
    pictures: int = 256
    heads: tuple[int, int, int] = (8, 16, 128)


def _full() -> Size:
    """The paper's sizes; captions beyond those that training an encoder holds out."""
    world = PocketWorld(
        num_documents=6_000,
        num_captions=512,
        num_conversations=20,
        num_questions=12,
        num_text_items=8,
    )
    data = _data(world, 2048)
    return Size(
        decoders={name: DECODERS[name] for name in ("79m", "1b")},
        data=data,
        encoder=_encoder(data, SIGLIP),
        rows=Rows(row_length=2048, batch_rows=32),
    )


def _dry() -> Size:
    world = PocketWorld(
        num_documents=60, num_captions=264, num_conversations=8, num_questions=4, num_text_items=4
    )
    data = _data(world, 400)
    tower = EncoderConfig(
        image_size=24,
        patch_size=12,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
    )
    decoder = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=400)
    return Size(
        decoders={"79m": decoder, "1b": decoder},
        data=data,
        encoder=_encoder(data, tower),
        rows=Rows(row_length=192, batch_rows=4),
        threads=1,
        data_workers=0,
        steps=1,
        pictures=8,
        heads=(1, 2, 16),
    )


FULL, DRY = _full(), _dry()


@dataclass
class Part:
    """A part of the measuring: where it keeps what it has (`NAME.json`), and what it had before."""

    name: str
    out: Path
    device: str
    size: Size
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            self.values = read_json(self.path)

    @property
    def path(self) -> Path:
        return self.out / f"{self.name}.json"

    def keep(self, **values: Any) -> None:
        """Write down what is known now."""
        self.values |= values
        write_json(self.path, self.values)

    def runner(self, **machine: Any) -> StageRunner:
        """What runs stages, in a store that lies beside the results."""
        given = {"workers": 1, "threads": self.size.threads, "device": self.device}
        given |= {"data_workers": self.size.data_workers, "features": "live"}
        place = Machine.model_validate(given | machine)
        return StageRunner(Ledger(self.out / "store"), place, lambda event: None, lambda: False)

    def stage(self, scale: str, *, pictures: bool) -> Trained:
        """A text run of the scale, or its training on captions and text from scratch."""
        size = self.size
        shares = {"web": 1.0 - PICTURE_SHARE, "pictures": PICTURE_SHARE} if pictures else {"web": 1}
        num_steps = WARM_STEPS + size.steps + 2
        training = Training(
            budget=Mixture(
                total_tokens=num_steps * size.rows.batch_rows * size.rows.row_length,
                shares=tuple(Share(source=name, share=share) for name, share in shares.items()),
                max_epochs=10_000,
            ),
            rows=size.rows,
            schedule=WarmupCosine(peak_rate=1e-3),
        )
        decoder = size.decoders[scale]
        if not pictures:
            return Pretrain(data=size.data, decoder=decoder, training=training)
        return Continue(
            data=size.data,
            encoder=size.encoder,
            decoder=decoder,
            start=FromScratch(),
            training=training,
        )
