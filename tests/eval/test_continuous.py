"""Continuous outcomes against plain forward passes, and what of each kind of task can be had."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_readers import official

import peer_checkpoints
import tiny
from answerers import Fake, ignore, kept
from midstream.config import Evaluation
from midstream.core.stats import standard_error
from midstream.data.examples import TextCodec, question_ids
from midstream.data.images import decode_pixels
from midstream.eval.benchmark import evaluate
from midstream.eval.continuous import Target, summary, target, text_outcomes, visual_outcomes
from midstream.eval.find_task import other_pictures, read_visual_task
from midstream.eval.predict import ModelAnswerer
from midstream.eval.tasks import VISUAL_FORMATS, Ask, Reply, VisualExample
from midstream.eval.text import TextAnswer
from midstream.eval.transformers_answerer import TransformersAnswerer
from midstream.model.read_prompts import Part, embed_parts
from midstream.study.results import OUTCOMES, EvaluationResult, TaskResult
from midstream.study.store import Ledger

QUESTIONS = ("What colour is the circle?", "Is there a star?", "Where?", "How many shapes?")
CHOICES = (("red", "blue"), ("yes", "no"), (), ("on the left", "on the right", "on"))
GOLDS = ("dark red", "no", "on the left of the blue square", None)


def forward(answerer: ModelAnswerer, question: str, picture: Path | None, text: str) -> list[float]:
    """The log-probability of each token of a reply, by one pass over the whole row."""
    model, codec = answerer.model, answerer.codec
    head, tail = question_ids(codec, question, has_image=picture is not None), f" {text}"
    ids = torch.tensor([[*head, *codec.encode(tail)]])
    rows = model.decoder.embed(ids)
    if picture is not None:
        pixels = decode_pixels(picture.read_bytes(), str(picture), tiny.ENCODER.transform)
        assert answerer.encode is not None
        features = answerer.encode(torch.from_numpy(pixels)[None])
        first = tuple(codec.begin_ids)
        shown = Part(first, ((len(first), 0),))
        rows = torch.cat((embed_parts(model, [shown], features)[0], rows), dim=1)
    with torch.no_grad():
        hidden = model.decoder(rows, torch.arange(rows.shape[1])[None], None)
        logprobs = model.decoder.output(hidden).double().log_softmax(dim=-1)[0]
    count = ids.shape[1] - len(head)
    return [float(logprobs[at - count - 1, ids[0, at - count]]) for at in range(count)]


@pytest.mark.parametrize("writes", [True, False])
def test_one_reading_gives_the_text_the_choices_and_the_gold_of_plain_passes(
    answerer: ModelAnswerer, pictures: list[Path], writes: bool
) -> None:
    images: list[Path | None] = [pictures[0], pictures[1], None, pictures[0]]
    asks = [Ask(*own, writes) for own in zip(QUESTIONS, images, CHOICES, GOLDS, strict=True)]
    found = answerer.reply(asks)
    bare = answerer.reply([one._replace(choices=(), gold=None) for one in asks])
    assert [reply.text for reply in found] == [reply.text for reply in bare]
    for reply, ask in zip(found, asks, strict=True):
        *asked, own, gold, _ = ask
        if gold is not None:
            expected = sum(forward(answerer, *asked, gold))  # type: ignore[arg-type]
            assert reply.gold == pytest.approx(expected, abs=1e-5)
        tokens = [forward(answerer, *asked, text) for text in own]  # type: ignore[arg-type]
        first = len({tuple(answerer.codec.encode(f" {text}")[:1]) for text in own}) == len(own)
        totals = [each[0] if first else sum(each) for each in tokens]
        assert reply.choices == pytest.approx(totals, abs=1e-5)
        assert answerer.reply([ask]) == [reply]
    assert [reply.gold is None for reply in found] == [False, False, False, True]
    assert bool(found[0].text) == writes


def test_another_peoples_model_gives_the_gold_answer_the_probability_of_one_pass(
    tmp_path: Path, pictures: list[Path]
) -> None:
    peer_checkpoints.build("LLaVA 1.5", tmp_path / "peer")
    peer = TransformersAnswerer(
        str(tmp_path / "peer"), torch.device("cpu"), max_new_tokens=4, batch_size=3
    )
    golds = ["red cat", "No", "dog in the image"]
    own: list[tuple[str, ...]] = [("red", "blue"), ("Yes", "No"), ()]
    free = zip(QUESTIONS[:3], pictures[:3], own, golds, [True, False, True], strict=True)
    asks = [Ask(*one) for one in free]
    found = peer.reply(asks)
    # As the probability of a whole reply beside another that begins alike, which has its own test.
    pairs = [(gold, f"{gold} dog") for gold in golds]
    beside = [one._replace(choices=pair, gold=None) for one, pair in zip(asks, pairs, strict=True)]
    for reply, pair in zip(found, peer.reply(beside), strict=True):
        assert reply.gold == pytest.approx(pair.choices[0], abs=1e-4)
    bare = peer.reply([one._replace(gold=None, writes=True) for one in asks])
    for reply, one in zip(found, bare, strict=True):
        assert reply.choices == pytest.approx(one.choices, abs=1e-5)
    assert [reply.text for reply in found] == [bare[0].text, "", bare[2].text]
    assert peer.num_tokens([("The cat", " red dog"), ("", "red")]) == [2, 1]


def example(gold: Any, **more: Any) -> VisualExample:
    return VisualExample("1", "What?", Path("a.png"), gold, **more)


def aim(name: str, one: VisualExample, letters: Any = "letter", *, written: bool = False) -> Target:
    return target(VISUAL_FORMATS[name], one, letters, spelt_as_gold=written)


def test_the_gold_of_ten_answers_is_the_commonest_and_of_equals_the_first() -> None:
    ten = ["red", "blue", "blue ", "blue", "red", *"abcde"]
    assert aim("vqav2", example(ten)).gold == "red"
    assert aim("vqav2", example([*ten[:-1], "blue"])).gold == "blue"
    assert aim("vizwiz", example({"answers": ten[1:], "answerable": True})).gold == "blue"
    assert aim("gqa", example("left ")) == Target(gold="left")
    assert aim("gqa", example(" ")).gold is None
    assert aim("refcoco", example([0.1, 0.02, 0.5, 1.0], size=(9, 9))).gold == (
        "[0.10, 0.02, 0.50, 1.00]"
    )


def test_a_closed_set_is_asked_in_the_words_of_the_task_or_as_its_files_spell_them() -> None:
    pope = example("no", choices=("Yes", "No"))
    assert aim("pope", pope) == Target(("Yes", "No"), ("Yes", "No"), (False, True), "No")
    assert aim("pope", pope, written=True).options == ("yes", "no")
    assert aim("pope", pope, written=True).gold == "no"
    vsr = example("True", choices=("True", "False"))
    assert aim("vsr", vsr, written=True) == aim("vsr", vsr)
    count = example({"index": 2, "choices": ["0", "1", "2"]}, choices=("0", "1", "2"))
    lettered = Target(("A", "B", "C"), ("A", "B", "C"), (False, False, True), "C")
    assert aim("tallyqa", count) == aim("tallyqa", count, written=True) == lettered
    assert aim("tallyqa", count, "likelihood") == replace(
        lettered, options=("0", "1", "2"), gold="2"
    )
    two = aim("qa", example(["the cup", "A mug"], choices=("A cup", "a mug", "a dog")))
    assert (two.right, two.gold) == ((True, True, False), "A cup")


def outcomes(about: Target, reply: Reply, other: Reply | None = None) -> dict[str, float | None]:
    return visual_outcomes(example(""), "", (about, reply, other))


def test_the_probabilities_of_a_closed_set_sum_to_one() -> None:
    logprobs, count = [-700.0, -701.5, -699.0, -900.0], 4
    rows = [
        outcomes(
            Target(("",) * count, ("",) * count, tuple(at == right for at in range(count)), "x"),
            Reply("", logprobs, -700.0),
        )
        for right in range(count)
    ]
    each = [row["correct_prob"] or 0.0 for row in rows]
    assert math.fsum(each) == pytest.approx(1.0)
    assert each[0] / each[1] == pytest.approx(math.exp(1.5))
    assert rows[0]["margin"] == pytest.approx(each[0] - each[2])
    assert rows[2]["margin"] == pytest.approx(each[2] - each[0])
    assert {(row["prob"] == row["correct_prob"], row["prob_chance"]) for row in rows} == {
        (True, 0.25)
    }
    both = outcomes(Target(("",) * 2, ("",) * 2, (True, True), "x"), Reply("", [-1.0, -2.0], -1.0))
    assert (both["correct_prob"], both["margin"], both["prob_chance"]) == (1.0, 1.0, 1.0)


def test_bits_are_per_byte_and_gained_over_another_picture() -> None:
    about = Target(gold="né")  # three bytes
    row = outcomes(about, Reply("", [], -3 * math.log(2)), Reply("", [], -9 * math.log(2)))
    assert row["bits_per_byte"] == pytest.approx(1.0)
    assert row["bits_gained"] == pytest.approx(2.0)
    assert (row["prob"], row["prob_chance"]) == (pytest.approx(1 / 8), 0.0)
    assert row["correct_prob"] is row["margin"] is row["iou"] is row["bits_per_token"] is None
    assert outcomes(about, Reply("", [], -1.0))["bits_gained"] is None
    assert set(outcomes(Target(), Reply("", [], None)).values()) == {None}


def test_of_a_box_the_overlap_counts_and_needs_no_likelihood() -> None:
    box = example([0.0, 0.0, 0.5, 0.5], size=(10, 10))
    row = visual_outcomes(box, "[0.0, 0.0, 0.5, 0.25]")
    assert (row["iou"], row["prob"], row["prob_chance"]) == (0.5, 0.5, 0.0)
    assert row["bits_per_byte"] is None
    weighed = (Target(gold="[0, 0, 1, 1]"), Reply("there", [], -9.0), None)
    row = visual_outcomes(box, "there", weighed)
    assert (row["iou"], row["prob"]) == (0.0, 0.0)
    assert row["bits_per_byte"] == pytest.approx(9 / 12 / math.log(2))


def test_a_mean_is_of_the_examples_that_have_it_and_weighs_splits_alike() -> None:
    nothing = dict.fromkeys(OUTCOMES)
    values = [1.0, 0.0, 0.5, None]
    rows = [{**nothing, "margin": value} for value in values]
    found = summary(rows, list("aabc"), ["x", "x", "y", "y"])
    assert found["margin"] == 0.5
    assert found["stderr"]["margin"] == standard_error([1.0, 0.0, 0.5], list("aab"), list("xxy"))
    assert (found["iou"], found["stderr"]["iou"]) == (None, None)


def test_a_right_answer_that_cannot_be_has_no_mean_that_json_cannot_hold() -> None:
    never = -math.inf
    said = TextAnswer("It is", (" a", " b"), 1, 0, 0.0, "", (never, -2.0), ("It is", " a"))
    rows = [text_outcomes(one, 1) for one in (said, replace(said, logprobs=(-1.0, -2.0)))]
    found = summary(rows, None, ["", ""])
    assert (found["bits_per_byte"], found["stderr"]["bits_per_byte"]) == (None, None)
    assert found["correct_prob"] == pytest.approx((0 + math.e / (1 + math.e)) / 2)
    impossible = text_outcomes(replace(said, logprobs=(never, never)), 1)
    assert (impossible["correct_prob"], impossible["prob"]) == (None, 0.0)
    json.dumps(found, allow_nan=False)


def test_text_is_weighed_per_byte_character_and_token() -> None:
    said = TextAnswer("It is", (" né", " x"), 1, 0, 0.0, "", (-3.0, -2.0), ("It is", " né"))
    row, bits = text_outcomes(said, 4), 3 / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits / 3)
    assert row["bits_per_character"] == pytest.approx(bits / 2)
    assert row["bits_per_token"] == pytest.approx(bits / 4)
    assert row["correct_prob"] == pytest.approx(1 / (1 + math.e))
    assert row["margin"] == pytest.approx((1 - math.e) / (1 + math.e))
    assert (row["prob"], row["prob_chance"]) == (row["correct_prob"], 0.5)
    alone = text_outcomes(replace(said, choices=(" né",), logprobs=(-3.0,)), 4)
    assert (alone["correct_prob"], alone["prob"]) == (None, pytest.approx(math.exp(-3)))
    assert set(text_outcomes(TextAnswer("p", ("4",), 0, 1, 1.0), 0).values()) == {None}
    assert set(text_outcomes(replace(said, gold=None), 0).values()) == {None}


def asked(answers: Any, root: Path, out: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """The results, and the predictions of each task as rows by example."""
    evaluation = Evaluation.model_validate(options)
    found = evaluate(kept(answers), evaluation, root, out, ignore)
    tables = {
        task: {row["example_id"]: row for row in pq.read_table(path).to_pylist()}
        for task in found["tasks"]
        for path in [out / "predictions" / f"{task}.parquet"]
    }
    return found, tables


@pytest.mark.parametrize("by", ["probability", "text"])
def test_a_model_on_a_world_has_the_outcomes_of_plain_forward_passes(
    answerer: ModelAnswerer, tiny_ledger: Ledger, tmp_path: Path, by: str
) -> None:
    root = tiny_ledger.folder(tiny.WORLD) / "world"
    tasks = ("vqav2", "pope", "refcoco")
    options = {"visual_tasks": tasks, "limit": 6, "fixed_answers": by, "prompts": "short"}
    found, tables = asked(answerer, root, tmp_path, **options)
    for name in tasks:
        task = read_visual_task(root, name, 6)
        for one, (other,) in zip(task.examples, other_pictures(task), strict=True):
            row = tables[name][one.example_id]
            spelt = target(task.format, one, "letter", spelt_as_gold=by == "text")
            assert spelt.gold is not None
            bits, blind = (
                -sum(forward(answerer, row["prompt"], picture, spelt.gold))
                / (len(spelt.gold.encode()) * math.log(2))
                for picture in (one.image, other)
            )
            assert row["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
            assert row["bits_gained"] == pytest.approx(blind - bits, abs=2e-5)
        part = found["tasks"][name]["continuous"]
        for outcome in OUTCOMES:
            values = [row[outcome] for row in tables[name].values()]
            assert (part[outcome] is None) == (None in values)
    rows = found["tasks"]
    assert rows["refcoco"]["continuous"]["iou"] == rows["refcoco"]["details"]["mean_iou"]
    assert rows["pope"]["continuous"]["prob_chance"] == 0.5
    if by == "probability":  # the answer is the likeliest one
        for row in tables["pope"].values():
            assert (row["correct_prob"] > 0.5) == (row["score"] == 1) == (row["margin"] > 0)
    over = [row["continuous"]["prob"] - row["continuous"]["prob_chance"] for row in rows.values()]
    assert found["stable"]["vision_prob"] == pytest.approx(sum(over) / 3)
    read = EvaluationResult.model_validate({"seconds": 1.0, **found})
    assert read.unknown_keys() == []
    assert read.tasks["pope"].continuous.correct_prob == rows["pope"]["continuous"]["correct_prob"]


def test_a_model_that_ignores_the_picture_gains_no_bit(
    answerer: ModelAnswerer, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    def same(pixels: torch.Tensor) -> torch.Tensor:
        assert answerer.encode is not None
        return answerer.encode(torch.zeros_like(pixels))

    model, codec = answerer.model, answerer.codec
    sizes = {"max_new_tokens": 4, "batch_size": 3}
    blind = ModelAnswerer(model, codec, encode=same, encoder=tiny.ENCODER, **sizes)
    root = tiny_ledger.folder(tiny.WORLD) / "world"
    options = {"visual_tasks": ("vqav2", "pope"), "limit": 6}
    found, tables = asked(blind, root, tmp_path, **options)
    assert {row["bits_gained"] for rows in tables.values() for row in rows.values()} == {0.0}
    assert found["tasks"]["pope"]["continuous"]["stderr"]["bits_gained"] == 0.0


def test_without_a_blind_pass_nothing_is_known_to_be_gained(tmp_path: Path) -> None:
    (tmp_path / "gqa").mkdir()
    official(tmp_path / "gqa", "gqa")
    options: dict[str, Any] = {"visual_tasks": ("gqa",), "blind": False}
    found, _ = asked(Fake(lambda *_: "woman"), tmp_path, tmp_path / "out", **options)
    part = found["tasks"]["gqa"]["continuous"]
    assert (part["bits_gained"], part["correct_prob"], part["iou"]) == (None, None, None)
    assert part["prob"] == pytest.approx((1 + 2 * math.exp(-1)) / 3)


def test_the_text_that_is_scored_beside_probabilities_is_asked_for_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "vsr").mkdir()
    official(tmp_path / "vsr", "vsr")
    fake = Fake(lambda *_: "True")
    options: dict[str, Any] = {"visual_tasks": ("vsr",), "blind": False, "fixed_answers": "both"}
    asked(fake, tmp_path, tmp_path / "out", **options)
    how = {(choices, gold is None, writes) for _, _, choices, gold, writes in fake.asked}
    assert how == {(("True", "False"), False, False), ((), True, True)}


def items(root: Path, queries: Sequence[str]) -> None:
    (root / "text_tasks").mkdir(parents=True)
    rows = [
        {"query": q, "choices": [" red", " the left"], "gold": i % 2} for i, q in enumerate(queries)
    ]
    (root / "text_tasks/facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = {"visual_tasks": {}, "text_tasks": {"facts": {"chance": 0.5}}}
    (root / "world.json").write_text(json.dumps(listed))


def test_a_text_task_has_the_outcomes_of_the_harness_own_requests(
    answerer: ModelAnswerer, codec: TextCodec, tmp_path: Path
) -> None:
    queries = ("The circle is", "The star is on", "Where? It is")
    items(tmp_path / "world", queries)
    found, tables = asked(
        answerer, tmp_path / "world", tmp_path / "out", text_tasks=("facts",), blind=False
    )
    for row in tables["facts"].values():
        pairs = [(row["prompt"], text) for text in (" red", " the left")]
        values = [value for value, _ in answerer.loglikelihood(pairs)]
        at = queries.index(row["prompt"]) % 2
        bits, gold = -values[at] / math.log(2), pairs[at][1]
        assert row["bits_per_byte"] == pytest.approx(bits / len(gold.strip()), rel=1e-6)
        assert row["bits_per_token"] == pytest.approx(bits / len(codec.encode(gold)), rel=1e-6)
        right = 1 / (1 + math.exp(values[1 - at] - values[at]))
        assert row["correct_prob"] == pytest.approx(right, rel=1e-6)
        assert row["bits_gained"] is None
    part = found["tasks"]["facts"]["continuous"]
    assert found["stable"]["text_prob"] == pytest.approx(part["correct_prob"] - 0.5)


def test_results_of_before_have_no_outcome() -> None:
    old = {"kind": "vision", "metric": "m", "score": 0.5, "chance": 0.25, "num_examples": 8}
    read = TaskResult.model_validate(old).continuous
    assert {getattr(read, name) for name in OUTCOMES} == {None}
    assert read.stderr == {}
