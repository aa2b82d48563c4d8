"""Questions, answers and pictures without a data set's ceremony: format `qa`."""

from pathlib import Path
from typing import Any

from midstream.eval.readers.examples import Pictures, VisualExample
from midstream.eval.readers.records import Record, add, find_file, lines
from midstream.eval.scoring import plain_answer

QA_QUESTIONS = "questions.jsonl"


def read_qa(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """JSON lines of `question`, `answer` or `answers`, `image`; optional `choices`, `id`, `split`.

    gold is the list of right answers, one of which is enough. Without `id` an example is named by
    its line. Raises ValueError for an answer that is none of the choices, and for choices that are
    equal once normalised.
    """
    look = Pictures(folder, (".",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    path = find_file(folder, QA_QUESTIONS, "*.jsonl", "*.jsonl.gz")
    for number, record in enumerate(lines(path), start=1):
        key = record.identifier("id") if "id" in record else str(number)
        golds, choices = _golds(record), _choices(record)
        by_plain = {plain_answer(choice): choice for choice in choices}
        if len(by_plain) < len(choices):
            record.refuse(f"two of its choices {list(choices)} are equal once normalised")
        for gold in golds:
            if choices and plain_answer(gold) not in by_plain:
                record.refuse(f"its answer {gold!r} is none of its choices {list(choices)}")
        example = VisualExample(
            key,
            record.text("question"),
            look.find(record, record.text("image")),
            golds,
            record.identifier("split") if "split" in record else "",
            choices=choices,
        )
        add(examples, key, example, record)
    return list(examples.values())


def _golds(record: Record) -> list[str]:
    if "answer" in record and "answers" in record:
        record.refuse("it has both 'answer' and 'answers'; keep one of them")
    if "answers" not in record:
        value = record.value["answer"] if "answer" in record else record.get("answer", str)
        return [_text(value, "answer", record)]
    golds = [_text(value, "answers", record) for value in record.get("answers", list)]
    if not golds:
        record.refuse("its 'answers' are an empty list")
    return golds


def _choices(record: Record) -> tuple[str, ...]:
    if "choices" not in record:
        return ()
    choices = tuple(_text(value, "choices", record) for value in record.get("choices", list))
    if len(choices) < 2:
        record.refuse(f"its 'choices' are {list(choices)}; give two or more, or none")
    return choices


def _text(value: Any, key: str, record: Record) -> str:
    """A text or a number, as text."""
    if type(value) not in (str, int, float) or not str(value).strip():
        record.refuse(f"{value!r} under {key!r} is neither a text nor a number")
    return str(value)
