"""The report shows what the store holds, all of it, and nothing else."""

import csv
import json
import math
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_studies import groups_of, write_report
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from midstream import config
from midstream.cli.app import app
from midstream.core.storage import read_json, write_json
from midstream.cost.graph import order
from midstream.report.curves import MAX_POINTS, curve_figure
from midstream.report.figures import panel_figure, stable_panel
from midstream.report.page import MAX_CURVES
from midstream.report.results import Part as Used
from midstream.report.results import (
    Spread,
    best_group,
    difference,
    line_rows,
    paired_difference,
    spent,
    write_csv,
)
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    DataStage,
    Evaluate,
    Finetune,
    FromScratch,
    Prepare,
    PrepareSource,
    Pretrain,
    Stage,
    TrainEncoder,
)
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study
from read_only import only_read

PERCENTS = (0, 20, 80, 100)
SEEDS = (0, 1, 2)
STABLE_VISION = {0: 0.21, 20: 0.25, 80: 0.342, 100: 0.33}
STABLE_TEXT = {0: 0.05, 20: 0.11, 80: 0.181, 100: 0.20}
HOSTILE = (
    '<script>alert("x")</script><img src=x onerror=alert(1)> & a very long answer ' + "la " * 60
)
TASKS = {"colours": ("vision", 0.25), "yes_no": ("vision", 0.5), "cloze": ("text", 0.25)}


def make_study() -> Study:
    """Four shares of text pre-training, three seeds, two text-only baselines."""
    data = Prepare(world=config.PocketWorld(), tokenizer=config.TrainedTokenizer(vocab_size=512))
    decoder = config.DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, vocab_size=512)
    seeing = config.EncoderConfig(
        image_size=32, patch_size=8, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64
    )
    cosine = config.WarmupCosine(peak_rate=1e-3, warmup_fraction=0.05)
    encoder = TrainEncoder(
        data=data,
        encoder=seeing,
        training=config.ContrastiveTraining(
            source="scenes", text_hidden_size=32, text_num_layers=1, num_steps=300, schedule=cosine
        ),
    )

    def training(seed: int, tokens: int, *sources: str) -> config.Training:
        shares = tuple(config.Share(source=name, share=1 / len(sources)) for name in sources)
        return config.Training(
            budget=config.Mixture(total_tokens=tokens, shares=shares),
            rows=config.Rows(row_length=128, batch_rows=8),
            schedule=cosine,
            seed=seed,
        )

    def text_run(seed: int) -> Pretrain:
        return Pretrain(
            data=data,
            decoder=decoder,
            training=training(seed, 1_000_000, "stories"),
            milestones=(0.2, 0.8, 1.0),
        )

    asked = config.Evaluation(visual_tasks=("colours", "yes_no"), text_tasks=("cloze",))

    def line(percent: int, seed: int) -> Line:
        start = FromScratch()
        if percent:
            start = ContinueFrom(stage=text_run(seed), completion=percent / 100)
        seen = Continue(
            data=data,
            encoder=encoder,
            decoder=decoder,
            start=start,
            training=training(seed, 400_000, "stories", "scenes"),
        )
        tuned = Finetune(start=seen, training=training(seed, 100_000, "dialogues"))
        return Line(
            name=f"{percent} %, seed {seed}",
            axes={"percent": percent, "seed": seed},
            result=Evaluate(of=tuned, evaluation=asked),
        )

    texts = config.Evaluation(text_tasks=("cloze",))
    return Study(
        name="when",
        question="After how much text should a language model first see images?",
        lines=tuple(line(percent, seed) for percent in PERCENTS for seed in SEEDS),
        figure=Figure(x="percent", x_label="Text pre-training done (%)", hollow=(0, 100)),
        baselines={
            f"text only, {share:.0%}": Evaluate(of=text_run(0), completion=share, evaluation=texts)
            for share in (0.8, 1.0)
        },
        notes=("Blocks of 32 pixels are a world, too.",),
    )


