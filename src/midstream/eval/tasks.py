"""The benchmarks of `benchmarks.toml` with their functions, and the protocol of what answers them.

Published records of a text task are put into the columns of its data set on the hub.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from midstream.eval import read_answers, read_tables, scoring
from midstream.eval.benchmark_records import (
    Record,
    Shown,
    VisualExample,
    entries,
    lines,
    missing,
    read_json_file,
    read_text,
    records,
)
from midstream.eval.scoring import BENCHMARKS, VISUAL_CHANCE, Numbers

__all__ = ["VISUAL_FORMATS", "Answerer", "VisualExample", "VisualFormat"]

Score = Callable[[str, Any], float]


class Ask(NamedTuple):
    """A question: its prompt is the user's message alone; no `image` is one without a picture, a
    path one behind that picture, `Shown` one with several in their places. `writes`: whether an
    answer is written; of `choices` and the `gold` answer the log-probabilities are asked for."""

    prompt: str
    image: Path | Shown | None = None
    choices: Sequence[str] = ()
    gold: str | None = None
    writes: bool = True


# A plain text to go on with, where to stop, and behind how many tokens at the latest.
GoOn = tuple[str, Sequence[str], int]


class Reply(NamedTuple):
    """A question's answer: the text that was written ("" where none was asked for), and the
    log-probabilities of its choices and of the gold answer (None where none was given)."""

    text: str
    choices: list[float]
    gold: float | None


@runtime_checkable
class Answerer(Protocol):
    """A model as the evaluation sees it; "In: ... Out:" and the separators are added inside."""

    @property
    def weights_digest(self) -> str:
        """Stands for the weights that answer."""
        ...

    def reply(self, asked: Sequence[Ask]) -> list[Reply]:
        """For each question its greedy answer where one is written; the log-probability of each of
        its choices as the reply, of their first tokens where these differ from one another, else of
        the whole; and of the gold answer, always of the whole.

        What stands behind a reply, its end, is no part of it.
        """
        ...

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the continuation's log-probability, and whether greedy
        decoding would give it."""
        ...

    def num_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """How many tokens the continuation of each (context, continuation) has there."""
        ...

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text."""
        ...

    def generate_until(self, asked: Sequence[GoOn]) -> list[str]:
        """Greedy continuations, each up to the first of its stops."""
        ...


@dataclass(frozen=True)
class VisualFormat:
    """A benchmark's files, wording and metric, a row of benchmarks.toml; `{question}` stands in
    both prompts.

    `parse` is None of an answer that the scorer cannot read, which is wrong and counted; `reads`
    says what it can. `fixed`: "answers", where a choice is made among the examples' `choices` (an
    example without any is answered freely), "letters" where among the letters of these, None where
    answers are free.
    `variants` are other people's scorers of the same answers, by whose they are. `corpus` scores
    all answers at once in place of `score`. `summarise` adds numbers over all examples; `note` says
    what is odd about a score, if anything.
    """

    name: str
    metric: str
    read: Callable[..., list[VisualExample]]
    official_prompt: str
    score: Score
    files: tuple[str, ...]
    published: str
    licence: str
    short_prompt: str = "{question}"
    fixed: Literal["answers", "letters"] | None = None
    variants: Mapping[str, Score] = field(default_factory=dict)
    summarise: Callable[[Sequence[str], Sequence[VisualExample]], Numbers] | None = None
    note: Callable[[Sequence[str], Sequence[VisualExample]], str | None] | None = None
    parse: Callable[[str, VisualExample], Any] = lambda text, _: text
    reads: str = ""
    corpus: Callable[[Sequence[str], Sequence[Any]], list[float]] | None = None

    def scores(self, texts: Sequence[str], golds: Sequence[Any]) -> list[float]:
        """The score of each answer, of all together where one depends on the others' golds."""
        if self.corpus is not None:
            return self.corpus(texts, golds)
        return [self.score(*pair) for pair in zip(texts, golds, strict=True)]

    @property
    def chance(self) -> float:
        """What guessing scores on the official data."""
        return VISUAL_CHANCE[self.name][0]

    def prompt(self, question: str, wording: str) -> str:
        """The user's message: `wording` is "official", "short", or a template of its own."""
        known = {"official": self.official_prompt, "short": self.short_prompt}
        return known.get(wording, wording).replace("{question}", question)

    def details(self, predictions: Sequence[str], examples: Sequence[VisualExample]) -> Numbers:
        """Numbers beside the score: other people's scorers, the benchmark's own further ones, and
        the score by each kind of question ("answer_type=number")."""
        pairs = list(zip(predictions, examples, strict=True))
        found: Numbers = {
            name: scoring.mean([score(text, e.gold) for text, e in pairs])
            for name, score in self.variants.items()
        }
        if self.summarise is not None:
            found |= self.summarise(predictions, examples)
        by_kind: dict[str, list[float]] = defaultdict(list)
        told = any(example.kinds for example in examples)
        scores = self.scores(predictions, [e.gold for e in examples]) if told else []
        for example, score in zip(examples, scores, strict=told):
            for kind, value in example.kinds.items():
                by_kind[f"{kind}={value}"].append(score)
        return found | {kind: scoring.mean(values) for kind, values in sorted(by_kind.items())}


