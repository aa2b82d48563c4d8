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
    items,
    lines,
    missing,
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
    """A task of the harness: where its description lies, and what reads its published files
    (`benchmark_files.TEXT_FILES`)."""

    yaml: str
    split: str
    read: Callable[..., LocalTask]
    num_docs: int
    published: str
    licence: str


def _arc(path: Path) -> LocalTask:
    docs = []
    for record in lines(path):
        if "query" in _keys(record):  # llm-foundry's form
            docs.append({"question": _stem(record), **_foundry_choices(record)})
        else:
            docs.append(_stem_and_choices(record, "question"))
    return LocalTask(tuple(docs))


def _openbookqa(path: Path) -> LocalTask:
    docs = []
    for record in lines(path):
        if "query" in _keys(record):
            docs.append({"question_stem": _stem(record), **_foundry_choices(record)})
        else:
            docs.append(_stem_and_choices(record, "question_stem"))
    return LocalTask(tuple(docs))


def _stem(record: Record) -> str:
    return record.text("query").removeprefix("Question: ").removesuffix("\n")


def _foundry_choices(record: Record) -> Doc:
    """llm-foundry's list of choices as ARC's, lettered."""
    choices = _texts(record, "choices")
    labels = [chr(ord("A") + index) for index in range(len(choices))]
    gold = _below(record.get("gold", int), len(choices), record)
    return {"choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}


def _stem_and_choices(record: Record, key: str) -> Doc:
    """A published record of ARC or OpenBookQA, the question under `key`."""
    asked = Record(record.where, record.get("question", dict))
    options = [Record(asked.where, one) for one in asked.get("choices", list)]
    labels = [option.text("label") for option in options]
    choices = {"text": [option.text("text") for option in options], "label": labels}
    return {key: asked.text("stem"), "choices": choices, "answerKey": record.text("answerKey")}


def _winogrande(path: Path) -> LocalTask:
    docs = []
    for record in lines(path):
        if "context_options" not in _keys(record):
            keys = ("sentence", "option1", "option2", "answer")
            doc = {key: record.text(key) for key in keys}
            if "_" not in doc["sentence"] or doc["answer"] not in ("1", "2"):
                record.refuse("a sentence needs a blank '_' and the answer 1 or 2")
            docs.append(doc)
            continue
        options = _texts(record, "context_options")  # llm-foundry's form
        if len(options) != 2:
            record.refuse(f"it has {len(options)} context_options, not two")
        gold = _below(record.get("gold", int), 2, record)
        # The harness puts an option in place of the blank, and what stands behind it after.
        doc = {"sentence": f"_ {record.text('continuation').strip()}", "answer": str(gold + 1)}
        docs.append(doc | {"option1": options[0], "option2": options[1]})
    return LocalTask(tuple(docs))


def _copa(path: Path) -> LocalTask:
    docs = []
    for record in lines(path):
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


def _mathqa(path: Path) -> LocalTask:
    if path.suffix == ".json":
        keys = ("Problem", "options", "correct")
        return LocalTask(tuple({key: one.text(key) for key in keys} for one in items(path)))
    docs = []
    for record in lines(path):
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


def _piqa(asked: Path, labels: Path) -> LocalTask:
    if not labels.is_file():
        missing(labels)
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


def _pubmedqa(questions: Path, path: Path) -> LocalTask:
    asked = dict(entries(questions))
    docs = []
    for key, gold in read_json_file(path).items():
        if key not in asked:
            raise ValueError(f"{path} names {key}, which {questions} lacks; give one release")
        record = asked[key]
        docs.append(
            {
                "QUESTION": record.text("QUESTION"),
                "CONTEXTS": _texts(record, "CONTEXTS"),
                "final_decision": gold,
            }
        )
    return LocalTask(tuple(docs))


def _hellaswag(path: Path) -> LocalTask:
    if path.suffix == ".jsonl":
        keys = ("ctx_a", "ctx_b", "activity_label")
        return LocalTask(
            tuple(
                {key: record.text(key) for key in keys}
                | {"endings": _texts(record, "endings"), "label": record.identifier("label")}
                for record in lines(path)
            )
        )
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


def _boolq(path: Path) -> LocalTask:
    docs, departs = [], None
    for record in lines(path):
        if "query" in _keys(record):  # llm-foundry's form
            docs.append(_foundry_boolq(record))
            departs = "passages without their titles, as llm-foundry's file has them"
            continue
        key = "label" if "label" in _keys(record) else "answer"
        value = record.value[key] if key in _keys(record) else None
        if not isinstance(value, bool):
            record.refuse(f"its {key!r} is {value!r}, neither true nor false")
        # SuperGLUE, whose wording the harness has, puts the title before the passage.
        title = f"{record.text('title')} -- " if "title" in _keys(record) else ""
        passage, question = title + record.text("passage"), record.text("question")
        docs.append({"passage": passage, "question": question, "label": int(value)})
    return LocalTask(tuple(docs), departs=departs)


def _foundry_boolq(record: Record) -> Doc:
    # "Passage: ...\nQuestion: does ...?\n"
    passage, mark, question = record.text("query").rpartition("\nQuestion: ")
    if not mark or _texts(record, "choices") != ["no", "yes"]:
        record.refuse("its query has no line 'Question: ', or its choices are not no and yes")
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.rstrip("\n").removesuffix("?"),
        "label": _below(record.get("gold", int), 2, record),
    }


