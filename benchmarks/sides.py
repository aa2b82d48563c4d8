"""The sides of `train_step.py`: rows that each of them can take, and its step on them."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import cross_entropy

import peers
from midstream.config import DECODERS, AdamW, DecoderConfig, EncoderConfig, VLMConfig
from midstream.config.flops import model_flops
from midstream.core.batch import IGNORE, Batch
from midstream.core.tokens import TokenCount
from midstream.data.images import Encode, encode_fixed
from midstream.model.decoder import Decoder
from midstream.model.vision import build_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.recipes.paper_scale import SIGLIP
from midstream.train.parallel import Place
from midstream.train.step import make_optimizer, train_step
from midstream.work.open_model import on_device
from peers import Row, Step, step_of

SETTINGS = AdamW()
# A tower of 27 x 27 patches that is small enough to be looked through on two cores.
SMALL_TOWER = EncoderConfig(
    image_size=378,
    patch_size=14,
    hidden_size=384,
    num_layers=5,
    num_heads=6,
    intermediate_size=1536,
    feature_layer=-1,
)
CAPTION_TOKENS = 30


def decoder_30m(vocab_size: int) -> DecoderConfig:
    """The size between 11m and 79m that reference measurements used."""
    return DecoderConfig(hidden_size=512, num_layers=8, num_heads=8, vocab_size=vocab_size)


@dataclass(frozen=True)
class Work:
    """What a step is given: a model, the length of its rows and how many, and pictures or none."""

    decoder: DecoderConfig
    encoder: EncoderConfig | None = None
    length: int = 1024
    rows: int = 1

    @property
    def model(self) -> VLMConfig:
        return VLMConfig(decoder=self.decoder, encoder=self.encoder)


WORKS = {
    "30m text": Work(decoder_30m(4096)),
    "79m text": Work(DECODERS["79m"]),
    "30m image-text": Work(decoder_30m(50432), SMALL_TOWER),
    "30m image-text, vocabulary 4,096": Work(decoder_30m(4096), SMALL_TOWER),
}
GPU_WORKS = {
    "79m text": Work(DECODERS["79m"], length=2048, rows=16),
    "1b text": Work(DECODERS["1b"], length=2048, rows=8),
    "1b image-text, 10 % image tokens": Work(DECODERS["1b"], SIGLIP, length=2048, rows=8),
}


@dataclass
class Side:
    """One contestant and what was measured of it; `flops` are those of its step."""

    name: str
    step: Step
    tokens: int
    images: int
    flops: float
    seconds: list[float] = field(default_factory=list)


# ------------------------------------------------------------------------------------- rows


def drawn(work: Work, device: torch.device) -> Row:
    """A row that every side can take: text, or a picture, its caption, and padding."""
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(1, work.decoder.vocab_size - 1, (1, work.length + 1), generator=chance)
    input_ids, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    pixels, patches = None, 0
    if work.encoder is not None:
        patches, size = work.encoder.num_patches, work.encoder.image_size
        pixels = torch.rand((1, 3, size, size), generator=chance).to(device) * 2 - 1
        targets[:, : patches - 1] = peers.IGNORED
        targets[:, patches + CAPTION_TOKENS :] = peers.IGNORED
    return Row(input_ids.to(device), targets.to(device), pixels, patches)


def batch_of(work: Work, row: Row, *, filled: bool = False, images: int | None = None) -> Batch:
    """The same row as Midstream reads it; `filled`: a text stands behind the caption.

    With `images`, so many of the work's rows begin with a picture, and all are full of text.
    """
    length, patches, rows = work.length, row.num_patches, work.rows
    with_image = rows if images is None else images
    if work.encoder is None:
        with_image = 0
    input_ids = row.input_ids.cpu().expand(rows, -1).clone()
    targets = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
    position_ids = torch.arange(length).expand(rows, -1).clone()
    segment_ids = torch.zeros((rows, length), dtype=torch.long)
    end = patches + CAPTION_TOKENS + 1
    for number in range(with_image):
        input_ids[number, :patches] = 0
        targets[number, : patches - 1] = IGNORE
        targets[number, end - 1] = IGNORE
        if filled or images is not None:
            segment_ids[number, end:] = 1
            position_ids[number, end:] -= end
        else:
            segment_ids[number, end:] = -1
            position_ids[number, end:] = 0
            targets[number, end:] = IGNORE
    slots = [[number, 0] for number in range(with_image)]
    image_slots = torch.tensor(slots, dtype=torch.int64).reshape(-1, 2)
    seen = int((segment_ids >= 0).sum())
    counts = TokenCount(
        text=seen - with_image * patches,
        image=with_image * patches,
        pad=rows * length - seen,
        target=int((targets != IGNORE).sum()),
    )
    pixels = torch.zeros((0, 3, 1, 1))
    if row.pixels is not None:
        pixels = row.pixels.cpu().expand(with_image, -1, -1, -1)
    return Batch(input_ids, targets, position_ids, segment_ids, image_slots, pixels, counts)


# ------------------------------------------------------------------------------------ sides


def model_of(work: Work, place: Place, *, compiled: bool = False) -> VLM:
    """Midstream's model with its own initial weights."""
    model = VLM(work.model)
    initialise(model, 0)
    model.to(place.device)
    if compiled:
        assert isinstance(model.decoder, Decoder)
        for block in model.decoder.layers:
            block.compile()
        model.compiled_blocks = True
    return model


