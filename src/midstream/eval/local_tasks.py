"""lm-evaluation-harness's own tasks from published files, for machines without a hub.

A task keeps the harness's wording, choices and metrics: the published records are put into the
columns that its data set has on the hub, and the harness's own description of the task is used.
Where a file holds less than the data set, or other words, `departs` says so, and no published
average takes the score.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream.eval.readers.records import (
    Record,
    entries,
    find_file,
    items,
    lines,
    read_json_file,
    read_text,
)

Doc = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """What a folder gives of a task: its records in the columns of the hub's data set.

    settings: what differs from the harness's description. departs: how the file differs from the
    data set, None where it does not; `chance` where that changes what guessing scores.
    """

    docs: tuple[Doc, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    departs: str | None = None
    chance: float | None = None


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness: where its description lies, and its published files."""

    yaml: str
    split: str
    read: Callable[[Path], LocalTask]
    files: tuple[str, ...]
    num_docs: int
    published: str
    licence: str


def _arc(folder: Path) -> LocalTask:
    path = find_file(folder, "ARC-Easy-Test.jsonl", "arc_easy.jsonl")
    docs = []
    for record in lines(path):
        if "query" in _keys(record):  # llm-foundry's form
            choices, gold = _texts(record, "choices"), record.get("gold", int)
            labels = [chr(ord("A") + index) for index in range(len(choices))]
            question = record.text("query").removeprefix("Question: ")
            answer = labels[_below(gold, len(choices), record)]
        else:
            asked = Record(record.where, record.get("question", dict))
            options = [Record(asked.where, one) for one in asked.get("choices", list)]
            choices = [option.text("text") for option in options]
            labels = [option.text("label") for option in options]
            question, answer = asked.text("stem"), record.text("answerKey")
        docs.append(
            {
                "question": question,
                "choices": {"text": choices, "label": labels},
                "answerKey": answer,
            }
        )
    return LocalTask(tuple(docs))


def _copa(folder: Path) -> LocalTask:
    docs = []
    for record in lines(find_file(folder, "val.jsonl", "copa.jsonl")):
        if "query" in _keys(record):  # llm-foundry's form: "The woman retired, therefore"
            premise, _, connector = record.text("query").rpartition(", ")
            if connector not in _CONNECTORS:
                record.refuse(f"its query ends with {connector!r}, not with because or therefore")
            first, second = _texts(record, "choices")
            doc = {"premise": premise + ".", "question": _CONNECTORS[connector]}
            doc |= {"choice1": first, "choice2": second, "label": record.get("gold", int)}
        else:
            doc = {key: record.text(key) for key in ("premise", "question", "choice1", "choice2")}
            doc["label"] = record.get("label", int)
        docs.append(doc)
    return LocalTask(tuple(docs))


_CONNECTORS = {"because": "cause", "therefore": "effect"}


def _mathqa(folder: Path) -> LocalTask:
    if (folder / "test.json").is_file():
        keys = ("Problem", "options", "correct")
        return LocalTask(
            tuple({key: one.text(key) for key in keys} for one in items(folder / "test.json"))
        )
    docs = []
    for record in lines(find_file(folder, "math_qa.jsonl")):
        # "Question: ... ?\nA. 30\nB. ...\nAnswer: "
        question, *rest = record.text("query").removeprefix("Question: ").split("\nA. ")
        listed = ("A. " + "\nA. ".join(rest)).removesuffix("\nAnswer: ").split("\n")
        choices = [line[3:] for line in listed]
        if len(choices) != len(_texts(record, "choices")):
            record.refuse(f"its query lists {len(choices)} options, its choices are others")
        gold = _below(record.get("gold", int), len(choices), record)
        docs.append({"Problem": question, "choices": choices, "gold": gold})
    settings = {"doc_to_choice": "choices", "doc_to_target": "gold"}
    return LocalTask(tuple(docs), settings, "four of the five options", 0.25)


def _piqa(folder: Path) -> LocalTask:
    asked, labels = find_file(folder, "valid.jsonl"), find_file(folder, "valid-labels.lst")
    golds = read_text(labels).split()
    records = list(lines(asked))
    if len(records) != len(golds) or not set(golds) <= {"0", "1"}:
        raise ValueError(
            f"{labels} holds {len(golds):,} labels, {asked} {len(records):,} questions; each needs "
            "one label, 0 or 1: give the two files of one release"
        )
    return LocalTask(
        tuple(
            {key: record.text(key) for key in ("goal", "sol1", "sol2")} | {"label": int(gold)}
            for record, gold in zip(records, golds, strict=True)
        )
    )


