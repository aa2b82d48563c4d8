"""One self-contained page for a study: every number, figure and picture comes from its store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midstream.report.costs import budgets, made, trouble
from midstream.report.curves import curves, rates_figure, stretch
from midstream.report.exports import exports, write_exports
from midstream.report.figures import (
    Panel,
    grid_figure,
    panel_figure,
    small_figure,
    stable_panel,
    task_panel,
)
from midstream.report.gather import TRAINING, Facts, answer, best_line, gather, repeated, shortened
from midstream.report.latex import escape_markdown
from midstream.report.losses import curve_figure
from midstream.report.printed import view_notes
from midstream.report.samples import samples
from midstream.report.settings import generated_data
from midstream.report.table import kinds_of, stable_of, write_csv
from midstream.report.templating import data_uri, render
from midstream.storage import write_bytes
from midstream.study.graph import PlanRow
from midstream.study.ledger import Ledger
from midstream.study.studies import Study

# The two benchmarks that the paper draws beside the stable scores (right half of Figures 4 to 8).
COMMON = {"vision": "vqav2", "text": "arc_easy"}
# Pictures of single stages on a page; a study of hundreds has as many more.
MAX_CURVES = 12


def write_report(study: Study, ledger: Ledger, max_curves: int = MAX_CURVES) -> Path:
    """Write `<store>/reports/<study>/` and return its page; see `write_facts`."""
    return write_facts(gather(study, ledger), max_curves=max_curves)


def write_facts(
    facts: Facts,
    *,
    suite: str | None = None,
    max_curves: int = MAX_CURVES,
    out: Path | None = None,
) -> Path:
    """Write index.html, results.csv, findings.md, tables (CSV, LaTeX) and figures; the page.

    What is not there yet is shown as missing. `suite` is the suite whose index the page links;
    at most `max_curves` training stages have their loss drawn. All of it goes to `<out>/<study>/`,
    `out` being `<store>/reports` without it.
    """
    study, ledger = facts.study, facts.ledger
    folder = (out or ledger.store / "reports") / study.name
    write_csv(facts.rows, folder / "results.csv")
    write_exports(exports(study, facts.groups, facts.pairs, facts.costs, facts.view), folder)
    write_bytes(folder / "findings.md", findings_text(facts).encode())
    best = best_line(facts)
    text = render(
        "page.html.jinja",
        facts=facts,
        study=study,
        suite=suite,
        rows=facts.rows,
        groups=facts.groups,
        stable=stable_of(study),
        tasks=facts.tasks,
        troubles=[
            trouble(row, facts.plan.labels[row.stage.name], ledger) for row in facts.plan.to_run
        ],
        repeated=repeated(study),
        answers=[answer(panel, facts.groups) for panel in kinds_of(study)],
        figures=_score_figures(facts, folder),
        benchmarks=_benchmarks(facts, folder),
        rates=_rates(facts, folder),
        table_notes=[] if facts.view is None else view_notes(facts.view),
        generated=generated_data(study),
        shortened=shortened(facts),
        pairs=facts.pairs,
        best=best,
        samples=_samples(facts, best),
        plan=facts.plan,
        costs=facts.costs,
        trained=_trained(facts, folder, max_curves),
        budgets=budgets(facts.plan, ledger),
        made=made(facts.plan, ledger),
    )
    write_bytes(folder / "index.html", text.encode())
    return folder / "index.html"


def findings_text(facts: Facts) -> str:
    """The findings as Markdown."""
    lines = [f"# {escape_markdown(facts.study.name)}", "", escape_markdown(facts.study.question)]
    lines += ["", *findings_lines(facts)]
    return "\n".join([*lines, ""])


def findings_lines(facts: Facts) -> list[str]:
    """One Markdown item a finding; a claim is quoted with its source before what ours show."""
    lines = []
    for finding in facts.findings:
        claim = ""
        if finding.claim is not None:
            source = f" ({escape_markdown(finding.source)})" if finding.source else ""
            claim = f"*{escape_markdown(finding.claim)}*{source}: "
        words = f"**{finding.verdict_words}**. {escape_markdown(finding.sentence)}"
        lines.append(f"- {claim}{words}")
    return lines or ["- No claim and no place to compare."]


# ------------------------------------------------------------------------------------- figures


def _score_figures(facts: Facts, folder: Path) -> list[dict[str, str]]:
    """The stable scores, then the two common benchmarks, as pictures of the page."""
    panels = {
        f"stable_{kind}": stable_panel(kind, facts.baselines("stable.text"))
        for kind in kinds_of(facts.study)
    }
    for kind, task in COMMON.items():
        own = [one for one in facts.tasks if one["kind"] == kind]
        found = next((one for one in own if one["name"] == task), own[0] if own else None)
        if found is not None:
            panels[f"common_{kind}"] = _task_panel(facts, found)
    return [
        {
            "title": panel.title,
            "picture": _written(panel_figure(facts.study, facts.groups, panel), folder / name),
        }
        for name, panel in panels.items()
    ]


def _benchmarks(facts: Facts, folder: Path) -> list[dict[str, str]]:
    """A small picture a benchmark for the page, and all of a kind in one for print."""
    shown = []
    for kind in ("vision", "text"):
        panels = [_task_panel(facts, task) for task in facts.tasks if task["kind"] == kind]
        if panels:
            whole = grid_figure(facts.study, facts.groups, panels)
            _written(whole, folder / f"benchmarks_{kind}")
        for panel in panels:
            drawn = small_figure(facts.study, facts.groups, panel)
            shown.append({"title": panel.title, "picture": data_uri("image/svg+xml", drawn)})
    return shown


def _task_panel(facts: Facts, task: dict[str, Any]) -> Panel:
    return task_panel(task, facts.baselines(f"{task['name']}.score"))


def _rates(facts: Facts, folder: Path) -> dict[str, Any]:
    """Every learning rate over tokens, to scale and with the image stages stretched."""
    try:
        drawn, missing = curves(facts.study, facts.ledger)
    except (OSError, ValueError) as reason:
        # An imported checkpoint may lie on another machine than the report is made on.
        return {"pictures": [], "times": None, "missing": [str(reason)]}
    if not drawn:
        return {"pictures": [], "times": None, "missing": missing}
    pictures = [_written(rates_figure(drawn), folder / "rates")]
    times = stretch(drawn)
    if times is not None:
        pictures.append(_written(rates_figure(drawn, times), folder / "rates_stretched"))
    return {"pictures": pictures, "times": times, "missing": missing}


def _written(figure: dict[str, bytes], path: Path) -> str:
    for suffix, data in figure.items():
        write_bytes(path.with_suffix(f".{suffix}"), data)
    return data_uri("image/svg+xml", figure["svg"])


# ------------------------------------------------------------------------------ stages, samples


def _samples(facts: Facts, best: dict[str, Any] | None) -> list[dict[str, Any]]:
    if best is None:
        return []
    lines = facts.study.lines
    result = next(line.result for line in lines if line.result.name == best["stage"])
    return samples(result, facts.ledger)


def _trained(facts: Facts, folder: Path, max_curves: int) -> list[dict[str, Any]]:
    """Training stages with their results (None until done) and, for some, curves."""
    rows = [row for row in facts.plan.rows if row.stage.kind in TRAINING]
    drawn = _drawn(rows, max_curves)
    return [_one_trained(row, facts, folder, row.stage.name in drawn) for row in rows]


def _drawn(rows: Sequence[PlanRow], limit: int) -> set[str]:
    """Which stages are drawn: one of each kind in turn, those that more lines use first."""
    queues = [
        sorted((r for r in rows if r.stage.kind == kind), key=lambda row: -len(row.lines))
        for kind in TRAINING
    ]
    picked: list[str] = []
    for turn in range(max(map(len, queues), default=0)):
        picked += [queue[turn].stage.name for queue in queues if turn < len(queue)]
    return set(picked[:limit])


def _one_trained(row: PlanRow, facts: Facts, folder: Path, drawn: bool) -> dict[str, Any]:
    metrics = facts.ledger.metrics(row.stage) if drawn else []
    name = f"curves_{row.stage.name}"
    return {
        "label": facts.plan.labels[row.stage.name],
        "kind": row.stage.kind,
        "state": row.state,
        "lines": row.lines,
        "results": facts.ledger.results(row.stage) if row.state == "done" else None,
        "drawn": drawn,
        "steps": len(metrics),
        "curves": _written(curve_figure(metrics), folder / name) if metrics else None,
    }