def our_step(model: VLM, batch: Batch, encode: object, place: Place) -> Step:
    """The step of every training stage."""
    optimizer = make_optimizer(model, SETTINGS)
    return lambda: (
        train_step(
            model,
            optimizer,
            [batch],
            encode=encode,  # type: ignore[arg-type]
            rate=1e-4,
            settings=SETTINGS,
            place=place,
        )
        .read()
        .loss
    )


def plain_step(work: Work, row: Row, place: Place) -> Step:
    """Midstream's own model in a plain loop: padded rows, logits everywhere."""
    model = model_of(work, place)
    batch = batch_of(work, row).map(lambda one: one.to(place.device))
    look = encoder_of(work, place)

    def loss() -> torch.Tensor:
        features = None if look is None or row.pixels is None else look(row.pixels).float()
        logits = model.decoder.output(model(batch, features))
        return cross_entropy(
            logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE
        )

    return step_of(model, loss, place.device)


def encoder_of(work: Work, place: Place) -> Encode | None:
    """A frozen tower with random weights, as stages look through it; None without pictures."""
    if work.encoder is None:
        return None
    tower = build_encoder(work.encoder)
    initialise(tower, 0)
    return on_device(tower.to(place.device).eval())


def encode_of(work: Work, place: Place) -> Encode | None:
    """What a stage calls for its pictures: the tower, and features rounded as stores hold them."""
    look = encoder_of(work, place)
    if look is None or work.encoder is None:
        return None
    return partial(encode_fixed, look, config=work.encoder)


def side(work: Work, name: str, step: Step, batch: Batch, *, looks: bool) -> Side:
    """With the FLOPs of what the batch holds."""
    attended = int((batch.position_ids + 1)[batch.segment_ids >= 0].sum())
    images = len(batch.image_slots)
    flops = model_flops(
        work.model,
        positions=batch.counts.seen,
        texts=batch.counts.seen - batch.counts.image,
        attended=attended,
        images=images,
        encoded=images if looks else 0,
        trains_encoder=False,
    )
    return Side(name, step, batch.counts.seen, images, flops)


def makers(work: Work, options: argparse.Namespace, place: Place) -> dict[str, Callable[[], Side]]:
    """Every side of a work, to be built where it is measured."""
    device, decoder, tower = place.device, work.decoder, work.encoder
    row = drawn(work, device)
    padded = batch_of(work, row)
    if tower is None:
        others = {
            "transformers Llama": lambda: peers.llama_text(decoder, row, device),
            "OpenLM": lambda: peers.openlm_text(options.openlm, decoder, row, device),
            "nanoVLM": lambda: peers.nanovlm_text(options.nanovlm, decoder, row, device),
        }
        ours = {"midstream": (padded, False, False), "midstream, compiled": (padded, False, True)}
    else:
        filled = batch_of(work, row, filled=True)
        stored = torch.randn((len(padded.images), tower.num_patches, tower.hidden_size))
        others = {
            "transformers LLaVA": lambda: peers.llava_image(decoder, tower, row, device),
            "nanoVLM": lambda: peers.nanovlm_image(options.nanovlm, decoder, tower, row, device),
        }
        ours = {
            "midstream": (padded, True, False),
            "midstream, text behind": (filled, True, False),
            "midstream, stored features": (padded, False, False),
            "midstream, text behind, stored": (filled, False, False),
        }

    def other(name: str, step: Callable[[], Step]) -> Side:
        return side(work, name, step(), padded, looks=True)

    def mine(name: str, batch: Batch, looks: bool, compiled: bool) -> Side:
        encode = encode_of(work, place)
        if encode is not None and not looks:
            encode = lambda _pixels: stored.to(device)  # noqa: E731
        step = our_step(model_of(work, place, compiled=compiled), batch, encode, place)
        return side(work, name, step, batch, looks=looks)

    plain = partial(other, "plain loop", lambda: plain_step(work, row, place))
    found: dict[str, Callable[[], Side]] = {"plain": plain}
    for name, step in others.items():
        key = name.split()[0].lower()
        if getattr(options, key, True):
            found[key] = partial(other, name, step)
    return found | {name: partial(mine, name, *how) for name, how in ours.items()}
