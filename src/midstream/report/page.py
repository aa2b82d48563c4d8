"""The page of a study, the index of a suite, the summary in Markdown; all from the store.

Templates escape everything, and a policy lets a page load nothing.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from midstream import __version__
from midstream.core.storage import write_bytes
from midstream.core.tokens import counted, duration, quantity
from midstream.cost.graph import PlanRow, plan
from midstream.report.curves import curve_figure, curves, rates_figure, stretch
from midstream.report.figures import (
    FILES,
    Panel,
    Task,
    grid_figure,
    panel_figure,
    probability_panel,
    small_figure,
    stable_panel,
    task_panel,
)
from midstream.report.findings import KIND_NAMES, SCORE_NAMES, interval, place, points, signed
from midstream.report.gather import (
    TRAINING,
    Facts,
    answer,
    best_line,
    exports,
    generated_data,
    repeated,
    scores_export,
    seen_grid,
    shortened,
    write_exports,
)
from midstream.report.line_rows import (
    PROBABILITY,
    LineRow,
    Snapshot,
    kinds_of,
    stable_of,
    write_csv,
)
from midstream.report.samples import samples
from midstream.report.size_laws import ladder_figure, ladder_grid
from midstream.report.table import (
    budgets,
    cost_rows,
    escape_markdown,
    made,
    to_markdown,
    view_grid,
    view_notes,
)
from midstream.study.results import RESULTS
from midstream.study.store import Ledger
from midstream.study.studies import Suite


def render(template: str, **values: object) -> str:
    """A template of `templates/` as a whole page; its style sheet is inside and named by hash."""
    style = _read("style.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = {"css": style, "css_hash": digest, "version": __version__}
    return _environment().get_template(template).render(**page, **values)


def svg_uri(svg: bytes) -> str:
    """A picture inside the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _read(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text()


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_read),
    )
    environment.globals |= {"kinds": KIND_NAMES, "heads": SCORE_NAMES}
    environment.filters |= {
        "counted": counted,
        "place": place,
        "points": points,
        "interval": interval,
        "signed": signed,
        "engineering": quantity,
        "duration": duration,
    }
    return environment


# The two benchmarks that the paper draws beside the stable scores (right half of Figures 4 to 8).
COMMON = {"vision": "vqav2", "text": "arc_easy"}
# Pictures of single stages on a page; a study of hundreds has as many more.
MAX_CURVES = 12
# What a report may have written that the next one does not.
EARLIER = (
    "curves_*.svg",
    *(f"{name}.{end}" for name in ("pairs", "table", "seen", "ladder") for end in ("csv", "tex")),
    *(
        f"{name}.{end}"
        for name in ("stable_*", "common_*", "benchmarks_*", "ladder", "rates", "rates_stretched")
        for end in FILES
    ),
)


