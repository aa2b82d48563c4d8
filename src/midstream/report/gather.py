"""All that a report of one study says: as values before anything is drawn, as CSV and LaTeX."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream.config import Epochs, Mixture, PocketWorld, PublicFolder, SmallReal
from midstream.core.stats import fit
from midstream.core.storage import write_bytes
from midstream.core.tokens import counted, duration, quantity, span
from midstream.cost.cost import encoder_parameters
from midstream.cost.graph import Plan, plan
from midstream.report.figures import Task
from midstream.report.findings import (
    KIND_NAMES,
    Finding,
    findings,
    place,
    points,
    score_name,
    versus,
)
from midstream.report.line_rows import (
    Group,
    LineRow,
    Snapshot,
    Spread,
    best_group,
    curves_of,
    group_rows,
    line_rows,
    parts_of,
    stable_of,
    tasks_of,
    write_csv,
)
from midstream.report.samples import Examples, results_by_place
from midstream.report.size_laws import Laws, ladder_grid, ladder_records, laws_of
from midstream.report.table import (
    Grid,
    KindCost,
    View,
    cost_rows,
    table_view,
    to_latex,
    view_grid,
    view_records,
)
from midstream.report.verdicts import compare
from midstream.study.results import EvaluationResult, PictureViews, TrainingResult
from midstream.study.stages import Stage, Trained
from midstream.study.store import Ledger
from midstream.study.studies import Line, Study

TOKENS = {"pretrain": "text", "continue": "image-text", "finetune": "fine-tuning"}


def settings_line(study: Study) -> str:
    """Data, parameters, tokens of each kind of stage (as planned), seeds and what is asked."""
    stages: dict[str, dict[str, Stage]] = {}
    for line in study.lines:
        for kind, part in parts_of(line.result).items():
            for stage in (*part.before, part.stage):
                stages.setdefault(kind, {})[stage.identity] = stage
    lines = [line.result.of for line in study.lines]
    said = [" and ".join(dict.fromkeys(_world(model.data.world) for model in lines)) or "no data"]
    said.append(f"decoder of {span([m.model.decoder.num_parameters for m in lines])} parameters")
    towers = [m.model.encoder for m in lines if m.model.encoder is not None]
    if towers:
        said.append(f"encoder of {span([encoder_parameters(tower) for tower in towers])}")
    for kind, name in TOKENS.items():
        words = _budgets(name, list(stages.get(kind, {}).values()))
        said += [words] if words else []
    seeds = {line.axes["seed"] for line in study.lines if "seed" in line.axes}
    repeated = f", {counted(len(seeds), 'seed')}" if seeds else ""
    said.append(counted(len(study.lines), "line") + repeated)
    return "; ".join(said)


def generated_data(study: Study) -> bool:
    """Whether a line of the study rests on the generated pocket world."""
    return any(isinstance(line.result.of.data.world, PocketWorld) for line in study.lines)


def _world(world: PocketWorld | SmallReal | PublicFolder) -> str:
    if isinstance(world, PocketWorld):
        return "a generated pocket world"
    return "small real data sets" if isinstance(world, SmallReal) else f"data {world.root.name}"


def _budgets(name: str, stages: list[Stage]) -> str:
    tokens, epochs, unknown = [], [], False
    for stage in stages:
        if not isinstance(stage, Trained):
            continue
        budget = stage.training.budget
        if isinstance(budget, Epochs):
            epochs.append(budget.epochs)
        elif isinstance(budget, Mixture):
            tokens.append(budget.total_tokens)
        else:
            unknown = True
    words = [f"{span(tokens)} {name} tokens"] if tokens else []
    if epochs:
        unit = "epoch" if max(epochs) == 1 else "epochs"
        words.append(f"{span(epochs, place)} {name} {unit}")
    if unknown:
        words.append(f"{name} by amounts")
    return ", ".join(words)


_SEEING = ("continue", "finetune")
_HEADS = ("stage", "source", "lines", "pictures", "views of each", "seen")
# More rows of words than these stay with the records.
MOST_ROWS = 60


@dataclass(frozen=True)
class Seen:
    """How often a stage of a line, of this kind, showed the pictures of a source."""

    line: Line
    kind: str
    source: str
    views: PictureViews


def seen_records(study: Study, ledger: Ledger) -> list[Seen]:
    """One a line, stage and source of pictures, where the stage is done and counted them."""
    records = []
    for line in study.lines:
        parts = parts_of(line.result)
        for part in (parts[kind] for kind in _SEEING if kind in parts):
            for stage in filter(ledger.is_done, (part.stage, *part.before)[::-1]):
                for name, share in ledger.result(stage, TrainingResult).sources.items():
                    if (views := share.pictures) is not None:
                        records.append(Seen(line, stage.kind, name, views))
    return records


def seen_grid(study: Study, records: list[Seen]) -> Grid:
    """The records as words: what all repetitions at a place saw alike stands once, else as means
    and the span of views."""
    axes = [axis for axis in (study.figure.x, study.figure.by) if axis is not None]
    alike: dict[tuple[Any, ...], list[PictureViews]] = {}
    for one in records:
        key = (*(one.line.axes[axis] for axis in axes), one.kind, one.source)
        alike.setdefault(key, []).append(one.views)
    rows = []
    for (*at, kind, source), views in alike.items():
        distinct, number = sum(one.distinct for one in views), sum(one.views for one in views)
        times = sorted({pair[0] for one in views for pair in one.times})
        first = f"{times[0]:,} to " if len(times) > 1 else ""
        each = f"{first}{counted(times[-1], 'time')}" if times else "never"
        told = (KIND_NAMES[kind], source, str(len(views)), f"{distinct / len(views):,.0f}")
        often = f"{number / max(distinct, 1):,.2f}"
        rows.append((", ".join(map(place, at)), *told, often, each))
    left = len(rows) - MOST_ROWS
    notes = ["pictures are told apart by their bytes; means over lines"]
    notes += [f"{left:,} more rows: seen.csv has all of them"] if left > 0 else []
    title = f"{study.name}: how often pictures were seen"
    return Grid(title, (_axis(study), *_HEADS), tuple(rows[:MOST_ROWS]), tuple(notes))


def _axis(study: Study) -> str:
    """The head of a column of places."""
    return ", ".join(filter(None, (study.figure.x_label, study.figure.by)))


def flat_records(records: list[Seen]) -> list[dict[str, Any]]:
    """For a file: axes as in results.csv; `times` is "views:pictures", one after the other."""
    return [
        {"line": one.line.name}
        | {f"axis.{axis}": at for axis, at in one.line.axes.items()}
        | {"stage": one.kind, "source": one.source}
        | {"pictures": one.views.distinct, "views": one.views.views}
        | {"times": " ".join(f"{often}:{number}" for often, number in one.views.times)}
        for one in records
    ]


Record = dict[str, Any]
TRAINING = ("train_encoder", "pretrain", "continue", "finetune")


@dataclass(frozen=True)
class Facts:
    """A study as its store has it; `tasks` are name, kind and chance of each benchmark, `laws`
    those of a ladder, `seen` what its stages say of their pictures."""

    study: Study
    ledger: Snapshot
    plan: Plan
    rows: list[LineRow]
    groups: list[Group]
    tasks: list[Task]
    findings: list[Finding]
    view: View | None
    costs: list[KindCost]
    settings: str
    laws: list[Laws]
    seen: list[Seen]

    def baselines(self, column: str) -> dict[str, float | int | None]:
        """The baselines' values of a column, by name."""
        return {row.name: row.values[column] for row in self.rows if row.role == "baseline"}


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
        findings=findings(study, rows, groups, examples),
        view=table_view(study, rows),
        costs=cost_rows(planned, snapshot),
        settings=settings_line(study),
        laws=laws_of(study, rows, snapshot),
        seen=seen_records(study, snapshot),
    )