_SCORERS = ("score", "summarise", "note", "corpus")


def _format(name: str, row: Mapping[str, Any]) -> VisualFormat:
    assert name in VISUAL_CHANCE, f"benchmarks.toml: give {name} a level under [chance.visual]"
    row, scorers = dict(row), {key: row[key] for key in _SCORERS if key in row}
    tables = row.pop("tables", None)
    changed = {
        "read": resolve_name(f"midstream.eval.{row['read']}"),
        "files": tuple(row["files"]),
        "official_prompt": BENCHMARKS["prompts"][row["official_prompt"]],
        "variants": {who: getattr(scoring, own) for who, own in row.get("variants", {}).items()},
    }
    if parse := row.get("parse"):
        changed |= {"parse": getattr(read_answers, parse), "reads": BENCHMARKS["reads"][parse]}
    for key, own in scorers.items():
        module = "" if "." in own else "scoring."
        changed[key] = resolve_name(f"midstream.eval.{module}{own}")
    if tables is not None:
        own_tables = resolve_name(f"midstream.eval.read_tables.{tables}")
        changed["read"] = read_tables.or_tables(changed["read"], own_tables)
    return VisualFormat(name=name, **{**row, **changed})


VISUAL_FORMATS: dict[str, VisualFormat] = {
    name: _format(name, row) for name, row in BENCHMARKS["visual"].items()
}


Encode = Callable[[str], list[int]]


def reply_tokens(encode: Encode, prompt: str, replies: Sequence[str]) -> list[list[int]]:
    """What a model writes behind `prompt` to give each reply.

    encode: ids of a text, no special token added. `prompt` is the text that the replies stand
    behind, "" where they begin a text of their own; the replies hold the space that parts them from
    it. A reply that would melt into the prompt's last token is tokenised as one that begins a line.
    """
    return [_behind(encode, prompt, reply) for reply in replies]


def telling(whole: list[list[int]]) -> list[list[int]]:
    """The replies' first tokens where these differ from one another, else whole replies."""
    first = [ids[:1] for ids in whole]
    return first if len({tuple(ids) for ids in first}) == len(first) else whole


def _behind(encode: Encode, prompt: str, reply: str) -> list[int]:
    for before in (prompt, "\n"):
        head, both = encode(before), encode(before + reply)
        if len(both) > len(head) and both[: len(head)] == head:
            return both[len(head) :]
    return encode(reply)


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
    """A task of the harness, a row of benchmarks.toml: where its description lies (or `settings` of
    our own), and what reads its published files (`core.identity.TEXT_FILES`)."""

    split: str
    read: Callable[..., LocalTask]
    num_docs: int
    published: str
    licence: str
    yaml: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_arc(path: Path, key: str = "question") -> LocalTask:
    """ARC and, by another `key`, OpenBookQA: their own form, or llm-foundry's."""
    docs = []
    for record in lines(path):
        if "query" in record:
            asked = record.text("query").removeprefix("Question: ").removesuffix("\n")
            texts = record.texts("choices")
            labels = list(ascii_uppercase[: len(texts)])
            answer = labels[record.index("gold", len(texts))]
        else:
            own = Record(record.where, record.get("question", dict))
            asked, options = own.text("stem"), own.records("choices")
            texts, labels = ([one.text(name) for one in options] for name in ("text", "label"))
            answer = record.text("answerKey")
        docs.append({key: asked, "choices": {"text": texts, "label": labels}, "answerKey": answer})
    return LocalTask(tuple(docs))


read_openbookqa = partial(read_arc, key="question_stem")


