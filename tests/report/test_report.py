"""The report shows what the store holds, all of it, and nothing else."""

import csv
import math
import random
import re
from pathlib import Path

import made_studies
import pytest
from made_studies import flat_rows, groups_of
from made_whole import PERCENTS

from midstream.report.curves import MAX_POINTS, curve_figure
from midstream.report.figures import panel_figure, stable_panel
from midstream.report.gather import flat_records, seen_grid, seen_records
from midstream.report.line_rows import Part as Used
from midstream.report.line_rows import spent, write_csv
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Study


def test_every_line_and_baseline_is_one_flat_row(study: Study, finished: Path) -> None:
    ledger = Ledger(finished)
    rows = flat_rows(study, ledger)
    assert len(rows) == 14
    assert len({tuple(row) for row in rows}) == 1
    for line, row in zip(study.lines, rows, strict=False):
        found = ledger.results(line.result)
        assert row["axis.percent"] == line.axes["percent"]
        assert row["stable.vision_blind"] == found["stable"]["vision_blind"]
        assert row["colours.score"] == found["tasks"]["colours"]["score"]
        assert row["colours.chance"] == 0.25
        assert row["tokens.continue"] == 400_000
        assert row["tokens.pretrain"] == (line.axes["percent"] * 10_000 or None)
    assert [row["tokens.pretrain"] for row in rows[-2:]] == [800_000, 1_000_000]
    assert rows[-1]["stable.vision"] is None


def test_a_part_of_a_text_run_costs_the_steps_up_to_its_milestone(
    study: Study, finished: Path
) -> None:
    ledger, run = Ledger(finished), study.baselines["text only, 80%"].of
    tokens, seconds = spent(Used(run, 0.2), ledger)
    assert tokens == 200_000
    assert seconds == pytest.approx(200 * 0.01)
    assert spent(Used(run, 0.2005), ledger)[0] == 201_000


def test_summary_gives_mean_and_spread_over_seeds(study: Study, finished: Path) -> None:
    groups = groups_of(study, Ledger(finished))
    assert [group.x for group in groups] == list(PERCENTS)
    rows = [row for row in flat_rows(study, Ledger(finished)) if row["axis.percent"] == 80]
    scores = [row["yes_no.score"] for row in rows]
    spread = groups[2].spreads["yes_no.score"]
    mean = sum(scores) / 3
    assert spread.n == groups[2].planned == 3
    assert spread.mean == pytest.approx(mean)
    assert spread.sd == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 2))
    assert groups[2].mixed == ()


def test_csv_gives_back_every_row(study: Study, finished: Path, tmp_path: Path) -> None:
    rows = flat_rows(study, Ledger(finished))
    write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as stream:
        back = list(csv.DictReader(stream))
    assert len(back) == len(rows)
    for row, read in zip(rows, back, strict=True):
        assert read == {key: "" if value is None else str(value) for key, value in row.items()}
        assert float(read["stable.text"]) == row["stable.text"]
    assert (finished / "reports/when/results.csv").read_bytes() == (
        tmp_path / "results.csv"
    ).read_bytes()


def test_figures_are_the_same_bytes_each_time(study: Study, finished: Path) -> None:
    groups = groups_of(study, Ledger(finished))
    for panel in ("vision", "text"):
        drawn = stable_panel(panel, {"text only": 0.2})
        first = panel_figure(study, groups, drawn)
        assert first["png"].startswith(b"\x89PNG")
        assert b"prefers-color-scheme: dark" in first["svg"]
        kept = (finished / f"reports/when/stable_{panel}.svg").read_bytes()
        assert (kept == first["svg"]) is (panel == "vision")


def test_figure_changes_with_a_score_and_with_its_hollow_marks(
    study: Study, finished: Path
) -> None:
    groups = groups_of(study, Ledger(finished))
    drawn = panel_figure(study, groups, stable_panel("vision", {}))["svg"]
    full = study.model_copy(update={"figure": study.figure.model_copy(update={"hollow": ()})})
    assert panel_figure(full, groups, stable_panel("vision", {}))["svg"] != drawn
    assert panel_figure(study, groups[1:], stable_panel("vision", {}))["svg"] != drawn