def shortened(facts: Facts) -> dict[str, str]:
    """Why a task is not whole in the results, by task, and in how many where not in all."""
    found: dict[str, Counter[str | None]] = {}
    for result in filter(facts.ledger.is_done, facts.study.results):
        for name, task in facts.ledger.result(result, EvaluationResult).tasks.items():
            found.setdefault(name, Counter())[task.shortened] += 1
    return {
        name: "; ".join(
            why if len(told) == 1 else f"{why} in {number} of {told.total()}"
            for why, number in told.items()
            if why
        )
        for name, told in found.items()
        if any(told)
    }


def answer(
    study: Study, rows: Sequence[LineRow], groups: Sequence[Group], panel: str
) -> dict[str, Any]:
    """Which x is best in one panel, and how far it lies from the last, the first and blind."""
    column = f"stable.{panel}"
    found: list[dict[str, Any]] = []
    for by, own in curves_of(groups).items():
        best = best_group(own, column)
        if best is None:
            found.append({"by": by, "best": None})
            continue
        against = []
        for other in {group.x: group for group in (own[-1], own[0])}.values():
            if other.x != best.x:
                sides = versus(study, best, other)
                compared = compare(study, rows, column, sides, places=len(own))
                gap = None if compared is None else compared.contrast
                against.append({"x": other.x, "gap": gap})
        spread, blind = best.spreads[column], None
        if panel == "vision" and best.spreads["stable.vision_blind"].n:
            asked = {1.0: spread, -1.0: best.spreads["stable.vision_blind"]}
            cells = fit({sign: dict(one.values) for sign, one in asked.items()})
            blind = cells.contrast({sign: sign for sign in asked})
        one = {"by": by, "best": best, "spread": spread, "against": against, "blind": blind}
        found.append(one)
    return {"panel": panel, "curves": found}


