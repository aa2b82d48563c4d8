"""The pocket world: its files, its splits, its balance, and its answers solved a second way."""

import hashlib
import io
import json
import pickle
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from PIL import Image

from midstream.config import PocketWorld
from midstream.worlds.pocket_benchmarks import Item, open_items, pope_items, where_items
from midstream.worlds.pocket_language import FACTS, NAMES, answer, fact_table
from midstream.worlds.pocket_scenes import (
    COLORS,
    CONCEPTS,
    FREQUENCIES,
    PAIRS,
    POSITIONS,
    SELDOM_SHARE,
    SHAPES,
    SPLITS,
    TAIL,
    TASKS,
    WORDS,
    Plan,
    frequency,
    generator,
    sample_scene,
)
from midstream.worlds.pocket_world import (
    CHANCES,
    TEXT_TASKS,
    caption_scene,
    talk,
    write_pocket_world,
)

SMALL = PocketWorld(
    seed=5,
    num_documents=400,
    num_captions=50,
    num_conversations=60,
    num_questions=60,
    num_text_items=40,
)
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pocket") / "world"
    write_pocket_world(SMALL, folder)
    return folder


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def load_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def documents(root: Path) -> list[str]:
    texts = []
    for path in sorted((root / "text/web").iterdir()):
        data = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
        texts += [json.loads(line)["text"] for line in data.decode().splitlines()]
    return texts


def captions(root: Path, source: str = "pictures") -> list[dict[str, bytes]]:
    files: dict[str, dict[str, bytes]] = defaultdict(dict)
    for path in sorted((root / "captions" / source).iterdir()):
        with tarfile.open(path) as shard:
            for member in shard.getmembers():
                key, extension = member.name.split(".")
                stream = shard.extractfile(member)
                assert stream is not None
                files[key][extension] = stream.read()
    return list(files.values())


