"""The pocket world without files: what can be answered without the right picture."""

from collections import Counter, defaultdict

import pytest

from midstream.config import PocketWorld
from midstream.worlds.pocket_files import Item, open_items, pope_items, where_items
from midstream.worlds.pocket_language import answer
from midstream.worlds.pocket_scenes import PAIRS, WORDS, Plan, generator, sample_scene
from midstream.worlds.pocket_world import CHANCES, talk


def test_another_items_picture_answers_no_better_than_guessing():
    world = PocketWorld(num_questions=120)
    pope = [item for f in ("random", "adversarial") for item in pope_items(world, f, PAIRS[:12])]
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


def test_conversations_have_even_answers_over_every_kind():
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(600):
        for question, reply in talk(PocketWorld(), index)[1]:
            answers[question.kind][reply] += 1
    possible = {"exists": 2, "word": len(WORDS)}
    for kind, counts in answers.items():
        if not kind.startswith("where"):
            expected = 1 / possible.get(kind, 4)
            # Four standard deviations of an even draw.
            slack = 4 * (expected * (1 - expected) / counts.total()) ** 0.5
            assert max(counts.values()) / counts.total() <= expected + slack, (kind, counts)


def test_a_plan_larger_than_the_scene_is_refused():
    with pytest.raises(ValueError, match="3 planned things do not fit into 2"):
        sample_scene(generator(0, "test"), Plan(PAIRS[:3]), num_things=2)
