"""Examples: separators, masks and turns, as `data/examples.py` says."""

from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from midstream.config import TokenizerFile
from midstream.data.examples import (
    END_OF_TEXT,
    SEPARATOR,
    TextCodec,
    Turn,
    asked_example,
    caption_example,
    conversation_example,
    document_example,
    question_ids,
    text_example,
    without_marks,
)
from midstream.data.formats.conversations import Conversation, conversation_of
from midstream.data.source_writer import RejectedError


def byte_tokenizer() -> Tokenizer:
    """A token for every byte, and two for frequent pairs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "th", "he"]
    found = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [("t", "h"), ("h", "e")])
    )
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


CODEC = TextCodec(byte_tokenizer())
# The same tokenizer with a rule: "th" begins each text.
BEGINS = CODEC.beginning_with("th")
SPECIAL = {CODEC.end_of_text, CODEC.separator}
# Texts that contain what looks like special tokens.
TEXTS = st.lists(
    st.sampled_from([END_OF_TEXT, SEPARATOR, "the ", "\n", "é", "In: ", "<image>", "日"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    min_size=1,
    max_size=6,
).map("".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def record(*turns: tuple[str, Any], **others: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **others}


@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_special_tokens_in_data_stay_plain_text(text: str) -> None:
    ids = CODEC.encode(text)
    assert not SPECIAL & set(ids)
    assert CODEC.decode(ids) == text
    assert CODEC.encode_many([text, "the", text]) == [ids, CODEC.encode("the"), ids]


PIECES = ["<unk>", "<s>", "</s>", *"▁abcs<>/", "▁a", "ab"]


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([(piece, 0.0 if n < 3 else -1.0) for n, piece in enumerate(PIECES)], 0),
        models.WordLevel({piece: n for n, piece in enumerate(PIECES)}, "<unk>"),
        models.BPE(
            {piece: n for n, piece in enumerate(PIECES)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            ignore_merges=True,
        ),
    ],
)
def test_marks_that_a_models_own_vocabulary_holds_stay_plain_text(model: models.Model) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in PIECES[:3]])
    codec = TextCodec(Tokenizer.from_str(tokenizer.to_str()))
    assert codec.end_of_text == PIECES.index("</s>")
    ids = codec.encode("a </s> b<s> c </s>")
    assert not {1, 2} & set(ids)
    assert ids[0] == PIECES.index("a")
    for text in ("a b ▁a ab", "c ab<"):
        assert codec.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert codec.encode_many(["a </s>"]) == [codec.encode("a </s>")]


@given(text=TEXTS)
@settings(max_examples=30, deadline=None)
def test_a_document_is_target_with_its_end_and_a_caption_from_behind_the_separator(
    text: str,
) -> None:
    ids = CODEC.encode(text)
    document, caption = text_example(CODEC, ids), caption_example(CODEC, ids)
    assert document.input_ids.tolist() == [*ids, CODEC.end_of_text]
    assert document.supervised.tolist() == [1] * (len(ids) + 1)
    assert caption.input_ids.tolist() == [CODEC.separator, *ids, CODEC.end_of_text]
    assert caption.supervised.tolist() == [0] + [1] * (len(ids) + 1)


def with_picture(turns: Sequence[tuple[str, str] | Turn]) -> list[tuple[str, str] | Turn]:
    """The turns, of which the first has a picture before it."""
    return [Turn(*turns[0])._replace(pictures=(0,)), *turns[1:]]


@given(turns=TURNS, has_image=st.booleans())
@settings(max_examples=60, deadline=None)
def test_only_replies_and_their_separators_are_targets(
    turns: list[tuple[str, str]], has_image: bool
) -> None:
    example = conversation_example(CODEC, with_picture(turns) if has_image else turns)
    expected: list[tuple[int, int]] = [(CODEC.separator, 0)] if has_image else []
    for question, reply in turns:
        expected += [(t, 0) for t in CODEC.encode(f"In: {question}\nOut:")]
        expected += [(CODEC.separator, 0)]
        expected += [(t, 1) for t in CODEC.encode(f" {reply.strip()}")]
        expected += [(CODEC.separator, 1)]
    found = zip(example.input_ids.tolist(), example.supervised.tolist(), strict=True)
    assert list(found) == expected
    # One separator behind the image, every human turn and every reply.
    assert (example.input_ids == CODEC.separator).sum() == has_image + 2 * len(turns)
    # Evaluation asks with the tokens that stood before the reply in training.
    first_target = int(np.argmax(example.supervised))
    asked = question_ids(CODEC, turns[0][0], has_image=has_image)
    assert example.input_ids[:first_target].tolist() == asked


@given(text=TEXTS, turns=TURNS, has_image=st.booleans())
@settings(max_examples=30, deadline=None)
def test_what_begins_a_text_stands_first_in_every_example_and_is_learnt_in_texts_alone(
    text: str, turns: list[tuple[str, str]], has_image: bool
) -> None:
    begin, ids = CODEC.tokenizer.token_to_id("th"), CODEC.encode(text)
    assert BEGINS.begin_of_text == begin
    seen = with_picture(turns) if has_image else turns
    for plain, begun, learnt in (
        (text_example(CODEC, ids), text_example(BEGINS, ids), 1),
        (caption_example(CODEC, ids), caption_example(BEGINS, ids), 0),
        (conversation_example(CODEC, seen), conversation_example(BEGINS, seen), 0),
    ):
        assert begun.input_ids.tolist() == [begin, *plain.input_ids]
        assert begun.supervised.tolist() == [learnt, *plain.supervised]
    # Of a question about a picture it stands before the picture.
    asked = question_ids(CODEC, text, has_image=has_image)
    head = [] if has_image else [begin]
    assert question_ids(BEGINS, text, has_image=has_image) == head + asked


def test_a_choice_replaces_the_rule_of_a_tokenizer_and_nothing_else() -> None:
    assert CODEC.begin_of_text is None
    assert CODEC.beginning_with(None) is CODEC.beginning_with("") is CODEC
    assert BEGINS.beginning_with(None) is BEGINS.beginning_with("th") is BEGINS
    none, other = BEGINS.beginning_with(""), BEGINS.beginning_with("he")
    assert none.begin_of_text is None
    assert other.begin_of_text == CODEC.tokenizer.token_to_id("he")
    for codec in (BEGINS, none, other):
        assert codec.encode("the é") == CODEC.encode("the é")
        assert (codec.size, codec.stop_ids) == (CODEC.size, CODEC.stop_ids)


def test_a_tokenizers_file_says_what_begins_its_texts(tmp_path: Path) -> None:
    plain, begins = tmp_path / "plain.json", tmp_path / "begins.json"
    CODEC.tokenizer.save(str(plain))
    BEGINS.tokenizer.save(str(begins))
    for path, choice, expected in (
        (plain, "rule", None),
        (plain, "none", None),
        (plain, "he", "he"),
        (begins, "rule", "th"),
        (begins, "none", ""),
        (begins, "he", "he"),
    ):
        assert TokenizerFile.read(path, choice).begin_of_text == expected
    with pytest.raises(ValueError, match=r"plain\.json has no token '<s>'.*'rule'.*'none'"):
        TokenizerFile.read(plain, "<s>")
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        TokenizerFile.read(tmp_path / "gone.json")


def talk_of(
    turns: Sequence[Turn], *pictures: str | bytes, left_out: tuple[str, ...] = ()
) -> Conversation:
    """A conversation whose pictures all stand before it."""
    first = turns[0]._replace(pictures=(0,) * len(pictures))
    return Conversation((first, *turns[1:]), pictures, left_out)


@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), image=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_record_gives_its_turns_without_the_image_mark(
    pairs: list[tuple[str, str]], image: bool
) -> None:
    clean = [(q.replace("<image>", "") + "?", a.replace("<image>", "") + ".") for q, a in pairs]
    turns = [turn for q, a in clean for turn in (("human", q), ("gpt", a))]
    others = {"image": "a.jpg"} if image else {}
    if image:
        turns[0] = ("human", "<image>\n" + turns[0][1])
    expected = tuple(Turn(q.strip(), a.strip()) for q, a in clean)
    assert conversation_of(record(*turns, **others)) == talk_of(expected, *others.values())


ASK, REPLY = ("human", "What?"), ("gpt", "A cat.")


SHOWN = ("human", "<image>\nWhat?")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({}, "no conversation"),
        ({"conversations": []}, "no conversation"),
        ({"conversations": "hello"}, "no conversation"),
        ({"conversations": {"from": "human", "value": "What?"}}, "no conversation"),
        ({"conversations": ["What?", "A cat."]}, "no conversation"),
        ({"conversations": [{"value": "What?"}, {"value": "A cat."}]}, "no conversation"),
        (record(ASK, ("gpt", True)), "no conversation"),
        (record(("human", [{"type": "bar", "text": "What?"}]), REPLY), "no conversation"),
        (record(("human", [{"type": "video", "video": "a"}]), REPLY), "video or sound"),
        (record(("human", {"text": "What?"}), REPLY), "no conversation"),
        ({"conversations": [{"from": "gpt"}], "system": True}, "no conversation"),
        (record(("system", "Be nice.")), "no reply left"),
        (record(ASK), "no reply left"),
        (record(ASK, ASK), "no reply left"),
        (record(ASK, ("gpt", " \n ")), "no reply left"),
        (record(ASK, ("gpt", None)), "no reply left"),
        (record(ASK, ("tool", "42"), REPLY), "no reply left"),
        (record(REPLY, ASK), "no reply left"),
        (record(ASK, REPLY, REPLY), "roles do not alternate"),
        (record(ASK, ("gpt", ""), REPLY), "roles do not alternate"),
        (record(ASK, REPLY, ("critic", "Well.")), "unknown role"),
        (record(("tool", "42"), ASK, REPLY), "roles do not alternate"),
        (record(("system", "Be <image>."), ASK, REPLY), "<image> without a picture"),
        (record(("system", "<image>"), SHOWN, REPLY, image="a"), "marks and pictures disagree"),
        (record(SHOWN, REPLY), "<image> without a picture"),
        (record(SHOWN, REPLY, image=""), "<image> without a picture"),
        (record(SHOWN, REPLY, image=None), "<image> without a picture"),
        (record(SHOWN, REPLY, images=[]), "<image> without a picture"),
        (record(ASK, ("gpt", "an <image> tag")), "<image> without a picture"),
        (record(("human", "<Image> What?"), REPLY, image="a.jpg"), "picture without <image>"),
        (record(("human", "<|image_pad|>What?"), REPLY), "<image> without a picture"),
        (record(ASK, ("gpt", "<image>"), image="a.jpg"), "picture outside a question"),
        (record(("system", "<image>"), ASK, REPLY, image="a"), "picture outside a question"),
        (record(SHOWN, REPLY, SHOWN, REPLY, image="a.jpg"), "marks and pictures disagree"),
        (
            record(("human", "<image> <image>?"), REPLY, image="a.jpg"),
            "marks and pictures disagree",
        ),
        (record(SHOWN, REPLY, images=["a.jpg", "b.jpg"]), "marks and pictures disagree"),
        (record(SHOWN, REPLY, images=["a.jpg", "a.jpg"]), "marks and pictures disagree"),
        (record(SHOWN, REPLY, image="a.jpg", images=["b.jpg"]), "marks and pictures disagree"),
        (record(SHOWN, REPLY, image=7), "<image> without a picture"),
        (record(SHOWN, REPLY, images=[{"path": 7}]), "not a picture name"),
        (record(SHOWN, REPLY, image="data:image/png;base64,@"), "not a picture name"),
        (record(SHOWN, REPLY, images=[""]), "not a picture name"),
        (record(ASK, REPLY, videos=["a.mp4"]), "video or sound"),
        (record(("human", ""), REPLY), "empty turn"),
        (record(ASK, REPLY, ("human", ""), REPLY), "empty turn"),
    ],
)
def test_a_malformed_conversation_is_refused_by_its_record_and_reason(
    bad: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RejectedError) as caught:
        conversation_of(bad)
    assert caught.value.reason == reason
    renamed = {"value": "content", "from": "role", "human": "user", "gpt": "assistant"}
    turns = bad.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        moved = [
            {renamed[key]: renamed.get(x, x) if key == "from" else x for key, x in turn.items()}
            for turn in turns
        ]
        other = {key: value for key, value in bad.items() if key != "conversations"}
        with pytest.raises(RejectedError) as caught:
            conversation_of({"messages": moved, **other})
        assert caught.value.reason == reason


def test_an_absent_picture_makes_a_text_only_record() -> None:
    nothing: list[dict[str, Any]] = [{}, {"image": ""}, {"image": float("nan")}, {"images": []}]
    for others in nothing:
        found = conversation_of(record(ASK, REPLY, **others))
        assert found == talk_of([Turn("What?", "A cat.")])


PARTS: list[tuple[list[Any], str | bytes]] = [
    ([{"type": "image"}, {"type": "text", "text": "What?"}], "a.jpg"),
    ([{"type": "text", "text": "What?"}, {"type": "image", "image": "b.jpg"}], "b.jpg"),
    (["What?", {"type": "image", "image": {"path": "b.jpg", "bytes": None}}], "b.jpg"),
    ([{"type": "image", "path": "b.jpg", "text": None}, {"text": "What?"}], "b.jpg"),
    ([{"type": "image_url", "image_url": {"url": "b.jpg"}}, "What?"], "b.jpg"),
    ([{"type": "image", "image_path": "b.jpg"}, "What?"], "b.jpg"),
    ([{"type": "image_url", "image_url": "data:image/png;base64,UE\n5H"}, "What?"], b"PNG"),
]


LISTS = ("conversations", "messages", "conversation")
KEYS = (("from", "value"), ("role", "content"), ("speaker", "text"), ("role", "text"))


def test_lists_keys_and_parts_go_together_in_every_way() -> None:
    for key, keys, (parts, picture) in product(LISTS, KEYS, PARTS):
        said = [("user", parts), ("Assistant", [{"type": "text", "text": "A"}, "cat."])]
        others = {"images": ["a.jpg"]} if picture == "a.jpg" else {}
        talk: dict[str, Any] = {"conversations": []}
        talk |= {key: [dict(zip(keys, turn, strict=True)) for turn in said], **others}
        assert conversation_of(talk) == talk_of([Turn("What?", "A\ncat.")], picture)


def test_a_picture_alone_is_a_question_and_a_part_in_its_midst_stands_there() -> None:
    alone = record(("human", "<image>"), REPLY, ("human", "Sure?"), REPLY, image="a.jpg")
    turns = [Turn("", "A cat."), Turn("Sure?", "A cat.")]
    assert conversation_of(alone) == talk_of(turns, "a.jpg")
    midst = ["Is ", {"type": "image", "image": "a.jpg"}, " a cat?"]
    assert conversation_of(record(("human", midst), REPLY)).turns[0].question == "Is  a cat?"
    with pytest.raises(RejectedError, match="empty turn"):
        conversation_of(record(("human", "<image>"), REPLY, ("human", ""), REPLY, image="a"))
    twice = record(("human", [{"type": "image", "image": name} for name in "ab"]), REPLY)
    assert conversation_of(twice) == talk_of([Turn("", "A cat.")], "a", "b")


def test_pairs_of_a_user_and_an_assistant_have_their_picture_in_front() -> None:
    pairs = [{"user": "What?", "assistant": "A cat.", "source": "s"}]
    pairs += [{"user": "Sure?", "assistant": "Yes"}]
    turns = (Turn("What?", "A cat."), Turn("Sure?", "Yes"))
    shown = {"texts": pairs, "images": [{"bytes": b"PNG", "path": None}]}
    for talk in (
        shown,
        shown | {"texts": {k: [x[k] for x in pairs] for k in ("user", "assistant")}},
    ):
        assert conversation_of(talk) == talk_of(turns, b"PNG")
    assert conversation_of({"texts": pairs}) == talk_of(turns)


def test_a_system_text_stands_masked_before_the_question_that_it_comes_before() -> None:
    nice, brief = ("system", " Be nice.\n"), ("system", "Be brief.")
    sure, yes = ("human", "Sure?"), ("gpt", "Yes")
    found = conversation_of(record(nice, ASK, REPLY, brief, sure, yes))
    assert found.turns == (Turn("What?", "A cat.", "Be nice."), Turn("Sure?", "Yes", "Be brief."))
    for same in (
        record(ASK, REPLY, system="Be nice."),
        record(nice, ASK, REPLY, system="Be nice."),
        record(ASK, nice, REPLY),
        record(("system", ""), nice, ASK, REPLY),
    ):
        assert conversation_of(same).turns == found.turns[:1]
    both = conversation_of(record(nice, SHOWN, REPLY, system="See.", image="a.jpg"))
    assert both == talk_of([Turn("What?", "A cat.", "See.\nBe nice.")], "a.jpg")
    example = conversation_example(CODEC, with_picture(found.turns))
    expected = [(CODEC.separator, 0)]
    for asked, reply in (
        ("Be nice.\nIn: What?\nOut:", " A cat."),
        ("Be brief.\nIn: Sure?\nOut:", " Yes"),
    ):
        expected += [(t, 0) for t in [*CODEC.encode(asked), CODEC.separator]]
        expected += [(t, 1) for t in [*CODEC.encode(reply), CODEC.separator]]
    assert list(zip(example.input_ids, example.supervised, strict=True)) == expected


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("left", "reason"),
    [
        ([("human", "And?"), ("gpt", "")], "empty reply"),
        ([("human", "And?"), ("gpt", " \n")], "empty reply"),
        ([("human", "And?"), ("gpt", None)], "empty reply"),
        ([("human", ""), ("gpt", "")], "empty reply"),
        ([("human", "And?")], "question without a reply"),
        ([("human", "And?"), ("tool", "42"), ("gpt", "It is 42.")], "tool turn"),
        ([("human", "And?"), ("function_call", "{}"), ("observation", "42"), REPLY], "tool turn"),
    ],
)
def test_a_question_without_a_reply_to_learn_is_left_out_and_counted(
    left: list[tuple[str, Any]], reason: str
) -> None:
    whole = [Turn("What?", "A cat."), Turn("Sure?", "Yes")]
    sure, yes = ("human", "Sure?"), ("gpt", "Yes")
    for turns in ([*left, ASK, REPLY, sure, yes], [ASK, REPLY, *left, sure, yes]):
        found = conversation_of(record(*turns))
        assert found == talk_of(whole, left_out=(reason,))
    found = conversation_of(record(ASK, REPLY, *left))
    assert found == talk_of(whole[:1], left_out=(reason,))
    # What it was told goes on to the next question, or is counted where there is none.
    told = [("system", "Be nice."), *left]
    found = conversation_of(record(*told, ASK, REPLY))
    assert found.turns == (Turn("What?", "A cat.", "Be nice."),)
    found = conversation_of(record(ASK, REPLY, *told))
    assert found.left_out == (reason, "system turn without a question")


def test_a_reply_that_is_a_call_is_left_out_with_all_up_to_the_next_question() -> None:
    messages = [
        {"role": "user", "content": "What is 6 times 7?"},
        CALL,
        {"role": "tool", "content": {"result": 42}, "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Any time."},
    ]
    found = conversation_of({"messages": messages})
    assert found == talk_of([Turn("Thanks.", "Any time.")], left_out=("tool turn",))


def test_a_picture_stays_where_the_question_that_shows_it_is_left_out() -> None:
    talk = record(SHOWN, ("gpt", ""), ("human", "Sure?"), ("gpt", "Yes"), image="a.jpg")
    expected = talk_of([Turn("Sure?", "Yes")], "a.jpg", left_out=("empty reply",))
    assert conversation_of(talk) == expected


def test_pictures_stand_where_their_marks_stood() -> None:
    # LLaVA-NeXT's and M4-Instruct's lists, Mantis's, and parts in any turn: places in the question
    # as it is left.
    ab = ["a.jpg", "b.jpg"]
    front = record(("human", "<image>\n<image>\nWhich is a cat?"), ("gpt", "1"), image=ab)
    expected = (Turn("Which is a cat?", "1", "", (0, 0)),)
    assert conversation_of(front) == Conversation(expected, tuple(ab))
    apart = ("human", " Left: <image>, right:\n<image>\n"), ("gpt", "Yes")
    expected = (Turn("Left: , right:", "Yes", "", (6, 14)),)
    assert conversation_of(record(*apart, images=ab)) == Conversation(expected, tuple(ab))
    named = [{"type": "image_url", "image_url": {"url": "b.jpg"}}, {"type": "text", "text": "It?"}]
    later = record(SHOWN, REPLY, ("human", ["And ", *named]), ("gpt", "No"), image="a.jpg")
    expected = (Turn("What?", "A cat.", "", (0,)), Turn("And It?", "No", "", (4,)))
    assert conversation_of(later) == Conversation(expected, tuple(ab))
    lone = record(ASK, REPLY, ("human", "And this? <image>"), ("gpt", "No"), image="b.jpg")
    expected = (Turn("What?", "A cat."), Turn("And this?", "No", "", (9,)))
    assert conversation_of(lone) == Conversation(expected, ("b.jpg",))
    twice = record(SHOWN, REPLY, ("human", "<image>Sure?"), ("gpt", "No"), image=["a", "a"])
    assert conversation_of(twice).pictures == ("a", "a")
    both = {"images": ab, **later}
    assert conversation_of({**both, "image": None}).pictures == tuple(ab)
    many = ["p"] * 200
    shown = conversation_of(record(("human", "<image>" * 200 + "?"), REPLY, images=many))
    assert shown.turns[0].pictures == (0,) * 200


@given(
    places=st.lists(st.integers(0, 12), min_size=2, max_size=5),
    question=st.text("a \n", max_size=12),
)
@settings(max_examples=60, deadline=None)
def test_marks_in_any_place_leave_the_text_and_stand_before_the_same_letters(
    places: list[int], question: str
) -> None:
    cuts = sorted(min(place, len(question)) for place in places)
    ends = [0, *cuts, len(question)]
    marked = "<image>".join(question[low:high] for low, high in pairwise(ends))
    names = [f"{n}.jpg" for n in range(len(cuts))]
    found = conversation_of(record(("human", marked), REPLY, images=names))
    (turn,) = found.turns
    assert (turn.question, found.pictures) == (question.strip(), tuple(names))
    letters = [question[:cut].count("a") for cut in cuts]
    assert [turn.question[:place].count("a") for place in turn.pictures] == letters


def test_pictures_of_questions_that_are_left_out_go_to_the_next_or_are_counted() -> None:
    none = ("gpt", "")
    talk = record(
        *(("human", "A <image>?"), none, ("human", "B <image>?"), ("gpt", "Yes")),
        *(("human", "C <image>?"), none),
        images=["a", "b", "c"],
    )
    found = conversation_of(talk)
    assert found.turns == (Turn("B ?", "Yes", "", (0, 2)),)
    assert found.pictures == ("a", "b")
    assert found.left_out == ("empty reply", "empty reply", "picture without a question left")


def test_pairs_that_are_rated_too_low_are_left_out() -> None:
    pairs = [{"user": f"{n}?", "assistant": "Yes"} for n in range(3)]
    talk = {"texts": pairs, "images": ["a", "b"], "relevance_ratings": [1, 5, 5]}
    talk |= {"formatting_ratings": [5, None, 2], "visual_dependency_ratings": None}
    left = ("rated too low",)
    assert len(conversation_of(talk).turns) == 3
    expected = talk_of([Turn("1?", "Yes"), Turn("2?", "Yes")], "a", "b", left_out=left)
    assert conversation_of(talk, 2) == expected
    assert conversation_of(talk, 3) == talk_of([Turn("1?", "Yes")], "a", "b", left_out=left * 2)
    with pytest.raises(RejectedError, match="no reply left"):
        conversation_of(talk, 6)


def test_a_tokenizer_file_reads_back_and_its_own_cut_and_padding_are_off(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    codec = TextCodec.from_file(tmp_path / "t.json")
    texts = ["a", "the quick brown fox" * 5]
    assert codec.encode_many(texts) == [CODEC.encode(text) for text in texts]
    assert codec.encode(texts[1]) == CODEC.encode(texts[1])
    assert (codec.end_of_text, codec.separator) == (CODEC.end_of_text, CODEC.separator)


def test_the_size_covers_the_largest_id_also_where_ids_have_gaps() -> None:
    assert CODEC.size == 256 + 2 + 2
    assert max(CODEC.end_of_text, CODEC.separator) == CODEC.size - 1
    codec = TextCodec(Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a")))
    assert codec.size == 70_001


def test_what_is_no_tokenizer_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer file"):
        TextCodec.from_file(path)


def test_pictures_stand_where_the_turns_and_the_parts_say() -> None:
    assert without_marks("<image>\nIs it <image>? ") == ("Is it ?", (0, 6))
    assert without_marks("What?") == ("What?", ())
    assert without_marks("<image>") == ("", (0,))
    first = Turn("What differs?", "The hat.", "Be brief.", (0, 0))
    later = Turn("And here: ?", "Nothing.", "", (10,))
    example = conversation_example(CODEC, [first, later])
    sep = CODEC.separator
    head = [sep, sep, *CODEC.encode("Be brief.\nIn: What differs?\nOut:"), sep]
    reply = [*CODEC.encode(" The hat."), sep]
    asked = [*CODEC.encode("In: And here: "), sep, *CODEC.encode("?\nOut:"), sep]
    assert example.input_ids.tolist() == head + reply + asked + [*CODEC.encode(" Nothing."), sep]
    place = len(head) + len(reply) + len(CODEC.encode("In: And here: "))
    assert example.pictures == (0, 1, place)
    assert not example.supervised[list(example.pictures)].any()

    text = CODEC.encode("A cat.")
    document = document_example(CODEC, [text, None, None, text])
    assert document.input_ids.tolist() == [*text, sep, sep, *text, CODEC.end_of_text]
    assert document.pictures == (len(text), len(text) + 1)
    learnt = [1] * len(text) + [0, 0] + [1] * len(text) + [1]
    assert document.supervised.tolist() == learnt
    begun = document_example(BEGINS, [None, text])
    assert (begun.pictures, begun.supervised[:2].tolist()) == ((1,), [0, 0])


@pytest.mark.parametrize("codec", [CODEC, BEGINS])
@pytest.mark.parametrize("num_earlier", [0, 1, 2])
def test_what_is_asked_is_the_head_of_the_conversation_that_training_lays_out(
    codec: TextCodec, num_earlier: int
) -> None:
    turns = [
        Turn("Is it like ?", "yes", "Be brief.", (0, 3, 11)),
        Turn("And now?", "no", "", ()),
        Turn("Which one?", "the left", "", (0, 10)),
    ][2 - num_earlier :]
    whole = conversation_example(codec, turns)
    head, asked = asked_example(codec, turns[-1]._replace(reply=""), turns[:-1])
    ids = [*head.input_ids, *asked.input_ids]
    assert ids == whole.input_ids[: len(ids)].tolist()
    places = [*head.pictures, *(len(head.input_ids) + place for place in asked.pictures)]
    assert tuple(places) == whole.pictures
    assert whole.supervised[len(ids) :].all()
    assert not asked.supervised.any()
    assert (head.supervised == whole.supervised[: len(head.supervised)]).all()
    assert (len(head.input_ids) == 0) is (num_earlier == 0)
