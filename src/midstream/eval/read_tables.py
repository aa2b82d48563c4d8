"""Benchmarks as the hub has them, Parquet tables with pictures in their cells (lmms-lab's) ->
examples, as `readers` makes them of the official files (docs/evaluation.md)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from midstream.config.training import is_pool
from midstream.core.digests import is_hidden, is_note
from midstream.eval.benchmark_records import (
    UNPACKED,
    Pictures,
    Record,
    VisualExample,
    gqa_kinds,
)
from midstream.eval.read_several import rows
from midstream.eval.readers import POPE_SPLITS, Asked, reader, ten, with_options

Read = Callable[..., list[VisualExample]]
_OFFICIAL = (".json", ".jsonl", ".p", ".csv", ".gz")


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
        f"{folder} holds {names} and none of the split {wanted[0][0]}; fetch its tables, or the "
        "official files (docs/evaluation.md)"
    )