def test_figure_takes_an_axis_of_names_and_a_curve_for_each_value_of_by(
    study: Study, finished: Path
) -> None:
    lines = tuple(
        line.model_copy(
            update={"axes": {"optimizer": ("carry", "fresh")[i % 2], "width": i // 6, "seed": i}}
        )
        for i, line in enumerate(study.lines)
    )
    about = Figure(x="optimizer", x_label="Adam's moments", by="width")
    named = study.model_copy(update={"lines": lines, "figure": about})
    groups = groups_of(named, Ledger(finished))
    assert [(group.x, group.by, group.planned) for group in groups] == [
        ("carry", 0, 3),
        ("fresh", 0, 3),
        ("carry", 1, 3),
        ("fresh", 1, 3),
    ]
    assert panel_figure(named, groups, stable_panel("vision", {}))["svg"].startswith(b"<?xml")


def test_a_figure_over_an_axis_that_a_line_lacks_is_refused(study: Study, tmp_path: Path) -> None:
    figure = study.figure.model_copy(update={"by": "width"})
    with pytest.raises(ValueError, match="'width', and line '0 %, seed 0' has only percent, seed"):
        groups_of(study.model_copy(update={"figure": figure}), Ledger(tmp_path))


def test_curves_change_with_the_metrics_and_what_is_held_out() -> None:
    lines = [{"tokens_seen": s, "loss": 1 / s, "rate": 1e-3} for s in range(1, 50)]
    drawn = curve_figure(lines)["svg"]
    changes = [{"loss": 60}, {"rate": 60}, {"tokens_seen": 60}]
    changes += [{"held_out": {"web": {"loss": loss}}} for loss in (0.5, 0.7)]
    others = [curve_figure([*lines[:-1], lines[-1] | change])["svg"] for change in changes]
    assert len({drawn, *others}) == 6
    nothing = lines[-1] | {"held_out": {"web": {"loss": None}}}
    assert curve_figure([*lines[:-1], nothing])["svg"] == drawn


def test_long_curves_are_drawn_from_at_most_two_hundred_points() -> None:
    chance = random.Random(0)
    lines = [
        {"step": s, "tokens_seen": 10 * s, "loss": chance.random(), "rate": 1e-3}
        for s in range(1, 5001)
    ]
    svg = curve_figure(lines)["svg"]
    assert len(svg) < 40_000
    paths = [len(re.findall(rb"[ML] ", path)) for path in re.findall(rb'd="([^"]*)"', svg)]
    assert 100 < max(paths) <= MAX_POINTS
    with pytest.raises(ValueError, match="no metrics"):
        curve_figure([])


def test_axes_called_as_the_ledgers_own_columns_stay_apart(ledger: Ledger) -> None:
    axes, scores = ("stage", "views"), {("early", 1): (0.1,), ("late", 2): (0.2,)}
    study = made_studies.study(scores, axes=axes)
    for line in study.lines:
        times = int(line.axes["views"])
        pictures = {"distinct": 30, "views": 30 * times, "times": [[times, 30]]}
        share = {"planned_tokens": 9, "realised_tokens": 9, "largest_example_tokens": 3}
        stage = line.result.of
        sources = {"talks": share | {"pictures": pictures}}
        made_studies.finish(ledger, stage, {"tokens_seen": 9, "sources": sources})
    records = seen_records(study, ledger)
    own = ("axis.stage", "axis.views", "stage", "source", "pictures", "views", "times")
    assert [tuple(one[name] for name in own) for one in flat_records(records)] == [
        ("early", 1, "finetune", "talks", 30, 30, "1:30"),
        ("late", 2, "finetune", "talks", 30, 60, "2:30"),
    ]
    rows = seen_grid(study, records).rows
    assert [(row[0], row[1], row[-2]) for row in rows] == [
        ("early, 1", "Fine-tuning", "1.00"),
        ("late, 2", "Fine-tuning", "2.00"),
    ]