def visual(root: Path, task: str) -> list[tuple[str, str, str]]:
    """(picture below the task's folder, question or expression, answer) from the official files."""
    folder = root / "bench" / task
    if task == "vqav2":
        questions = load(folder / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
        notes = load(folder / "v2_mscoco_val2014_annotations.json")["annotations"]
        assert [q["question_id"] for q in questions] == [a["question_id"] for a in notes]
        for note in notes:
            assert [r["answer"] for r in note["answers"]] == [note["multiple_choice_answer"]] * 10
        images = [f"val2014/COCO_val2014_{q['image_id']:012d}.jpg" for q in questions]
        golds = [note["multiple_choice_answer"] for note in notes]
        return list(zip(images, [q["question"] for q in questions], golds, strict=True))
    if task == "gqa":
        items = load(folder / "testdev_balanced_questions.json").values()
        return [(f"images/{q['imageId']}.jpg", q["question"], q["answer"]) for q in items]
    if task == "textvqa":
        data = load(folder / "TextVQA_0.5.1_val.json")["data"]
        return [(f"train_images/{q['image_id']}.jpg", q["question"], q["answers"][9]) for q in data]
    if task == "pope":
        files = [folder / f"coco_pope_{f}.json" for f in ("random", "popular", "adversarial")]
        lines = [load_lines(file) for file in files]
        assert len({len(items) for items in lines}) == 1
        return [(f"val2014/{q['image']}", q["text"], q["label"]) for items in lines for q in items]
    if task == "refcoco":
        instances = load(folder / "instances.json")
        names = {image["id"]: image["file_name"] for image in instances["images"]}
        boxes = {note["id"]: note["bbox"] for note in instances["annotations"]}
        found = []
        for ref in pickle.loads((folder / "refs(unc).p").read_bytes()):
            assert ref["split"] == "val"
            x, y, w, h = boxes[ref["ann_id"]]
            box = json.dumps([int(v) for v in (x, y, x + w, y + h)])
            found.append((f"train2014/{names[ref['image_id']]}", ref["sentences"][0]["sent"], box))
        return found
    items = load(folder / "val_expressions.json").values()
    return [(f"OCID-dataset/{q['scene_path']}", q["sentence"], q["bbox"]) for q in items]


def cell_of(thing: dict[str, Any]) -> tuple[int, int]:
    return divmod(POSITIONS.index(thing["position"]), 3)


def solve(scene: dict[str, Any], text: str) -> str:
    """The answer to a question, from its words and a scene's record alone."""
    things = scene["objects"]
    if text == "what word is written?":
        return str(scene["word"]["text"])
    if found := re.fullmatch(r"how many (.+) are there\?", text):
        assert found[1] == "things"
        return str(len(things))
    if found := re.fullmatch(r"Is there a (\w+) in the image\?", text):
        return "yes" if any(found[1] == thing["shape"] for thing in things) else "no"
    asked, _, rest = text.partition(" is ") if "?" in text else ("box", "", text)
    rest = rest.removesuffix("?").removeprefix("at ")
    relation = re.search(r" (left of|right of|above|below) ", rest)
    target = rest[: relation.start()] if relation else rest

    def fits(thing: dict[str, Any], phrase: str) -> bool:
        words = set(phrase.split()) - {"the", "object"}
        own = {thing["color"], thing["shape"], thing["size"]}
        return words <= own or phrase == f"the {thing['position']}"

    meant = [thing for thing in things if fits(thing, target)]
    if relation:
        anchors = [thing for thing in things if fits(thing, rest[relation.end() :])]
        assert len(anchors) == 1
        (row, column), (down, right) = cell_of(anchors[0]), STEPS[relation[1]]
        meant = [thing for thing in meant if cell_of(thing) == (row + down, column + right)]
    assert len(meant) == 1, (text, scene)
    return json.dumps(meant[0]["box"]) if asked == "box" else str(meant[0][asked.split()[1]])


def num_answers(question: str) -> int:
    """How many answers a question has, boxes aside."""
    if question.startswith("Is"):
        return 2
    words = question.split()
    return {"many": 4, "color": len(COLORS), "shape": len(SHAPES), "word": len(WORDS)}[words[1]]


def described_key(text: str) -> str:
    """The canonical key of the scene that a description tells of."""
    pattern = "(?:{n} at the {p}|{p}: {n})"
    place = "|".join(POSITIONS)
    thing = rf"((?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)}))"
    found = []
    for name in (thing, r"the (word \w+)"):
        for match in re.finditer(pattern.format(n=name, p=f"({place})"), text):
            parts = [part for part in match.groups() if part]
            position, what = sorted(parts, key=lambda part: part not in POSITIONS)
            found.append((POSITIONS.index(position), what))
    return ", ".join(f"{POSITIONS[cell]}: {what}" for cell, what in sorted(found))


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_same_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path: Path):
    sizes = {"num_documents": 50, "num_captions": 9, "num_conversations": 9}
    world = PocketWorld(seed=5, num_questions=12, num_text_items=8, **sizes)
    changed = world.model_copy(update={"seed": 6})
    for name, value in (("first", world), ("again", world), ("other", changed)):
        write_pocket_world(value, tmp_path / name)
    first, other = digests(tmp_path / "first"), digests(tmp_path / "other")
    assert digests(tmp_path / "again") == first
    assert other.keys() == first.keys()
    assert [name for name in first if first[name] == other[name]] == []


def test_a_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="not empty"):
        write_pocket_world(SMALL, tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]


def test_world_json_names_every_task_that_has_files(root: Path):
    world = load(root / "world.json")
    assert set(world["visual_tasks"]) == {item.name for item in (root / "bench").iterdir()}
    assert set(world["text_tasks"]) == {f.stem for f in (root / "text_tasks").iterdir()}
    assert {name: task["chance"] for name, task in world["visual_tasks"].items()} == CHANCES


def test_sizes_are_those_of_the_configuration(root: Path):
    assert len(documents(root)) == SMALL.num_documents
    assert len(captions(root)) == SMALL.num_captions
    assert len(load(root / "instruct/talks/llava.json")) == SMALL.num_conversations
    assert {task: len(visual(root, task)) for task in TASKS} == dict.fromkeys(TASKS, 60)
    for task in TEXT_TASKS:
        assert len(load_lines(root / "text_tasks" / f"{task}.jsonl")) == SMALL.num_text_items


