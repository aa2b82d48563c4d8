"""Tables beside a paper's, exports, suites, the summary, and where an axis has its places."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import made_studies as made
import pytest
from typer.testing import CliRunner

from midstream.cli.app import app
from midstream.report.figures import panel_figure, scale_of, stable_panel, x_label
from midstream.report.gather import exports, gather, write_exports
from midstream.report.line_rows import line_rows
from midstream.report.page import summary_text, write_facts, write_index
from midstream.report.table import (
    Grid,
    escape_latex,
    table_view,
    to_latex,
    to_markdown,
    view_grid,
    view_records,
)
from midstream.study.store import Ledger
from midstream.study.studies import Claim, Printed, Published, Study, Suite, Table

SCORES = {
    (20, "a"): (0.20, 0.22),
    (20, "b"): (0.30, 0.34),
    (80, "a"): (0.40, 0.42),
    (80, "b"): (0.50, 0.54),
}
AXES = ("x", "kind")
HOSTILE = "<script>alert(1)</script> | 5 % & $x_1$ \\ #{y}"


def tabled(**table: Any) -> Study:
    known = {
        "title": "Table",
        "rows": "x",
        "scores": ("stable.vision",),
        "source": "paper, Table 3",
    }
    return made.study(SCORES, axes=AXES, table=Table(**(known | table)))


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    made.fill(ledger, tabled(), SCORES, axes=AXES)
    return ledger


def grid_of(study: Study, ledger: Ledger) -> Grid:
    view = table_view(study, line_rows(study, ledger))
    return view_grid(view)


def test_printed_numbers_stand_beside_ours_under_the_papers_name(filled: Ledger) -> None:
    study = tabled(
        columns="kind",
        printed=(Printed(at={"x": 20, "kind": "a"}, score="stable.vision", value=0.5871),),
    )
    grid = grid_of(study, filled)
    assert grid.heads == ("x", "kind a", "kind a (paper)", "kind b")
    assert grid.rows[0] == ("20", "21.0 ± 1.4 (2)", "58.71", "32.0 ± 2.8 (2)")
    assert grid.rows[1] == ("80", "41.0 ± 1.4 (2)", "–", "52.0 ± 2.8 (2)")
    assert "paper: as printed in paper, Table 3, not computed here" in grid.notes


def test_a_row_may_be_a_tasks_metric_or_a_published_set_and_quoted_numbers_keep_their_error(
    ledger: Ledger,
) -> None:
    other = Published(
        name="Other",
        scores={"pope": 0.87, "suite:two": 0.5814},
        errors={"pope": 0.003},
        source="its paper",
    )
    study = tabled(
        rows="scores", columns="kind", scores=("pope", "pope:f1", "suite:two"), published=(other,)
    )
    made.fill(ledger, study, SCORES, axes=AXES)
    for line in study.lines:
        folder = ledger.folder(line.result)
        found = json.loads((folder / "results.json").read_text())
        found["tasks"]["pope"]["details"] = {"f1": 0.25}
        found["suites"] = {"two": {"score": 0.5, "missing": [], "shortened": []}}
        (folder / "results.json").write_text(json.dumps(found))
    grid = grid_of(study, ledger)
    assert [row[0] for row in grid.rows] == ["pope", "pope (f1)", "stable score, two"]
    assert [row[1].split()[0] for row in grid.rows[1:]] == ["25.0", "50.0"]
    assert [row[-1] for row in grid.rows] == ["87.00 ± 0.3", "–", "58.14"]


def test_printed_seeds_are_told_apart_and_places_of_the_paper_alone_are_not_measured(
    filled: Ledger,
) -> None:
    printed = tuple(
        Printed(at={"x": x, "kind": "a", "seed": seed}, score="pope", value=value)
        for x, seed, value in ((20, 7, 0.7383), (20, 365, 0.7446), (50, 7, 0.7))
    )
    grid = grid_of(tabled(columns="kind", scores=("pope",), printed=printed), filled)
    assert grid.rows[0][2] == "73.83 (seed 7), 74.46 (seed 365)"
    assert grid.rows[1][:3] == ("50", "not measured", "70.00")


def test_a_turned_table_has_a_row_a_score_and_quotes_models_with_their_source(
    filled: Ledger,
) -> None:
    other = Published(name="PaliGemma 3B", scores={"pope": 0.87}, source="Beyer et al. 2024")
    study = tabled(rows="scores", columns="kind", scores=("pope", "vqav2"), published=(other,))
    grid = grid_of(study, filled)
    assert grid.heads == ("score", "kind a", "kind b", "PaliGemma 3B")
    assert [row[0] for row in grid.rows] == ["pope", "vqav2"]
    assert grid.rows[0][3] == "87.00"
    assert grid.rows[1] == ("vqav2", "not measured", "not measured", "–")
    assert "quoted, not computed here: PaliGemma 3B: Beyer et al. 2024" in grid.notes
    view = table_view(study, line_rows(study, filled))
    quoted = [record for record in view_records(view) if record["kind"] == "published"]
    assert [record["published"] for record in quoted] == [0.87, None]
    assert all(record["mean"] is None for record in quoted)


def test_a_table_over_scores_lists_baselines_and_quoted_models_below(filled: Ledger) -> None:
    other = Published(name="Other", scores={"stable.vision": 0.5125}, source="its paper")
    study = tabled(published=(other,))
    study = study.model_copy(update={"baselines": {"text only": made.result((1, "z"), 0)}})
    grid = grid_of(study, filled)
    assert grid.heads == ("x", "Vision, stable")
    assert [row[0] for row in grid.rows] == ["20", "80", "text only", "Other (quoted)"]
    assert grid.rows[0][1].endswith("(4)")
    assert grid.rows[2:] == (("text only", "missing"), ("Other (quoted)", "51.25"))


def test_letters_that_latex_reads_are_escaped() -> None:
    assert escape_latex("a&%$#_{}b") == r"a\&\%\$\#\_\{\}b"


def test_latex_says_what_it_needs_and_keeps_titles_in_comments() -> None:
    grid = Grid("Title\nof two lines", ("a", "b_1"), (("5 %", "1.0 ± 0.1"), ("[x]", "−2")))
    text = to_latex(grid)
    assert text.startswith("% Title of two lines\n% needs \\usepackage{booktabs}\n")
    assert "a & b\\_1 \\\\\n\\midrule\n5 \\% & 1.0 $\\pm$ 0.1 \\\\\n{}[x] & $-$2 \\\\\n" in text
    assert text.index("\\toprule") < text.index("\\midrule") < text.index("\\bottomrule")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_with_booktabs_alone(tmp_path: Path) -> None:
    grid = Grid(HOSTILE, ("a", HOSTILE), (("~^<>", HOSTILE), ("[b]", "× · –")))
    (tmp_path / "table.tex").write_text(to_latex(grid))
    page = (
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        "\\input{table.tex}\n\\end{document}\n"
    )
    (tmp_path / "page.tex").write_text(page)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:]


def test_markdown_cells_hold_no_bar_no_tag_and_no_emphasis() -> None:
    (row,) = to_markdown(Grid("", ("a", "b"), ((HOSTILE, "*x*"),))).splitlines()[2:]
    assert "<script>" not in row
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "\\*x\\*" in row
    assert "x\\_1" in row


def test_every_table_is_exported_with_all_digits_and_as_latex(
    filled: Ledger, tmp_path: Path
) -> None:
    facts = gather(tabled(), filled)
    made_of = exports(facts)
    write_exports(made_of, tmp_path / "out")
    names = {"scores", "cost", "table"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("csv", "tex")
    }
    with (tmp_path / "out" / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(SCORES)
    for row, values in zip(rows, SCORES.values(), strict=True):
        assert float(row["stable.vision.mean"]) == sum(values) / 2
        assert row["stable.vision.n"] == "2"


def test_crowded_numbers_stand_evenly_and_the_axis_says_so(ledger: Ledger) -> None:
    shares = (0, 1, 5, 10, 20, 30, 50, 100)
    scale = scale_of(shares)
    assert scale.even
    assert list(scale.at.values()) == list(range(8))
    assert scale_of((0.04725, 0.08537, 0.1685, 0.3449)).even
    spread = scale_of((0, 20, 40, 60, 80, 100))
    assert not spread.even
    assert spread.at[80] == 80
    assert scale_of(("fresh", "carry")).at == {"fresh": 0, "carry": 1}
    scores = {(share,): (share / 200,) for share in shares}
    study = made.study(scores)
    made.fill(ledger, study, scores)
    facts = gather(study, ledger)
    assert x_label(study, facts.groups) == "x \N{MIDDLE DOT} not to scale"
    assert panel_figure(study, facts.groups, stable_panel("vision", {}))["pdf"].startswith(b"%PDF")


def suite() -> Suite:
    claim = Claim(text=HOSTILE, higher={"x": 80}, lower={"x": 20}, source="paper, section 3")
    one = tabled().model_copy(update={"name": "one", "claims": (claim,)})
    two = made.study({(5,): (0.1, 0.2)}).model_copy(update={"name": "two"})
    return Suite(name="both", question="All?", studies=(one, two))


@pytest.mark.usefixtures("undrawn")
def test_a_suite_has_an_index_that_links_its_studies_and_gives_its_totals(filled: Ledger) -> None:
    about = suite()
    facts = [gather(study, filled) for study in about.studies]
    pages = [write_facts(one, suite=about.name) for one in facts]
    text = write_index(about, facts, filled).read_text()
    links = re.findall(r'<a href="([^"]*)"', text)
    assert links == ["../one/index.html", "../two/index.html"]
    index = filled.store / "reports" / "both"
    assert [(index / link).resolve() for link in links] == [page.resolve() for page in pages]
    assert '<nav><a href="../both/index.html">both</a></nav>' in pages[0].read_text()
    words = " ".join(text.split())
    assert "10 lines and 0 baselines of 2 studies" in words
    assert "8 of 8 evaluations done" in words
    assert "0 of 2 evaluations done" in words
    assert "no interval" in words
    assert "<script" not in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml") for source in sources)
    assert "default-src 'none'" in text


def test_a_suite_of_the_name_of_its_study_is_refused(filled: Ledger) -> None:
    about = suite().model_copy(update={"name": "one"})
    with pytest.raises(ValueError, match=r"reports/one/index\.html"):
        write_index(about, [], filled)


def test_the_summary_quotes_the_ledger_and_how_it_was_made(filled: Ledger) -> None:
    facts = [gather(study, filled) for study in suite().studies]
    text = summary_text(facts, "Results", "midstream report both --markdown results.md")
    assert "Generated by `midstream report both --markdown results.md` with Midstream" in text
    assert "| 20, a | 2 | 21.0 ± 1.4 | 5.0 ± 0.0 |" in text
    assert "**no interval**" in text
    assert "**not measured**" not in text.split("## two")[0]
    assert "**Not complete: " in text.split("## two")[1]
    assert "a generated pocket world; decoder of" in text
    assert "<script>" not in text
    assert str(filled.store) not in text
    assert "/" not in re.sub(r"</?\w+>|s/", "", text.split("## one")[0].replace("tokens/s", ""))


@pytest.mark.usefixtures("undrawn")
def test_the_command_reports_a_suite_and_a_study_of_it_and_writes_the_summary(
    filled: Ledger, tmp_path: Path
) -> None:
    filled.save_study(suite())
    out = tmp_path / "docs" / "results.md"
    command = ["report", "both", "--store", str(filled.store), "--markdown", str(out)]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    text = out.read_text()
    assert "`midstream report both --markdown results.md`" in text
    assert text.count("\n## ") == 2
    assert (filled.store / "reports" / "both" / "index.html").is_file()
    ended = CliRunner().invoke(app, ["report", "two", "--store", str(filled.store)])
    assert ended.exit_code == 0, ended.output
    ended = CliRunner().invoke(app, ["report", "three", "--store", str(filled.store)])
    assert ended.exit_code == 2


@pytest.mark.usefixtures("undrawn")
def test_rows_are_described_in_columns_of_words(filled: Ledger) -> None:
    labels = {"20": {"stages": "text, image-text", "mixture": HOSTILE}}
    study = tabled(labels=labels)
    grid = grid_of(study, filled)
    assert grid.heads[:3] == ("x", "stages", "mixture")
    assert grid.rows[0][:3] == ("20", "text, image-text", HOSTILE)
    assert grid.rows[1][:3] == ("80", "–", "–")
    page = write_facts(gather(study, filled)).read_text()
    assert "text, image-text" in page
    assert "<script>alert" not in page


@pytest.mark.usefixtures("undrawn")
def test_a_study_that_asks_only_text_shows_nothing_of_vision(ledger: Ledger) -> None:
    whole = made.study({(20,): (0.2, 0.3), (80,): (0.4, 0.5)})
    asked = made.ASKED.model_copy(update={"visual_tasks": ()})
    lines = tuple(
        line.model_copy(update={"result": line.result.model_copy(update={"evaluation": asked})})
        for line in whole.lines
    )
    study = whole.model_copy(update={"lines": lines})
    facts = gather(study, ledger)
    page = write_facts(facts).read_text()
    assert "Vision" not in page
    assert "Text, stable" in page
    assert not any("Vision" in finding.sentence for finding in facts.findings)
    assert not list(ledger.store.rglob("stable_vision.*"))
