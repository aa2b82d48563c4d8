"""Visual benchmarks: reader, wording, scorer, chance level; and what answers them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from midstream.eval import readers, scoring
from midstream.eval.aggregate import VISUAL_CHANCE
from midstream.eval.readers import VisualExample

__all__ = ["VISUAL_FORMATS", "Answerer", "VisualExample", "VisualFormat"]

Numbers = dict[str, float | None]
Score = Callable[[str, Any], float]


@runtime_checkable
class Answerer(Protocol):
    """A model as the evaluation sees it. `prompts` are the user's message alone: the turn's
    "In: ... Out:" and the separators are added inside."""

    @property
    def weights_digest(self) -> str:
        """Stands for the weights that answer."""
        ...

    def generate(self, prompts: Sequence[str], images: Sequence[Path | None]) -> list[str]:
        """Greedy answers, one a prompt; None is a prompt without a picture."""
        ...

    def choose(
        self,
        prompts: Sequence[str],
        images: Sequence[Path | None],
        choices: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """For each prompt the log-probability of each of its answers as the reply: of their first
        tokens where these differ from one another, else of the whole answers."""
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the continuation's log-probability, and whether greedy
        decoding would give it."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text."""
        ...

    def generate_until(
        self, contexts: Sequence[str], stops: Sequence[Sequence[str]], max_new_tokens: Sequence[int]
    ) -> list[str]:
        """Greedy continuations of plain texts, each up to the first of its stops."""
        ...


@dataclass(frozen=True)
class VisualFormat:
    """A benchmark's files, wording and metric; `{question}` stands in both prompts.

    `parses` says whether the scorer can read an answer at all; what it cannot read is wrong and
    counted. `fixed`: "answers", where a choice is made among the examples' `choices` (an example
    without any is answered freely), "letters" where among the letters of these, None where answers
    are free. `variants` are other people's scorers of the same answers, by whose they are.
    `summarise` adds numbers over all examples; `note` says what is odd about a score, if anything.
    """

    name: str
    metric: str
    read: Callable[..., list[VisualExample]]
    official_prompt: str
    short_prompt: str
    score: Score
    files: tuple[str, ...]
    published: str
    licence: str
    fixed: Literal["answers", "letters"] | None = None
    variants: Mapping[str, Score] = field(default_factory=dict)
    summarise: Callable[[Sequence[str], Sequence[VisualExample]], Numbers] | None = None
    note: Callable[[Sequence[str], Sequence[VisualExample]], str | None] | None = None
    parses: Callable[[str], bool] = lambda _prediction: True

    @property
    def chance(self) -> float:
        """What guessing scores on the official data."""
        return VISUAL_CHANCE[self.name][0]

    def prompt(self, question: str, wording: str) -> str:
        """The user's message: `wording` is "official", "short", or a template of its own."""
        known = {"official": self.official_prompt, "short": self.short_prompt}
        return known.get(wording, wording).replace("{question}", question)

    def details(
        self, predictions: Sequence[str], examples: Sequence[VisualExample]
    ) -> dict[str, float | None]:
        """Numbers beside the score: other people's scorers, the benchmark's own further ones, and
        the score by each kind of question ("answer_type=number")."""
        found: dict[str, float | None] = {}
        for name, score in self.variants.items():
            found[name] = _mean(
                [score(text, e.gold) for text, e in zip(predictions, examples, strict=True)]
            )
        if self.summarise is not None:
            found |= self.summarise(predictions, examples)
        by_kind: dict[str, list[float]] = defaultdict(list)
        for text, example in zip(predictions, examples, strict=True):
            for kind, value in example.kinds.items():
                by_kind[f"{kind}={value}"].append(self.score(text, example.gold))
        return found | {kind: _mean(values) for kind, values in sorted(by_kind.items())}


