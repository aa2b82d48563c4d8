"""The small real world: written from a tiny copy of the owners' layouts, and from the real data."""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, models

from midstream.config import SmallReal
from midstream.core.identity import folder_fingerprint, source_folders
from midstream.core.storage import read_json
from midstream.data.formats.conversations import conversation_of
from midstream.data.formats.read_captions import caption_units, read_captions
from midstream.data.formats.read_text import read_text, text_units
from midstream.data.formats.records import CaptionRecord, ReadOptions, TextRecord
from midstream.eval.tasks import VISUAL_FORMATS
from midstream.eval.text import read_text_task
from midstream.recipes import real_small
from midstream.study.stages import Continue, ContinueFrom, Finetune
from midstream.worlds import small_real_owners as owners
from midstream.worlds.small_real import QUESTIONS_PER_CONVERSATION, write_small_real

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
NUM_PHOTOS = 60
EASY_TRAIN = [
    ["what color is the shape?", "red", 0],
    ["what color is the shape?", "red", 1],
    ["what color is the shape?", "blue", 2],
    ["is there a circle?", "yes", 0],
    ["is there a circle?", "no", 1],
    ["is there a circle?", "no", 2],
    *[[f"is there a thing {index}?", "yes", 0] for index in range(7)],
]
EASY_TEST = [
    ["what color is the shape?", "red", 0],
    ["what color is the shape?", "blue", 1],
    ["is there a circle?", "no", 0],
    ["is there a circle?", "no", 1],
    ["is there a square?", "yes", 1],  # a question training lacks: guessed with "yes"
]


def save_picture(path: Path, number: int, mode: str = "RGB") -> None:
    """A picture of one colour; every number has bytes of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (number % 16 * 16, number // 16 % 16 * 16, number // 256 * 64)
    full = (*color, 0) if mode == "RGBA" else color
    Image.new(mode, (24, 16), full).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_lines(path: Path, records: list[Any]) -> None:
    write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_photos(folder: Path) -> None:
    """Each photograph has two captions of its own, a true pair and wrong ones."""
    captions, pairs = ["image,caption"], []
    for number in range(NUM_PHOTOS):
        name = f"photo_{number}.jpg"
        save_picture(folder / "images" / name, number)
        captions += [f'{name},"A dog, number {number} ."', f"{name},It is animal {number} ."]
        other = (number + 1) % NUM_PHOTOS
        pairs += [
            f"{name}\tA dog number {number} .\tmatch",
            f"{name}\tA dog number {other} .\tno-match",
            f"{name}\tA stranger {number // 2} .\tno-match",
        ]
    write(folder / "captions.txt", "\n".join(captions) + "\n")
    write(folder / "match_pairs.tsv", "\n".join([*pairs, pairs[0]]) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data folder in the owners' layouts, with the recipe's tokenizer; it is only read."""
    root = tmp_path_factory.mktemp("small") / "owners"
    chapter = "CHAPTER {}\r\n\r\n" + "It was late, and the rain fell.\r\nHe left.\r\n" * 60
    novel = "\ufeffA NOVEL\r\n" + "".join(chapter.format(number) for number in range(3))
    write(root / "text_novels" / "Nobody_Novel_1900.txt", novel)
    article = " \n = {} = \n \n Some text , as it is . \n \n = = Part = = \n \n More <unk> . \n"
    write(root / "text_wikitext2" / "valid.txt", article.format("One") + article.format("Two"))
    write_lines(root / "text_web_wiki" / "c4_demo.jsonl", [{"text": f"web {i}"} for i in range(3)])
    write(root / "text_web_wiki" / "wiki_demo.txt", "First article.\nSecond article.")
    write_photos(root / "caption_flickr8k")
    emoji = root / "caption_noto_emoji"
    write(emoji / "captions.csv", "image,caption,group\na.png,grinning face,S\nb.png,keycap 1,S\n")
    for number, name in enumerate(("a.png", "b.png")):
        save_picture(emoji / "72" / name, number, mode="RGBA")
    for split, questions in (("train", EASY_TRAIN), ("test", EASY_TEST)):
        for number in range(3):
            picture = root / "vqa_easy" / split / "images" / f"{number}.png"
            save_picture(picture, 100 + number + 3 * (split == "test"))
        write(root / "vqa_easy" / split / "questions.json", json.dumps(questions))
    rows = ["question,answer,image_id"]
    for number in range(40):
        save_picture(root / "vqa_daquar" / "images" / f"image{number}.jpg", 300 + number)
        rows += [f'what is on the table {number},"cup, pen",image{number}']
    write(root / "vqa_daquar" / "data_train.csv", "\n".join(rows) + "\n")
    text = root / "bench_text"
    arc = [
        {"query": "Question: Why?", "choices": list("abcd"), "gold": 3},
        {"query": "Question: How?", "choices": list("abc"), "gold": 0},
    ]
    write_lines(text / "llm_foundry" / "arc_easy.jsonl", arc)
    copa = {"query": "It rained, therefore", "choices": ["it was wet.", "it was dry."], "gold": 0}
    write_lines(text / "llm_foundry" / "copa.jsonl", [copa])
    write_lines(
        text / "piqa" / "valid.jsonl", [{"goal": "Boil.", "sol1": "Heat.", "sol2": "Cool."}]
    )
    write(text / "piqa" / "valid-labels.lst", "0\n")
    write(root / real_small.TOKENIZER, Tokenizer(models.WordLevel({"a": 0}, "a")).to_str())
    return root


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return Path(shutil.copytree(root, tmp_path / "owners"))


