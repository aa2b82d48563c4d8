"""What a store holds, opened: data, tokenizer, trained model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor

from midstream.config import AnyEncoderConfig, PublicFolder
from midstream.data.examples import TextCodec
from midstream.data.images import encode_fixed, encode_raw
from midstream.data.prepare import open_codec, open_source
from midstream.data.sources import Source
from midstream.model.vision import VisionEncoder, build_encoder, load_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import load_weights
from midstream.study.imported import RECORD
from midstream.study.label import label
from midstream.study.stages import (
    Continue,
    EncoderStage,
    Evaluate,
    Finetune,
    LoadModel,
    Prepare,
    PrepareSource,
    PrepareTokenizer,
    Pretrain,
    WithModel,
    stage_from_json,
)
from midstream.study.store import Ledger
from midstream.train import checkpoint
from midstream.train.parallel import ALONE, Place, autocast


def world_root(data: Prepare | PrepareSource | PrepareTokenizer, ledger: Ledger) -> Path:
    """Where a world's public files lie: the user's folder, or that of the stage that wrote them."""
    if isinstance(data.world, PublicFolder):
        return data.world.root
    return ledger.folder(data.laid_out[0]) / "world"


def open_tokenizer(data: Prepare, ledger: Ledger) -> TextCodec:
    """The tokenizer of a world's sources."""
    return open_codec(ledger.folder(data.vocabulary))


def open_sources(data: Prepare, names: Iterable[str], ledger: Ledger) -> dict[str, Source]:
    """Prepared sources by name, in the order of their names."""
    root = world_root(data, ledger)
    return {
        name: open_source(root, name, ledger.folder(data.source(name)))
        for name in sorted(set(names))
    }


Look = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode; `completion` is below 1 at a text run's earlier milestone.

    `encoder` is the frozen encoder beside the model or the model's own; None where it has none.
    """

    stage: WithModel
    completion: float
    weights: Path
    vlm: VLM
    codec: TextCodec
    encoder: VisionEncoder | None
    ledger: Ledger

    @property
    def name(self) -> str:
        """The stage's name, and the share of its tokens where that is not all."""
        share = "" if self.completion == 1.0 else f" at {self.completion * 100:g} %"
        return self.stage.name + share

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [images, 3, size, size] -> features as this model's projector takes them.

        Raises ValueError for a model that sees nothing.
        """
        if self.encoder is None:
            raise ValueError(f"{self.name} has no encoder; it cannot see pictures")
        return look_through(self.vlm, self.encoder)(pixels)


def look_through(vlm: VLM, encoder: VisionEncoder) -> Look:
    """What makes a model's features of pixels, in batches of one size and without autograd.

    A frozen encoder's outputs are rounded as they are stored; a model's own are as they are.
    """
    config = vlm.config.encoder
    assert config is not None, "it has an encoder"
    encode = on_device(encoder)
    if vlm.config.owns_encoder or config.kind == "patches":
        return partial(encode_raw, encode, config=config)
    return partial(encode_fixed, encode, config=config)


def on_device(encoder: VisionEncoder) -> Look:
    """The encoder without autograd, in its device's precision, on pixels from any device."""
    device = next(encoder.parameters()).device

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        with autocast(device):
            return cast(Tensor, encoder(pixels.to(device)))

    return encode


def open_model(path: Path, device: torch.device, place: Place = ALONE) -> OpenedModel:
    """Open a stage's folder, or a milestone in that of a text run (`milestones/80`), on every rank.

    Raises FileNotFoundError if it is none or not done, ValueError for a stage without a model,
    CorruptError for bytes that differ from their manifest.
    """
    ledger, stage, completion = find_model(path)
    ledger.results(stage)
    weights = weights_folder(ledger, stage, completion)
    vlm = VLM(stage.model)
    fill_model(vlm, weights, place)
    vlm.to(device).eval()
    encoder = vlm.encoder
    if isinstance(stage, LoadModel | Continue | Finetune) and encoder is None:
        assert stage.encoder_stage is not None, "a patch projection is the model's own"
        encoder = open_encoder(ledger, stage.encoder_stage, stage.model.encoder, place=place)
        encoder.to(device).eval()
    codec = open_tokenizer(stage.data, ledger)
    return OpenedModel(stage, completion, weights, vlm, codec, encoder, ledger)


