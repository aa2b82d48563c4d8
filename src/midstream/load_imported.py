"""Weights that are there already become a stage of a store, once they are seen to fit.

They are what `midstream import` wrote, or the encoders of other stages.
"""

import shutil
from pathlib import Path
from typing import Any

from midstream.config import AnyDecoderConfig, FusedEncoder, PretrainedEncoder
from midstream.data.examples import TextCodec
from midstream.data.preparation.source import canonical_tokenizer
from midstream.model.vision import VisionEncoder, build_encoder, load_encoder, load_towers
from midstream.model.vlm import VLM
from midstream.model.weights import save_weights, weights_digest
from midstream.open_data import open_tokenizer
from midstream.open_model import fill_model
from midstream.storage import new_folder, verify
from midstream.study.imported import ImportRecord, Position, open_imported
from midstream.study.ledger import Ledger
from midstream.study.stage import FuseEncoders, LoadDecoder, LoadEncoder, LoadModel


def load_encoder_stage(stage: LoadEncoder, ledger: Ledger) -> dict[str, Any]:
    """Imported towers to `weights/`, under the encoder's own names; returns the stage's results.

    Raises CorruptError or ValueError for folders that are not those that were planned with.
    """
    records = [open_imported(imported) for imported in stage.towers]
    encoder, unused = put_together(stage.encoder, [one.folder for one in stage.towers])
    return _kept(encoder, ledger.folder(stage)) | {
        "unused": list(unused),
        "imported_from": [record.origin for record in records],
    }


def fuse_encoders_stage(stage: FuseEncoders, ledger: Ledger) -> dict[str, Any]:
    """The towers of finished stages to one encoder's `weights/`; returns the stage's results.

    Raises CorruptError for weights whose bytes differ from their manifest.
    """
    folders = [ledger.folder(tower) / "weights" for tower in stage.towers]
    for folder in folders:
        verify(folder)
    encoder, unused = put_together(stage.encoder, folders)
    return _kept(encoder, ledger.folder(stage)) | {"unused": list(unused)}


def load_decoder_stage(stage: LoadDecoder, ledger: Ledger) -> dict[str, Any]:
    """An imported language model to `weights/`, if its vocabulary fits the data; returns results.

    Raises CorruptError or ValueError for a folder that is not the one that was planned with.
    """
    record = open_imported(stage.checkpoint)
    if record.config != stage.decoder:
        raise ValueError(f"{stage.checkpoint.folder} holds another decoder than the stage says")
    return _copied(stage, record, ledger)


def load_model_stage(stage: LoadModel, ledger: Ledger) -> dict[str, Any]:
    """An imported vision-language model to `weights/`, its towers aside; returns results.

    Raises CorruptError or ValueError for a folder that is not the one that was planned with.
    """
    record = open_imported(stage.checkpoint)
    if record.model != stage.model:
        raise ValueError(f"{stage.checkpoint.folder} holds another model than the stage says")
    return _copied(stage, record, ledger)


def _copied(stage: LoadDecoder | LoadModel, record: ImportRecord, ledger: Ledger) -> dict[str, Any]:
    check_vocabulary(open_tokenizer(stage.data, ledger), stage.decoder, stage.checkpoint.folder)
    weights = ledger.folder(stage) / "weights"
    with new_folder(weights) as temporary:
        for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
            if (stage.checkpoint.folder / name).is_file():
                shutil.copyfile(stage.checkpoint.folder / name, temporary / name)
    model = VLM(stage.model)
    fill_model(model, weights)
    position = record.position or Position()
    return {
        "tokens_seen_before": position.tokens_seen,
        "last_rate": position.rate,
        "imported_from": [record.origin],
        "weights_digest": weights_digest(model),
    }


def put_together(
    config: PretrainedEncoder, folders: list[Path]
) -> tuple[VisionEncoder, tuple[str, ...]]:
    """An encoder from folders of weights, one a tower; and the tensors it has no use for."""
    encoder = build_encoder(config)
    files = [folder / "model.safetensors" for folder in folders]
    if isinstance(config, FusedEncoder):
        return encoder, load_towers(encoder, files)
    return encoder, load_encoder(encoder, files[0])


def check_vocabulary(codec: TextCodec, decoder: AnyDecoderConfig, folder: Path) -> None:
    """Raises ValueError where data and an imported decoder do not speak the same tokens."""
    if codec.size > decoder.vocab_size:
        raise ValueError(
            f"the data has ids up to {codec.size - 1:,}, the decoder of {folder} has "
            f"{decoder.vocab_size:,} rows; import it again with the data's tokenizer (--tokenizer)"
        )
    path = folder / "tokenizer.json"
    # What begins a text is the recipe's choice.
    if path.is_file() and canonical_tokenizer(
        TextCodec.from_file(path).beginning_with("")
    ) != canonical_tokenizer(codec.beginning_with("")):
        raise ValueError(
            f"the data was tokenised by another tokenizer than {path}; prepare it with that file"
        )


def _kept(encoder: VisionEncoder, folder: Path) -> dict[str, Any]:
    """Write an encoder's weights into a stage's folder; what its results say of them."""
    with new_folder(folder / "weights") as temporary:
        save_weights(encoder, temporary / "model.safetensors")
    return {
        "weights_digest": weights_digest(encoder),
        "num_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
    }
