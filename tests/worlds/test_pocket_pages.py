"""Albums and pages of the pocket world: what is asked follows from the pictures at their places."""

from collections import Counter
from pathlib import Path

import pytest

from midstream.config import PocketWorld
from midstream.config.training import pool_of
from midstream.data.formats.conversations import conversation_units, read_conversations
from midstream.data.formats.read_documents import document_units, read_documents
from midstream.data.formats.records import DocumentRecord, ReadOptions
from midstream.eval.find_task import read_visual_task
from midstream.worlds.pocket_pages import ALBUM_KINDS, ORDINALS, Album, album, page
from midstream.worlds.pocket_scenes import TASKS, Scene, generator
from midstream.worlds.pocket_world import write_pocket_world

TURNS = 48


def albums(kind: str) -> list[Album]:
    return [
        album(generator(3, kind, turn), kind, turn, splits=TASKS)  # type: ignore[arg-type]
        for turn in range(TURNS)
    ]


def true_answers(kind: str, question: str, scenes: tuple[Scene, ...]) -> list[str]:
    """What the pictures' records say, by another way than the generator's."""
    words = question.rstrip("?.").split()
    things = [{thing.pair for thing in scene.things} for scene in scenes]
    shapes = [{shape for _, shape in pairs} for pairs in things]
    if kind == "which":
        return [ORDINALS[n] for n, pairs in enumerate(things) if tuple(words[-2:]) in pairs]
    if kind == "at":
        place, shape = ORDINALS.index(words[-2]), words[4]
        return [color for color, other in things[place] if other == shape]
    if kind == "odd":
        shared = [
            [n for n, mine in enumerate(shapes) if shape not in mine]
            for shape in set.union(*shapes)
        ]
        return [ORDINALS[lack[0]] for lack in shared if len(lack) == 1]
    if words[0] == "both":
        return ["True" if all(words[-1] in mine for mine in shapes) else "False"]
    place = ("left", "right").index(words[1])
    return ["True" if tuple(words[-2:]) in things[place] else "False"]


@pytest.mark.parametrize("kind", ALBUM_KINDS)
def test_an_albums_answer_is_what_its_pictures_say(kind: str):
    for found in albums(kind):
        assert found.answer in found.choices
        told = true_answers(kind, found.question, found.scenes)
        assert set(told) == {found.answer}
        assert all(scene.split in TASKS for scene in found.scenes)


@pytest.mark.parametrize("kind", ALBUM_KINDS)
def test_pictures_in_another_order_have_another_answer_and_no_answer_is_the_likeliest(kind: str):
    found = albums(kind)
    swapped = [true_answers(kind, one.question, one.scenes[::-1]) for one in found]
    changed = sum(one.answer not in told for one, told in zip(found, swapped, strict=True))
    # The middle one of three stays where it is, and what both show both show.
    assert changed >= TURNS // 2
    if kind == "at":
        return
    for number in {len(one.scenes) for one in found}:
        answers = Counter(one.answer for one in found if len(one.scenes) == number)
        assert max(answers.values()) - min(answers.values()) <= 2


def test_pages_have_their_pictures_before_their_texts_and_are_of_three_forms():
    world = PocketWorld(seed=5)
    pages = [page(world, index) for index in range(24)]
    assert pages == [page(world, index) for index in range(24)]
    for parts in pages:
        assert isinstance(parts[0], Scene)
        assert isinstance(parts[-1], str)
        scenes = [part for part in parts if isinstance(part, Scene)]
        assert 2 <= len(scenes) <= 4
        assert {scene.split for scene in scenes} == {"captions"}
    texts = [sum(isinstance(part, str) for part in parts) for parts in pages]
    assert [number == 1 for number in texts] == [index % 3 == 2 for index in range(24)]


def test_the_benchmarks_and_sources_of_several_pictures_are_read(tmp_path: Path):
    made = {"num_documents": 20, "num_captions": 10, "num_conversations": 5, "num_text_items": 8}
    world = PocketWorld(num_pages=6, num_albums=8, num_questions=12, **made)
    write_pocket_world(world, tmp_path)
    pairs, albums = (read_visual_task(tmp_path, name) for name in ("nlvr2", "pocket_albums"))
    assert [len(example.pictures) for example in pairs.examples] == [2] * 12
    assert {str(example.gold) for example in pairs.examples} == {"True", "False"}
    groups = {example.kinds["group"] for example in albums.examples}
    assert groups == {"which", "odd", "at"}
    assert {len(example.pictures) for example in albums.examples} == {2, 3, 4}

    for task in (*TASKS, "nlvr2", "pocket_albums"):
        asked, pool = (read_visual_task(tmp_path, name) for name in (task, pool_of(task)))
        assert len(pool.examples) == len(asked.examples) == 12
        assert (pool.format, pool.chance) == (asked.format, asked.chance)
        shown = [
            {path.read_bytes() for example in one.examples for path in example.pictures}
            for one in (asked, pool)
        ]
        assert not shown[0] & shown[1]

    options = ReadOptions()
    (unit,) = document_units([str(tmp_path / "documents" / "pages" / "pages.jsonl")], options)
    documents = list(read_documents(unit, options))
    for index, found in enumerate(documents):
        assert isinstance(found, DocumentRecord)
        told = [part if isinstance(part, str) else None for part in found.joined]
        # Readers strip the ends of texts.
        wanted = [part.strip() if isinstance(part, str) else None for part in page(world, index)]
        assert [text and text.strip() for text in told] == wanted
    talks = conversation_units([str(tmp_path / "instruct" / "albums")])
    found = [record for unit in talks for record in read_conversations(unit, options)]
    assert [len(record.pictures) for record in found] == [
        len(record.turns[0].pictures) for record in found
    ]
