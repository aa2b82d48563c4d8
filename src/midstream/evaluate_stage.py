"""An Evaluate stage: only what no evaluation of the model asked before, of files as planned."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from midstream.benchmark_files import benchmark_digest
from midstream.config import PublicFolder, World
from midstream.eval.benchmark import evaluate
from midstream.eval.earlier import earlier_tasks
from midstream.eval.kept_answers import BATCHES_AT_ONCE, EvaluationStopped, KeptAnswers
from midstream.eval.predict import ModelAnswerer
from midstream.identity import kept_digests
from midstream.open_data import world_root
from midstream.open_model import evaluations, open_model, weights_folder
from midstream.storage import remove_folder
from midstream.study.ledger import Ledger
from midstream.study.stage import Evaluate, Pretrain
from midstream.train.loop import Interrupted
from midstream.train.parallel import Place


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
        weights_folder(ledger, stage.of, stage.completion)
        folder = folder / "milestones" / f"{stage.completion * 100:g}"
    opened = open_model(folder, place.device)
    answerer = ModelAnswerer(
        opened.vlm,
        opened.codec,
        encode=opened.encode if opened.encoder is not None else None,
        encoder=stage.of.model.encoder,
        max_new_tokens=stage.evaluation.max_new_tokens,
        batch_size=stage.evaluation.batch_size,
    )
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
    return {"step": 0, **scores, **{k: v for k, v in stable.items() if v is not None}}
