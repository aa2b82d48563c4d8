"""Benchmarks in Parquet tables with pictures in their cells: those that ask about several pictures,
and what the hub (lmms-lab) has of others -> examples, as `readers` makes them of the official files
(docs/evaluation.md). NLVR2, whose pictures are files, stands with its like."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from midstream.config.training import is_pool
from midstream.core.digests import is_hidden, is_note
from midstream.data.formats.record_files import columns_of, table_rows
from midstream.eval.benchmark_records import (
    UNPACKED,
    Pictures,
    Record,
    VisualExample,
    find_file,
    gqa_kinds,
    lines,
    marked,
    missing,
    split_of,
)
from midstream.eval.read_answers import choice_letter
from midstream.eval.readers import POPE_SPLITS, Asked, reader, ten, with_options
from midstream.eval.scoring import LETTERS

Read = Callable[..., list[VisualExample]]
_OFFICIAL = (".json", ".jsonl", ".p", ".csv", ".gz")
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
        example = VisualExample(key, record.text("sentence"), left, label, more=(right,))
        yield record, replace(example, choices=("True", "False"))


@reader()
def read_blink(folder: Path, look: Pictures) -> Asked:
    """BLINK's validation tables, a folder a task, which weigh alike; gold is a letter's index."""
    tables = sorted(folder.glob("*/val*.parquet")) or sorted(folder.glob("**/val*.parquet"))
    tables = tables or missing(folder / "val-0.parquet")
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
    tables = sorted(folder.glob("**/test*.parquet")) or missing(folder / "test-0.parquet")
    columns = ["idx", "question", "options", "answer", "image_list"]
    for record in rows(tables, columns, ("task", "image_relation", "image_type")):
        options = record.texts("options", least=2)
        gold = _lettered(record, record.text("answer"), options)
        text = f"Question: {record.text('question')}\nChoices:{_listed(options)}"
        kinds = record.kinds("task", "image_relation")
        key, shown = record.identifier("idx"), record.get("image_list", list)
        yield record, _example(record, key, text, shown, look, gold, kinds=kinds)


@reader()
def read_mantis_eval(folder: Path, look: Pictures) -> Asked:
    """Mantis-Eval's test table: questions with options, and free ones (`answers`)."""
    tables = sorted(folder.glob("**/test*.parquet")) or missing(folder / "test-0.parquet")
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
            text = f"{text}{_listed(options, ' ')}\n{_MULTI_CHOICE}"
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


def _listed(options: list[str], lead: str = "") -> str:
    pairs = zip(LETTERS, options, strict=False)
    return "".join(f"\n{lead}({letter}) {option}" for letter, option in pairs)


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


# ------------------------------------------------------------------- other benchmarks in tables


