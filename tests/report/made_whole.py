"""A whole study in a store: made-up results of every stage, in the formats of docs/store.md."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import tiny
from midstream import config
from midstream.core.storage import read_json, write_json
from midstream.cost.graph import order
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    DataStage,
    Evaluate,
    Finetune,
    FromScratch,
    PrepareSource,
    Pretrain,
    Stage,
    TrainEncoder,
)
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study

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

    def training(seed: int, tokens: int, *sources: str) -> config.Training:
        budget = tiny.mixture(tokens, **dict.fromkeys(sources, 1 / len(sources)))
        return config.Training(budget=budget, rows=tiny.ROWS, schedule=tiny.warm(), seed=seed)

    def text_run(seed: int) -> Pretrain:
        changes = {"training": training(seed, 1_000_000, "web"), "milestones": (0.2, 0.8, 1.0)}
        return tiny.TEXT.model_copy(update=changes)

    asked = config.Evaluation(visual_tasks=("colours", "yes_no"), text_tasks=("cloze",))

    def line(percent: int, seed: int) -> Line:
        start = FromScratch()
        if percent:
            start = ContinueFrom(stage=text_run(seed), completion=percent / 100)
        seen = tiny.SEEN.model_copy(
            update={"start": start, "training": training(seed, 400_000, "web", "pictures")}
        )
        tuned = Finetune(start=seen, training=training(seed, 100_000, "talks"))
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
                "web": source | {"kind": "text", "num_tokens": 2_000_000},
                "pictures": source | {"kind": "caption", "num_tokens": 90_000, "num_images": 6000},
                "talks": source | {"kind": "instruct", "num_tokens": 200_000},
            }
            finish(ledger, stage, common | sources[stage.source])
        elif isinstance(stage, DataStage):
            finish(ledger, stage, common | {"vocab_size": 512})
        elif isinstance(stage, TrainEncoder):
            metrics(ledger, stage, 300, 2048, chance)
            found = {"steps": 300, "first_loss": 6.0, "final_loss": 1.5, "retrieval": 0.5}
            found |= {"num_parameters": 9, "retrieval_chance": 0.1, "weights_digest": "w"}
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


def page_of(store: Path) -> str:
    return (store / "reports" / "when" / "index.html").read_text()


def change(ledger: Ledger, stage: Stage, **values: Any) -> None:
    path = ledger.folder(stage) / "results.json"
    write_json(path, read_json(path) | values)
