"""What a chat says of its model: name, training, scores."""

from collections.abc import Iterator
from pathlib import Path

from midstream.open_model import OpenedModel, WithModel, evaluations
from midstream.storage import read_json
from midstream.study.chain import came_from
from midstream.study.label import label
from midstream.study.ledger import Ledger
from midstream.study.stage import LoadDecoder, LoadModel, Pretrain

_TITLES = {
    "load_decoder": "imported",
    "load_model": "imported",
    "pretrain": "text",
    "continue": "images and text",
    "finetune": "conversations",
}


def describe(opened: OpenedModel) -> list[str]:
    """A line about the model, one for each stage of its training and one for each evaluation."""
    modules = [opened.vlm, *([] if opened.encoder is None else [opened.encoder])]
    # An encoder may be a part of the model as well.
    sizes = {id(value): value.numel() for module in modules for value in module.parameters()}
    sees = "sees pictures" if opened.encoder is not None else "text only"
    lines = [f"{opened.name}: {sum(sizes.values()):,} parameters, {sees}"]
    lines += [f"trained on {line}" for line in _training(opened)]
    return lines + [f"scores: {line}" for line in _scores(opened)]


def caution(opened: OpenedModel) -> str | None:
    """What to expect of a model that has not learnt conversations; None for one that has."""
    counts = read_json(opened.weights / "progress.json")["counts"]
    if counts["instruct"]:
        return None
    return (
        "this model was not fine-tuned on conversations: it goes on with text and captions, and "
        "may not answer"
    )


def _training(opened: OpenedModel) -> Iterator[str]:
    chain: list[tuple[WithModel, float]] = []
    found: tuple[WithModel, float] | None = (opened.stage, opened.completion)
    while found is not None:
        chain.append(found)
        found = came_from(found[0])
    for link, part in reversed(chain):
        folder = opened.ledger.folder(link)
        of = f"{part * 100:g} % of" if part != 1.0 else "in"
        milestones = isinstance(link, Pretrain)
        kept = folder / f"milestones/{part * 100:g}" if milestones else folder / "weights"
        if isinstance(link, LoadDecoder | LoadModel):
            yield f"{_TITLES[link.kind]}: {_tokens_before(opened.ledger, link)}, in {link.name}"
            continue
        yield f"{_TITLES[link.kind]}: {_tokens(kept / 'progress.json')}, {of} {link.name}"


def _tokens_before(ledger: Ledger, stage: LoadDecoder | LoadModel) -> str:
    found = ledger.results(stage)["tokens_seen_before"] if ledger.is_done(stage) else None
    return "tokens unknown" if found is None else f"{found:,} tokens"


def _tokens(progress: Path) -> str:
    if not progress.is_file():
        return "unknown, the stage is not in this store"
    found = read_json(progress)
    kinds = ", ".join(
        f"{kind} {count:,}"
        for kind, count in found["counts"].items()
        if count and kind not in ("pad", "target")
    )
    return f"{found['tokens_seen']:,} tokens ({kinds or 'of unknown kinds'})"


def _scores(opened: OpenedModel) -> Iterator[str]:
    for stage in evaluations(opened):
        tasks = opened.ledger.results(stage)["tasks"]
        scores = ", ".join(
            f"{task} {found['score']:.1%} (chance {found['chance']:.1%})"
            if found["chance"] is not None
            else f"{task} {found['metric']} {found['score']:.4g}"
            for task, found in sorted(tasks.items())
        )
        yield f"{scores} ({label(stage)})"
