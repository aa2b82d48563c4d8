"""Documents of a user's world: prepared, planned, trained on, held out and counted."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import tiny
from inputs import png
from midstream.config import (
    Amount,
    Amounts,
    PatchProjection,
    PublicFolder,
    Rows,
    TrainedTokenizer,
    Training,
)
from midstream.core.identity import world_fingerprint
from midstream.cost.cost import work_of
from midstream.launch.check_data import data_problems
from midstream.study.results import TrainingResult
from midstream.study.stages import Continue, Prepare
from midstream.study.store import Ledger
from midstream.work.show_data import open_stage, print_row

PAGES = 60


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Continue:
    """Documents of one to four pictures, every eighth longer than a row, and lines of text."""
    root = tmp_path_factory.mktemp("world")
    pages, web = root / "documents/pages", root / "text/web"
    pages.mkdir(parents=True)
    web.mkdir(parents=True)
    lines, shown = [], 0
    for number in range(PAGES):
        texts, images = list[str | None](), list[str | None]()
        for part in range(1 + number % 4):
            (pages / f"{shown}.png").write_bytes(png(shown, (9, 9)))
            texts += [None, f"Picture {part} of page {number} " + "is long. " * (number % 8)]
            images += [f"{shown}.png", None]
            shown += 1
        lines.append(json.dumps({"texts": texts, "images": images}) + "\n")
    (pages / "pages.jsonl").write_text("".join(lines))
    (web / "web.txt").write_text("".join(f"A line of text, number {n}.\n" for n in range(200)))
    data = Prepare(
        world=PublicFolder(root=root, fingerprint=world_fingerprint(root), validation_fraction=0.2),
        tokenizer=TrainedTokenizer(vocab_size=tiny.VOCAB_SIZE, sources=("web",)),
    )
    amounts = (Amount(source="pages", epochs=2), Amount(source="web", tokens=300))
    return Continue(
        data=data,
        encoder=PatchProjection(image_size=24, patch_size=12, hidden_size=16),
        decoder=tiny.DECODER,
        start=tiny.FromScratch(),
        training=Training(
            budget=Amounts(amounts=amounts),
            rows=Rows(row_length=128, batch_rows=8),
            schedule=tiny.warm(),
        ),
    )


@pytest.fixture(scope="module")
def done(stage: Continue, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    ledger = Ledger(tmp_path_factory.mktemp("store"))
    tiny.run_missing(ledger, stage)
    return ledger


def test_documents_are_trained_on_as_planned_and_their_views_are_counted(
    stage: Continue, done: Ledger
) -> None:
    assert not list(data_problems([stage], done))
    result = done.result(stage, TrainingResult)
    pages = result.sources["pages"]
    assert pages.seen is not None
    assert pages.pictures is not None
    assert pages.kind == "interleaved"
    assert pages.seen.seen == pages.realised_tokens
    assert pages.seen.image == 4 * pages.pictures.views == 8 * pages.pictures.distinct
    assert pages.cut["pieces"] > 2 * pages.cut["examples"] - 1 > 0
    # Loss of held-out documents with the pictures of others.
    held = result.held_out["pages"]
    assert held.loss is not None
    assert held.loss_other_picture is not None
    assert held.loss_other_picture != held.loss
    assert held.num_examples > 1


def test_a_plan_prices_what_documents_hold(stage: Continue, done: Ledger) -> None:
    work = work_of(stage, done, "cpu")
    assert work is not None
    result = done.result(stage, TrainingResult)
    views = result.sources["pages"].pictures
    assert views is not None
    assert (work.tokens, work.images) == (result.tokens.seen, views.views)
    # Long documents are cut between their parts, which leaves room in rows that have no text.
    assert work.rows == pytest.approx(len(open_stage(stage, done).plan), rel=0.02)
    assert work.rows * 128 > 1.05 * work.tokens
    # However many pieces a document comes in, its patches are no targets.
    assert work.targets == pytest.approx(result.tokens.target, rel=0.01)


def test_a_checkpoint_says_how_rows_of_documents_are_laid_out(
    stage: Continue, done: Ledger
) -> None:
    runner = tiny.runner(done)
    assert "rows of documents" in runner._origin(stage)


def test_a_row_of_documents_is_shown_with_its_pictures_in_their_places(
    stage: Continue, done: Ledger, tmp_path: Path
) -> None:
    stream, shown = io.StringIO(), open_stage(stage, done)
    for index in range(len(shown.plan)):
        print_row(shown, index, tmp_path, Console(file=stream, highlight=False, width=400))
    text = stream.getvalue()
    # The picture, what ends it, and what is learnt of it, in this order.
    assert "[image 4 positions -> row-0-image-0.png]\n<|separator|>⟦" in text
    assert text.count("[image 4 positions -> ") == len(list(tmp_path.glob("row-*-image-*.png")))
    assert "(goes on from another row)" in text


def test_what_documents_ask_of_rows_is_told_before_anything_runs(
    stage: Continue, done: Ledger
) -> None:
    def told(**rows: object) -> str:
        changed = stage.training.rows.model_copy(update=rows)
        training = stage.training.model_copy(update={"rows": changed})
        problems = data_problems([stage.model_copy(update={"training": training})], done)
        return "\n".join(map(str, problems))

    assert "4 positions, a row has 4" not in told(row_length=8)
    assert "and its separator take 5 positions, a row has 4" in told(row_length=4)
    assert "choose filled rows" in told(layout="padded")
    assert "for text only, pages are none" in told(layout="joined")
