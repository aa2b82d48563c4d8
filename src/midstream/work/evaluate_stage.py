"""Stages that do not train: weights that are there already, once they are seen to fit; evaluations.

An evaluation asks only what no other of the model asked before, of files as planned.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from midstream.config import AnyDecoderConfig, FusedEncoder, PretrainedEncoder, PublicFolder, World
from midstream.core.identity import benchmark_digest, kept_digests
from midstream.core.storage import new_folder, remove_folder, verify
from midstream.data.examples import TextCodec
from midstream.eval.answers import BATCHES_AT_ONCE, EvaluationStopped, KeptAnswers, earlier_tasks
from midstream.eval.benchmark import evaluate
from midstream.eval.predict import ModelAnswerer
from midstream.model.vision import VisionEncoder, build_encoder, load_encoder, load_towers
from midstream.model.vlm import VLM
from midstream.model.weights import save_weights, weights_digest
from midstream.study.imported import Position, open_imported
from midstream.study.stages import (
    Evaluate,
    FuseEncoders,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    Pretrain,
)
from midstream.study.store import Ledger
from midstream.train.loop import Interrupted
from midstream.train.parallel import Place
from midstream.work.open_model import (
    OpenedModel,
    evaluations,
    fill_model,
    open_model,
    open_tokenizer,
    weights_folder,
    world_root,
)


def encoder_stage(stage: LoadEncoder | FuseEncoders, ledger: Ledger) -> dict[str, Any]:
    """Towers, imported or of finished stages, to one encoder's `weights/`; the stage's results.

    Raises CorruptError for weights whose bytes differ from their manifest, and ValueError for
    imported folders that are not those that were planned with.
    """
    told: dict[str, Any] = {}
    if isinstance(stage, LoadEncoder):
        records = [open_imported(imported) for imported in stage.towers]
        folders = [one.folder for one in stage.towers]
        told = {"imported_from": [record.origin for record in records]}
    else:
        folders = [ledger.folder(tower) / "weights" for tower in stage.towers]
        for folder in folders:
            verify(folder)
    encoder, unused = put_together(stage.encoder, folders)
    with new_folder(ledger.folder(stage) / "weights") as temporary:
        save_weights(encoder, temporary / "model.safetensors")
    return {
        "weights_digest": weights_digest(encoder),
        "num_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "unused": list(unused),
        **told,
    }


def imported_stage(stage: LoadDecoder | LoadModel, ledger: Ledger) -> dict[str, Any]:
    """An imported model to `weights/`, towers aside, if its vocabulary fits the data; its results.

    Raises CorruptError or ValueError for a folder that is not the one that was planned with.
    """
    record = open_imported(stage.checkpoint)
    held, wanted = (
        (record.config, stage.decoder)
        if isinstance(stage, LoadDecoder)
        else (record.model, stage.model)
    )
    if held != wanted:
        raise ValueError(f"{stage.checkpoint.folder} holds another model than the stage says")
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
    if path.is_file() and _tokens_of(TextCodec.from_file(path)) != _tokens_of(codec):
        raise ValueError(
            f"the data was tokenised by another tokenizer than {path}; prepare it with that file"
        )


def _tokens_of(codec: TextCodec) -> dict[str, Any]:
    """The tokenizer but for what it puts around a text, which is the recipe's choice."""
    content: dict[str, Any] = json.loads(codec.tokenizer.to_str())
    return content | {"post_processor": None}


def answerer_of(opened: OpenedModel, max_new_tokens: int, batch_size: int) -> ModelAnswerer:
    """What answers for a model of a store."""
    return ModelAnswerer(
        opened.vlm,
        opened.codec,
        encode=opened.encode if opened.encoder is not None else None,
        encoder=opened.stage.model.encoder,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


def evaluate_stage(
    stage: Evaluate,
    ledger: Ledger,
    place: Place,
    *,
    should_stop: Callable[[], bool],
    at: Callable[[str], None],
    note: Callable[[float, str], None],
) -> dict[str, Any]:
    """Ask a stage's model its benchmarks; returns the results of docs/store.md.

    Tasks that another evaluation of this model in the store asked in the same way, of the same
    files, are taken from there. Every rank makes the call. Raises Interrupted when asked to stop,
    ValueError for a benchmark that changed since it was planned, and for a task whose metric is no
    share of right answers.
    """
    folder = ledger.folder(stage.of)
    if isinstance(stage.of, Pretrain) and stage.completion != 1.0:
        folder = weights_folder(ledger, stage.of, stage.completion)
    opened = open_model(folder, place.device, place)
    asked = stage.evaluation
    answerer = answerer_of(opened, asked.max_new_tokens, asked.batch_size)
    kept = ledger.folder(stage) / "answers"
    answers = KeptAnswers(
        answerer,
        kept,
        at_once=stage.evaluation.batch_size * BATCHES_AT_ONCE,
        settings=str(stage.evaluation.max_new_tokens),
        ranks=place,
        should_stop=should_stop,
        at=at,
    )
    root = world_root(stage.of.data, ledger)
    earlier = earlier_tasks(ledger.folder(one) for one in evaluations(opened))
    try:
        # The pictures of a benchmark are the same for all models of a study.
        with kept_digests(ledger.digests):
            check_benchmarks(stage.of.data.world, root, stage.benchmarks)
            results = evaluate(
                answers, stage.evaluation, root, ledger.folder(stage), note, done=earlier
            )
    except EvaluationStopped as reason:
        raise Interrupted(str(reason)) from None
    others = [name for name, task in results["tasks"].items() if task["chance"] is None]
    if others:
        raise ValueError(
            f"{', '.join(others)}: no share of right answers, as a study's scores are; leave out "
            "of the study and ask with midstream eval"
        )
    if place.rank == 0:
        remove_folder(kept)
    return {**results, "weights_digest": answerer.weights_digest}


def check_benchmarks(world: World, root: Path, planned: Mapping[str, Any]) -> None:
    """Raises ValueError for a benchmark of a user's folder that changed since it was planned."""
    if not isinstance(world, PublicFolder):
        return
    for task, expected in planned.items():
        found = benchmark_digest(root, task) if expected is not None else None
        if found != expected:
            raise ValueError(
                f"benchmark {task!r} of {root} has fingerprint {found}, the plan was made for "
                f"{expected}: its files changed; plan again"
            )


def scores_of(results: Mapping[str, Any]) -> dict[str, float | int]:
    """What an evaluation found, as one line of metrics: each task's score, and the stable ones."""
    scores = {name: task["score"] for name, task in results["tasks"].items()}
    stable = {f"stable.{name}": value for name, value in results["stable"].items()}
    return {"step": 0} | {k: v for k, v in (scores | stable).items() if v is not None}
