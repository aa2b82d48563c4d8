"""One self-contained page for a study: every number, figure and picture comes from its store."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from midstream import __version__
from midstream.report.figures import curve_figure, score_figure
from midstream.report.pairs import paired_rows
from midstream.report.samples import samples
from midstream.report.table import (
    KINDS,
    STABLE,
    Group,
    Part,
    best_group,
    difference,
    group_rows,
    line_rows,
    paired_difference,
    parts_of,
    spent,
    tasks_of,
    write_csv,
)
from midstream.storage import write_bytes
from midstream.study.graph import Plan, PlanRow, plan
from midstream.study.ledger import Ledger
from midstream.study.studies import Study

TRAINING = ("train_encoder", "pretrain", "continue", "finetune")


def write_report(study: Study, ledger: Ledger) -> Path:
    """Write `<store>/reports/<study>/` (index.html, results.csv, figures) and return the page.

    Works at any moment of a study: what is not there yet is shown as missing.
    """
    planned = plan(study, ledger)
    folder = ledger.store / "reports" / study.name
    rows = line_rows(study, ledger)
    groups = group_rows(study, rows)
    write_csv(rows, folder / "results.csv")
    page = _environment().from_string(files(__package__).joinpath("page.html.jinja").read_text())
    text = page.render(
        study=study,
        version=__version__,
        rows=rows,
        groups=groups,
        stable=STABLE,
        tasks=[_task(name, kind, rows) for name, kind in tasks_of(study)],
        troubles=[_trouble(row, ledger) for row in planned.to_run],
        repeated=_repeated(study),
        answers=[_answer(panel, groups) for panel in ("vision", "text")],
        figures=_score_figures(study, rows, groups, folder),
        shortened=_shortened(study, ledger),
        pairs=paired_rows(study, groups, ledger),
        best=_best_line(rows),
        samples=_samples(study, rows, ledger),
        plan=planned,
        costs=_costs(planned, ledger),
        trained=[
            _trained(row, ledger, folder) for row in planned.rows if row.stage.kind in TRAINING
        ],
        budgets=_budgets(planned, ledger),
        made=_made(planned, ledger),
    )
    write_bytes(folder / "index.html", text.encode())
    return folder / "index.html"


# ------------------------------------------------------------------------------ what was found


def _task(name: str, kind: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    chances = {row[f"{name}.chance"] for row in rows} - {None}
    if len(chances) > 1:
        raise ValueError(
            f"task {name!r} has {len(chances)} chance levels {sorted(chances)}; run it again"
        )
    return {"name": name, "kind": kind, "chance": chances.pop() if chances else None}


def _shortened(study: Study, ledger: Ledger) -> dict[str, str]:
    """Why a task is not whole in some of the results, by task."""
    found: dict[str, str] = {}
    for result in study.results:
        if ledger.is_done(result):
            for task, row in ledger.results(result)["tasks"].items():
                if row.get("shortened"):
                    found[task] = row["shortened"]
    return found


def _answer(panel: str, groups: Sequence[Group]) -> dict[str, Any]:
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
        answer: dict[str, Any] = {
            "by": by,
            "best": best,
            "spread": spread,
            "against": against,
            "blind": None,
        }
        if panel == "vision":
            answer["blind"] = difference(spread, best.spreads["stable.vision_blind"])
        found.append(answer)
    return {"panel": panel, "curves": found}


def _repeated(study: Study) -> dict[str, list[str]]:
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


def _score_figures(
    study: Study, rows: Sequence[dict[str, Any]], groups: Sequence[Group], folder: Path
) -> dict[str, str]:
    baselines = {row["name"]: row["stable.text"] for row in rows if row["role"] == "baseline"}
    drawn = {}
    for panel in ("vision", "text"):
        figure = score_figure(study, groups, baselines, panel)
        drawn[panel] = _written(figure, folder / f"stable_{panel}")
    return drawn


def _written(figure: dict[str, bytes], path: Path) -> str:
    for suffix, data in figure.items():
        write_bytes(path.with_suffix(f".{suffix}"), data)
    return _data_uri("image/svg+xml", figure["svg"])


def _best_line(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    known = [row for row in rows if row["role"] == "line" and row["stable.vision"] is not None]
    return max(known, key=lambda row: row["stable.vision"]) if known else None


def _samples(study: Study, rows: Sequence[dict[str, Any]], ledger: Ledger) -> list[dict[str, Any]]:
    best = _best_line(rows)
    if best is None:
        return []
    result = next(line.result for line in study.lines if line.result.name == best["stage"])
    return samples(result, ledger)


# ------------------------------------------------------------------------------- plan and cost


def _trouble(row: PlanRow, ledger: Ledger) -> dict[str, Any]:
    error = ledger.status(row.stage).get("error")
    return {"stage": row.stage.name, "state": row.state, "error": error, "lines": row.lines}


def _costs(planned: Plan, ledger: Ledger) -> list[dict[str, Any]]:
    """By kind of stage: how many, tokens, FLOPs and seconds; once, and for every line alone."""
    costs = []
    for kind in KINDS:
        rows = [row for row in planned.rows if row.stage.kind == kind]
        if not rows:
            continue
        alone = [Part(row.stage, share) for row in rows for share in row.needs.values()]
        once = [spent(Part(row.stage), ledger) for row in rows]
        costs.append(
            {
                "kind": kind,
                "stages": len(rows),
                "done": sum(row.state == "done" for row in rows),
                "alone": len(alone),
                "tokens": sum(tokens or 0 for tokens, _ in once),
                "flops": sum(row.cost.flops or 0.0 for row in rows),
                "seconds": sum(seconds or 0.0 for _, seconds in once),
                "seconds_alone": sum(spent(part, ledger)[1] or 0.0 for part in alone),
            }
        )
    return costs


def _trained(row: PlanRow, ledger: Ledger, folder: Path) -> dict[str, Any]:
    """A training stage's results (None until it is done) and its curves (None before a step)."""
    metrics = ledger.metrics(row.stage)
    name = f"curves_{row.stage.name}"
    return {
        "name": row.stage.name,
        "kind": row.stage.kind,
        "state": row.state,
        "lines": row.lines,
        "results": ledger.results(row.stage) if row.state == "done" else None,
        "steps": len(metrics),
        "curves": _written(curve_figure(metrics), folder / name) if metrics else None,
    }


