"""The index of a suite: each study with its picture and first finding, and the totals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midstream.report.costs import cost_rows
from midstream.report.figures import small_figure, stable_panel
from midstream.report.gather import Facts
from midstream.report.parts import Snapshot
from midstream.report.table import kinds_of
from midstream.report.templating import data_uri, render
from midstream.storage import write_bytes
from midstream.study.graph import plan
from midstream.study.ledger import Ledger
from midstream.study.studies import Suite


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
        studies=[_study(one) for one in facts],
    )
    path = (out or ledger.store / "reports") / suite.name / "index.html"
    write_bytes(path, text.encode())
    return path


def _study(facts: Facts) -> dict[str, Any]:
    panel = stable_panel(kinds_of(facts.study)[0], {})
    drawn = small_figure(facts.study, facts.groups, panel)
    return {
        "name": facts.study.name,
        "question": facts.study.question,
        "thumbnail": data_uri("image/svg+xml", drawn),
        "finding": facts.findings[0] if facts.findings else None,
        "more": max(0, len(facts.findings) - 1),
        "done": sum(row["state"] == "done" for row in facts.rows),
        "planned": len(facts.rows),
    }