@pytest.mark.parametrize("task", TASKS)
def test_official_answers_are_those_of_the_pictures(root: Path, task: str):
    scenes = {s["image"]: s for s in load_lines(root / "bench" / task / "scenes.jsonl")}
    for image, question, gold in visual(root, task):
        assert Image.open(root / "bench" / task / image).size == (72, 72)
        assert solve(scenes[image], question) == gold


def test_conversations_are_answered_by_their_pictures(root: Path):
    folder = root / "instruct/talks"
    scenes = {scene["image"]: scene for scene in load_lines(folder / "scenes.jsonl")}
    for record in load(folder / "llava.json"):
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert 2 <= len(turns) // 2 <= 3
        assert turns[0]["value"].startswith("<image>\n")
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            question = human["value"].removeprefix("<image>\n")
            if where := re.fullmatch(r"Where is (.*)\?", question):
                box = json.loads(solve(scenes[record["image"]], where[1]))
                expected = "[" + ", ".join(f"{edge / 72:.2f}" for edge in box) + "]"
            else:
                expected = solve(scenes[record["image"]], question)
            assert gpt["value"] == expected


def test_boxes_surround_exactly_the_pixels_of_the_things(root: Path):
    for files in captions(root):
        pixels = np.asarray(Image.open(io.BytesIO(files["jpg"]))).astype(int)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        differs = np.abs(pixels - background).max(axis=2) > 60
        scene = json.loads(files["json"])
        for thing in scene["objects"]:
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= 72
            assert 0 <= top < bottom <= 72
            row, column = divmod(POSITIONS.index(thing["position"]), 3)
            cell = differs[24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
            rows, columns = np.nonzero(cell)
            # A star's tips cover less than a pixel, hence one pixel of tolerance on a side.
            seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            seen += 24 * np.array([column, row, column, row])
            assert np.abs(seen - thing["box"]).max() <= 1
            side = int(right - left)
            middle = pixels[top : top + side, left : left + side][differs[top:bottom, left:right]]
            assert np.abs(np.median(middle, axis=0) - COLORS[thing["color"]]).max() < 40


def test_captions_name_everything_in_the_picture(root: Path):
    for files in captions(root):
        scene = json.loads(files["json"])
        named = [(t["position"], f"{t['color']} {t['shape']}") for t in scene["objects"]]
        if scene["word"]:
            named.append((scene["word"]["position"], f"the word {scene['word']['text']}"))
        named.sort(key=lambda pair: POSITIONS.index(pair[0]))
        assert files["txt"].decode() == ", ".join(name for _, name in named) + "."


def test_no_scene_is_in_two_splits_and_no_text_tells_of_an_evaluated_one(root: Path):
    keys: dict[str, set[str]] = {"captions": {json.loads(f["json"])["key"] for f in captions(root)}}
    talks = load_lines(root / "instruct/talks/scenes.jsonl")
    keys["instruct"] = {scene["key"] for scene in talks}
    for task in TASKS:
        scenes = load_lines(root / "bench" / task / "scenes.jsonl")
        keys[task] = {scene["key"] for scene in scenes}
    everything = Counter(key for split in keys.values() for key in split)
    assert max(everything.values()) == 1

    def split(key: str) -> str:
        number = hashlib.blake2b(key.encode(), digest_size=4).digest()
        return SPLITS[int.from_bytes(number, "little") % len(SPLITS)]

    told = {described_key(text.split("\n")[0]) for text in documents(root)} - {""}
    assert len(told) > 200
    assert {split(key) for key in told} == {"captions", "instruct"}
    items = load_lines(root / "text_tasks" / "pocket_reading.jsonl")
    assert {split(described_key(item["query"].split("\n")[0])) for item in items} <= set(TASKS)


@pytest.mark.parametrize("task", TASKS[:4])
def test_answers_are_even_over_every_question(root: Path, task: str):
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question, gold in visual(root, task):
        answers[question][gold] += 1
    # POPE's three files are balanced one by one.
    slack = 3 if task == "pope" else 1
    for question, counts in answers.items():
        possible = num_answers(question)
        assert max(counts.values()) <= counts.total() / possible + slack
    total = sum(answers.values(), Counter())
    assert max(total.values()) / total.total() <= {"pope": 0.5}.get(task, 0.15)
    yes_no = [counts for question, counts in answers.items() if question.startswith("Is")]
    assert sum(c["yes"] for c in yes_no) == sum(c["no"] for c in yes_no)


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_text_items_have_four_choices_with_even_golds(root: Path, task: str):
    items = load_lines(root / "text_tasks" / f"{task}.jsonl")
    assert Counter(item["gold"] for item in items) == dict.fromkeys(range(4), 10)
    training = "\n".join(documents(root))
    for item in items:
        assert len(set(item["choices"])) == 4
        assert item["query"] == item["query"].rstrip()
        assert all(choice == " " + choice.strip() for choice in item["choices"])
        description = item["query"].split("\n")[0]
        if task != "pocket_facts":
            assert item["choices"][item["gold"]].strip() in description, item
            assert item["query"] not in training
    layouts = {bool(re.search(r"^In: .*\nOut:$", item["query"], re.M)) for item in items}
    assert layouts == {True, False}


def test_facts_asked_are_told_by_the_documents_and_every_value_is_as_frequent(root: Path):
    table = fact_table(SMALL.seed)
    for fact, (values, _, _) in FACTS.items():
        counts = Counter(table[name, fact] for name in NAMES)
        assert counts == dict.fromkeys(values, len(NAMES) // len(values))
    texts, num_told = "\n".join(documents(root)), 0
    for item in load_lines(root / "text_tasks/pocket_facts.jsonl"):
        question = re.search(r"(what .*\?)", item["query"])
        assert question is not None
        told = set(re.findall(re.escape(question[1]) + r"(?: answer:|\nOut:) (\w+)", texts))
        assert told <= {item["choices"][item["gold"]].strip()}
        num_told += len(told)
    assert num_told > SMALL.num_text_items // 2


def test_vocabulary_is_small_and_lower_case(root: Path):
    texts = documents(root) + [files["txt"].decode() for files in captions(root)]
    for record in load(root / "instruct/talks/llava.json"):
        texts += [turn["value"] for turn in record["conversations"]]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    assert len(words) < 220
    assert {word for word in words if word != word.lower()} == {"In", "Out", "Is", "Where"}


def test_the_words_of_a_world_are_those_of_every_version_before(root: Path):
    words = hashlib.sha256()
    for text in documents(root):
        words.update(text.encode())
    for files in captions(root):
        words.update(files["txt"] + files["json"])
    # Without the pictures' bytes, which follow from the JPEG library too.
    for name in ("instruct/talks/llava.json", "text_tasks/pocket_facts.jsonl", "world.json"):
        words.update((root / name).read_bytes())
    assert words.hexdigest()[:16] == "6818482b607d95aa"


@pytest.fixture(scope="module")
def with_alt_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same world with four hundred alt texts, more than there are captions."""
    folder = tmp_path_factory.mktemp("alt") / "world"
    write_pocket_world(SMALL.model_copy(update={"num_alt_texts": 400}), folder)
    return folder


@pytest.fixture(scope="module")
def alt_texts(with_alt_texts: Path) -> list[dict[str, bytes]]:
    return captions(with_alt_texts, "alt_texts")


def test_alt_texts_are_of_the_same_pictures_and_change_nothing_else_in_the_world(
    root: Path, with_alt_texts: Path, alt_texts: list[dict[str, bytes]]
):
    without, found = digests(root), digests(with_alt_texts)
    added = found.keys() - without.keys()
    assert {str(Path(name).parent) for name in added} == {"captions/alt_texts"}
    assert {name: found[name] for name in without} == without
    described = captions(root)
    for files, alt in zip(described, alt_texts, strict=False):
        assert (alt["jpg"], alt["json"]) == (files["jpg"], files["json"])
        assert alt["txt"] != files["txt"]
    assert len(alt_texts) == 400
    keys = {json.loads(files["json"])["key"] for files in alt_texts}
    assert len(keys) > 350


def test_alt_texts_are_the_first_of_more(alt_texts: list[dict[str, bytes]], tmp_path: Path):
    few = SMALL.model_copy(
        update=dict.fromkeys(("num_documents", "num_captions", "num_conversations"), 9)
        | {"num_questions": 12, "num_text_items": 8, "num_alt_texts": 7}
    )
    write_pocket_world(few, tmp_path / "world")
    assert captions(tmp_path / "world", "alt_texts") == alt_texts[:7]


def test_alt_texts_are_short_and_say_neither_where_nor_all_nor_only_what_is_there(
    alt_texts: list[dict[str, bytes]],
):
    true = wrong = silent = 0
    for files in alt_texts:
        text = files["txt"].decode()
        things = json.loads(files["json"])["objects"]
        assert len(text) <= 80
        assert not any(place in text for place in POSITIONS)
        words = set(re.findall("[a-z]+", text))
        named = words & {*COLORS, *SHAPES}
        present = {thing[what] for thing in things for what in ("color", "shape")}
        true += bool(named) and named <= present
        wrong += not named <= present
        silent += not named
        pairs = {(t["color"], t["shape"]) for t in things}
        told = set(re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", text))
        if len(pairs) > 2:
            assert not pairs <= told
    # Three quarters name what is there, a tenth name nothing; the rest name what is not.
    assert 0.6 < true / 400 < 0.85
    assert 0.05 < silent / 400 < 0.2
    assert 0.08 < wrong / 400 < 0.3


def test_another_items_picture_answers_no_better_than_guessing():
    world = PocketWorld(num_questions=120)
    pope = [item for f in ("random", "adversarial") for item in pope_items(world, f, SHAPES[:6])]
    sets: dict[str, list[Item]] = {"pope": pope}
    sets |= {task: open_items(world, task) for task in ("vqav2", "gqa", "textvqa")}
    sets |= {task: where_items(world, task) for task in ("refcoco", "ocid_ref")}
    for task, items in sets.items():
        right = [
            answer(items[(index + shift) % len(items)].scene, item.question) == item.answer
            for shift in (1, 2, 3, 5, 7, 11)
            for index, item in enumerate(items)
        ]
        # One word in eight is right by accident, though its chance counts as 0.
        chance = max(CHANCES[task], 1 / len(WORDS))
        assert sum(right) / len(right) <= chance + 0.03, task


def test_conversations_show_common_concepts_some_seldom_and_never_the_last():
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    shown: Counter[str] = Counter()
    for index in range(600):
        scene, turns = talk(PocketWorld(), index)
        shown.update(frequency(name) for thing in scene.things for name in thing.pair)
        for question, reply in turns:
            answers[question.kind][reply] += 1
            assert "captions only" not in {frequency(w) for w in question.about if w in CONCEPTS}
    assert shown["captions only"] == 0
    assert shown["seldom"] / shown.total() == pytest.approx(SELDOM_SHARE, abs=0.04)
    assert answers["exists"]["yes"] / answers["exists"].total() == pytest.approx(0.5, abs=0.08)
    for kind, names in {"color": tuple(COLORS), "shape": SHAPES, "word": WORDS}.items():
        common = [answers[kind][name] for name in names if frequency(name) == "common"]
        # Common ones are as frequent as each other, within four standard deviations.
        assert np.ptp(common) <= 8 * np.mean(common) ** 0.5, (kind, answers[kind])


def test_captions_show_every_concept_with_a_long_tail():
    shown: Counter[str] = Counter()
    for index in range(2_000):
        scene = caption_scene(PocketWorld(), index)
        shown.update(name for thing in scene.things for name in thing.pair)
        shown.update([scene.word] if scene.word else [])
    for names in (tuple(COLORS), SHAPES, WORDS):
        first, last = shown[names[0]], shown[names[-1]]
        assert last > 0
        assert last / first == pytest.approx(len(names) ** TAIL, rel=0.3)


@pytest.mark.parametrize("task", TASKS)
def test_every_question_is_in_the_group_of_its_rarest_concept(root: Path, task: str):
    groups = load(root / "bench" / task / "groups.json")
    assert len(groups) == SMALL.num_questions
    if task == "textvqa":
        for item in load(root / "bench/textvqa/TextVQA_0.5.1_val.json")["data"]:
            assert groups[str(item["question_id"])] == frequency(item["answers"][0])
    assert set(groups.values()) == set(FREQUENCIES)


def test_a_plan_larger_than_the_scene_is_refused():
    with pytest.raises(ValueError, match="3 planned things do not fit into 2"):
        sample_scene(generator(0, "test"), Plan(PAIRS[:3]), num_things=2)