_BRIEFLY = "{question}\nAnswer the question using a single word or phrase."
_VIZWIZ = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)
_BOX = (
    'Please provide the bounding box coordinate of the region this sentence describes: "{question}"'
)
_VSR = (
    'Based on the image, is this statement "True" or "False"? {question}\n'
    'Respond with "True" or "False" directly.'
)
_LETTER = "{question}\nAnswer with the option's letter from the given choices directly."
_COCO = "annotations CC BY 4.0; COCO pictures under their authors' Creative Commons licences"
_RESEARCH = "for research; see its terms"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _single_answers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> str | None:
    """What normalising would change, where every list of ten holds one answer ten times."""
    if any(len(set(example.gold)) > 1 for example in examples):
        return None
    pairs = list(zip(predictions, examples, strict=True))
    official = _mean([scoring.vqa_accuracy(text, e.gold) for text, e in pairs])
    plain = _mean([scoring.qa_accuracy(text, e.gold) for text, e in pairs])
    if official is None or plain is None or official == plain:
        return None
    return (
        "each question has one answer, written ten times, which VQA v2's rule compares letter by "
        f"letter (here {100 * official:.2f}; normalised {100 * plain:.2f}); format qa is made for "
        "single answers (docs/evaluation.md)"
    )


def _vizwiz_score(prediction: str, gold: Mapping[str, Any]) -> float:
    return scoring.vizwiz_accuracy(prediction, gold["answers"])


def _vizwiz_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    can = [bool(example.gold["answerable"]) for example in examples]
    return dict(scoring.unanswerable_scores(predictions, can))


def _pope_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """The official numbers of each split, and their means."""
    by_split: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for text, example in zip(predictions, examples, strict=True):
        by_split[example.split].append((scoring.pope_answer(text), example.gold))
    found: Numbers = {}
    keys = ("accuracy", "precision", "recall", "f1", "yes_rate")
    by_name = {
        split: scoring.yes_no_scores([one for one, _ in pairs], [gold for _, gold in pairs])
        for split, pairs in by_split.items()
    }
    for key in keys:
        values = [numbers[key] for numbers in by_name.values()]
        known = [value for value in values if value is not None]
        found[key] = _mean(known) if len(known) == len(values) else None
        found |= {f"{split}.{key}": numbers[key] for split, numbers in by_name.items()}
    return found


