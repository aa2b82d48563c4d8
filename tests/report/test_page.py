"""What a study's page says, and that it says it safely."""

import base64
import hashlib
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_studies import flat_rows, write_report
from made_whole import HOSTILE, change, page_of
from PIL import Image
from typer.testing import CliRunner

from midstream.cli.app import app
from midstream.cost.graph import order
from midstream.report.gather import answer, gather
from midstream.report.page import MAX_CURVES
from midstream.study.stages import DataStage
from midstream.study.store import Ledger
from midstream.study.studies import Study
from read_only import only_read


def test_page_holds_every_score_of_every_line(study: Study, finished: Path) -> None:
    text = page_of(finished)
    for row in flat_rows(study, Ledger(finished)):
        for key, value in row.items():
            if key.endswith((".score", ".blind", "stable.vision", "stable.text")) and value:
                assert f"{100 * value:.1f}" in text
    assert "After how much text should a language model first see images?" in text
    assert "Blocks of 32 pixels are a world, too." in text
    assert "This study is not complete" not in text
    assert "missing" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)


def test_page_names_the_best_x_and_its_interval(study: Study, finished: Path) -> None:
    facts = gather(study, Ledger(finished))
    best = answer(study, facts.rows, facts.groups, "vision")["curves"][0]
    against = {other["x"]: other["gap"] for other in best["against"]}
    gap = against[100.0]
    text = " ".join(page_of(finished).split())
    assert "is at <strong>Text pre-training done (%) = 80</strong>" in text
    assert f"<strong>not decided</strong>, {100 * gap.mean:+.1f} points (95 % interval" in text
    assert f"{100 * gap.low:+.1f}".replace("-", "−") in text
    assert "n = 3)" in text


def test_page_says_which_stages_the_repetitions_share(study: Study, finished: Path) -> None:
    text = " ".join(page_of(finished).split())
    assert (
        "Repetitions differ from text pre-training, image-text training and fine-tuning on; "
        "they share encoder training, whose own spread is not in these numbers." in text
    )


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


def test_page_changes_with_scores_realised_tokens_padding_and_memory_of_the_store(
    study: Study, finished: Path, store: Ledger
) -> None:
    before = page_of(finished)
    assert "All 39 budgets" in before
    asked, trained = study.lines[4].result, study.lines[0].result.of
    tasks, sources = store.results(asked)["tasks"], store.results(trained)["sources"]
    tasks["colours"]["score"] = 0.98765
    change(store, asked, tasks=tasks, stable={"vision": 0.87654, "vision_blind": 0, "text": 0.1})
    sources["talks"]["realised_tokens"] = 100_098
    change(store, trained, sources=sources, pad_fraction=0.4321, peak_memory_bytes=7 * 2**30)
    after = write_report(study, store).read_text()
    for text in ("98.8", "87.7", "100,098", "In 1 of 39 budgets", "at worst by 98 tokens"):
        assert text in after
        assert text not in before
    for text in ("+98", "43.2 %", "7.0 GiB", trained.identity[:7]):
        assert text in after
    assert "is at <strong>Text pre-training done (%) = 20</strong>" in " ".join(after.split())


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
    sheet = text.split("<style>")[1].split("</style>")[0]
    named = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    assert f"style-src 'sha256-{named}'" in text
    assert len(text) < 3_000_000


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
    # What an earlier report had of other stages goes, what is somebody's stays.
    for name in ("curves_pretrain-0123.svg", "benchmarks_gone.pdf", "notes.csv"):
        (out / "when").mkdir(parents=True, exist_ok=True)
        (out / "when" / name).touch()
    asked = ["report", "when", "--store", str(store.store), "--out", str(out)]
    with only_read(store.store):
        result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert f"report: {out / 'when' / 'index.html'}" in result.stdout
    assert (out / "when" / "results.csv").is_file()
    there = {path.name for path in (out / "when").iterdir()}
    assert not {"curves_pretrain-0123.svg", "benchmarks_gone.pdf"} & there
    assert {"notes.csv", "rates.svg"} <= there


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


def test_missing_and_failed_stages_are_said_first_and_hostile_words_are_shown_as_text(
    study: Study, store: Ledger
) -> None:
    gone, broken = study.lines[3].result, study.lines[9].result.of
    shutil.rmtree(store.folder(gone))
    (store.folder(broken) / "SUCCESS").unlink()
    store.mark_failed(broken, f"the loss became inf at step 12 {HOSTILE}")
    (store.folder(study.lines[9].result) / "SUCCESS").unlink()
    rows = flat_rows(study, store)
    assert rows[3]["stable.vision"] is None
    assert rows[3]["state"] == "new"
    hostile = study.model_copy(update={"question": f"why {HOSTILE}?", "notes": (HOSTILE,)})
    text = write_report(hostile, store).read_text()
    assert text.count("&lt;script&gt;") >= 3
    assert "<script" not in text
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
    rows = flat_rows(study, store)
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