def _winogrande(record: Record) -> Doc:
    if "context_options" not in record:
        doc: Doc = {one: record.text(one) for one in ("sentence", "option1", "option2", "answer")}
        if "_" not in doc["sentence"] or doc["answer"] not in ("1", "2"):
            record.refuse("a sentence needs a blank '_' and the answer 1 or 2")
        return doc
    options = record.texts("context_options")  # llm-foundry's form
    if len(options) != 2:
        record.refuse(f"it has {len(options)} context_options, not two")
    # The harness puts an option in place of the blank, and what stands behind it after.
    doc = {"sentence": f"_ {record.text('continuation').strip()}"}
    doc |= {"answer": str(record.index("gold", 2) + 1)}
    return doc | {"option1": options[0], "option2": options[1]}


def _copa(record: Record) -> Doc:
    if "query" not in record:
        doc: Doc = {key: record.text(key) for key in ("premise", "question", "choice1", "choice2")}
        return doc | {"label": record.get("label", int)}
    # llm-foundry's form: "The woman retired, therefore"
    premise, _, connector = record.text("query").rpartition(", ")
    question = {"because": "cause", "therefore": "effect"}.get(connector)
    choices = record.texts("choices")
    if question is None or len(choices) != 2:
        record.refuse(
            f"its query ends with {connector!r}, not because or therefore, or not two choices"
        )
    doc = {"premise": premise + ".", "question": question, "label": record.get("gold", int)}
    return doc | {"choice1": choices[0], "choice2": choices[1]}


def read_mathqa(path: Path) -> LocalTask:
    """MathQA's own list, or llm-foundry's lines, of four options."""
    if path.suffix == ".json":
        keys = ("Problem", "options", "correct")
        return LocalTask(tuple({key: one.text(key) for key in keys} for one in records(path)))
    docs = []
    for record in lines(path):
        # "Question: ... ?\nA. 30\nB. ...\nAnswer: "
        question, *rest = record.text("query").removeprefix("Question: ").split("\nA. ")
        listed = ("A. " + "\nA. ".join(rest)).removesuffix("\nAnswer: ").split("\n")
        choices = [line[3:] for line in listed]
        if len(choices) != len(record.texts("choices")):
            record.refuse(f"its query lists {len(choices)} options, its choices are others")
        gold = record.index("gold", len(choices))
        docs.append({"Problem": question, "choices": choices, "gold": gold})
    settings = {"doc_to_choice": "choices", "doc_to_target": "gold"}
    return LocalTask(tuple(docs), settings, "four of the five options", 0.25)


def read_piqa(asked: Path, labels: Path) -> LocalTask:
    """PIQA's questions, and its file of labels."""
    if not labels.is_file():
        missing(labels)
    golds = read_text(labels).split()
    records = list(lines(asked))
    if len(records) != len(golds) or not set(golds) <= {"0", "1"}:
        raise ValueError(
            f"{labels} holds {len(golds):,} labels, {asked} {len(records):,} questions; each needs "
            "one label, 0 or 1: give the two files of one release"
        )
    docs: list[Doc] = [{key: one.text(key) for key in ("goal", "sol1", "sol2")} for one in records]
    pairs = zip(docs, golds, strict=True)
    return LocalTask(tuple(doc | {"label": int(gold)} for doc, gold in pairs))


def read_pubmedqa(questions: Path, path: Path) -> LocalTask:
    """PubMedQA's questions, and its file of the test set's answers."""
    asked = dict(entries(questions))
    docs = []
    for key, gold in read_json_file(path).items():
        if key not in asked:
            raise ValueError(f"{path} names {key}, which {questions} lacks; give one release")
        texts = {"QUESTION": asked[key].text("QUESTION"), "CONTEXTS": asked[key].texts("CONTEXTS")}
        docs.append({**texts, "final_decision": gold})
    return LocalTask(tuple(docs))


