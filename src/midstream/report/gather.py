"""All that a report of one study says, as values, before any of it is drawn or written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from midstream.report.costs import cost_rows
from midstream.report.finding import Finding
from midstream.report.findings import findings
from midstream.report.pairs import Examples, paired_rows
from midstream.report.parts import Part, Snapshot, parts_of
from midstream.report.printed import View, table_view
from midstream.report.settings import settings_line
from midstream.report.spread import difference, paired_difference
from midstream.report.table import Group, best_group, group_rows, line_rows, tasks_of
from midstream.study.graph import Plan, plan
from midstream.study.ledger import Ledger
from midstream.study.studies import Study

TRAINING = ("train_encoder", "pretrain", "continue", "finetune")


@dataclass(frozen=True)
class Facts:
    """A study as its store has it; `tasks` are name, kind and chance of each benchmark."""

    study: Study
    ledger: Snapshot
    plan: Plan
    rows: list[dict[str, Any]]
    groups: list[Group]
    tasks: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    findings: list[Finding]
    view: View | None
    costs: list[dict[str, Any]]
    settings: str

    def baselines(self, column: str) -> dict[str, float | int | None]:
        """The baselines' values of a column, by name."""
        return {row["name"]: row[column] for row in self.rows if row["role"] == "baseline"}

    @property
    def complete(self) -> bool:
        """Whether every stage is done."""
        return not self.plan.to_run


def gather(study: Study, ledger: Ledger) -> Facts:
    """Read the store once; what is not there yet is missing, at any moment of a study.

    Raises ValueError for a figure over an axis that a line lacks, and for a task of two chances.
    """
    snapshot = Snapshot.of(ledger)
    planned = plan(study, snapshot)
    rows = line_rows(study, snapshot)
    groups = group_rows(study, rows)
    examples = Examples(snapshot)
    return Facts(
        study=study,
        ledger=snapshot,
        plan=planned,
        rows=rows,
        groups=groups,
        tasks=[_task(name, kind, rows) for name, kind in tasks_of(study)],
        pairs=paired_rows(study, groups, snapshot, examples),
        findings=findings(study, rows, groups, snapshot, examples),
        view=table_view(study, rows),
        costs=cost_rows(planned, snapshot),
        settings=settings_line(study, snapshot),
    )


def shortened(facts: Facts) -> dict[str, str]:
    """Why a task is not whole in some of the results, by task."""
    found: dict[str, str] = {}
    for result in facts.study.results:
        if facts.ledger.is_done(result):
            for task, row in facts.ledger.results(result)["tasks"].items():
                if row.get("shortened"):
                    found[task] = row["shortened"]
    return found


def answer(panel: str, groups: Sequence[Group]) -> dict[str, Any]:
    """Which x is best in one panel, and how far it lies from the last, the first and blind."""
    column = f"stable.{panel}"
    found: list[dict[str, Any]] = []
    for by in dict.fromkeys(group.by for group in groups):
        own = [group for group in groups if group.by == by]
        best = best_group(own, column)
        if best is None:
            found.append({"by": by, "best": None})
            continue
        spread, against = best.spreads[column], []
        for other in dict.fromkeys((own[-1].x, own[0].x)):
            if other != best.x:
                rival = next(group.spreads[column] for group in own if group.x == other)
                gap, paired = difference(spread, rival), paired_difference(spread, rival)
                against.append({"x": other, "difference": gap, "paired": paired})
        one: dict[str, Any] = {
            "by": by,
            "best": best,
            "spread": spread,
            "against": against,
            "blind": None,
        }
        if panel == "vision":
            one["blind"] = difference(spread, best.spreads["stable.vision_blind"])
        found.append(one)
    return {"panel": panel, "curves": found}


def repeated(study: Study) -> dict[str, list[str]]:
    """Which kinds of training stage the repetitions at one x have of their own, and which shared.

    What they share adds nothing to their spread. Both are empty without repetitions.
    """
    places: dict[tuple[Any, Any], list[dict[str, Part]]] = {}
    for line in study.lines:
        by = None if study.figure.by is None else line.axes[study.figure.by]
        places.setdefault((line.axes[study.figure.x], by), []).append(parts_of(line.result))
    found: dict[str, list[str]] = {"own": [], "shared": []}
    for kind in TRAINING:
        names = [
            {parts[kind].stage.identity for parts in members if kind in parts}
            for members in places.values()
            if len(members) > 1
        ]
        if any(names):
            found["own" if any(len(each) > 1 for each in names) else "shared"].append(kind)
    return found


def best_line(facts: Facts) -> dict[str, Any] | None:
    """The row of the line with the highest stable vision score."""
    rows = [row for row in facts.rows if row["role"] == "line"]
    known = [row for row in rows if row["stable.vision"] is not None]
    return max(known, key=lambda row: row["stable.vision"]) if known else None


def _task(name: str, kind: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chances = {row[f"{name}.chance"] for row in rows} - {None}
    if len(chances) > 1:
        raise ValueError(
            f"task {name!r} has {len(chances)} chance levels {sorted(chances)}; run it again"
        )
    return {"name": name, "kind": kind, "chance": chances.pop() if chances else None}