def repeated(study: Study) -> dict[str, list[str]]:
    """Which kinds of training stage the repetitions at one x have of their own, and which shared.

    What they share adds nothing to their spread. Both are empty without repetitions.
    """
    places = [list(map(parts_of, results)) for results in results_by_place(study).values()]
    found: dict[str, list[str]] = {"own": [], "shared": []}
    for kind in TRAINING:
        names = [
            {parts[kind].stage.identity for parts in members if kind in parts}
            for members in places
            if len(members) > 1
        ]
        if any(names):
            found["own" if any(len(each) > 1 for each in names) else "shared"].append(kind)
    return found


def best_line(facts: Facts) -> LineRow | None:
    """The row of the line with the highest stable vision score."""
    rows = [row for row in facts.rows if row.role == "line"]
    scored = [(row.values["stable.vision"], row) for row in rows]
    known = [(score, row) for score, row in scored if score is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def _task(name: str, kind: str, rows: Sequence[LineRow]) -> Task:
    given = (row.values[f"{name}.chance"] for row in rows)
    chances = {chance for chance in given if chance is not None}
    if len(chances) > 1:
        raise ValueError(
            f"task {name!r} has {len(chances)} chance levels {sorted(chances)}; run it again"
        )
    return Task(name, kind, chances.pop() if chances else None)


@dataclass(frozen=True)
class Export:
    """One table under a file name: words for people, records with all digits."""

    name: str
    grid: Grid
    records: tuple[Record, ...]


def exports(facts: Facts) -> list[Export]:
    """Means, cost, and what the study has of its own: table, laws, pictures seen."""
    study = facts.study
    made = [scores_export(study, facts.groups), _cost_export(study, facts.costs)]
    if facts.view is not None:
        made.append(Export("table", view_grid(facts.view), tuple(view_records(facts.view))))
    if facts.laws:
        grid = ladder_grid(study, facts.laws)
        made.append(Export("ladder", grid, tuple(ladder_records(facts.laws))))
    if facts.seen:
        made.append(Export("seen", seen_grid(study, facts.seen), tuple(flat_records(facts.seen))))
    return made


def write_exports(made: Sequence[Export], folder: Path) -> None:
    """`<name>.csv` and `<name>.tex` for each."""
    for export in made:
        write_bytes(folder / f"{export.name}.tex", to_latex(export.grid).encode())
        if export.records:
            write_csv(export.records, folder / f"{export.name}.csv")


def scores_export(study: Study, groups: Sequence[Group]) -> Export:
    """Means over repetitions: a row a place, a column a score."""
    tasks = [f"{task}.score" for task, _ in tasks_of(study)]
    columns = [*stable_of(study), *tasks]
    columns = [c for c in columns if any(group.spreads[c].n for group in groups)]
    about, rows, records = study.figure, [], []
    for group in groups:
        name = ", ".join(str(place(at)) for at in (group.x, group.by) if at is not None)
        n = str(group.n) if group.n == group.planned else f"{group.n} of {group.planned}"
        rows.append((name, n, *(spread_words(group.spreads[c]) for c in columns)))
        record: Record = {about.x: group.x} | ({about.by: group.by} if about.by else {})
        record |= {"planned": group.planned}
        for column in columns:
            spread = group.spreads[column]
            record |= {f"{column}.mean": spread.mean, f"{column}.sd": spread.sd}
            record |= {f"{column}.n": spread.n}
        records.append(record)
    note = "mean ± standard deviation over repetitions, in points of 100"
    heads = (_axis(study), "n", *map(score_name, columns))
    grid = Grid(f"{study.name}: scores", heads, tuple(rows), (note,))
    return Export("scores", grid, tuple(records))


def spread_words(spread: Spread) -> str:
    """Mean ± sd in points; missing without a value."""
    if spread.mean is None:
        return "missing"
    return points(spread.mean) + ("" if spread.sd is None else f" ± {points(spread.sd)}")


def _cost_export(study: Study, costs: Sequence[KindCost]) -> Export:
    heads = ("stages", "number", "done", "alone", "tokens seen", "FLOPs", "time", "time alone")
    rows = tuple(
        (
            KIND_NAMES[cost.kind],
            str(cost.stages),
            str(cost.done),
            str(cost.alone),
            f"{cost.tokens:,}" if cost.tokens else "–",
            quantity(cost.flops) if cost.flops else "–",
            duration(cost.seconds),
            duration(cost.seconds_alone),
        )
        for cost in costs
    )
    grid = Grid(f"{study.name}: cost", heads, rows, ("FLOPs are planned, the rest was spent",))
    return Export("cost", grid, tuple(vars(cost) for cost in costs))