def _agieval(path: Path) -> LocalTask:
    docs = []
    for record in lines(path):
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


def _bigbench(path: Path) -> LocalTask:
    if path.suffix == ".json":
        return LocalTask(tuple(_bigbench_docs(path)))
    docs = []
    for record in lines(path):
        choices = _texts(record, "choices")
        gold = choices[_below(record.get("gold", int), len(choices), record)]
        inputs = record.text("query").rstrip()
        docs.append({"inputs": inputs, "multiple_choice_targets": choices, "targets": [gold]})
    return LocalTask(tuple(docs), departs="the wording of llm-foundry's file")


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


def _cs_algorithms(path: Path) -> LocalTask:
    docs = []
    for record in lines(path):
        continuation = f" {record.text('continuation').strip()}"
        docs.append({"context": record.text("context"), "continuation": continuation})
    return LocalTask(tuple(docs), {"output_type": "loglikelihood"})


_FOUNDRY = "mosaicml/llm-foundry, scripts/eval/local_data"
_AI2 = "Allen Institute for AI"
_BIGBENCH = "bigbench/multiple_choice"
_ROWS: dict[str, tuple[str, str, Callable[..., LocalTask], int, str, str]] = {
    "agieval_sat_en": ("agieval/sat-en.yaml", "test", _agieval, 206, "AGIEval v1", "MIT"),
    "agieval_lsat_ar": ("agieval/lsat-ar.yaml", "test", _agieval, 230, "AGIEval v1", "MIT"),
    "arc_easy": (
        "arc/arc_easy.yaml",
        "test",
        _arc,
        2376,
        f"ARC ({_AI2}), or {_FOUNDRY}",
        "CC BY-SA 4.0",
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        "test",
        _arc,
        1172,
        f"ARC ({_AI2}), or {_FOUNDRY}",
        "CC BY-SA 4.0",
    ),
    "bigbench_conceptual_combinations_multiple_choice": (
        f"{_BIGBENCH}/conceptual_combinations.yaml",
        "default",
        _bigbench,
        103,
        f"BIG-bench, or {_FOUNDRY}",
        "Apache-2.0",
    ),
    "bigbench_cs_algorithms_multiple_choice": (
        f"{_BIGBENCH}/cs_algorithms.yaml",
        "default",
        _bigbench,
        1320,
        "BIG-bench",
        "Apache-2.0",
    ),
    "bigbench_cs_algorithms": ("", "test", _cs_algorithms, 1320, _FOUNDRY, "Apache-2.0"),
    "boolq": (
        "super_glue/boolq/default.yaml",
        "validation",
        _boolq,
        3270,
        f"BoolQ (Google), SuperGLUE, or {_FOUNDRY}",
        "CC BY-SA 3.0",
    ),
    "copa": (
        "super_glue/copa/default.yaml",
        "validation",
        _copa,
        100,
        f"SuperGLUE, or {_FOUNDRY}",
        "BSD-2-Clause",
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "validation",
        _hellaswag,
        10042,
        "HellaSwag (rowanz)",
        "MIT",
    ),
    "mathqa": (
        "mathqa/mathqa.yaml",
        "test",
        _mathqa,
        2985,
        f"MathQA, or {_FOUNDRY}",
        "Apache-2.0",
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        "test",
        _openbookqa,
        500,
        f"OpenBookQA ({_AI2}), or {_FOUNDRY}",
        "Apache-2.0",
    ),
    "piqa": ("piqa/piqa.yaml", "validation", _piqa, 1838, "PIQA (Y. Bisk)", "AFL-3.0"),
    "pubmedqa": ("pubmedqa/pubmedqa.yaml", "test", _pubmedqa, 500, "PubMedQA", "MIT"),
    "winogrande": (
        "winogrande/default.yaml",
        "validation",
        _winogrande,
        1267,
        f"WinoGrande ({_AI2}), or {_FOUNDRY}",
        "CC BY 4.0",
    ),
}
HARNESS_TASKS: dict[str, HarnessTask] = {name: HarnessTask(*row) for name, row in _ROWS.items()}


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
