"""Questions with fixed answers: VSR, TallyQA, AI2D."""

from pathlib import Path

from midstream.eval.readers.examples import Pictures, VisualExample, coco_names
from midstream.eval.readers.records import (
    Record,
    add,
    find_file,
    lines,
    missing,
    read_json_file,
    read_text,
    records,
)
from midstream.eval.scoring import LETTERS

NUM_COUNTS = 16
AI2D_TEST_IDS = "ai2d_test_ids.csv"


def read_vsr(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """VSR's zero-shot test statements; gold is "True" or "False"."""
    look = Pictures(folder, ("train2017", "val2017"), needed=pictures)
    examples: dict[str, VisualExample] = {}
    path = find_file(folder, "test.jsonl", "*vsr*.jsonl", "*test*.jsonl")
    for number, record in enumerate(lines(path)):
        name = record.text("image")
        stem = name.removesuffix(".jpg")
        others = coco_names("train2014", int(stem)) if stem.isdecimal() else ()
        label = record.identifier("label")
        if label not in ("0", "1"):
            record.refuse(f"its label is {label}, not 0 or 1")
        example = VisualExample(
            str(number),
            record.text("caption"),
            look.find(record, name, *others),
            "True" if label == "1" else "False",
            kinds=record.kinds("relation"),
            choices=("True", "False"),
        )
        add(examples, example.example_id, example, record)
    return list(examples.values())


def read_tallyqa(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """TallyQA's test questions, simple and complex, as a choice of sixteen counts.

    gold: {"index", "choices"}; a count above fifteen is refused.
    """
    look = Pictures(folder, (".",), needed=pictures)
    counts = tuple(str(count) for count in range(NUM_COUNTS))
    examples: dict[str, VisualExample] = {}
    for record in records(find_file(folder, "test.json", "*test*.json")):
        count = record.get("answer", int)
        if not 0 <= count < NUM_COUNTS:
            record.refuse(f"its answer is {count}, not one of 0 to {NUM_COUNTS - 1}")
        key, simple = record.identifier("question_id"), record.value.get("issimple")
        if not isinstance(simple, bool):
            record.refuse(f"its 'issimple' is {simple!r}, neither true nor false")
        example = VisualExample(
            key,
            with_options(record.text("question"), counts),
            look.find(record, record.text("image")),
            {"index": count, "choices": list(counts)},
            "simple" if simple else "complex",
            choices=counts,
        )
        add(examples, key, example, record)
    return list(examples.values())


def read_ai2d(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """AI2D's questions about diagrams, the test pictures and the others as two splits."""
    listed = folder / AI2D_TEST_IDS
    if not listed.is_file():
        missing(listed)
    test = {line.strip() for line in read_text(listed).splitlines() if line.strip()}
    paths = sorted((folder / "questions").glob("*.json"))
    if not paths:
        missing(folder / "questions" / "0.json")
    look = Pictures(folder, ("images",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for path in paths:
        page = Record(str(path), read_json_file(path))
        picture = page.text("imageName")
        for text, value in page.get("questions", dict).items():
            record = Record(f"{path} question {text!r}", value)
            options = record.texts("answerTexts", least=2)
            index = record.index("correctAnswer", len(options))
            key = record.identifier("questionId")
            example = VisualExample(
                key,
                with_options(text, options),
                look.find(record, picture),
                {"index": index, "choices": options},
                "test" if picture.split(".")[0] in test else "val",
                choices=tuple(options),
            )
            add(examples, key, example, record)
    return list(examples.values())


def with_options(question: str, options: tuple[str, ...] | list[str]) -> str:
    """The question and a lettered line for each option."""
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join((question, *listed))