def or_tables(read: Read, tables: Read) -> Read:
    """`read`, and `tables` of a folder that holds tables and no file of the official kinds."""

    def whole(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
        files = [path for path in folder.glob("*") if path.suffix in _OFFICIAL]
        own = [path for path in files if not (is_hidden(path.name) or is_note(path.name))]
        return (read if own or not _all_tables(folder) else tables)(folder, pictures=pictures)

    return whole


@reader()
def read_vqa(folder: Path, look: Pictures) -> Asked:
    """VQA v2, OK-VQA: a row a question, with its ten answers."""
    kinds, columns = ("answer_type", "question_type"), "question_id question answers"
    tables = _tables(folder, ("validation", "val2014"))
    for record in _rows(tables, look, columns, ("image_id", *kinds)):
        key, given = record.identifier("question_id"), record.get("answers", list)
        texts = [one.get("answer") if isinstance(one, dict) else one for one in given]
        answers = ten(Record(record.where, {"answers": texts}).texts("answers"), record)
        told = {kind: str(record.value[kind]) for kind in kinds if kind in record}
        shown = record.identifier("image_id") if "image_id" in record else key
        image, asked = _picture(record, look, shown), record.text("question")
        yield record, VisualExample(key, asked, image, answers, kinds=told)


@reader()
def read_textvqa(folder: Path, look: Pictures) -> Asked:
    """TextVQA: a row a question, with its ten answers."""
    columns = "question_id image_id question answers"
    for record in _rows(_tables(folder, ("validation",)), look, columns):
        key, other = record.identifier("question_id"), record.identifier("image_id")
        answers, image = ten(record.texts("answers"), record), _picture(record, look, other)
        asked = record.text("question")
        yield record, VisualExample(key, asked, image, answers, other_id=other)


@reader()
def read_pope(folder: Path, look: Pictures) -> Asked:
    """POPE: a row a question; its category is the split."""
    columns = "question_id question answer category image_source"
    for record in _rows(_tables(folder, ("test",), POPE_SPLITS), look, columns):
        number, split = record.identifier("question_id"), record.one_of("category", *POPE_SPLITS)
        label, asked = record.one_of("answer", "yes", "no"), record.text("question")
        image = _picture(record, look, record.text("image_source"))
        example = VisualExample(f"{split}-{number}", asked, image, label, split)
        yield record, replace(example, choices=("Yes", "No"), other_id=number)


@reader()
def read_gqa(folder: Path, look: Pictures) -> Asked:
    """GQA's balanced test-dev questions in one folder of tables, their pictures in another."""
    images, questions = (folder / f"testdev_balanced_{kind}" for kind in ("images", "instructions"))
    shown: dict[str, Path] = {}
    for record in rows(_tables(images, ("testdev",)), ["id", "image"], ()) if look.needed else ():
        shown[record.identifier("id")] = look.unpack(record, record.value["image"])
    columns = ["id", "imageId", "question", "answer"]
    for record in rows(_tables(questions, ("testdev",)), columns, ("types",)):
        key, picture = record.identifier("id"), record.identifier("imageId")
        if look.needed and picture not in shown:
            record.refuse(f"its picture {picture} is in no table of {images}")
        image = shown.get(picture, folder / UNPACKED / picture)
        asked, answer = record.text("question"), record.text("answer")
        yield record, VisualExample(key, asked, image, answer, kinds=gqa_kinds(record))


@reader()
def read_ai2d(folder: Path, look: Pictures) -> Asked:
    """AI2D's test questions, which have no names but their places; gold is an option's number."""
    tables = _rows(_tables(folder, ("test",)), look, "question options answer")
    for number, record in enumerate(tables):
        options, told = record.texts("options", least=2), record.identifier("answer")
        index = int(told) if told.isdecimal() else len(options)
        index = Record(record.where, {"answer": index}).index("answer", len(options))
        image, asked = _picture(record, look, str(number)), record.text("question")
        gold = {"index": index, "choices": options}
        example = VisualExample(str(number), with_options(asked, options), image, gold, "test")
        yield record, replace(example, choices=tuple(options))


def _rows(
    tables: list[Path], look: Pictures, columns: str, further: tuple[str, ...] = ()
) -> Iterator[Record]:
    """Rows of tables; pictures are read where they are needed alone."""
    return rows(tables, columns.split() + ["image"] * look.needed, further)


def _picture(record: Record, look: Pictures, name: str) -> Path:
    """The picture of a row; where none is needed, a name that all questions about it have."""
    if look.needed:
        return look.unpack(record, record.value["image"])
    return look.folder / UNPACKED / name


def _all_tables(folder: Path) -> list[Path]:
    # No other folders: `folder` may hold those of several benchmarks.
    places = ("", "data/", "Full/", "testdev_balanced_*/")
    found = [path for place in places for path in folder.glob(f"{place}*.parquet")]
    return sorted(path for path in found if not is_hidden(path.name))


def _tables(folder: Path, *alternatives: tuple[str, ...]) -> list[Path]:
    """The tables of the first of several sets of splits that is there; of shots those of `train`.
    Their names, or their folders', are the splits'."""
    there, wanted = _all_tables(folder), (("train",),) if is_pool(folder.name) else alternatives
    for splits in wanted:
        named = [p for p in there if {p.name.split("-")[0], p.parent.name} & {*splits}]
        if named:
            return named
    names = ", ".join(str(path.relative_to(folder)) for path in there[:10]) or "no table"
    raise FileNotFoundError(
        f"{folder} holds {names} and none of the split {wanted[0][0]}; fetch its tables"
    )