def read_hellaswag(path: Path) -> LocalTask:
    """HellaSwag's own lines, or a text file of six lines a task."""
    docs: list[Doc] = []
    if path.suffix == ".jsonl":
        for record in lines(path):
            docs.append({key: record.text(key) for key in ("ctx_a", "ctx_b", "activity_label")})
            docs[-1] |= {"endings": record.texts("endings"), "label": record.identifier("label")}
        return LocalTask(tuple(docs))
    rows = [line for line in read_text(path).split("\n") if line]
    if len(rows) % 6:
        raise ValueError(f"{path} holds {len(rows):,} lines, no multiple of six; it is cut off")
    for number in range(0, len(rows), 6):
        activity, mark, context = rows[number].partition(": ")
        if not mark or rows[number + 1] not in ("0", "1", "2", "3"):
            raise ValueError(
                f"{path} line {number + 1}: a task is 'activity: context', a label, four endings"
            )
        doc: Doc = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
        docs.append(doc | {"label": rows[number + 1], "endings": rows[number + 2 : number + 6]})
    return LocalTask(tuple(docs), departs="contexts as the text file writes them")


def read_boolq(path: Path) -> LocalTask:
    """BoolQ's own form, SuperGLUE's, or llm-foundry's."""
    asked = list(lines(path))
    departs = "passages without their titles, as llm-foundry's file has them"
    foundry = any("query" in record for record in asked)
    return LocalTask(tuple(map(_boolq, asked)), departs=departs if foundry else None)


def _boolq(record: Record) -> Doc:
    if "query" not in record:
        value = next((record.value[key] for key in ("label", "answer") if key in record), None)
        if not isinstance(value, bool):
            record.refuse(f"its label or answer is {value!r}, neither true nor false")
        # SuperGLUE, whose wording the harness has, puts the title before the passage.
        title = f"{record.text('title')} -- " if "title" in record else ""
        passage, question = title + record.text("passage"), record.text("question")
        return {"passage": passage, "question": question, "label": int(value)}
    # "Passage: ...\nQuestion: does ...?\n"
    passage, mark, question = record.text("query").rpartition("\nQuestion: ")
    if not mark or record.texts("choices") != ["no", "yes"]:
        record.refuse("its query has no line 'Question: ', or its choices are not no and yes")
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.rstrip("\n").removesuffix("?"),
        "label": record.index("gold", 2),
    }


def _agieval(record: Record) -> Doc:
    options = record.texts("options")
    letters = list(ascii_uppercase[: len(options)])
    if record.text("label") not in letters:
        record.refuse(f"its label {record.text('label')!r} is none of {', '.join(letters)}")
    # AGIEval's zero-shot wording of its multiple-choice tasks.
    query = (
        f"{record.text('passage')}Q: {record.text('question')} Answer Choices: "
        f"{' '.join(options)}\nA: Among A through {letters[-1]}, the answer is"
    )
    return {"query": query, "choices": options, "gold": [letters.index(record.text("label"))]}


def read_bigbench(path: Path) -> LocalTask:
    """BIG-bench's own task.json (inputs, and a score for each choice), or llm-foundry's lines."""
    docs = []
    if path.suffix != ".json":
        for record in lines(path):
            choices = record.texts("choices")
            gold, inputs = record.index("gold", len(choices)), record.text("query").rstrip()
            docs.append(_bigbench(inputs, choices, choices[gold]))
        return LocalTask(tuple(docs), departs="the wording of llm-foundry's file")
    examples = list(records(path, "examples"))
    prefix, suffix = read_json_file(path).get("example_input_prefix", "\nQ: "), "\nA:"
    for record in examples:
        scores = record.get("target_scores", dict)
        listed = "".join(f"\n  choice: {choice}" for choice in scores)
        inputs = f"{prefix}{record.text('input')}{listed}{suffix}"
        docs.append(_bigbench(inputs, list(scores), max(scores, key=scores.__getitem__)))
    return LocalTask(tuple(docs))


def _bigbench(inputs: str, choices: list[str], gold: str) -> Doc:
    return {"inputs": inputs, "multiple_choice_targets": choices, "targets": [gold]}


def _cs_algorithms(record: Record) -> Doc:
    continuation = f" {record.text('continuation').strip()}"
    return {"context": record.text("context"), "continuation": continuation}


def _each_line(path: Path, doc_of: Callable[[Record], Doc]) -> LocalTask:
    return LocalTask(tuple(map(doc_of, lines(path))))


read_winogrande = partial(_each_line, doc_of=_winogrande)
read_copa = partial(_each_line, doc_of=_copa)
read_agieval = partial(_each_line, doc_of=_agieval)
read_cs_algorithms = partial(_each_line, doc_of=_cs_algorithms)
HARNESS_TASKS: dict[str, HarnessTask] = {
    name: HarnessTask(**{**row, "read": globals()[row["read"]]})
    for name, row in BENCHMARKS["text"].items()
}