def _pubmedqa(folder: Path) -> LocalTask:
    asked = dict(entries(find_file(folder, "ori_pqal.json")))
    path = find_file(folder, "test_ground_truth.json")
    docs = []
    for key, gold in read_json_file(path).items():
        if key not in asked:
            raise ValueError(f"{path} names {key}, which ori_pqal.json lacks; give one release")
        record = asked[key]
        docs.append(
            {
                "QUESTION": record.text("QUESTION"),
                "CONTEXTS": _texts(record, "CONTEXTS"),
                "final_decision": gold,
            }
        )
    return LocalTask(tuple(docs))


def _hellaswag(folder: Path) -> LocalTask:
    official = folder / "hellaswag_val.jsonl"
    if official.is_file():
        keys = ("ctx_a", "ctx_b", "activity_label")
        return LocalTask(
            tuple(
                {key: record.text(key) for key in keys}
                | {"endings": _texts(record, "endings"), "label": record.identifier("label")}
                for record in lines(official)
            )
        )
    path = find_file(folder, "hellaswag_val*.txt")
    rows = [line for line in read_text(path).split("\n") if line]
    if len(rows) % 6:
        raise ValueError(f"{path} holds {len(rows):,} lines, no multiple of six; it is cut off")
    docs = []
    for number in range(0, len(rows), 6):
        activity, mark, context = rows[number].partition(": ")
        if not mark or rows[number + 1] not in ("0", "1", "2", "3"):
            raise ValueError(
                f"{path} line {number + 1}: a task is 'activity: context', a label 0 to 3 and four "
                "endings; mend these lines"
            )
        doc: Doc = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
        docs.append(doc | {"label": rows[number + 1], "endings": rows[number + 2 : number + 6]})
    return LocalTask(tuple(docs), departs="contexts as the text file writes them")


def _boolq(folder: Path) -> LocalTask:
    docs = []
    for record in lines(find_file(folder, "val.jsonl", "dev.jsonl", "boolq*.jsonl")):
        key = "label" if "label" in _keys(record) else "answer"
        value = record.value[key] if key in _keys(record) else None
        if not isinstance(value, bool):
            record.refuse(f"its {key!r} is {value!r}, neither true nor false")
        docs.append(
            {
                "passage": record.text("passage"),
                "question": record.text("question"),
                "label": int(value),
            }
        )
    return LocalTask(tuple(docs))


def _agieval(name: str) -> Callable[[Path], LocalTask]:
    def read(folder: Path) -> LocalTask:
        docs = []
        for record in lines(find_file(folder, f"{name}.jsonl")):
            options = _texts(record, "options")
            gold = _below(ord(record.text("label")) - ord("A"), len(options), record)
            last = chr(ord("A") + len(options) - 1)
            # AGIEval's zero-shot wording of its multiple-choice tasks.
            query = (
                f"{record.text('passage')}Q: {record.text('question')} Answer Choices: "
                f"{' '.join(options)}\nA: Among A through {last}, the answer is"
            )
            docs.append({"query": query, "choices": options, "gold": [gold]})
        return LocalTask(tuple(docs))

    return read


def _bigbench(name: str) -> Callable[[Path], LocalTask]:
    def read(folder: Path) -> LocalTask:
        published = folder / "task.json"
        if published.is_file():
            return LocalTask(tuple(_bigbench_docs(published)))
        docs = []
        for record in lines(find_file(folder, f"{name}.jsonl")):
            choices = _texts(record, "choices")
            gold = choices[_below(record.get("gold", int), len(choices), record)]
            inputs = record.text("query").rstrip()
            docs.append({"inputs": inputs, "multiple_choice_targets": choices, "targets": [gold]})
        return LocalTask(tuple(docs), departs="the wording of llm-foundry's file")

    return read


def _bigbench_docs(path: Path) -> list[Doc]:
    """BIG-bench's own task.json: inputs, and a score for each choice."""
    value = read_json_file(path)
    prefix, suffix = value.get("example_input_prefix", "\nQ: "), "\nA:"
    docs = []
    for number, example in enumerate(value.get("examples", [])):
        record = Record(f"{path} examples record {number}", example)
        scores = record.get("target_scores", dict)
        best = max(scores, key=lambda choice: scores[choice])
        listed = "".join(f"\n  choice: {choice}" for choice in scores)
        inputs = f"{prefix}{record.text('input')}{listed}{suffix}"
        docs.append({"inputs": inputs, "multiple_choice_targets": list(scores), "targets": [best]})
    if not docs:
        raise ValueError(f"{path} holds no examples; give BIG-bench's own file")
    return docs