def _budgets(planned: Plan, ledger: Ledger) -> dict[str, int]:
    """Over all (stage, source) with a planned number: how many, the largest difference in tokens,
    and how many differ by more than the source's largest example."""
    gaps = []
    for row in planned.rows:
        if row.state == "done" and row.stage.kind in ("pretrain", "continue", "finetune"):
            for source in ledger.results(row.stage)["sources"].values():
                if source["planned_tokens"] is not None:
                    gap = abs(source["realised_tokens"] - source["planned_tokens"])
                    gaps.append((gap, source["largest_example_tokens"]))
    return {
        "pairs": len(gaps),
        "worst": max((gap for gap, _ in gaps), default=0),
        "beyond": sum(gap > largest for gap, largest in gaps),
    }


def _made(planned: Plan, ledger: Ledger) -> dict[str, Any]:
    """When the stages ran, for how long, and the most memory that one of them took."""
    times, memory = [], {}
    for row in planned.rows:
        if row.state == "done":
            status = ledger.status(row.stage)
            times.append(tuple(datetime.fromisoformat(status[key]) for key in ("started", "ended")))
            memory[row.stage.name] = ledger.results(row.stage)["peak_memory_bytes"]
    return {
        "store": str(ledger.store),
        "first": min(started for started, _ in times) if times else None,
        "last": max(ended for _, ended in times) if times else None,
        "wall": sum((ended - started for started, ended in times), timedelta()).total_seconds(),
        "peak_stage": max(memory, key=lambda name: memory[name]) if memory else None,
        "peak_bytes": max(memory.values()) if memory else None,
    }


# -------------------------------------------------------------------------------------- words


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "place": lambda value: f"{value:g}" if isinstance(value, int | float) else value,
        "points": lambda value: f"{100 * value:.1f}",
        "signed": lambda value: f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}"),
        "engineering": _engineering,
        "duration": _duration,
        "p_value": lambda value: "< .0001" if value < 1e-4 else f"{value:.2g}",
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
    }
    return environment


def _engineering(value: float) -> str:
    """Three digits with a unit's letter up to tera, powers of ten above."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value:.2e}" if value >= 1e15 else f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
