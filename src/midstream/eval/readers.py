"""The official files of the visual benchmarks, as downloaded -> examples (docs/evaluation.md)."""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from midstream.eval.benchmark_records import (
    Pictures,
    Record,
    VisualExample,
    add,
    both_names,
    coco_names,
    entries,
    find_file,
    gqa_kinds,
    lines,
    load_plain_pickle,
    marked,
    missing,
    picture_size,
    plain_words,
    read_json_file,
    read_text,
    records,
    split_of,
)
from midstream.eval.scoring import LETTERS, plain_answer

Asked = Iterator[tuple[Record, VisualExample]]

NUM_VQA_ANSWERS = 10
_CAPTION = "Provide a one-sentence caption for the provided image."
NUM_COUNTS = 16
POPE_SPLITS = ("random", "popular", "adversarial")
# What LLaVA's file puts behind the question, and the line of recognised words.
_OCR_MARK = "\nReference OCR token:"
_OCR_TAIL = "\nAnswer the question using a single word or phrase."
# Every picture of OCID is of this size, in pixels.
_OCID_SIZE = (640, 480)
# OCID-Ref's clutter by take: up to so many objects on the table.
_CLUTTER = ((9, "free"), (16, "touching"), (20, "stacked"))


def reader(
    *places: str,
) -> Callable[[Callable[[Path, Pictures], Asked]], Callable[..., list[VisualExample]]]:
    """`read(folder, pictures=True)` from what yields each record's example, no id twice."""

    def wrap(read: Callable[[Path, Pictures], Asked]) -> Callable[..., list[VisualExample]]:
        @functools.wraps(read)
        def whole(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
            examples: dict[str, VisualExample] = {}
            for record, example in read(folder, Pictures(folder, places, needed=pictures)):
                add(examples, example.example_id, example, record)
            return list(examples.values())

        return whole

    return wrap


# ------------------------------------------------------------------------------ free answers


@reader("train2014", "train2017", "val2017")
def read_vqav2(folder: Path, look: Pictures) -> Asked:
    """VQA v2: every question with its ten answers, which are the gold.

    The files are those of one subset, val2014 as published; a cut of them may be named otherwise
    and packed by gzip.
    """
    name = f"mscoco_{split_of(folder, 'val')}2014"
    exact = [f"{version}OpenEnded_{name}_questions.json" for version in ("v2_", "")]
    patterns = ("v2_*questions.json", "*questions*.json", "*questions*.gz*")
    questions = find_file(folder, *exact, *patterns)
    exact = [f"v2_{name}_annotations.json", f"{name}_annotations.json", "v2_*annotations.json"]
    answered = find_file(folder, *exact, "*annotat*.json*", "*annotat*.gz*")
    subset = _same_subset(questions, answered)
    look.places = (subset, *look.places)
    annotations: dict[str, Any] = {}
    for record in records(answered, "annotations"):
        answers = ten([one.text("answer") for one in record.records("answers")], record)
        found = answers, record.kinds("answer_type", "question_type")
        add(annotations, record.identifier("question_id"), found, record)
    asked = set()
    for record in records(questions, "questions"):
        key = record.identifier("question_id")
        if key not in annotations:
            record.refuse(f"question {key} has no annotation in {answered}")
        image = look.find(record, *coco_names(subset, record.get("image_id", int)))
        answers, kinds = annotations[key]
        asked.add(key)
        yield record, VisualExample(key, record.text("question"), image, answers, kinds=kinds)
    if extra := annotations.keys() - asked:
        raise ValueError(
            f"{answered} holds {len(annotations):,} annotations for {len(asked):,} questions in "
            f"{questions}; question {min(extra)} is missing there; give two files of one release"
        )


@reader("images")
def read_gqa(folder: Path, look: Pictures) -> Asked:
    """GQA's balanced test-dev questions; gold is the answer's text."""
    exact = f"{split_of(folder, 'testdev')}_balanced_questions.json"
    patterns = (exact, "*balanced_questions.json", "*questions*.json", f"questions1.2/{exact}")
    for key, record in entries(find_file(folder, *patterns)):
        image = look.find(record, f"{record.identifier('imageId')}.jpg")
        answer, question = record.text("answer"), record.text("question")
        yield record, VisualExample(key, question, image, answer, kinds=gqa_kinds(record))


@reader("train_images")
def read_textvqa(folder: Path, look: Pictures) -> Asked:
    """TextVQA 0.5.1 validation without OCR tokens; gold is the list of ten answers."""
    split = split_of(folder, "val")
    path = find_file(folder, f"TextVQA_0.5.1_{split}.json", f"TextVQA_*{split}*.json")
    for record in records(path, "data"):
        key, image_id = record.identifier("question_id"), record.identifier("image_id")
        answers, image = ten(record.texts("answers"), record), look.find(record, f"{image_id}.jpg")
        asked = record.text("question")
        yield record, VisualExample(key, asked, image, answers, other_id=image_id)


def read_textvqa_ocr(folder: Path, *, pictures: bool = True) -> list[VisualExample]:
    """The same questions with the words that were recognised in the picture behind them.

    They come from LLaVA's list, whose `question_id` is the picture's id; its questions are found
    by their words, the same letters first, then whatever their case and white space.
    """
    path = find_file(folder, "textvqa_val_v051_ocr.jsonl", "*textvqa*ocr*.jsonl")
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


@reader("val", "train")
def read_vizwiz(folder: Path, look: Pictures) -> Asked:
    """VizWiz-VQA validation; an example is named by its picture.

    gold: {"answers": ten texts, "answerable": bool}.
    """
    split = split_of(folder, "val")
    for index, record in enumerate(records(find_file(folder, f"{split}.json", f"*{split}*.json"))):
        answers = ten([one.text("answer") for one in record.records("answers")], record)
        key, answerable = record.text("image"), record.identifier("answerable") == "1"
        gold, kinds = {"answers": answers, "answerable": answerable}, record.kinds("answer_type")
        image, asked = look.find(record, key), record.text("question")
        yield record, VisualExample(key, asked, image, gold, kinds=kinds, other_id=str(index))


@reader("val2014", "train2017", "val2017")
def read_pope(folder: Path, look: Pictures) -> Asked:
    """POPE's splits that are there, at least one of three; gold is "yes" or "no"."""
    # LLaVA's layout has them in coco/, the pictures beside it.
    below = folder / "coco" if not any(folder.glob("coco_pope_*")) else folder
    names = [(s, below / f"coco_pope_{s}{end}") for s in POPE_SPLITS for end in (".jsonl", ".json")]
    present = {split: path for split, path in names if path.is_file()}
    if not present:
        missing(folder / "coco_pope_random.json")
    for path in (one for split, one in names if one.is_file() and one != present[split]):
        raise ValueError(f"{below} holds {path.name} in another form, too; keep one")
    for split, path in present.items():
        for record in lines(path):
            number, label = record.identifier("question_id"), record.one_of("label", "yes", "no")
            asked, image = record.text("text"), look.find(record, *both_names(record.text("image")))
            example = VisualExample(f"{split}-{number}", asked, image, label, split)
            yield record, replace(example, choices=("Yes", "No"), other_id=number)


@reader("val2014", "train2014", "images")
def read_captions(folder: Path, look: Pictures) -> Asked:
    """Karpathy's list of COCO: pictures and their captions, which are the gold; the test split, in
    a folder that shots are drawn from (`<task>_train`) the training split."""
    yield from _karpathy(folder, look, "dataset_coco.json")


@reader("flickr30k-images", "images")
def read_flickr30k(folder: Path, look: Pictures) -> Asked:
    """Karpathy's list of Flickr30k, as `read_captions`; they come in one archive."""
    yield from _karpathy(folder, look, "dataset_flickr30k.json")


def _karpathy(folder: Path, look: Pictures, name: str) -> Asked:
    path = find_file(folder, name, "dataset_*.json")
    split = split_of(folder, "test")
    wanted = ("train", "restval") if split == "train" else (split,)
    for record in records(path, "images"):
        if record.text("split") not in wanted:
            continue
        name = record.text("filename")
        captions = [one.text("raw") for one in record.records("sentences")]
        if not captions:
            record.refuse("it has no sentences")
        names = [f"{record.text('filepath')}/{name}", name] if "filepath" in record else [name]
        other = record.identifier("cocoid") if "cocoid" in record else PurePath(name).stem
        image = look.find(record, *names)
        yield record, VisualExample(name, _CAPTION, image, captions, other_id=other)


def _same_subset(*paths: Path) -> str:
    """The COCO subset that both files say they are of, val2014 where they do not say."""
    values = {path: read_json_file(path) for path in paths}
    said = {p: v.get("data_subtype") for p, v in values.items() if isinstance(v, dict)}
    subsets = list(dict.fromkeys(subset for subset in said.values() if subset))
    if len(subsets) > 1:
        told = ", ".join(f"{path} is of {subset}" for path, subset in said.items())
        raise ValueError(f"{told}; give the questions and annotations of one subset")
    return str(subsets[0]) if subsets else "val2014"


def ten(answers: list[str], record: Record) -> list[str]:
    """Ten people's answers; refuses more or fewer."""
    if len(answers) != NUM_VQA_ANSWERS:
        record.refuse(
            f"it has {len(answers)} answers, the metric compares {NUM_VQA_ANSWERS} people's (of "
            "questions with one answer each make format qa, docs/evaluation.md)"
        )
    return answers


@reader()
def read_qa(folder: Path, look: Pictures) -> Asked:
    """JSON lines of `question`, `answer` or `answers`, `image` (one or a list, whose places the
    question's image marks say); optional `choices`, `id`, `split`.

    gold is the list of right answers, one of which is enough. Without `id` an example is named by
    its line. Raises ValueError for an answer that is none of the choices, and for choices that are
    equal once normalised.
    """
    path = find_file(folder, "questions.jsonl", "*.jsonl", "*.jsonl.gz", own=True)
    for number, record in enumerate(lines(path), start=1):
        if "answer" in record and "answers" in record:
            record.refuse("it has both 'answer' and 'answers'; keep one of them")
        given = [record.get("answer", object)] if "answers" not in record else None
        golds = _texts(given or record.get("answers", list), record)
        choices = _texts(record.get("choices", list), record) if "choices" in record else []
        if not golds or ("choices" in record and len(choices) < 2):
            record.refuse("its 'answers' are an empty list, or its 'choices' not two or more")
        by_plain = {plain_answer(choice): choice for choice in choices}
        if len(by_plain) < len(choices):
            record.refuse(f"two of its choices {choices} are equal once normalised")
        for gold in golds:
            if choices and plain_answer(gold) not in by_plain:
                record.refuse(f"its answer {gold!r} is none of its choices {choices}")
        key = record.identifier("id") if "id" in record else str(number)
        split = record.identifier("split") if "split" in record else ""
        several = isinstance(record.value.get("image"), list)
        names = record.texts("image") if several else [record.text("image")]
        image, *more = (look.find(record, name) for name in names)
        yield (
            record,
            VisualExample(
                key,
                marked(record, record.text("question"), len(names)),
                image,
                golds,
                split,
                choices=tuple(choices),
                more=tuple(more),
            ),
        )


def _texts(values: list[Any], record: Record) -> list[str]:
    for value in values:
        if type(value) not in (str, int, float) or not str(value).strip():
            record.refuse(f"{value!r} is neither a text nor a number, as answers and choices are")
    return list(map(str, values))


# ----------------------------------------------------------------------------- fixed answers


@reader("train2017", "val2017")
def read_vsr(folder: Path, look: Pictures) -> Asked:
    """VSR's zero-shot test statements; gold is "True" or "False"."""
    split = split_of(folder, "test")
    path = find_file(folder, f"{split}.jsonl", "*vsr*.jsonl", f"*{split}*.jsonl")
    for number, record in enumerate(lines(path)):
        name = record.text("image")
        stem = name.removesuffix(".jpg")
        others = coco_names("train2014", int(stem)) if stem.isdecimal() else ()
        told = record.value.get("label")
        says = told if isinstance(told, bool) else record.one_of("label", "0", "1") == "1"
        image, asked = look.find(record, name, *others), record.text("caption")
        example = VisualExample(str(number), asked, image, str(says), choices=("True", "False"))
        yield record, replace(example, kinds=record.kinds("relation"))


@reader(".")
def read_tallyqa(folder: Path, look: Pictures) -> Asked:
    """TallyQA's test questions, simple and complex, as a choice of sixteen counts; for shots the
    training questions, which need not say which they are.

    gold: {"index", "choices"}; a count above fifteen is refused.
    """
    counts, asked_of = tuple(str(count) for count in range(NUM_COUNTS)), split_of(folder, "test")
    for record in records(find_file(folder, f"{asked_of}.json", f"*{asked_of}*.json")):
        gold = {"index": record.index("answer", NUM_COUNTS), "choices": list(counts)}
        key, simple = record.identifier("question_id"), record.value.get("issimple")
        if not isinstance(simple, bool) and (asked_of == "test" or simple is not None):
            record.refuse(f"its 'issimple' is {simple!r}, neither true nor false")
        asked = with_options(record.text("question"), counts)
        split = "train" if simple is None else "simple" if simple else "complex"
        image = look.find(record, record.text("image"))
        yield record, VisualExample(key, asked, image, gold, split, choices=counts)


@reader("images")
def read_ai2d(folder: Path, look: Pictures) -> Asked:
    """AI2D's questions about diagrams, the test pictures and the others as two splits; for shots
    the others alone."""
    listed = find_file(folder, "ai2d_test_ids.csv")
    test = {line.strip() for line in read_text(listed).splitlines() if line.strip()}
    paths = sorted((folder / "questions").glob("*.json"))
    if not paths:
        missing(folder / "questions" / "0.json")
    for path in paths:
        page = Record(str(path), read_json_file(path))
        picture = page.text("imageName")
        split = "test" if picture.split(".")[0] in test else "val"
        if split == "test" and split_of(folder, split) == "train":
            continue
        for text, value in page.get("questions", dict).items():
            record = Record(f"{path} question {text!r}", value)
            options = record.texts("answerTexts", least=2)
            gold = {"index": record.index("correctAnswer", len(options)), "choices": options}
            key, image = record.identifier("questionId"), look.find(record, picture)
            asked = with_options(text, options)
            yield record, VisualExample(key, asked, image, gold, split, choices=tuple(options))


def with_options(question: str, options: tuple[str, ...] | list[str]) -> str:
    """A question with its options in lettered lines."""
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join((question, *listed))


# ------------------------------------------------------------------------------------- boxes


def _refcoco(folder: Path, look: Pictures, refs_path: Path) -> Asked:
    instances = folder / "instances.json"
    images: dict[str, Record] = {}
    boxes: dict[str, Record] = {}
    for table, key in ((images, "images"), (boxes, "annotations")):
        for record in records(instances, key):
            add(table, record.identifier("id"), record, record)
    num_found, split = 0, split_of(folder, "val")
    for index, value in enumerate(load_plain_pickle(refs_path)):
        ref = Record(f"{refs_path} record {index}", value)
        if ref.text("split") != split:
            continue
        annotation, picture = ref.identifier("ann_id"), ref.identifier("image_id")
        if annotation not in boxes:
            ref.refuse(f"annotation {annotation} is not in {instances}")
        if picture not in images:
            ref.refuse(f"image {picture} is not in {instances}")
        size = (images[picture].get("width", int), images[picture].get("height", int))
        if min(size) <= 0:
            images[picture].refuse(f"its size is {size[0]} by {size[1]} pixels")
        box = boxes[annotation]
        x, y, width, height = _four(box.get("bbox", list), box)
        gold = _shares([x, y, x + width, y + height], size, box)
        image = look.find(ref, images[picture].text("file_name"))
        for sentence in ref.records("sentences"):
            number, asked = sentence.identifier("sent_id"), sentence.text("sent")
            key, num_found = f"{ref.identifier('ref_id')}-{number}", num_found + 1
            example = VisualExample(key, asked, image, gold, split, size=size, other_id=number)
            yield sentence, example
    if not num_found:
        raise ValueError(
            f"{refs_path} holds no expression of split {split!r}; give the official file"
        )


@reader("train2014")
def read_refcoco(folder: Path, look: Pictures) -> Asked:
    """RefCOCO or RefCOCO+ validation, one example a sentence; for shots the training split.

    gold is the box [x1, y1, x2, y2] as a share of the picture, with two decimals. Raises ValueError
    for a box that leaves its picture by more than a pixel.
    """
    return _refcoco(folder, look, folder / "refs(unc).p")


@reader("train2014")
def read_refcocog(folder: Path, look: Pictures) -> Asked:
    """RefCOCOg validation in the UMD split, as `read_refcoco`."""
    return _refcoco(folder, look, folder / "refs(umd).p")


@reader("OCID-dataset")
def read_ocid_ref(folder: Path, look: Pictures) -> Asked:
    """OCID-Ref validation; gold is a box as in `read_refcoco`, by the size of the picture file."""
    split = split_of(folder, "val")
    for key, record in entries(folder / f"{split}_expressions.json"):
        image, asked = look.find(record, record.text("scene_path")), record.text("sentence")
        try:
            box = json.loads(record.text("bbox"))
        except json.JSONDecodeError:
            box = None
        size = picture_size(image) if image.is_file() else _OCID_SIZE
        gold, take = _shares(_four(box, record), size, record), record.value.get("take_id")
        kinds = {}
        if type(take) is int:
            kinds["clutter"] = next((name for most, name in _CLUTTER if take <= most), "stacked")
        yield record, VisualExample(key, asked, image, gold, split, kinds=kinds, size=size)


def _four(value: Any, record: Record) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or {*map(type, value)} - {int, float}:
        record.refuse(f"its bbox {record.value['bbox']!r} is no list of four numbers")
    return [float(item) for item in value]


def _shares(corners: list[float], size: tuple[int, int], record: Record) -> list[float]:
    """A box in pixels as shares; it may end a pixel outside, as COCO's do by rounding."""
    (x1, y1, x2, y2), (width, height) = corners, size
    if x1 >= x2 or y1 >= y2:
        record.refuse(f"its bbox {record.value['bbox']} is empty, from {x1}, {y1} to {x2}, {y2}")
    if min(x1, y1) < -1 or x2 > width + 1 or y2 > height + 1:
        record.refuse(f"its box {corners} leaves the picture of {width} by {height} pixels")
    return [round(corner / side, 2) for corner, side in zip(corners, size * 2, strict=True)]