def configured(root: Path, **options: Any) -> SmallReal:
    return SmallReal(root=root, fingerprint=folder_fingerprint(root, SmallReal.FILES), **options)


def written(root: Path, out: Path, **options: Any) -> Path:
    out.mkdir()
    write_small_real(configured(root, **options), out)
    return out


@pytest.fixture(scope="module")
def world(root: Path) -> Path:
    """What is written from the folder; it is only read."""
    return written(root, root.parent / "world")


def conversations(world: Path, name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = read_json(world / "instruct" / name / "llava.json")
    return records


def human_texts(world: Path, name: str) -> str:
    turns = [turn for record in conversations(world, name) for turn in record["conversations"]]
    return "\n".join(turn["value"] for turn in turns if turn["from"] == "human")


def picture_bytes(folder: Path) -> set[bytes]:
    return {path.read_bytes() for path in folder.rglob("*") if path.suffix in (".jpg", ".png")}


def captioned_pictures(folder: Path) -> list[CaptionRecord]:
    options = ReadOptions()
    units = caption_units([str(folder)], options)
    found = [record for unit in units for record in read_captions(unit, options)]
    assert all(isinstance(record, CaptionRecord) for record in found)
    return [record for record in found if isinstance(record, CaptionRecord)]


def documents(folder: Path) -> list[str]:
    options = ReadOptions()
    found = [r for unit in text_units([str(folder)]) for r in read_text(unit, options)]
    return [record.text for record in found if isinstance(record, TextRecord)]


def check_nothing_is_on_both_sides(world: Path) -> None:
    captioned = captioned_pictures(world / "captions" / "flickr8k")
    trained = {record.picture.data for record in captioned}
    for name in ("vqa_easy", "daquar", "flickr_match"):
        trained |= picture_bytes(world / "instruct" / name / "images")
    for name in ("daquar", "flickr_match"):
        asked = picture_bytes(world / "bench" / name)
        assert asked
        assert not asked & trained
    pope = world / "bench" / "flickr_match" / "coco_pope_random.json"
    questions = [json.loads(line)["text"] for line in pope.read_text().splitlines()]
    seen = human_texts(world, "flickr_match")
    assert questions
    assert not [question for question in questions if question in seen]
    captions = {record.caption for record in captioned}
    assert not [text for text in questions if text.split('"')[1] in captions]


def check_pictures_exist(world: Path) -> None:
    for name in ("vqa_easy", "daquar", "flickr_match"):
        for record in conversations(world, name):
            talk = conversation_of(record)
            assert len(talk.pictures) == 1
            assert talk.turns
            assert (world / "instruct" / name / record["image"]).is_file()
    for name, entry in read_json(world / "world.json")["visual_tasks"].items():
        for example in VISUAL_FORMATS[entry["format"]].read(world / "bench" / name):
            assert example.image.is_file()


def test_every_part_of_the_layout_is_read_back_with_its_counts(world: Path) -> None:
    kinds = {name: kind for name, (kind, _) in source_folders(world).items()}
    assert kinds == {
        **dict.fromkeys(("novels", "wikitext2", "web_wiki"), "text"),
        **dict.fromkeys(("flickr8k", "emoji"), "caption"),
        **dict.fromkeys(("vqa_easy", "daquar", "flickr_match"), "instruct"),
    }
    texts = {name: documents(world / "text" / name) for name in kinds if kinds[name] == "text"}
    assert texts["web_wiki"] == ["web 0", "web 1", "web 2", "First article.", "Second article."]
    assert [text.split("\n")[0].strip() for text in texts["wikitext2"]] == ["= One =", "= Two ="]
    assert all("= = Part = =" in text and "More <unk> ." in text for text in texts["wikitext2"])
    held = {f"photo_{n}.jpg" for n in range(NUM_PHOTOS) if owners.is_held_apart(f"photo_{n}.jpg")}
    captions = [record.caption for record in captioned_pictures(world / "captions" / "flickr8k")]
    assert 0 < len(held) < NUM_PHOTOS
    assert len(captions) == len(set(captions)) == 2 * (NUM_PHOTOS - len(held))
    names = [record.caption for record in captioned_pictures(world / "captions" / "emoji")]
    assert names == ["grinning face", "keycap 1"]
    check_pictures_exist(world)


def test_transparent_emoji_become_white_jpegs(world: Path) -> None:
    for record in captioned_pictures(world / "captions" / "emoji"):
        with Image.open(io.BytesIO(record.picture.data)) as picture:
            assert picture.format == "JPEG"
            assert picture.getpixel((5, 5)) == (255, 255, 255)


def test_no_picture_or_caption_of_a_benchmark_is_trained_on(world: Path) -> None:
    check_nothing_is_on_both_sides(world)


def test_every_match_pair_is_used_once_or_counted(root: Path, world: Path) -> None:
    photos = owners.read_photos(root / "caption_flickr8k")
    counts = photos.counts
    assert counts["match_pairs_to_train"] == len(photos.training_pairs)
    assert counts["match_pairs_repeated"] == 1
    parts = ("to_train", "to_evaluate", "repeated", "with_a_caption_of_the_other_side")
    assert sum(counts[f"match_pairs_{part}"] for part in parts) == 3 * NUM_PHOTOS + 1
    notes = read_json(world / "world.json")["notes"]
    assert all(f"{name} {count}" in notes for name, count in counts.items())


def test_a_configuration_writes_the_same_bytes_and_a_seed_changes_the_questions_alone(
    root: Path, world: Path, tmp_path: Path
) -> None:
    assert folder_fingerprint(world) == folder_fingerprint(written(root, tmp_path / "again"))
    worlds = [written(root, tmp_path / f"w{s}", seed=s, num_questions=4) for s in range(3)]
    asked = {(one / "bench/flickr_match/coco_pope_random.json").read_bytes() for one in worlds}
    assert len(asked) > 1
    # What is held apart stays.
    shards = {(one / "captions/flickr8k/shard-000000.tar").read_bytes() for one in worlds}
    assert len(shards) == 1


def test_documents_of_a_novel_keep_its_words_and_end_with_a_sentence(own: Path) -> None:
    path = own / "text_novels" / "Nobody_Novel_1900.txt"
    documents = owners.read_novel(path)
    whole = path.read_bytes().decode("utf-8-sig")
    assert " ".join(documents).split() == whole.split()
    assert [document.split("\n")[0] for document in documents] == [
        "A NOVEL",
        "CHAPTER 1",
        "CHAPTER 2",
    ]
    write(path, "A sentence that goes on\r\nand ends here.\r\n" * 1000)
    documents = owners.read_novel(path)
    assert len(documents) > 3
    assert all(document.endswith("here.") for document in documents)
    longest = max(len(document) for document in documents)
    assert longest < owners.DOCUMENT_CHARACTERS + 100


def test_conversations_hold_every_question_once_in_the_benchmarks_wording(world: Path) -> None:
    prompt = VISUAL_FORMATS["vqav2"].official_prompt
    assert prompt == VISUAL_FORMATS["pope"].official_prompt
    found: Counter[tuple[str, str, str]] = Counter()
    for record in conversations(world, "vqa_easy"):
        turns = conversation_of(record).turns
        assert len(turns) <= QUESTIONS_PER_CONVERSATION
        found.update((text, reply, record["image"]) for text, reply, *_ in turns)
    expected = [(prompt.replace("{question}", q), a, f"images/{n}.png") for q, a, n in EASY_TRAIN]
    assert found == Counter(expected)
    for record in conversations(world, "flickr_match"):
        number = Path(record["image"]).stem.removeprefix("photo_")
        for text, reply, *_ in conversation_of(record).turns:
            own = f'Does the caption "A dog number {number} ." match the image?'
            assert reply == ("Yes" if text == prompt.replace("{question}", own) else "No")


def test_num_questions_limits_every_benchmark_and_match_questions_are_balanced_and_true(
    root: Path, tmp_path: Path
) -> None:
    world = written(root, tmp_path / "world", num_questions=2)
    assert len(read_text_task(world / "text_tasks" / "arc_easy.jsonl")) == 2
    for name, form in (("vqa_easy", "vqav2"), ("daquar", "vqav2"), ("flickr_match", "pope")):
        assert len(VISUAL_FORMATS[form].read(world / "bench" / name)) == 2
    world = written(root, tmp_path / "more", num_questions=6)
    examples = VISUAL_FORMATS["pope"].read(world / "bench" / "flickr_match")
    assert Counter(example.gold for example in examples) == {"yes": 3, "no": 3}
    for example in examples:
        number = example.image.stem.removeprefix("photo_")
        assert (example.gold == "yes") == (f'"A dog number {number} ."' in example.question)


def test_chance_is_the_score_of_answering_without_the_picture(world: Path) -> None:
    tasks = read_json(world / "world.json")
    # red for the colour (1 of 2), no for the circle (2 of 2), overall yes for the square (1 of 1)
    assert tasks["visual_tasks"]["vqa_easy"] == {"format": "vqav2", "chance": 4 / 5}
    assert tasks["visual_tasks"]["daquar"]["chance"] == 1.0
    assert tasks["text_tasks"]["arc_easy"]["chance"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert tasks["text_tasks"]["copa"]["chance"] == tasks["text_tasks"]["piqa"]["chance"] == 0.5


def test_visual_answers_are_the_owners(world: Path) -> None:
    examples = VISUAL_FORMATS["vqav2"].read(world / "bench" / "vqa_easy")
    form = VISUAL_FORMATS["vqav2"]
    answers = {(text, number): answer for text, answer, number in EASY_TEST}
    asked = {(e.question, int(e.image.stem.rpartition("_")[2])): e.gold for e in examples}
    assert asked.keys() == answers.keys()
    assert all(form.score(answers[key], gold) == 1.0 for key, gold in asked.items())
    rooms = form.read(world / "bench" / "daquar")
    assert all(form.score("cup, pen", room.gold) == 1.0 for room in rooms)
    assert all(form.score("cup", room.gold) == 0.0 for room in rooms)


def test_text_choices_continue_their_queries(world: Path) -> None:
    folder = world / "text_tasks"
    told = {
        name: [
            item["query"] + item["choices"][item["gold"]]
            for item in read_text_task(folder / f"{name}.jsonl")
        ]
        for name in ("piqa", "copa", "arc_easy")
    }
    assert told == {
        "piqa": ["Question: Boil.\nAnswer: Heat."],
        "copa": ["It rained, therefore it was wet."],
        "arc_easy": ["Question: Why?\nAnswer: d", "Question: How?\nAnswer: a"],
    }


def test_a_missing_part_or_picture_is_named_and_other_bytes_than_planned_are_refused(
    own: Path, tmp_path: Path
) -> None:
    config, away = configured(own), tmp_path / "away"
    for pattern in SmallReal.FILES:
        moved = [(path, away / path.relative_to(own)) for path in own.glob(pattern)]
        for path, place in moved:
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        with pytest.raises(FileNotFoundError, match=pattern.partition("/")[0]) as caught:
            write_small_real(config, tmp_path / "out")
        assert "docs/real-data.md" in str(caught.value)
        for path, place in moved:
            place.rename(path)
    picture = own / "vqa_daquar" / "images" / "image7.jpg"
    picture.rename(away / "image7.jpg")
    with pytest.raises(FileNotFoundError, match=r"data_train\.csv, line 9: picture .*image7\.jpg"):
        write_small_real(configured(own), tmp_path / "out")
    (away / "image7.jpg").rename(picture)
    with (own / "text_novels" / "Nobody_Novel_1900.txt").open("a") as stream:
        stream.write("One word more.")
    with pytest.raises(ValueError, match="plan again"):
        write_small_real(config, tmp_path / "out")


MALFORMED = [
    ("bench_text/piqa/valid-labels.lst", "0\n1\n", "holds 2 labels"),
    ("bench_text/llm_foundry/copa.jsonl", '{"query": "a"}\n', "line 1: needs the keys"),
    (
        "bench_text/llm_foundry/arc_easy.jsonl",
        '{"query": "a", "choices": ["b", "c"], "gold": 2}\n',
        "line 1: gold 2",
    ),
    ("caption_flickr8k/match_pairs.tsv", "photo_1.jpg\tA dog\tmaybe\n", "line 1: expected"),
    ("caption_flickr8k/captions.txt", "image,caption\nphoto_1.jpg,\n", "line 2: needs"),
    ("vqa_easy/test/questions.json", '[["is it?", "yes"]]', "record 0: expected"),
    ("text_wikitext2/valid.txt", "no title\n", "line 1: text before"),
]


def test_a_malformed_record_is_named(own: Path, tmp_path: Path) -> None:
    for number, (file, text, message) in enumerate(MALFORMED):
        whole = (own / file).read_bytes()
        (own / file).write_text(text)
        with pytest.raises(ValueError, match=message):
            write_small_real(configured(own), tmp_path / str(number))
        (own / file).write_bytes(whole)


def test_the_recipe_names_what_the_world_holds(root: Path, world: Path, tmp_path: Path) -> None:
    study = real_small.when_images_arrive(data=str(root), completions=(0.0, 0.4, 1.0), seeds=(1, 2))
    described = read_json(world / "world.json")
    folders = {
        path.name for kind in ("text", "captions", "instruct") for path in (world / kind).iterdir()
    }
    text_runs, sources = set(), set()
    for line in study.lines:
        finetuned = line.result.of
        assert isinstance(finetuned, Finetune)
        continued = finetuned.start
        assert isinstance(continued, Continue)
        if isinstance(continued.start, ContinueFrom):
            text_runs.add(continued.start.stage.identity)
            assert continued.start.completion in continued.start.stage.milestones
        for training in (finetuned.training, continued.training):
            sources |= {share.source for share in training.budget.shares}
        assert set(line.result.evaluation.visual_tasks) == set(described["visual_tasks"])
        assert set(line.result.evaluation.text_tasks) == set(described["text_tasks"])
    assert len(study.lines) == 6
    assert len(text_runs) == 1
    assert sources == folders
    # The plan's fingerprint is the one that the preparation will find.
    write_small_real(study.lines[0].result.of.data.world, tmp_path)


def test_the_recipe_refuses_a_folder_without_the_tokenizer(own: Path) -> None:
    (own / real_small.TOKENIZER).unlink()
    with pytest.raises(FileNotFoundError, match="20B_tokenizer"):
        real_small.when_images_arrive(data=str(own))


@pytest.mark.faults
def test_the_real_data_is_written_without_overlap_and_twice_alike(tmp_path: Path) -> None:
    if not (SHARED / "caption_flickr8k").is_dir():
        pytest.skip(f"the real data are not at {SHARED}; docs/real-data.md lists them")
    world, again = (written(SHARED, tmp_path / name) for name in ("first", "second"))
    assert folder_fingerprint(world) == folder_fingerprint(again)
    check_nothing_is_on_both_sides(world)
    check_pictures_exist(world)
    with (SHARED / "caption_flickr8k" / "captions.txt").open(newline="") as stream:
        num_captions = len(list(csv.DictReader(stream)))
    counts = owners.read_photos(SHARED / "caption_flickr8k").counts
    assert 0.1 < counts["flickr8k_captions_held_apart"] / num_captions < 0.2
    for task, entry in read_json(world / "world.json")["visual_tasks"].items():
        assert len(VISUAL_FORMATS[entry["format"]].read(world / "bench" / task)) == 400
