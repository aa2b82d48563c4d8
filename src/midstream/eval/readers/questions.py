"""Questions with free answers: VQA v2, GQA, TextVQA, VizWiz, POPE, and format `qa`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from midstream.eval.readers.benchmark_records import (
    Pictures,
    Record,
    VisualExample,
    add,
    coco_names,
    entries,
    find_file,
    lines,
    missing,
    plain_words,
    read_json_file,
    records,
)
from midstream.eval.scoring import plain_answer

VQAV2_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
VQAV2_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
GQA_QUESTIONS = "testdev_balanced_questions.json"
TEXTVQA_QUESTIONS = "TextVQA_0.5.1_val.json"
TEXTVQA_OCR = "textvqa_val_v051_ocr.jsonl"
VIZWIZ_QUESTIONS = "val.json"
POPE_SPLITS = ("random", "popular", "adversarial")
NUM_VQA_ANSWERS = 10
# What LLaVA's file puts behind the question, and the line of recognised words.
_OCR_MARK = "\nReference OCR token:"
_OCR_TAIL = "\nAnswer the question using a single word or phrase."


def read_vqav2(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """VQA v2: every question with its ten answers, which are the gold.

    The files are those of one subset, val2014 as published; a cut of them may be named otherwise
    and packed by gzip.
    """
    questions_path = find_file(
        folder, VQAV2_QUESTIONS, "v2_*questions.json", "*questions*.json", "*questions*.gz*"
    )
    annotations_path = find_file(
        folder, VQAV2_ANNOTATIONS, "v2_*annotations.json", "*annotat*.json*", "*annotat*.gz*"
    )
    subset = _same_subset(questions_path, annotations_path)
    annotations: dict[str, tuple[list[str], dict[str, str]]] = {}
    for record in records(annotations_path, "annotations"):
        answers = _ten([one.text("answer") for one in record.records("answers")], record)
        found = answers, record.kinds("answer_type", "question_type")
        add(annotations, record.identifier("question_id"), found, record)
    look = Pictures(folder, (subset, "train2014"), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for record in records(questions_path, "questions"):
        key = record.identifier("question_id")
        if key not in annotations:
            record.refuse(f"question {key} has no annotation in {annotations_path}")
        image = look.find(record, *coco_names(subset, record.get("image_id", int)))
        answers, kinds = annotations[key]
        example = VisualExample(key, record.text("question"), image, answers, kinds=kinds)
        add(examples, key, example, record)
    if len(annotations) != len(examples):
        extra = next(key for key in annotations if key not in examples)
        raise ValueError(
            f"{annotations_path} holds {len(annotations):,} annotations for {len(examples):,} "
            f"questions in {questions_path}; question {extra} is missing there; "
            "give two files of the same release"
        )
    return list(examples.values())


def read_gqa(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """GQA's balanced test-dev questions; gold is the answer's text."""
    look = Pictures(folder, ("images",), needed=pictures)
    examples = []
    for key, record in entries(
        find_file(folder, GQA_QUESTIONS, "*balanced_questions.json", "*questions*.json")
    ):
        image = look.find(record, f"{record.identifier('imageId')}.jpg")
        types = record.get("types", dict) if "types" in record else {}
        kinds = {name: str(types[name]) for name in ("structural", "semantic") if types.get(name)}
        if "structural" in kinds:
            # As the official evaluator parts them.
            kinds["form"] = "open" if kinds["structural"] == "query" else "binary"
        answer, question = record.text("answer"), record.text("question")
        examples.append(VisualExample(key, question, image, answer, kinds=kinds))
    return examples


def read_textvqa(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """TextVQA 0.5.1 validation without OCR tokens; gold is the list of ten answers."""
    look = Pictures(folder, ("train_images",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for record in records(find_file(folder, TEXTVQA_QUESTIONS, "TextVQA_*val*.json"), "data"):
        key, image_id = record.identifier("question_id"), record.identifier("image_id")
        answers, image = _ten(record.texts("answers"), record), look.find(record, f"{image_id}.jpg")
        example = VisualExample(key, record.text("question"), image, answers, other_id=image_id)
        add(examples, key, example, record)
    return list(examples.values())


def read_textvqa_ocr(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """The same questions with the words that were recognised in the picture behind them.

    They come from LLaVA's list, whose `question_id` is the picture's id; its questions are found
    by their words, the same letters first, then whatever their case and white space.
    """
    path = find_file(folder, TEXTVQA_OCR, "*textvqa*ocr*.jsonl")
    texts: dict[tuple[str, str], str] = {}
    alike: dict[tuple[str, str], str] = {}
    for record in lines(path):
        text = record.text("text").removesuffix(_OCR_TAIL)
        question = text.split(_OCR_MARK)[0].strip()
        key = (record.identifier("question_id"), question)
        if texts.get(key, text) != text:
            record.refuse(f"question {question!r} about {key[0]} stands there twice")
        texts[key] = text
        alike.setdefault((key[0], plain_words(question)), text)
    examples = []
    for example in read_textvqa(folder, pictures=pictures):
        names = (example.other_id or "", example.example_id)
        exact, plain = example.question.strip(), plain_words(example.question)
        found = [texts[name, exact] for name in names if (name, exact) in texts]
        found += [alike[name, plain] for name in names if (name, plain) in alike]
        if not found:
            raise ValueError(
                f"{path} has no question {example.question!r} about picture {example.other_id}; "
                "give the list that belongs to this release"
            )
        examples.append(replace(example, question=found[0]))
    return examples


def read_vizwiz(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """VizWiz-VQA validation; an example is named by its picture.

    gold: {"answers": ten texts, "answerable": bool}.
    """
    look = Pictures(folder, ("val",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for index, record in enumerate(records(find_file(folder, VIZWIZ_QUESTIONS, "*val*.json"))):
        answers = _ten([one.text("answer") for one in record.records("answers")], record)
        key, answerable = record.text("image"), record.identifier("answerable") == "1"
        example = VisualExample(
            key,
            record.text("question"),
            look.find(record, key),
            {"answers": answers, "answerable": answerable},
            kinds=record.kinds("answer_type"),
            other_id=str(index),
        )
        add(examples, key, example, record)
    return list(examples.values())


def read_pope(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """POPE's splits that are there, at least one of three; gold is "yes" or "no"."""
    names = [
        (s, folder / f"coco_pope_{s}{end}") for s in POPE_SPLITS for end in (".jsonl", ".json")
    ]
    present = {split: path for split, path in names if path.is_file()}
    if not present:
        missing(folder / "coco_pope_random.json")
    look = Pictures(folder, ("val2014",), needed=pictures)
    examples: dict[str, VisualExample] = {}
    for split, path in present.items():
        for record in lines(path):
            number, label = record.identifier("question_id"), record.text("label")
            if label not in ("yes", "no"):
                record.refuse(f"its label is {label!r}, not 'yes' or 'no'")
            example = VisualExample(
                f"{split}-{number}",
                record.text("text"),
                look.find(record, record.text("image")),
                label,
                split,
                choices=("Yes", "No"),
                other_id=number,
            )
            add(examples, example.example_id, example, record)
    return list(examples.values())


def _same_subset(questions: Path, annotations: Path) -> str:
    """The COCO subset that both files say they are of, val2014 where they do not say."""
    said = {}
    for path in (questions, annotations):
        value = read_json_file(path)
        said[path] = value.get("data_subtype") if isinstance(value, dict) else None
    if None not in said.values() and len(set(said.values())) > 1:
        told = ", ".join(f"{path} is of {subset}" for path, subset in said.items())
        raise ValueError(f"{told}; give the questions and annotations of one subset")
    return next((str(subset) for subset in said.values() if subset), "val2014")


def _ten(answers: list[Any], record: Record) -> list[str]:
    if len(answers) != NUM_VQA_ANSWERS:
        record.refuse(
            f"it has {len(answers)} answers, the metric compares {NUM_VQA_ANSWERS} people's (for "
            "questions with one answer each there is format qa: JSON lines of question, answer and "
            "image, docs/evaluation.md)"
        )
    return answers


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