def _cs_algorithms(folder: Path) -> LocalTask:
    docs = []
    for record in lines(find_file(folder, "bigbench_cs_algorithms.jsonl")):
        continuation = f" {record.text('continuation').strip()}"
        docs.append({"context": record.text("context"), "continuation": continuation})
    return LocalTask(tuple(docs), {"output_type": "loglikelihood"})


_FOUNDRY = "mosaicml/llm-foundry, scripts/eval/local_data"
HARNESS_TASKS: dict[str, HarnessTask] = {
    "agieval_sat_en": HarnessTask(
        "agieval/sat-en.yaml",
        "test",
        _agieval("sat-en"),
        ("sat-en.jsonl",),
        206,
        "AGIEval v1",
        "MIT",
    ),
    "agieval_lsat_ar": HarnessTask(
        "agieval/lsat-ar.yaml",
        "test",
        _agieval("lsat-ar"),
        ("lsat-ar.jsonl",),
        230,
        "AGIEval v1",
        "MIT",
    ),
    "arc_easy": HarnessTask(
        "arc/arc_easy.yaml",
        "test",
        _arc,
        ("arc_easy.jsonl", "ARC-Easy-Test.jsonl"),
        2376,
        f"ARC (Allen Institute for AI), or {_FOUNDRY}",
        "CC BY-SA 4.0",
    ),
    "bigbench_conceptual_combinations_multiple_choice": HarnessTask(
        "bigbench/multiple_choice/conceptual_combinations.yaml",
        "default",
        _bigbench("bigbench_conceptual_combinations"),
        ("bigbench_conceptual_combinations.jsonl", "conceptual_combinations/task.json"),
        103,
        f"BIG-bench, or {_FOUNDRY}",
        "Apache-2.0",
    ),
    "bigbench_cs_algorithms_multiple_choice": HarnessTask(
        "bigbench/multiple_choice/cs_algorithms.yaml",
        "default",
        _bigbench("bigbench_cs_algorithms_multiple_choice"),
        ("cs_algorithms/task.json",),
        1320,
        "BIG-bench",
        "Apache-2.0",
    ),
    "bigbench_cs_algorithms": HarnessTask(
        "",
        "test",
        _cs_algorithms,
        ("bigbench_cs_algorithms.jsonl",),
        1320,
        _FOUNDRY,
        "Apache-2.0",
    ),
    "boolq": HarnessTask(
        "super_glue/boolq/default.yaml",
        "validation",
        _boolq,
        ("BoolQ/val.jsonl", "boolq/dev.jsonl", "boolq.jsonl"),
        3270,
        "BoolQ (Google), or SuperGLUE",
        "CC BY-SA 3.0",
    ),
    "copa": HarnessTask(
        "super_glue/copa/default.yaml",
        "validation",
        _copa,
        ("COPA/val.jsonl", "copa.jsonl"),
        100,
        f"SuperGLUE, or {_FOUNDRY}",
        "BSD-2-Clause",
    ),
    "hellaswag": HarnessTask(
        "hellaswag/hellaswag.yaml",
        "validation",
        _hellaswag,
        ("hellaswag_val.jsonl", "hellaswag_val*.txt"),
        10042,
        "HellaSwag (rowanz)",
        "MIT",
    ),
    "mathqa": HarnessTask(
        "mathqa/mathqa.yaml",
        "test",
        _mathqa,
        ("MathQA/test.json", "math_qa.jsonl"),
        2985,
        f"MathQA, or {_FOUNDRY}",
        "Apache-2.0",
    ),
    "piqa": HarnessTask(
        "piqa/piqa.yaml",
        "validation",
        _piqa,
        ("valid.jsonl",),
        1838,
        "PIQA (Y. Bisk)",
        "AFL-3.0",
    ),
    "pubmedqa": HarnessTask(
        "pubmedqa/pubmedqa.yaml",
        "test",
        _pubmedqa,
        ("ori_pqal.json",),
        500,
        "PubMedQA",
        "MIT",
    ),
}


def find_local(folder: Path, name: str) -> Path | None:
    """The folder under `folder` that holds a task's published files, None where none does."""
    for pattern in HARNESS_TASKS[name].files:
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if found:
            return found[0].parent
    return None


def _keys(record: Record) -> set[str]:
    return set(record.value) if isinstance(record.value, dict) else set()


def _texts(record: Record, key: str) -> list[str]:
    values = record.get(key, list)
    if len(values) < 1 or not all(isinstance(value, str) for value in values):
        record.refuse(f"its {key!r} is no list of texts: {json.dumps(values)[:80]}")
    return list(values)


def _below(index: int, count: int, record: Record) -> int:
    if not 0 <= index < count:
        record.refuse(f"its answer {index} is none of {count} choices")
    return index
