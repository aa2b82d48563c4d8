"""`midstream import`: somebody's checkpoint as a folder that stages load.

A decoder's folder holds model.safetensors (float32, names of `VLM`), optimizer.safetensors where
the checkpoint has Adam's moments, progress.json, tokenizer.json where one is known, and import.json
(`study/imported.py`); an encoder's holds model.safetensors (the whole tower under `transformers`'
names) and import.json; a whole model's holds what a decoder's does, with the projector, and its
towers as folders of their own. It is written whole or not at all, after everything has been read.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from midstream.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    TransformersDecoderConfig,
    VLMConfig,
)
from midstream.data.examples import TextCodec
from midstream.data.preparation.source import canonical_tokenizer
from midstream.exchange import import_parts, import_whole, vision_checkpoints
from midstream.exchange.import_source import (
    ImportRequest,
    LanguageModel,
    Source,
    find_tokenizer,
    locate,
    read_language_model,
)
from midstream.exchange.import_summary import summary
from midstream.exchange.position import NUMBERS, settle
from midstream.exchange.vocabulary import Vocabulary, plan_vocabulary, resize, without_token
from midstream.identity import digest
from midstream.model.transformers_config import with_vocabulary
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.vlm import VLM, build_decoder
from midstream.model.weights import fill, save_weights, weights_digest
from midstream.storage import new_folder, write_bytes, write_json
from midstream.study.imported import RECORD, ImportRecord, Position, tower_folders
from midstream.tokens import TokenCount
from midstream.train.checkpoint import Progress


def serve(request: dict[str, Any]) -> None:
    """Import as the request says and print what was written."""
    from transformers.utils import logging

    # What it would say of a checkpoint's names, or draw as bars, is said below.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    asked = ImportRequest.model_validate(request)
    record, notes = import_model(asked)
    print("\n".join(summary(asked.out, record, notes)))


def import_model(request: ImportRequest) -> tuple[ImportRecord, list[str]]:
    """Write the folder `request.out`; returns its record, and sentences that the user should read.

    Raises FileNotFoundError or ValueError, and writes nothing, if the source is missing, half
    downloaded, of an unknown family, does not fit its own configuration or tokenizer, or if `out`
    is something else than an imported folder, which alone is replaced.
    """
    out = request.out.expanduser()
    if out.exists() and not (out / RECORD).is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is no imported folder; give another --out")
    source = locate(request)
    tower = source.path.is_dir() and vision_checkpoints.is_encoder(source.path)
    if tower or (request.part or "").startswith("encoder"):
        return _import_encoder(request, source, out)
    sight = import_whole.read_sight(source.path) if request.part == "model" else None
    model = read_language_model(request, source.path)
    return _import_decoder(request, source, model, sight, out)


# ------------------------------------------------------------------------------------ the decoder


def _import_decoder(
    request: ImportRequest,
    source: Source,
    model: LanguageModel,
    sight: import_whole.Sight | None,
    out: Path,
) -> tuple[ImportRecord, list[str]]:
    path, known = source.path, source.known
    public = Position() if known is None else known.position
    position, conflicts = settle(request.position, model.position, public)
    tokenizer = find_tokenizer(request, path)
    if tokenizer is None and model.tokenizer_folder is not None:
        tokenizer = find_tokenizer(request, model.tokenizer_folder)
    if tokenizer is not None and model.picture_token is not None:
        tokenizer = without_token(tokenizer, model.picture_token)
    vocabulary = plan_vocabulary(
        tokenizer,
        model.config.vocab_size,
        add_tokens=request.add_tokens,
        multiple=request.pad_vocab_to,
    )
    config = with_rows(model.config, vocabulary.rows_after)
    vlm = VLM(VLMConfig(decoder=config) if sight is None else sight.model(config))
    grown = _grown(model.config, config)
    tensors, moments = resize(model.tensors, model.moments, grown)
    tensors = {f"decoder.{name}": value for name, value in tensors.items()}
    fill(vlm, tensors | ({} if sight is None else sight.tensors), path=path)
    _check_finite(vlm.state_dict(), path)
    del tensors
    moments = None if moments is None else {_moment_name(name): moments[name] for name in moments}

    weights = weights_digest(vlm)
    learnt = None if moments is None else tensors_digest(moments)
    numbers = [getattr(position, name) for name in NUMBERS]
    record = ImportRecord(
        kind="decoder" if sight is None else "model",
        source=source.name,
        revision=source.revision,
        family=model.family,
        config=config,
        model=None if sight is None else vlm.config,
        vocabulary=vocabulary.as_json(),
        position=position,
        dropped=model.dropped if sight is None else (),
        has_moments=moments is not None,
        weights_digest=weights,
        content=digest([weights, learnt, numbers]),
    )
    with new_folder(out) as folder:
        save_weights(vlm, folder / "model.safetensors")
        if moments is not None:
            save_file(_own_memory(moments), folder / "optimizer.safetensors")
        if vocabulary.codec is not None:
            write_bytes(folder / "tokenizer.json", canonical_tokenizer(vocabulary.codec))
        write_json(folder / "progress.json", asdict(_progress(model.step, position)))
        write_json(folder / RECORD, record.model_dump(mode="json"))
        if sight is not None:
            for name, (tower, held) in zip(tower_folders(vlm.config), sight.towers, strict=True):
                _write_encoder(folder / name, source, tower, held, ())
    named = () if known is None else (f"known family: {known.family}",)
    remarks = _remarks(model.config, vocabulary, position)
    told = (note for note in model.notes if sight is None or note != import_parts.LEFT_OUT)
    return record, [*named, *source.notes, *told, *conflicts, *remarks]


def with_rows(config: AnyDecoderConfig, rows: int) -> AnyDecoderConfig:
    """The same decoder with `rows` token ids."""
    if rows == config.vocab_size:
        return config
    if isinstance(config, DecoderConfig):
        return config.model_copy(update={"vocab_size": rows})
    return with_vocabulary(config, rows)


def _grown(before: AnyDecoderConfig, after: AnyDecoderConfig) -> dict[str, int]:
    """Names of the parameters that have a row a token, and how many rows they get."""
    with torch.device("meta"):
        old, new = build_decoder(before).state_dict(), build_decoder(after).state_dict()
    return {name: len(new[name]) for name in old if new[name].shape != old[name].shape}


def _moment_name(name: str) -> str:
    key, _, parameter = name.partition(".")
    return f"{key}.decoder.{parameter}"


def _progress(step: int, position: Position) -> Progress:
    # Its counts are numbers; where nobody told them, import.json says so.
    seen = position.tokens_seen or 0
    return Progress(
        step=step,
        tokens_seen=seen,
        total_tokens=position.total_tokens or seen,
        rate=position.rate,
        counts=TokenCount(text=seen, target=seen),
    )


def _about_begin(codec: TextCodec) -> str:
    begin = codec.begin_of_text
    if begin is None:
        return "BOS: none, the tokenizer puts no token before a text"
    return (
        f"BOS: {codec.tokenizer.id_to_token(begin)} = {begin:,} begins each text in training, "
        "image-text rows (before the picture) and evaluation, as the tokenizer's rule says; a "
        'recipe may choose another or "none" (begin_of_text)'
    )


def _remarks(config: AnyDecoderConfig, vocabulary: Vocabulary, position: Position) -> Iterator[str]:
    if vocabulary.behind:
        yield (
            f"the tokenizer has {', '.join(vocabulary.behind)} behind the model's last row; new "
            "rows were made"
        )
    if vocabulary.codec is None:
        yield (
            "no tokenizer: no token was added and the data cannot be compared; give the model's "
            "own with --tokenizer"
        )
    else:
        yield _about_begin(vocabulary.codec)
    if vocabulary.codec is not None and isinstance(config, TransformersDecoderConfig):
        stated = config.settings.get("eos_token_id")
        ends = stated if isinstance(stated, list) else [stated]
        if stated is not None and vocabulary.codec.end_of_text not in ends:
            yield (
                f"its config.json ends texts with {stated}, Midstream with "
                f"{vocabulary.codec.end_of_text} of the tokenizer"
            )
    if position.rate is None:
        yield "the learning rate is unknown: give it with --rate, or warm up again"


# ------------------------------------------------------------------------------------ the encoder


def _import_encoder(
    request: ImportRequest, source: Source, out: Path
) -> tuple[ImportRecord, list[str]]:
    path = source.path
    given = {**request.position.model_dump(include=set(NUMBERS)), "tokenizer": request.tokenizer}
    given |= {"add_token": request.add_tokens or None, "num_heads": request.num_heads}
    senseless = [
        f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None
    ]
    if senseless:
        raise ValueError(f"{path} is a vision tower; leave {', '.join(senseless)} out")
    if request.part is None:
        config, tensors, dropped, notes = vision_checkpoints.read_encoder(path)
    else:
        config, tensors, dropped, notes = import_parts.read_encoder_part(path, request.part)
    return _write_encoder(out, source, config, tensors, dropped), [*source.notes, *notes]


def _write_encoder(
    out: Path,
    source: Source,
    config: EncoderConfig,
    tensors: dict[str, Tensor],
    dropped: tuple[str, ...],
) -> ImportRecord:
    _check_finite(tensors, source.path)
    weights = tensors_digest(tensors)
    record = ImportRecord(
        kind="encoder",
        source=source.name,
        revision=source.revision,
        family=config.family,
        config=config,
        dropped=dropped,
        weights_digest=weights,
        content=digest([weights]),
    )
    with new_folder(out) as folder:
        saved = folder / "model.safetensors"
        save_file(_own_memory(tensors), saved)
        # What cannot be used later is refused now.
        load_encoder(build_encoder(config), saved)
        write_json(folder / RECORD, record.model_dump(mode="json"))
    return record


# ---------------------------------------------------------------------------------------- together


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors: name, dtype, shape and bytes, in the order of names."""
    state = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        state.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        state.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors asks for."""
    copied = {name: value.detach().clone() for name, value in tensors.items()}
    return {name: value.contiguous() for name, value in copied.items()}


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite; nothing to import")
