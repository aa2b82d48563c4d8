"""What a study took, from its plan and its store: cost, stages in trouble, budgets, times."""

from datetime import datetime, timedelta
from typing import Any

from midstream.report.parts import KINDS, Part, Snapshot
from midstream.study.graph import Plan, PlanRow

BUDGETED = ("pretrain", "continue", "finetune")


def trouble(row: PlanRow, label: str, ledger: Snapshot) -> dict[str, Any]:
    """A stage that is not done, and why."""
    error = ledger.status(row.stage).get("error")
    return {"label": label, "state": row.state, "error": error, "lines": row.lines}


def cost_rows(planned: Plan, ledger: Snapshot) -> list[dict[str, Any]]:
    """By kind of stage: how many, tokens, FLOPs and seconds; once, and for every line alone."""
    found = []
    for kind in KINDS:
        rows = [row for row in planned.rows if row.stage.kind == kind]
        if not rows:
            continue
        alone = [Part(row.stage, share) for row in rows for share in row.needs.values()]
        once = [ledger.spent(Part(row.stage)) for row in rows]
        found.append(
            {
                "kind": kind,
                "stages": len(rows),
                "done": sum(row.state == "done" for row in rows),
                "alone": len(alone),
                "tokens": sum(tokens or 0 for tokens, _ in once),
                "flops": sum(row.cost.flops or 0.0 for row in rows),
                "seconds": sum(seconds or 0.0 for _, seconds in once),
                "seconds_alone": sum(ledger.spent(part)[1] or 0.0 for part in alone),
            }
        )
    return found


def budgets(planned: Plan, ledger: Snapshot) -> dict[str, int]:
    """Over all (stage, source) with a planned number: how many, the largest difference in tokens,
    and how many differ by more than the source's largest example."""
    gaps = []
    for row in planned.rows:
        if row.state == "done" and row.stage.kind in BUDGETED:
            for source in ledger.results(row.stage)["sources"].values():
                if source["planned_tokens"] is not None:
                    gap = abs(source["realised_tokens"] - source["planned_tokens"])
                    gaps.append((gap, source["largest_example_tokens"]))
    return {
        "pairs": len(gaps),
        "worst": max((gap for gap, _ in gaps), default=0),
        "beyond": sum(gap > largest for gap, largest in gaps),
    }


def made(planned: Plan, ledger: Snapshot) -> dict[str, Any]:
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
        "peak_stage": planned.labels[max(memory, key=memory.__getitem__)] if memory else None,
        "peak_bytes": max(memory.values()) if memory else None,
    }