def find_model(path: Path) -> tuple[Ledger, WithModel, float]:
    """The store, the stage and the share of its tokens that a folder stands for."""
    path = path.resolve()
    folder = path.parent.parent if path.parent.name == "milestones" else path
    if (path / RECORD).is_file():
        raise FileNotFoundError(
            f"{path} is an imported folder, and no stage of a store; give the folder of a stage "
            "that loads it or was trained from it, which a run of own_model.fine_tuning or "
            "own_model.image_shares makes"
        )
    if not (folder / "stage.json").is_file():
        raise FileNotFoundError(f"{path} is no stage of a store{_what_it_is(path)}")
    stage = stage_from_json((folder / "stage.json").read_bytes())
    if not isinstance(stage, WithModel):
        raise ValueError(f"{label(stage)} holds no language model; give a training stage's folder")
    completion = 1.0 if folder == path else float(path.name) / 100
    return Ledger(folder.parent), stage, completion


def _what_it_is(path: Path) -> str:
    """The end of an error about a folder that is no stage: what it is instead, and what to give."""
    if (path.parent / "stage.json").is_file():
        return f" but a part of one; give {path.parent}"
    if (path / "config.json").is_file():
        return (
            " but a model of transformers: midstream eval asks it as it is, and midstream import "
            "brings it to the recipes"
        )
    stages = sorted(mark.parent.name for mark in path.glob("*/stage.json"))
    kinds = ("finetune-", "continue-", "pretrain-", "loadmodel-", "loaddecoder-")
    models = [name for kind in kinds for name in stages if name.startswith(kind)]
    if models:
        return f" but a store; give one of its stages, such as {path / models[0]}"
    return (
        "; give a folder such as runs/finetune-0123456789abcdef, or a milestone in that of a text "
        "run"
    )


def evaluations(opened: OpenedModel) -> list[Evaluate]:
    """The finished evaluations of this very model in its store, in the order of their names."""
    found = []
    for mark in sorted(opened.ledger.store.glob("evaluate-*/SUCCESS")):
        try:
            stage = stage_from_json((mark.parent / "stage.json").read_bytes())
        except ValidationError:
            # Of another version of Midstream, and so of another model.
            continue
        assert isinstance(stage, Evaluate), "the folder's name says so"
        of = (stage.of.identity, stage.completion)
        if of == (opened.stage.identity, opened.completion):
            found.append(stage)
    return found


def weights_folder(ledger: Ledger, stage: WithModel, completion: float) -> Path:
    """Where a stage's weights lie; ValueError names the milestones where this one was not kept."""
    folder = ledger.folder(stage)
    if not isinstance(stage, Pretrain):
        return folder / "weights"
    found = checkpoint.milestone(folder, completion)
    if not found.is_dir():
        kept = ", ".join(f"{share * 100:g} %" for share in stage.milestones)
        raise ValueError(f"{label(stage)} kept no weights at {completion * 100:g} %; it has {kept}")
    return found


def fill_model(vlm: VLM, weights: Path, place: Place = ALONE) -> None:
    """Put the weights of a checkpoint folder into a model, after checking their bytes."""
    checkpoint.check_files(weights, place=place)
    load_weights(vlm, weights)


def open_encoder(
    ledger: Ledger,
    stage: EncoderStage,
    seen: AnyEncoderConfig | None = None,
    *,
    place: Place = ALONE,
) -> VisionEncoder:
    """The frozen encoder of a finished stage, its bytes checked; `seen` on pictures of a size that
    is not its own."""
    folder = ledger.folder(stage) / "weights"
    checkpoint.check_files(folder, place=place)
    encoder = build_encoder(seen or stage.encoder).requires_grad_(False)
    load_encoder(encoder, folder / "model.safetensors")
    return encoder
