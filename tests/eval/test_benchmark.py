"""A small world from files to results, with models whose right score is known beforehand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_readers import official

from answerers import Fake, ignore, kept
from midstream.config import Evaluation
from midstream.eval.benchmark import evaluate, score_visual
from midstream.eval.find_task import VisualTask, in_seeded_order, other_pictures, read_visual_task
from midstream.eval.scoring import SUITES
from midstream.eval.tasks import VISUAL_FORMATS, VisualExample

NUM_PICTURES = 6


def liking(text: str) -> Fake:
    return Fake(lambda *_: "yes", lambda _context, choice: float(choice == text))


def colour(image: Path | None) -> str:
    """The colour that the pictures of this world have for an answer."""
    assert image is not None
    return f"colour {int(image.stem)}"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Six pictures: GQA asks each one's colour, POPE asks twice a split whether it is odd."""
    root = tmp_path / "world"
    visual = {
        "colours": {"format": "gqa", "chance": 0.1},
        "odd": {"format": "pope", "chance": 0.5},
        "gone": {"format": "gqa", "chance": 0.1},
        "strange": {"format": "strange", "chance": 0.1},
        "unsure": {"format": "gqa", "chance": 25},
    }
    (root / "bench/colours/images").mkdir(parents=True)
    (root / "bench/odd/val2014").mkdir(parents=True)
    for index in range(NUM_PICTURES):
        # Pictures of equal bytes are one picture, and are asked about once.
        picture = Image.new("RGB", (4, 4), (40 * index, 0, 0))
        picture.save(root / f"bench/colours/images/{index}.jpg")
        picture.save(root / f"bench/odd/val2014/{index}.jpg")
    questions = {
        f"q{index}": {"imageId": str(index), "question": "Hue?", "answer": f"colour {index}"}
        for index in range(NUM_PICTURES)
    }
    (root / "bench/colours/testdev_balanced_questions.json").write_text(json.dumps(questions))
    (root / "bench/unsure").symlink_to(root / "bench/colours")
    for split in ("random", "popular"):
        lines = [
            {
                "question_id": 2 * index + again,
                "image": f"{index}.jpg",
                "text": f"Odd in {split}?",
                "label": "yes" if index % 2 else "no",
            }
            for index in range(NUM_PICTURES)
            for again in range(2)
        ]
        text = "\n".join(map(json.dumps, lines))
        (root / f"bench/odd/coco_pope_{split}.json").write_text(text)
    (root / "text_tasks").mkdir()
    items = [{"query": "It is", "choices": [" a", " b"], "gold": i % 4 // 3} for i in range(20)]
    (root / "text_tasks/letters.jsonl").write_text("\n".join(map(json.dumps, items)))
    letters = {"letters": {"chance": 0.5}}
    (root / "world.json").write_text(json.dumps({"visual_tasks": visual, "text_tasks": letters}))
    return root


def run(world: Path, fake: Fake, **options: Any) -> tuple[dict[str, Any], Path]:
    out = world.parent / "out"
    return evaluate(kept(fake), Evaluation(**options), world, out, ignore), out


def test_a_model_that_sees_scores_one_and_falls_to_zero_blind(world: Path) -> None:
    fake = Fake(lambda _prompt, image: f" {colour(image).title()}.\n")
    results, out = run(world, fake, visual_tasks=("colours",))
    task = results["tasks"]["colours"]
    assert (task["score"], task["blind"], task["stderr"], task["chance"]) == (1.0, 0.0, 0.0, 0.1)
    assert (task["kind"], task["metric"], task["num_examples"]) == ("vision", "exact match", 6)
    assert results["stable"] == {
        "vision": pytest.approx(0.9),
        "vision_blind": pytest.approx(-0.1),
        "text": None,
        # It writes another spelling than the gold one, and finds that as likely with any picture.
        "vision_prob": pytest.approx(math.exp(-1)),
        "text_prob": None,
    }
    rows = pq.read_table(out / "predictions/colours.parquet").to_pylist()
    assert sorted(row["example_id"] for row in rows) == [f"q{i}" for i in range(NUM_PICTURES)]
    for row in rows:
        assert row["prediction"] == colour(Path(row["image"])).title() + "."
        assert json.loads(row["gold"]) == colour(Path(row["image"]))
        assert row["blind_prediction"].lower() != row["prediction"].lower()
        assert (row["score"], row["blind_score"]) == (1.0, 0.0)
        assert row["prompt"] == "Hue?\nAnswer the question using a single word or phrase."


def test_pope_is_the_mean_of_its_splits(world: Path) -> None:
    fake = Fake(lambda prompt, _image: "yes" if "random" in prompt else "none")
    lines = (world / "bench/odd/coco_pope_random.json").read_text().splitlines()
    one_sided = [line for line in lines if '"yes"' in line]  # 6 of 12 questions
    (world / "bench/odd/coco_pope_random.json").write_text("\n".join(one_sided))
    results, _ = run(world, fake, visual_tasks=("odd",), blind=False)
    task = results["tasks"]["odd"]
    assert task["splits"] == {"random": 1.0, "popular": 0.5}
    assert task["score"] == 0.75  # by examples it would be 12 of 18
    assert task["blind"] is None
    assert results["stable"]["vision_blind"] is None


def test_unparsable_boxes_are_wrong_and_counted(world: Path) -> None:
    folder = world / "bench/boxes/OCID-dataset"
    folder.mkdir(parents=True)
    expressions = {}
    for index in range(4):
        Image.new("RGB", (10, 10)).save(folder / f"{index}.png")
        expressions[str(index)] = {
            "scene_path": f"{index}.png",
            "bbox": "[1, 1, 5, 5]",
            "sentence": f"thing {index}",
        }
    (world / "bench/boxes/val_expressions.json").write_text(json.dumps(expressions))
    declared = json.loads((world / "world.json").read_text())
    declared["visual_tasks"]["boxes"] = {"format": "ocid_ref", "chance": 0.0}
    (world / "world.json").write_text(json.dumps(declared))
    right = {0: "[0.1, 0.1, 0.5, 0.5]", 1: "[0.6, 0.6, 0.9, 0.9]", 2: "there", 3: "[0.1]"}
    fake = Fake(lambda _prompt, image: right[int(Path(image or "").stem)])
    results, _ = run(world, fake, visual_tasks=("boxes",), prompts="short")
    assert results["tasks"]["boxes"]["score"] == 0.25
    assert results["tasks"]["boxes"]["unparsable"] == 2
    assert sorted(set(fake.prompts)) == [f"Where is thing {index}?" for index in range(4)]


@pytest.mark.slow
def test_a_text_only_evaluation_has_a_text_score_and_predictions(world: Path) -> None:
    results, out = run(world, liking(" a"), text_tasks=("letters",))
    task = results["tasks"]["letters"]
    assert (task["kind"], task["score"], task["blind"]) == ("text", 0.75, None)
    assert task["stderr"] == pytest.approx((0.75 * 0.25 / 19) ** 0.5, rel=0.05)
    assert task["low"] < 0.75 < task["high"]
    stable = {name: value for name, value in results["stable"].items() if value is not None}
    # " a" is e times as likely as " b", and right in three of four.
    liked = math.e / (1 + math.e)
    assert stable == {"text": 0.25, "text_prob": pytest.approx(0.25 + liked / 2 - 0.5)}
    rows = pq.read_table(out / "predictions/letters.parquet").to_pylist()
    assert {row["prediction"] for row in rows} == {" a"}
    assert sum(row["score"] for row in rows) == 15
    assert all(row["image"] is None and row["blind_score"] is None for row in rows)


@pytest.mark.slow
def test_progress_runs_from_the_first_task_to_one(world: Path) -> None:
    told: list[float] = []
    evaluate(
        kept(liking(" a"), 4),
        Evaluation(visual_tasks=("colours", "odd"), text_tasks=("letters",), batch_size=1),
        world,
        world.parent / "out",
        lambda fraction, _text: told.append(fraction),
    )
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)
    assert len(told) > 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"visual_tasks": ("colours", "shapes")},
            FileNotFoundError,
            "no task 'shapes'.*there: colours, gone",
        ),
        (
            {"visual_tasks": ("gone",)},
            FileNotFoundError,
            "gone does not exist; there: colours, odd",
        ),
        ({"visual_tasks": ("strange",)}, ValueError, "format 'strange'; use vqav2, okvqa"),
        ({"visual_tasks": ("unsure",)}, ValueError, "chance 25"),
        ({"visual_tasks": ("odd",), "limit": 1}, ValueError, "limit 1 cannot cover the 2 splits"),
        ({"visual_tasks": ("colours",), "limit": 1}, ValueError, "1 of 1 examples share picture"),
        (
            {"visual_tasks": ("colours",), "text_tasks": ("sums",)},
            FileNotFoundError,
            "no task 'sums'.*there: letters",
        ),
        ({"visual_tasks": ("odd", "odd")}, ValueError, "twice: odd"),
        ({}, ValueError, "names no task"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_the_first_answer(
    world: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    fake = Fake()
    with pytest.raises(error, match=message):
        run(world, fake, **options)
    assert fake.asked == []


def test_a_limit_takes_the_first_of_the_full_order_with_splits_in_turn(world: Path) -> None:
    full = read_visual_task(world, "odd").examples
    part = read_visual_task(world, "odd", limit=7).examples
    assert part == full[:7]
    assert sum(example.split == "random" for example in part) in (3, 4)
    assert sorted(full, key=lambda e: e.example_id) != list(full)


def test_the_order_is_the_same_in_every_process() -> None:
    order = in_seeded_order(range(12), [str(number % 3) for number in range(12)], "gqa")
    assert order == [0, 4, 5, 3, 1, 11, 6, 10, 8, 9, 7, 2]


@pytest.mark.parametrize("sizes", [[1, 1], [3, 3], [5, 4, 1], [2, 2, 2, 1]])
def test_blind_pictures_are_a_permutation_in_which_every_picture_changes(sizes: list[int]) -> None:
    images = [Path(f"{group}.jpg") for group, size in enumerate(sizes) for _ in range(size)]
    images = in_seeded_order(images, [""] * len(images), "mix")
    examples = tuple(
        VisualExample(str(index), "?", image, "yes") for index, image in enumerate(images)
    )
    task = VisualTask("some", VISUAL_FORMATS["gqa"], 0.0, examples, len(examples))
    others = [one for (one,) in other_pictures(task)]
    assert all(other != image for other, image in zip(others, images, strict=True))
    assert sorted(others) == sorted(images)
    assert [(one,) for one in others] == other_pictures(task)


def test_a_picture_that_most_examples_share_leaves_no_blind_score() -> None:
    images = ["a.jpg", "a.jpg", "b.jpg"]
    examples = tuple(VisualExample(str(i), "?", Path(p), "yes") for i, p in enumerate(images))
    with pytest.raises(ValueError, match=r"2 of 3 examples share picture a\.jpg.*blind=False"):
        other_pictures(VisualTask("some", VISUAL_FORMATS["gqa"], 0.0, examples, len(examples)))


def test_chance_levels_are_those_of_the_paper() -> None:
    chances = {name: row.chance for name, row in VISUAL_FORMATS.items()}
    averaged = {task for name, own in SUITES.items() if "vision" in name for task in own}
    assert {name: chances[name] for name in averaged} == {
        "vqav2": 0.25,
        "gqa": 0.25,
        "textvqa": 0.0,
        "pope": 0.5,
        "refcoco": 0.0,
        "ocid_ref": 0.0,
    }


def evaluated(folder: Path, fake: Fake, name: str, **options: Any) -> dict[str, Any]:
    """The row of one task on the files that docs/evaluation.md shows."""
    if not (folder / name).is_dir():
        (folder / name).mkdir()
        official(folder / name, name)
    evaluation = Evaluation.model_validate({"visual_tasks": (name,), "blind": False, **options})
    row: dict[str, Any] = evaluate(kept(fake), evaluation, folder, folder / "out", ignore)
    return row["tasks"][name]


@pytest.mark.parametrize(
    ("by", "likely"),
    [("probability", False), ("probability", True), ("text", False), ("both", False)],
)
def test_fixed_answers_by_probability_and_by_text(tmp_path: Path, by: str, likely: bool) -> None:
    """The model likes the third count, and writes so."""
    fake = Fake(lambda prompt, _: "True" if "statement" in prompt else "2" if likely else "C")
    how = {"fixed_answers": by, "letters": "likelihood" if likely else "letter"}
    assert evaluated(tmp_path, fake, "vsr", **how)["score"] == pytest.approx(2 / 3)
    row = evaluated(tmp_path, fake, "tallyqa", **how)
    assert row["splits"] == {"simple": 0.5, "complex": 0.0}
    assert row["answered"] == ("text" if by == "text" else "probability")
    assert ("text.score" in row["details"]) is (by == "both")


def test_boxes_are_asked_for_in_the_frame_that_is_declared(tmp_path: Path) -> None:
    # [.02, .04, .17, .46] of 640 by 480 pixels is this of the square of 640.
    fake, found = Fake(lambda *_: "[0.02, 0.16, 0.17, 0.47]"), {}
    for frame in ("picture", "square"):
        row = evaluated(tmp_path, fake, "refcocog", box_frame=frame)
        found[frame] = row["details"]["mean_iou"]
    assert found["picture"] < 0.8 < 0.95 < found["square"]


def test_a_wording_of_the_recipes_own_takes_the_place_of_the_official_one(tmp_path: Path) -> None:
    fake, wordings = Fake(lambda *_: "unanswerable"), {"vizwiz": "Q: {question} A:"}
    row = evaluated(tmp_path, fake, "vizwiz", wordings=wordings)
    assert fake.prompts == ["Q: Can you tell me what this is? A:"]
    assert row["details"]["unanswerable_f1"] is None
    assert row["details"]["answer_type=other"] == 0.0
    for wrong in ({"gqa": "{question}"}, {"vizwiz": "no place"}):
        with pytest.raises(ValueError, match=r"none of the visual tasks|goes where"):
            Evaluation(visual_tasks=("vizwiz",), wordings=wrong)


@pytest.mark.parametrize(
    ("golds", "said", "noted"),
    [(["no"], "No", True), (["no"], "no", False), (["no", "nope"], "No", False)],
)
def test_ten_equal_answers_are_pointed_to_qa_where_normalising_changes_the_score(
    golds: list[str], said: str, noted: bool
) -> None:
    example = VisualExample("1", "Is it?", Path("a.jpg"), (golds * 10)[:10])
    task = VisualTask("mine", VISUAL_FORMATS["vqav2"], 0.0, (example,), 1)
    note = score_visual(task, [said])["note"]
    assert (note is not None) == noted
    if note is not None:
        assert "here 0.00; normalised 100.00" in note
        assert "format qa" in note


def test_scores_are_told_apart_by_the_groups_beside_the_official_files(tmp_path: Path) -> None:
    folder = tmp_path / "qa"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    rows = [{"id": str(n), "image": "a.png", "question": "what?", "answer": "x"} for n in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [e.example_id for e in read_visual_task(tmp_path, "qa", shuffled=False).examples]
    groups = dict(zip(ids, ("often", "often", "seldom"), strict=True))
    (folder / "groups.json").write_text(json.dumps(groups))
    task = read_visual_task(tmp_path, "qa", shuffled=False)
    found = task.format.details(["x", "y", "x"], task.examples)
    assert (found["group=often"], found["group=seldom"]) == (0.5, 1.0)
    # Where answers are scored together, a group has their scores.
    captions = VISUAL_FORMATS["coco_captions"]
    golds = [["A dog runs on grass"], ["A red ball lies there"], ["Two cats sleep here"]]
    told = [replace(e, gold=g) for e, g in zip(task.examples, golds, strict=True)]
    said = ["a dog runs", "a red ball lies there", "two cats"]
    scores = captions.scores(said, golds)
    found = captions.details(said, told)
    assert found["group=often"] == pytest.approx(sum(scores[:2]) / 2)
    assert 0 < scores[0] < scores[1]
    (folder / "groups.json").write_text(json.dumps({ids[0]: "often"}))
    with pytest.raises(ValueError, match=r"groups\.json names no group for example"):
        read_visual_task(tmp_path, "qa")
    (folder / "groups.json").write_text("[]")
    with pytest.raises(ValueError, match=r"groups\.json is no object"):
        read_visual_task(tmp_path, "qa")
