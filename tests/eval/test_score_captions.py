"""CIDEr against what COCO's own code (pycocoevalcap 1.2) gives for recorded captions."""

import pytest

from midstream.eval.score_captions import caption_words, cider, one_of

GOLDS = [
    ["A black dog and a spotted dog are fighting", "Two dogs are playing on the road ."],
    ["A little girl (in pink) climbs the stairs", "A girl isn't going up.", "The girl's stairs!"],
    ["A man rides a horse on the beach", "A man on a horse, by the sea"],
]
SAID = ["Two dogs are fighting on the road .", "a girl climbs the stairs", "a dog"]

# What the original prints, its own tokenizer included.
EXPECTED = [2.802188141968309, 1.6209641148348741, 0.0]


def test_captions_are_parted_as_the_original_parts_them() -> None:
    assert caption_words('A girl isn\'t "here" ... at\n3 p.m., on the t-shirt.') == (
        ["a", "girl", "is", "n't", "here", "at", "3", "p.m.", "on", "the", "t-shirt"]
    )
    assert caption_words("A horse. A dog by Mr. B. Smith at 3. Two") == (
        ["a", "horse", "a", "dog", "by", "mr.", "b.", "smith", "at", "3", "two"]
    )
    assert caption_words("(two)") == ["-lrb-", "two", "-rrb-"]


def test_scores_are_those_of_the_original_code() -> None:
    assert cider(SAID, GOLDS) == pytest.approx(EXPECTED, abs=1e-12)
    assert cider([own[0] for own in GOLDS], [[own[0]] for own in GOLDS]) == pytest.approx([10] * 3)
    # Of one picture every word is in all references, and weighs nothing.
    assert cider(SAID[:1], GOLDS[:1]) == [0.0]
    assert cider([""], [["a dog"]]) == [0.0]
    assert cider([], []) == []


def test_a_caption_alone_is_right_where_it_is_one_of_the_references() -> None:
    assert one_of("two dogs are playing on the road", GOLDS[0]) == 1
    assert one_of("two dogs", GOLDS[0]) == 0