def _box_numbers(predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
    """Accuracy at both thresholds in the frame that was declared, and in the other."""
    overlaps = [
        scoring.overlap(text, example.gold)
        for text, example in zip(predictions, examples, strict=True)
    ]
    found: Numbers = {"mean_iou": _mean(overlaps)}
    for threshold in (0.5, 0.25):
        hits = [
            scoring.box_accuracy(text, example.gold, threshold)
            for text, example in zip(predictions, examples, strict=True)
        ]
        found[f"iou_{threshold}"] = _mean(hits)
    return found


def _is_box(prediction: str) -> bool:
    return scoring.parse_box(prediction) is not None


def _is_letter(prediction: str) -> bool:
    return scoring.choice_letter(prediction, len(readers.choices.LETTERS)) is not None


def _boxes(name: str, read: Any, threshold: float, **more: Any) -> VisualFormat:
    return VisualFormat(
        name=name,
        metric=f"accuracy at IoU {threshold}",
        read=read,
        official_prompt=_BOX,
        short_prompt="Where is {question}?",
        score=partial(scoring.box_accuracy, threshold=threshold),
        summarise=_box_numbers,
        parses=_is_box,
        **more,
    )


_TEXTVQA: dict[str, Any] = {
    "metric": "VQA accuracy",
    "official_prompt": _BRIEFLY,
    "short_prompt": "{question}",
    "score": scoring.textvqa_accuracy,
    "published": "TextVQA 0.5.1 (Facebook AI Research)",
    "licence": "CC BY 4.0",
}
_REFER: dict[str, Any] = {
    "published": "refer (UNC Chapel Hill); pictures: COCO train2014",
    "licence": _COCO,
}
_TABLE = (
    VisualFormat(
        name="vqav2",
        metric="VQA accuracy",
        read=readers.read_vqav2,
        official_prompt=_BRIEFLY,
        short_prompt="{question}",
        score=scoring.vqa_accuracy,
        files=(readers.VQAV2_QUESTIONS, readers.VQAV2_ANNOTATIONS, "val2014/"),
        published="VQA v2 (visualqa.org); pictures: COCO val2014",
        licence=_COCO,
        variants={"vlm-evaluation": scoring.vqa_accuracy_prismatic},
        note=_single_answers,
    ),
    VisualFormat(
        name="gqa",
        metric="exact match",
        read=readers.read_gqa,
        official_prompt=_BRIEFLY,
        short_prompt="{question}",
        score=scoring.gqa_accuracy,
        files=(readers.GQA_QUESTIONS, "images/"),
        published="GQA (Stanford)",
        licence="CC BY 4.0",
        variants={"vlm-evaluation": scoring.gqa_accuracy_prismatic},
    ),
    VisualFormat(
        name="textvqa",
        read=readers.read_textvqa,
        files=(readers.TEXTVQA_QUESTIONS, "train_images/"),
        **_TEXTVQA,
    ),
    VisualFormat(
        name="textvqa_ocr",
        read=readers.read_textvqa_ocr,
        files=(readers.TEXTVQA_QUESTIONS, readers.questions.TEXTVQA_OCR, "train_images/"),
        **_TEXTVQA,
    ),
    VisualFormat(
        name="vizwiz",
        metric="VQA accuracy",
        read=readers.read_vizwiz,
        official_prompt=_VIZWIZ,
        short_prompt="{question}",
        score=_vizwiz_score,
        files=(readers.questions.VIZWIZ_QUESTIONS, "val/"),
        published="VizWiz-VQA (vizwiz.org)",
        licence="CC BY 4.0",
        summarise=_vizwiz_numbers,
    ),
    VisualFormat(
        name="pope",
        metric="accuracy",
        read=readers.read_pope,
        official_prompt=_BRIEFLY,
        short_prompt="{question}",
        score=scoring.pope_accuracy,
        files=(*(f"coco_pope_{split}.json" for split in readers.POPE_SPLITS), "val2014/"),
        published="POPE (AoiDragon/POPE, output/coco); pictures: COCO val2014",
        licence="MIT; " + _COCO,
        fixed="answers",
        summarise=_pope_numbers,
    ),
    _boxes(
        "refcoco",
        readers.read_refcoco,
        0.5,
        files=(readers.REFCOCO_REFS, readers.REFCOCO_INSTANCES, "train2014/"),
        **_REFER,
    ),
    _boxes(
        "refcoco_plus",
        readers.read_refcoco,
        0.5,
        files=(readers.REFCOCO_REFS, readers.REFCOCO_INSTANCES, "train2014/"),
        **_REFER,
    ),
    _boxes(
        "refcocog",
        readers.read_refcocog,
        0.5,
        files=(readers.boxes.REFCOCOG_REFS, readers.REFCOCO_INSTANCES, "train2014/"),
        **_REFER,
    ),
    _boxes(
        "ocid_ref",
        readers.read_ocid_ref,
        0.25,
        files=(readers.OCID_EXPRESSIONS, "OCID-dataset/"),
        published="OCID-Ref (National Taiwan University); pictures: OCID (TU Wien)",
        licence=_RESEARCH,
    ),
    VisualFormat(
        name="vsr",
        metric="accuracy",
        read=readers.read_vsr,
        official_prompt=_VSR,
        short_prompt='Is "{question}" true or false?',
        score=scoring.word_accuracy,
        files=("test.jsonl", "train2017/"),
        published="VSR zero-shot (cambridgeltl/visual-spatial-reasoning); pictures: COCO 2017",
        licence="Apache-2.0; " + _COCO,
        fixed="answers",
    ),
    VisualFormat(
        name="tallyqa",
        metric="accuracy",
        read=readers.read_tallyqa,
        official_prompt=_LETTER,
        short_prompt="{question}",
        score=scoring.letter_accuracy,
        files=("test.json", "VG_100K/", "val2014/"),
        published="TallyQA (RIT); pictures: Visual Genome, COCO val2014",
        licence=_RESEARCH,
        fixed="letters",
        parses=_is_letter,
    ),
    VisualFormat(
        name="ai2d",
        metric="accuracy",
        read=readers.read_ai2d,
        official_prompt=_LETTER,
        short_prompt="{question}",
        score=scoring.letter_accuracy,
        files=("questions/", readers.choices.AI2D_TEST_IDS, "images/"),
        published="AI2D (Allen Institute for AI)",
        licence=_RESEARCH,
        fixed="letters",
        parses=_is_letter,
    ),
    VisualFormat(
        name="qa",
        metric="normalised exact match",
        read=readers.read_qa,
        official_prompt=_BRIEFLY,
        short_prompt="{question}",
        score=scoring.qa_accuracy,
        files=(readers.QA_QUESTIONS,),
        published="your own: JSON lines of question, answer and image",
        licence="yours",
        fixed="answers",
    ),
)
VISUAL_FORMATS: dict[str, VisualFormat] = {row.name: row for row in _TABLE}