def finish(ledger: Ledger, stage: Stage, results: dict[str, Any]) -> None:
    with ledger.open_stage(stage) as work:
        work.finish(results)


def fill(ledger: Ledger, study: Study, pictures: Path) -> None:
    """Made-up results of every stage, in the formats of docs/store.md."""
    named = {line.result.identity: line.axes for line in study.lines}
    for number, stage in enumerate(order(study)):
        chance = random.Random(number)
        common = {"seconds": 10.0 + number, "peak_memory_bytes": 10_000_000 + number}
        if isinstance(stage, PrepareSource):
            source = {"num_examples": 900, "num_images": 0, "dropped": {}}
            sources = {
                "stories": source | {"kind": "text", "num_tokens": 2_000_000},
                "scenes": source | {"kind": "caption", "num_tokens": 90_000, "num_images": 6000},
                "dialogues": source | {"kind": "instruct", "num_tokens": 200_000},
            }
            finish(ledger, stage, common | sources[stage.source])
        elif isinstance(stage, DataStage):
            finish(ledger, stage, common | {"vocab_size": 512})
        elif isinstance(stage, TrainEncoder):
            metrics(ledger, stage, 300, 2048, chance)
            found = {"steps": 300, "first_loss": 6.0, "final_loss": 1.5, "retrieval": 0.5}
            finish(ledger, stage, common | found)
        elif isinstance(stage, Evaluate):
            results = evaluated(ledger, stage, named.get(stage.identity), pictures, chance)
            finish(ledger, stage, common | results)
        else:
            total = stage.training.budget.total_tokens
            steps = metrics(ledger, stage, total // 1000, 1000, chance)
            finish(ledger, stage, common | trained(stage, steps))


def metrics(
    ledger: Ledger, stage: Stage, steps: int, step_tokens: int, chance: random.Random
) -> int:
    ledger.folder(stage).mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 2 + 4 / math.sqrt(step) + chance.gauss(0, 0.05)}
        line |= {"rate": 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2, "seconds": 0.01}
        line["tokens_seen"] = step * step_tokens
        lines.append(json.dumps(line))
    (ledger.folder(stage) / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return steps


def trained(stage: Pretrain | Continue | Finetune, steps: int) -> dict[str, Any]:
    budget = stage.training.budget
    sources = {
        share.source: {
            "planned_tokens": int(budget.total_tokens * share.share),
            "realised_tokens": int(budget.total_tokens * share.share) + 7,
            "examples": 321,
            "epochs": 0.51,
            "largest_example_tokens": 97,
            "planned_sequences": None,
            "seen": {
                "text": 901,
                "caption": 0,
                "instruct": 0,
                "image": 18,
                "target": 777,
                "pad": 0,
            },
        }
        for share in budget.shares
    }
    return {
        "tokens_seen": steps * 1000,
        "steps": steps,
        "final_loss": 2.125,
        "sources": sources,
        "pad_fraction": 0.031,
        "image_row_pad_fraction": None if isinstance(stage, Pretrain) else 0.044,
    }


def evaluated(
    ledger: Ledger,
    stage: Evaluate,
    axes: dict[str, Any] | None,
    pictures: Path,
    chance: random.Random,
) -> dict[str, Any]:
    tasks = {}
    for task in (*stage.evaluation.visual_tasks, *stage.evaluation.text_tasks):
        kind, guess = TASKS[task]
        level = STABLE_TEXT[80]
        if axes is not None:
            level = (STABLE_VISION if kind == "vision" else STABLE_TEXT)[axes["percent"]]
        tasks[task] = {
            "kind": kind,
            "metric": "accuracy",
            "score": guess + level + chance.uniform(-0.012, 0.012),
            "stderr": 0.02,
            "chance": guess,
            "blind": guess + 0.04 + chance.uniform(-0.01, 0.01) if kind == "vision" else None,
            "num_examples": 12,
        }
        if kind == "vision":
            predictions(ledger.folder(stage) / "predictions" / f"{task}.parquet", pictures)
    seen = [task for task in tasks.values() if task["kind"] == "vision"]
    read = [task for task in tasks.values() if task["kind"] == "text"]

    def stable(found: list[dict[str, Any]], key: str) -> float | None:
        return sum(t[key] - t["chance"] for t in found) / len(found) if found else None

    return {
        "tasks": tasks,
        "stable": {
            "vision": stable(seen, "score"),
            "vision_blind": stable(seen, "blind"),
            "text": stable(read, "score"),
        },
    }


def predictions(path: Path, pictures: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = ("[0.2, 0.2, 0.7, 0.6]", HOSTILE, "blue", "red")
    rows = [
        {
            "example_id": f"q{index}",
            "prompt": f"Question {index}: what colour is the block on the left?",
            "prediction": answers[index % 4],
            "gold": json.dumps(["red", "red", "dark red"] if index % 4 else [0.1, 0.2, 0.5, 0.6]),
            "score": float(index % 2),
            "blind_prediction": "green",
            "blind_score": 0.0,
            "image": str(pictures / f"{index}.png") if index != 3 else None,
        }
        for index in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


@pytest.fixture(scope="module", autouse=True)
def _quick_curves() -> Iterator[None]:
    """One real drawing stands for the curves of all stages, to save the time of 28."""
    steps = range(1, 401)
    lines = [{"tokens_seen": 1000 * s, "loss": 2 + (s % 7) / s, "rate": 1 / s} for s in steps]
    drawn = curve_figure(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("midstream.report.page.curve_figure", lambda _: drawn)
        yield


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with its report; read only."""
    root = tmp_path_factory.mktemp("report")
    for index in range(12):
        size = 48 if index % 2 else 320
        image = Image.new("RGB", (size, size * 3 // 4), "#dfe8ee")
        draw = ImageDraw.Draw(image)
        draw.rectangle((size // 8, size // 8, size // 2, size // 2), fill=(200, 20 * index, 40))
        (root / "pictures").mkdir(exist_ok=True)
        image.save(root / "pictures" / f"{index}.png")
    fill(Ledger(root / "store"), study, root / "pictures")
    write_report(study, Ledger(root / "store"))
    return root / "store"


@pytest.fixture
def store(finished: Path, tmp_path: Path, undrawn: None) -> Iterator[Ledger]:
    """A copy of the finished store that the test may change; it has no report yet."""
    shutil.copytree(finished, tmp_path / "store", ignore=shutil.ignore_patterns("reports"))
    return Ledger(tmp_path / "store")


def page_of(store: Path) -> str:
    return (store / "reports" / "when" / "index.html").read_text()


def change(ledger: Ledger, stage: Stage, **values: Any) -> None:
    path = ledger.folder(stage) / "results.json"
    write_json(path, read_json(path) | values)


def test_every_line_and_baseline_is_one_flat_row(study: Study, finished: Path) -> None:
    ledger = Ledger(finished)
    rows = line_rows(study, ledger)
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
    rows = [row for row in line_rows(study, Ledger(finished)) if row["axis.percent"] == 80]
    scores = [row["yes_no.score"] for row in rows]
    spread = groups[2].spreads["yes_no.score"]
    mean = sum(scores) / 3
    assert spread.n == groups[2].planned == 3
    assert spread.mean == pytest.approx(mean)
    assert spread.sd == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 2))
    assert groups[2].mixed == ()


def test_best_group_has_the_highest_mean(study: Study, finished: Path) -> None:
    groups = groups_of(study, Ledger(finished))
    for column in ("stable.vision", "stable.text"):
        best = best_group(groups, column)
        assert best is not None
        assert best.spreads[column].mean == max(group.spreads[column].mean for group in groups)


def test_difference_has_the_textbook_interval() -> None:
    one = Spread((("a", 0.30), ("b", 0.32), ("c", 0.34)))
    other = Spread((("a", 0.26), ("b", 0.28), ("c", 0.30)))
    gap = difference(one, other)
    assert gap is not None
    assert gap.sd == pytest.approx(0.02)
    assert gap.low == pytest.approx(0.04 - 2.7764 * 0.02 * math.sqrt(2 / 3), abs=1e-5)
    assert gap.exceeds_spread is False
    paired = paired_difference(one, Spread((("a", 0.26), ("b", 0.281), ("c", 0.299))))
    assert paired is not None
    assert paired.exceeds_spread is True
    assert paired.sd == pytest.approx(0.001)


def test_one_repetition_each_claims_nothing() -> None:
    one, other = Spread((("a", 0.9),)), Spread((("a", 0.1),))
    for gap in (difference(one, other), paired_difference(one, other)):
        assert gap is not None
        assert gap.mean == pytest.approx(0.8)
        assert gap.low is gap.sd is gap.exceeds_spread is None
    assert difference(one, Spread(())) is None
    assert paired_difference(one, Spread((("b", 0.1),))) is None


def test_csv_gives_back_every_row(study: Study, finished: Path, tmp_path: Path) -> None:
    rows = line_rows(study, Ledger(finished))
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
        first = panel_figure(study, groups, stable_panel(panel, {"text only": 0.2}))
        assert (
            first["svg"]
            == panel_figure(study, groups, stable_panel(panel, {"text only": 0.2}))["svg"]
        )
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


def test_curves_change_with_the_metrics() -> None:
    lines = [{"tokens_seen": s, "loss": 1 / s, "rate": 1e-3} for s in range(1, 50)]
    drawn = curve_figure(lines)["svg"]
    assert drawn == curve_figure(lines)["svg"]
    for key in ("loss", "rate", "tokens_seen"):
        assert curve_figure([*lines[:-1], lines[-1] | {key: 60}])["svg"] != drawn


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


def test_page_holds_every_score_of_every_line(study: Study, finished: Path) -> None:
    text = page_of(finished)
    for row in line_rows(study, Ledger(finished)):
        for key, value in row.items():
            if key.endswith((".score", ".blind", "stable.vision", "stable.text")) and value:
                assert f"{100 * value:.1f}" in text
    assert "After how much text should a language model first see images?" in text
    assert "Blocks of 32 pixels are a world, too." in text
    assert "This study is not complete" not in text
    assert "missing" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)


def test_page_names_the_best_x_and_its_interval(study: Study, finished: Path) -> None:
    groups = groups_of(study, Ledger(finished))
    best, last = groups[2], groups[3]
    gap = difference(best.spreads["stable.vision"], last.spreads["stable.vision"])
    assert gap is not None
    assert gap.low is not None
    text = " ".join(page_of(finished).split())
    assert "is at <strong>Text pre-training done (%) = 80</strong>" in text
    assert (
        f"<strong>no clear difference</strong>, {100 * gap.mean:+.1f} points (95 % interval" in text
    )
    assert f"{100 * gap.low:+.1f}".replace("-", "−") in text
    assert "n = 3 and 3" in text


def test_page_says_which_stages_the_repetitions_share(study: Study, finished: Path) -> None:
    text = " ".join(page_of(finished).split())
    assert (
        "Repetitions differ from text pre-training, image-text training and fine-tuning on; "
        "they share encoder training, whose own spread is not in these numbers." in text
    )


def test_page_says_when_a_budget_is_missed(study: Study, store: Ledger) -> None:
    assert "All 39 budgets" in write_report(study, store).read_text()
    stage = study.lines[0].result.of
    sources = store.results(stage)["sources"]
    sources["dialogues"]["realised_tokens"] = 100_098
    change(store, stage, sources=sources)
    text = write_report(study, store).read_text()
    assert "In 1 of 39 budgets" in text
    assert "at worst by 98 tokens" in text


def test_pictures_are_found_after_the_store_has_moved(study: Study, store: Ledger) -> None:
    prepared = store.folder(study.lines[0].result.of.data.laid_out[0])
    (prepared / "world").mkdir()
    Image.new("RGB", (40, 30), "red").save(prepared / "world" / "a.png")
    for line in study.lines:
        path = store.predictions(line.result, "colours")
        table = pq.read_table(path).to_pylist()
        moved = f"/elsewhere/runs/{prepared.name}/world/a.png"
        pq.write_table(pa.Table.from_pylist([row | {"image": moved} for row in table]), path)
    assert "picture missing" not in write_report(study, store).read_text()


def test_page_changes_with_a_result(study: Study, store: Ledger) -> None:
    before = write_report(study, store).read_text()
    stage = study.lines[4].result
    tasks = store.results(stage)["tasks"]
    tasks["colours"]["score"] = 0.98765
    change(store, stage, tasks=tasks, stable={"vision": 0.87654, "vision_blind": 0, "text": 0.1})
    after = write_report(study, store).read_text()
    assert "98.8" in after
    assert "87.7" in after
    assert "98.8" not in before
    assert "87.7" not in before
    assert "is at <strong>Text pre-training done (%) = 20</strong>" in " ".join(after.split())


def test_page_shows_realised_tokens_padding_and_memory_of_the_store(
    study: Study, store: Ledger
) -> None:
    stage = study.lines[0].result.of
    assert isinstance(stage, Finetune)
    sources = store.results(stage)["sources"]
    sources["dialogues"]["realised_tokens"] = 123_456
    change(store, stage, sources=sources, pad_fraction=0.4321, peak_memory_bytes=7 * 2**30)
    text = write_report(study, store).read_text()
    assert "123,456" in text
    assert "+23,456" in text
    assert "43.2 %" in text
    assert "7.0 GiB" in text
    assert stage.identity[:7] in text


def test_page_says_what_sharing_saved(study: Study, finished: Path) -> None:
    text = " ".join(page_of(finished).split())
    stages = order(study)
    assert f"{len(stages)} stages carry 12 lines and 2 baselines" in text
    assert re.search(r"sharing saved \d+ % of the time", text)
    assert re.search(r"planned FLOPs the saving is \d+ %", text)


def test_hostile_predictions_are_shown_as_text(finished: Path) -> None:
    text = page_of(finished)
    assert "&lt;script&gt;alert(" in text
    assert "<script" not in text
    assert "<img src=x" not in text


def test_hostile_names_notes_and_errors_are_shown_as_text(study: Study, store: Ledger) -> None:
    hostile = study.model_copy(
        update={"question": f"why {HOSTILE}?", "notes": (HOSTILE,), "name": "when"}
    )
    stage = study.lines[0].result
    (store.folder(stage) / "SUCCESS").unlink()
    store.mark_failed(stage, f"boom {HOSTILE}")
    text = write_report(hostile, store).read_text()
    assert text.count("&lt;script&gt;") >= 3
    assert "<script" not in text


def test_page_needs_no_network_and_no_scripts(finished: Path) -> None:
    text = page_of(finished)
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', text)
    assert len(sources) > 20
    assert all(source.startswith("data:image/") for source in sources)
    assert "<link" not in text
    assert not re.search(r"\son\w+=|\bstyle=|@import|url\(", text.split("</style>")[0])
    assert not re.search(r"<[^>]*\s(?:on\w+|style)=", text)


def test_style_sheet_is_the_one_that_the_policy_names(finished: Path) -> None:
    import base64
    import hashlib

    text = page_of(finished)
    sheet = text.split("<style>")[1].split("</style>")[0]
    named = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert f"style-src 'sha256-{named}'" in text


def test_page_of_twelve_lines_stays_small(finished: Path) -> None:
    assert len(page_of(finished)) < 3_000_000


def test_figures_lie_beside_the_page_as_svg_png_and_pdf(study: Study, finished: Path) -> None:
    folder = finished / "reports" / "when"
    drawn = {path.stem for path in folder.glob("*.png")}
    panels = ("stable", "common", "benchmarks")
    kinds = {f"{panel}_{kind}" for panel in panels for kind in ("vision", "text")}
    assert drawn == kinds | {"rates"}
    assert drawn == {path.stem for path in folder.glob("*.pdf")}
    assert all(path.read_bytes().startswith(b"%PDF") for path in folder.glob("*.pdf"))
    losses = {path.stem for path in folder.glob("*.svg")} - drawn
    trained = {
        f"curves_{s.name}"
        for s in order(study)
        if s.kind != "evaluate" and not isinstance(s, DataStage)
    }
    assert losses < trained
    assert len(losses) == MAX_CURVES
    text = " ".join(page_of(finished).split())
    assert f"{MAX_CURVES} of {len(trained)} training stages are drawn" in text


def test_a_report_goes_elsewhere_from_a_store_that_may_only_be_read(
    study: Study, store: Ledger, tmp_path: Path
) -> None:
    store.save_study(study)
    out = tmp_path / "mine"
    asked = ["report", "when", "--store", str(store.store), "--out", str(out)]
    with only_read(store.store):
        result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert f"report: {out / 'when' / 'index.html'}" in result.stdout
    assert (out / "when" / "results.csv").is_file()


def test_a_store_that_takes_no_report_is_refused_with_the_way_out(
    study: Study, store: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save_study(study)
    monkeypatch.setattr(
        "midstream.core.storage.os.access", lambda _, mode, **more: not mode & os.W_OK
    )
    result = CliRunner().invoke(app, ["report", "when", "--store", str(store.store)])
    assert result.exit_code == 2
    assert f"{store.store} belongs to" in result.stderr
    assert "--out DIR" in result.stderr


def test_missing_and_failed_stages_are_said_first(study: Study, store: Ledger) -> None:
    gone, broken = study.lines[3].result, study.lines[9].result.of
    shutil.rmtree(store.folder(gone))
    (store.folder(broken) / "SUCCESS").unlink()
    store.mark_failed(broken, "the loss became inf at step 12")
    (store.folder(study.lines[9].result) / "SUCCESS").unlink()
    rows = line_rows(study, store)
    assert rows[3]["stable.vision"] is None
    assert rows[3]["state"] == "new"
    text = write_report(study, store).read_text()
    before, _, after = text.partition('aria-label="The answer"')
    assert f"3 of {len(order(study))} stages are not done" in before
    assert gone.identity[:7] in before
    assert "the loss became inf at step 12" in before
    line = after.split(f"<tr><th>{study.lines[3].name}")[1].split("</tr>")[0]
    assert line.count("missing") >= 6
    assert after.count('<td>2 <span class="missing">of 3</span></td>') == 2
    assert "(n = 2 of 3 planned)" in after


@pytest.mark.usefixtures("undrawn")
def test_page_of_an_empty_store_claims_nothing(study: Study, tmp_path: Path) -> None:
    text = write_report(study, Ledger(tmp_path)).read_text()
    assert f"{len(order(study))} of {len(order(study))} stages are not done" in text
    assert text.count("No line has a result yet.") == 2
    assert not re.search(r"\d ± \d|interval [−+]", text)


def test_a_picture_that_is_gone_is_named(study: Study, store: Ledger) -> None:
    rows = line_rows(study, store)
    best = max(rows[:12], key=lambda row: row["stable.vision"])
    stage = next(line.result for line in study.lines if line.result.name == best["stage"])
    path = store.predictions(stage, "colours")
    table = pq.read_table(path).to_pylist()
    table[0]["image"] = "nowhere/gone.png"
    pq.write_table(pa.Table.from_pylist(table), path)
    text = write_report(study, store).read_text()
    assert "picture missing" in text
    assert "nowhere/gone.png" in text


def test_tasks_with_two_chance_levels_are_refused(study: Study, store: Ledger) -> None:
    stage = study.lines[0].result
    tasks = store.results(stage)["tasks"]
    tasks["colours"]["chance"] = 0.125
    change(store, stage, tasks=tasks)
    with pytest.raises(ValueError, match=r"colours.*0\.125"):
        write_report(study, store)
