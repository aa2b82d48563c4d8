"""What a report says of a ladder: laws without the left-out size, and whether they tell it."""

import made_studies as made
import numpy as np
import pytest

import tiny
from midstream.config import DecoderConfig
from midstream.cost.graph import plan
from midstream.cost.price import sizes_price
from midstream.report.gather import exports, gather
from midstream.report.line_rows import line_rows
from midstream.report.page import summary_text, write_facts
from midstream.report.size_laws import Laws, laws_of
from midstream.study.axes import with_field
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Ladder, Line, Study

WIDTHS, SEEDS, SHARES = (8, 16, 32, 64), (1, 2, 3), (10, 50)
FLOORS = {10: 1.4, 50: 1.2}


def loss(size: int, share: int) -> float:
    return FLOORS[share] + (size / 20_000) ** -0.5


def line(width: int, share: int, seed: int) -> Line:
    """A model of its own width, share and seed."""
    decoder = DecoderConfig(**{**tiny.DECODER.model_dump(), "hidden_size": width})
    result = with_field(tiny.RESULT, "pretrain.decoder", decoder)
    result = with_field(result, "continue.decoder", decoder)
    result = with_field(result, "continue.training.seed", 100 * share + seed)
    result = result.model_copy(update={"evaluation": made.ASKED})
    size = float(f"{decoder.num_parameters / 1e6:.4g}")
    return Line(
        name=f"{width} {share} {seed}",
        axes={"size": size, "share": share, "seed": seed},
        result=result,
    )


def make(predict: int = WIDTHS[-1]) -> Study:
    lines = tuple(line(w, share, seed) for share in SHARES for w in WIDTHS for seed in SEEDS)
    of = next(one for one in lines if one.name.startswith(f"{predict} "))
    return Study(
        name="ladder",
        question="What do small sizes tell?",
        lines=lines,
        figure=Figure(x="size", x_label="size", by="share"),
        ladder=Ladder(axis="size", predict=float(of.axes["size"])),
    )


def fill(ledger: Ledger, study: Study, *, answers: bool = False, **moved: float) -> None:
    """Losses about the law; `moved` by a line's width, as w64=1.1."""
    for number, one in enumerate(study.lines):
        generator = np.random.default_rng(number)
        share, tuned = int(one.axes["share"]), one.result.of
        size = tuned.model.decoder.num_parameters
        factor = moved.get(f"w{tuned.model.decoder.hidden_size}", 1.0)
        measured = loss(size, share) * factor * np.exp(0.003 * generator.normal())
        held = {"loss": measured, "bits_per_byte": None, "loss_other_picture": None}
        held |= {"num_targets": 9, "num_examples": 3}
        trained = {"tokens_seen": 9, "final_loss": 1.0, "first_rate": 1e-3, "last_rate": 1e-4}
        made.finish(ledger, tuned.start, trained | {"held_out": {"pictures": held}})
        made.finish(ledger, tuned, trained)
        score = 0.2 + 0.05 * np.log2(size / 20_000) * (share == 50) + 0.01 * generator.normal()
        made.finish(ledger, one.result, made.results(float(score)))
        for task in (*made.ASKED.visual_tasks, *made.ASKED.text_tasks) if answers else ():
            path = ledger.folder(one.result) / "predictions" / f"{task}.parquet"
            made.write_answers(path, task, range(4), float(score))


def laws(study: Study, ledger: Ledger) -> list[Laws]:
    return laws_of(study, line_rows(study, ledger), ledger)


def first_loss(found: list[Laws]) -> Laws:
    return next(law for law in found if law.title.startswith("loss"))


def test_a_left_out_size_that_keeps_the_law_is_told_and_one_that_does_not_is_said(
    ledger: Ledger,
) -> None:
    study = make()
    fill(ledger, study)
    found = laws(study, ledger)
    law = first_loss(found)
    assert [rung.inside for rung in law.rungs] == 2 * [None, None, None, True]
    assert "exponent" in law.sentence
    told = law.rungs[3].told
    # Effects grow along the sizes.
    effect = next(law for law in found if law.title.startswith("Vision"))
    assert effect.title == "Vision, stable: share 50 less share 10"
    assert "+5." in effect.sentence or "+4." in effect.sentence
    assert len(effect.rungs) == len(WIDTHS)
    assert effect.rungs[-1].inside is True
    fill(ledger, study, w64=1.2)
    moved = first_loss(laws(study, ledger))
    assert moved.rungs[3].told == told  # the fit never sees it
    assert [rung.inside for rung in moved.rungs] == 2 * [None, None, None, False]


def test_before_the_left_out_size_is_run_its_prediction_stands_by_itself(ledger: Ledger) -> None:
    study = make()
    small = [one for one in study.lines if not one.name.startswith("64 ")]
    fill(ledger, study.model_copy(update={"lines": tuple(small)}))
    rung = first_loss(laws(study, ledger)).rungs[3]
    assert (rung.values, rung.inside) == ((), None)
    assert rung.told.low < loss(rung.parameters, 10) < rung.told.high


def test_what_is_not_told_is_a_sentence_with_its_reason(ledger: Ledger) -> None:
    study = make()
    assert laws(study, ledger)[0].title.startswith("Vision")
    assert "no line, since" in laws(study, ledger)[0].sentence
    few = study.model_copy(update={"lines": tuple(o for o in study.lines if o.axes["seed"] == 1)})
    fill(ledger, few)
    law = first_loss(laws(few, ledger))
    assert "no law, since there is 1 model" in law.sentence
    assert {rung.told for rung in law.rungs} == {None}


def test_page_summary_and_tables_have_the_laws(ledger: Ledger, undrawn: None) -> None:
    study = make()
    fill(ledger, study, answers=True)
    facts = gather(study, ledger)
    write_facts(facts)
    folder = ledger.store / "reports" / "ladder"
    assert {path.suffix for path in folder.glob("ladder.*")} == {
        ".svg",
        ".png",
        ".pdf",
        ".csv",
        ".tex",
    }
    page, summary = (folder / "index.html").read_text(), summary_text([facts], "all", "command")
    for law in facts.laws:
        for text in (page, summary):
            assert law.title in text
    table = next(one for one in exports(facts) if one.name == "ladder")
    assert sum(record["left_out"] for record in table.records) == len(facts.laws) + 1
    assert all("left out" in row[2] for row in table.grid.rows if row[7] != "–")


def test_a_plan_prices_the_sizes_of_the_fit_and_the_left_out_one_apart(ledger: Ledger) -> None:
    study = make()
    work = plan(study, ledger)
    hours = {row.stage.name: float(isinstance(row.stage, Evaluate)) for row in work.rows}
    price = sizes_price(study, work, hours)
    assert sum(price.flops.values()) == pytest.approx(work.model_flops[0])
    assert price.hours == {"fitted": 18.0, "predicted": 6.0, "shared": 0.0}
    assert price.flops["shared"] > 0
    shared = next(row.stage.name for row in work.rows if len(row.lines) == len(study.lines))
    del hours[shared]
    partly = sizes_price(study, work, hours)
    assert partly.hours == {"fitted": 18.0, "predicted": 6.0, "shared": None}
    assert "which they predict" in price.sentence(lambda flops: flops)
    assert sizes_price(study.model_copy(update={"ladder": None}), work, {}) is None
