"""Official files of benchmarks that ask about several pictures -> examples (docs/evaluation.md)."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from midstream.data.formats.record_files import columns_of, table_rows
from midstream.eval.benchmark_records import (
    Pictures,
    Record,
    VisualExample,
    find_file,
    lines,
    marked,
    missing,
    split_of,
)
from midstream.eval.read_answers import choice_letter
from midstream.eval.readers import Asked, reader
from midstream.eval.scoring import LETTERS

# Mantis-Eval's own wordings.
_MULTI_CHOICE = "Answer with the option's letter from the given choices directly."
_SHORT_ANSWER = (
    "Given the images, answer the following short answer vqa question:\nQ: {question}\nYou can "
    'first give your analysis, and then give your final answer as "Final Answer:"'
)


@reader("dev", "test1", "test", "train")
def read_nlvr2(folder: Path, look: Pictures) -> Asked:
    """NLVR2's public test, or its development set: a sentence about a left and a right picture;
    gold is "True" or "False"."""
    split = split_of(folder, "test1")
    patterns = (f"{split}.json", "dev.json", f"*{split}*.json*", "*dev*.json*")
    path = find_file(folder, *(patterns[::2] if split == "train" else patterns))
    for record in lines(path):
        key = record.text("identifier")
        pair, dash, _ = key.rpartition("-")
        if not dash or len(key.split("-")) != 4:
            record.refuse(f"its identifier {key!r} is not split-set-pair-sentence")
        label = str(record.value.get("label")).capitalize()  # some write true
        if label not in ("True", "False"):
            record.refuse(f"its label is {label!r}, neither True nor False")
        # Training pictures lie in folders by number.
        inside = f"{record.identifier('directory')}/" if "directory" in record else ""
        names = [f"{pair}-img{side}.png" for side in (0, 1)]
        left, right = (look.find(record, name, f"{inside}{name}") for name in names)
        yield (
            record,
            VisualExample(
                key,
                record.text("sentence"),
                left,
                label,
                choices=("True", "False"),
                more=(right,),
            ),
        )


@reader()
def read_blink(folder: Path, look: Pictures) -> Asked:
    """BLINK's validation tables, a folder a task, which weigh alike; gold is a letter's index."""
    tables = sorted(folder.glob("*/val*.parquet")) or sorted(folder.glob("**/val*.parquet"))
    if not tables:
        missing(folder / "val-00000-of-00001.parquet")
    columns = ["idx", "question", "choices", "answer", "prompt", "image_1"]
    for record in rows(tables, columns, ("image_2", "image_3", "image_4", "sub_task")):
        options = record.texts("choices", least=2)
        shown = [record.value[f"image_{n}"] for n in range(1, 5) if f"image_{n}" in record]
        split = record.text("sub_task") if "sub_task" in record else Path(record.where).parent.name
        gold = _lettered(record, record.text("answer"), options)
        yield (
            record,
            _example(record, record.text("idx"), record.text("prompt"), shown, look, gold, split),
        )


@reader()
def read_muirbench(folder: Path, look: Pictures) -> Asked:
    """MuirBench's test table; pictures stand in the question and in its options."""
    tables = sorted(folder.glob("**/test*.parquet"))
    if not tables:
        missing(folder / "test-00000-of-00001.parquet")
    columns = ["idx", "question", "options", "answer", "image_list"]
    for record in rows(tables, columns, ("task", "image_relation", "image_type")):
        options = record.texts("options", least=2)
        gold = _lettered(record, record.text("answer"), options)
        listed = [f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False)]
        text = "\n".join((f"Question: {record.text('question')}", "Choices:", *listed))
        kinds = record.kinds("task", "image_relation")
        key, shown = record.identifier("idx"), record.get("image_list", list)
        yield record, _example(record, key, text, shown, look, gold, kinds=kinds)


@reader()
def read_mantis_eval(folder: Path, look: Pictures) -> Asked:
    """Mantis-Eval's test table: questions with options, and free ones (`answers`)."""
    tables = sorted(folder.glob("**/test*.parquet"))
    if not tables:
        missing(folder / "test-00000-of-00001.parquet")
    columns = ["id", "question_type", "question", "images", "options", "answer"]
    for record in rows(tables, columns, ("category",)):
        kind = record.one_of("question_type", "multi-choice", "short-answer")
        text, answer = record.text("question"), record.text("answer")
        kinds = record.kinds("question_type", "category")
        key, shown = record.identifier("id"), record.get("images", list)
        if kind == "short-answer":
            gold: dict[str, Any] = {"answers": [answer]}
            text = _SHORT_ANSWER.replace("{question}", text)
        else:
            options = [_unlettered(option, at) for at, option in enumerate(record.texts("options"))]
            gold = _lettered(record, answer, options)
            listed = (
                f"\n ({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
            )
            text = f"{text}{''.join(listed)}\n{_MULTI_CHOICE}"
        yield record, _example(record, key, text, shown, look, gold, kinds=kinds)


def rows(tables: Sequence[Path], columns: list[str], further: Sequence[str]) -> Iterator[Record]:
    """The rows of tables as records; `further` columns may be missing."""
    for table in tables:
        names = set(columns_of(str(table)).names)
        if lacking := [name for name in columns if name not in names]:
            raise ValueError(
                f"{table} has no column {lacking[0]!r}, only {', '.join(sorted(names))}; give the "
                "official table"
            )
        held = [*columns, *(name for name in further if name in names)]
        for number, row in enumerate(table_rows(str(table), held)):
            value = {name: cell.as_py() for name, cell in zip(held, row, strict=True)}
            yield Record(f"{table} row {number}", value)


def _lettered(record: Record, answer: str, options: list[str]) -> dict[str, Any]:
    if len(options) > len(LETTERS):
        record.refuse(f"it has {len(options)} options, there are {len(LETTERS)} letters for them")
    index = choice_letter(answer, len(options))
    if index is None:
        record.refuse(f"its answer {answer!r} names none of its {len(options)} options by a letter")
    return {"index": index, "choices": options}


def _unlettered(option: str, at: int) -> str:
    """An option without the letter that it has before it in some records."""
    return re.sub(rf"^\s*\(?{LETTERS[at : at + 1]}[).:]\s*", "", option).strip()


def _example(
    record: Record,
    key: str,
    text: str,
    shown: list[Any],
    look: Pictures,
    gold: dict[str, Any],
    split: str = "",
    kinds: dict[str, str] | None = None,
) -> VisualExample:
    """A question with the pictures of a table's cells; those without a mark stand before it."""
    if not shown:
        record.refuse("it has no pictures")
    text = marked(record, text, len(shown))
    first, *more = (look.unpack(record, value) for value in shown)
    choices = tuple(gold.get("choices", ()))
    return VisualExample(key, text, first, gold, split, kinds or {}, choices, more=tuple(more))