def write_facts(
    facts: Facts, *, suite: str | None = None, max_curves: int = MAX_CURVES, out: Path | None = None
) -> Path:
    """Write index.html, results.csv, findings.md, tables (CSV, LaTeX) and figures; the page.

    What is not there yet is shown as missing. `suite` is the suite whose index the page links;
    at most `max_curves` training stages have their loss drawn. All of it goes to `<out>/<study>/`,
    `out` being `<store>/reports` without it; what an earlier report alone had there is removed.
    """
    study, ledger = facts.study, facts.ledger
    folder = (out or ledger.store / "reports") / study.name
    for pattern in EARLIER:
        for path in folder.glob(pattern):
            path.unlink()
    write_csv([row.flat() for row in facts.rows], folder / "results.csv")
    write_exports(exports(facts), folder)
    about = [f"# {escape_markdown(study.name)}", "", escape_markdown(study.question), ""]
    write_bytes(folder / "findings.md", "\n".join([*about, *findings_lines(facts), ""]).encode())
    best = best_line(facts)
    text = render(
        "page.html.jinja",
        facts=facts,
        study=study,
        suite=suite,
        stable=stable_of(study, facts.rows),
        troubles=[
            {
                "label": facts.plan.labels[row.stage.name],
                "state": row.state,
                "error": ledger.status(row.stage).get("error"),
                "lines": row.lines,
            }
            for row in facts.plan.to_run
        ],
        repeated=repeated(study),
        how_decided=HOW_DECIDED,
        answers=[answer(study, facts.rows, facts.groups, panel) for panel in kinds_of(study)],
        figures=_score_figures(facts, folder),
        benchmarks=_benchmarks(facts, folder),
        rates=_rates(facts, folder),
        ladder=_ladder(facts, folder),
        table_notes=facts.view and view_notes(facts.view),
        generated=generated_data(study),
        shortened=shortened(facts),
        seen=seen_grid(study, facts.seen) if facts.seen else None,
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


def _score_figures(facts: Facts, folder: Path) -> list[dict[str, str]]:
    """The stable scores, then the two common benchmarks, as pictures of the page."""
    panels = {
        f"stable_{kind}": stable_panel(kind, facts.baselines("stable.text"))
        for kind in kinds_of(facts.study)
    }
    for column in stable_of(facts.study, facts.rows):
        if column in PROBABILITY:
            panels[column.replace(".", "_")] = probability_panel(column)
    for kind, task in COMMON.items():
        own = [one for one in facts.tasks if one.kind == kind]
        for found in sorted(own, key=lambda one: one.name != task)[:1]:
            panels[f"common_{kind}"] = _task_panel(facts, found)
    return [
        _shown(panel, _written(panel_figure(facts.study, facts.groups, panel), folder / name))
        for name, panel in panels.items()
    ]


def _benchmarks(facts: Facts, folder: Path) -> list[dict[str, str]]:
    """A small picture a benchmark for the page, and all of a kind in one for print."""
    shown = []
    for kind in ("vision", "text"):
        panels = [_task_panel(facts, task) for task in facts.tasks if task.kind == kind]
        if panels:
            whole = grid_figure(facts.study, facts.groups, panels)
            _written(whole, folder / f"benchmarks_{kind}")
        for panel in panels:
            shown.append(_shown(panel, svg_uri(small_figure(facts.study, facts.groups, panel))))
    return shown


def _shown(panel: Panel, picture: str) -> dict[str, str]:
    return {"title": panel.title, "picture": picture}


def _task_panel(facts: Facts, task: Task) -> Panel:
    return task_panel(task, facts.baselines(f"{task.name}.score"))


def _rates(facts: Facts, folder: Path) -> dict[str, Any]:
    """Every learning rate over tokens, to scale and with the image stages stretched."""
    try:
        drawn, missing = curves(facts.study, facts.ledger)
    except (OSError, ValueError) as reason:
        # An imported checkpoint may lie on another machine than the report is made on.
        drawn, missing = [], [str(reason)]
    times = stretch(drawn)
    wanted = {"rates": 1 if drawn else None, "rates_stretched": times}
    pictures = [
        _written(rates_figure(drawn, by), folder / name) for name, by in wanted.items() if by
    ]
    return {"pictures": pictures, "times": times, "missing": missing}


def _ladder(facts: Facts, folder: Path) -> dict[str, Any] | None:
    """The picture and the table of the laws over sizes; None for a study that is no ladder."""
    if not facts.laws:
        return None
    picture = _written(ladder_figure(facts.laws), folder / "ladder")
    return {"picture": picture, "grid": ladder_grid(facts.study, facts.laws)}


def _written(figure: dict[str, bytes], path: Path) -> str:
    for suffix, data in figure.items():
        write_bytes(path.with_suffix(f".{suffix}"), data)
    return svg_uri(figure["svg"])


def _samples(facts: Facts, best: LineRow | None) -> list[dict[str, Any]]:
    if best is None:
        return []
    lines = facts.study.lines
    result = next(line.result for line in lines if line.result.name == best.stage)
    return samples(result, facts.ledger)


def _trained(facts: Facts, folder: Path, max_curves: int) -> list[dict[str, Any]]:
    """Training stages with their results (None until done) and, for some, curves.

    Drawn are one of each kind in turn, those that more lines use first.
    """
    rows = [row for row in facts.plan.rows if row.stage.kind in TRAINING]
    queues = [
        sorted((r for r in rows if r.stage.kind == kind), key=lambda row: -len(row.lines))
        for kind in TRAINING
    ]
    turns = [row.stage.name for turn in zip_longest(*queues) for row in turn if row is not None]
    return [_one_trained(row, facts, folder, row.stage.name in turns[:max_curves]) for row in rows]


def _one_trained(row: PlanRow, facts: Facts, folder: Path, drawn: bool) -> dict[str, Any]:
    stage, metrics = row.stage, facts.ledger.metrics(row.stage) if drawn else []
    curves = _written(curve_figure(metrics), folder / f"curves_{stage.name}") if metrics else None
    return {
        "label": facts.plan.labels[stage.name],
        "kind": stage.kind,
        "state": row.state,
        "lines": row.lines,
        "results": facts.ledger.result(stage, RESULTS[stage.kind]) if row.state == "done" else None,
        "drawn": drawn,
        "steps": len(metrics),
        "curves": curves,
    }


def write_index(
    suite: Suite, facts: Sequence[Facts], ledger: Ledger, out: Path | None = None
) -> Path:
    """Write `<out>/<suite>/index.html`, which links the studies' pages beside it.

    Without `out` it is `<store>/reports`.

    Raises ValueError where a study has the suite's name, whose page this would write over.
    """
    if suite.name in {study.name for study in suite.studies}:
        raise ValueError(
            f"suite {suite.name!r} has a study of the same name, and both would write "
            f"reports/{suite.name}/index.html; give one of them another name"
        )
    snapshot = Snapshot.of(ledger)
    planned = plan(suite, snapshot)
    text = render(
        "index.html.jinja",
        suite=suite,
        plan=planned,
        costs=cost_rows(planned, snapshot),
        studies=[(one, _thumbnail(one)) for one in facts],
    )
    path = (out or ledger.store / "reports") / suite.name / "index.html"
    write_bytes(path, text.encode())
    return path


def _thumbnail(facts: Facts) -> str:
    panel = stable_panel(kinds_of(facts.study)[0], {})
    return svg_uri(small_figure(facts.study, facts.groups, panel))


HOW_DECIDED = (
    "Intervals of 95 % are over seeds, by Student's t, seeds as blocks, with one spread of all "
    "places of the figure where Bartlett's test lets it stand (p of 0.1 or more), else with the "
    "difference's own. The best of several places is judged by Tukey's interval for all pairs. A "
    "difference is higher or lower where its interval leaves out zero, the same where two "
    "one-sided tests at 5 % find it smaller than the study's smallest difference, else not decided."
)


def summary_text(facts: Sequence[Facts], title: str, command: str) -> str:
    """One section a study: question, settings, means, findings, cost.

    `command` is what makes the file again. No path of this machine is in it.
    """
    lines = [
        f"# {escape_markdown(title)}",
        "",
        f"Generated by `{command}` with Midstream {__version__}; do not edit. Every number is read "
        f"from the store's results. Scores are in points of 100, means ± one standard deviation "
        f"over seeds; a stable score is the mean over tasks of score minus chance. {HOW_DECIDED}",
        "",
    ]
    for one in facts:
        lines += _section(one)
    return "\n".join(lines)


def _section(facts: Facts) -> list[str]:
    study = facts.study
    lines = [f"## {escape_markdown(study.name)}", "", escape_markdown(study.question), ""]
    lines += [f"Settings: {escape_markdown(facts.settings)}.", ""]
    if left := len(facts.plan.to_run):
        stages, are = counted(len(facts.plan.rows), "stage"), "is" if left == 1 else "are"
        lines += [f"**Not complete: {left} of {stages} {are} not done.**", ""]
    lines += [to_markdown(scores_export(study, facts.groups).grid)]
    if cut := shortened(facts):
        named = [f"{escape_markdown(t)} ({escape_markdown(why)})" for t, why in cut.items()]
        lines += [f"Not whole: {', '.join(named)}.", ""]
    if facts.view is not None:
        grid = view_grid(facts.view)
        lines += [f"### {escape_markdown(grid.title)}", "", to_markdown(grid)]
        lines += [". ".join(escape_markdown(note) for note in view_notes(facts.view)) + ".", ""]
    if facts.laws:
        lines += [f"- {escape_markdown(law.sentence)}" for law in facts.laws]
        lines += ["", to_markdown(ladder_grid(study, facts.laws))]
    if facts.seen:
        lines += [to_markdown(seen_grid(study, facts.seen)), ""]
    lines += ["What they show and what they do not:", "", *findings_lines(facts), ""]
    decided = sum(finding.is_decided for finding in facts.findings)
    told = f"{decided} of {counted(len(facts.findings), 'finding')} decided."
    lines += [f"{told} {_cost(facts)}", ""]
    if generated_data(study):
        lines += [
            "The data are a generated pocket world: what is found here holds for it, and says "
            "nothing about models of other sizes on other data.",
            "",
        ]
    return lines + [line for note in study.notes for line in (escape_markdown(note), "")]


def _cost(facts: Facts) -> str:
    planned = facts.plan
    seconds = duration(sum(cost.seconds for cost in facts.costs))
    alone = duration(sum(cost.seconds_alone for cost in facts.costs))
    text = (
        f"Cost: {counted(len(planned.rows), 'stage')} ({planned.num_shared} shared) for "
        f"{planned.num_alone} without sharing; {seconds} of compute for {alone}"
    )
    once, naive = quantity(planned.shared_flops), quantity(planned.naive_flops)
    return text + (f"; {once} FLOPs planned for {naive}." if planned.naive_flops else ".")
