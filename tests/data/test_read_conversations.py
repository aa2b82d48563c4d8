"""Conversations: LLaVA's and ShareGPT's layouts, cut into units, with the pictures' own bytes."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_inputs import OPTIONS, Put, as_json, as_lines, read_all, shared

from midstream.data.formats import conversations as module
from midstream.data.formats.conversations import conversation_units, read_conversations
from midstream.data.formats.records import ConversationRecord, Picture, ReadOptions
from midstream.data.source_writer import Reject

CAT, DOG = b"\xff\xd8 a cat", b"\x89PNG a dog"


def llava(*texts: str, **others: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    turns = [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]
    return {**others, "conversations": turns}


def messages(*texts: str, **others: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"content": text, "role": roles[n % 2]} for n, text in enumerate(texts)]
    return {"messages": turns, **others}


def read(source: str, options: ReadOptions = OPTIONS) -> list[Any]:
    return read_all("conversations", source, options=options)


def shown(item: Any) -> Any:
    """What a record holds without its place, or its reason."""
    if isinstance(item, Reject):
        return item.reason
    turns = tuple(tuple(text for text in turn[:3] if text) for turn in item.turns)
    return turns, None if item.picture is None else item.picture.data


# As in the mix of 665k: many turns, questions before and behind the mark, rows without a picture.
MIX = [
    llava(
        "<image>\nWhat is on the sofa?",
        "A cat.",
        "Is it asleep?",
        "Yes",
        id="000000033471",
        image="coco/train2017/000000033471.jpg",
    ),
    llava("Read it.\n<image>", "Stop", id="b", image="ocr_vqa/images/1.png"),
    llava("Name a prime.", "Seven.", id="wgByO4Y_0", model=""),
    llava("Name a colour.", "Red.", id="c", image=None),
    llava("Name a town.", "Paris.", id="d", image=""),
    llava("Why?", "Because.", "And?", id="e"),
    {"id": "f", "conversations": [{"from": "gpt", "value": "Hello."}]},
    llava("<image>\nWhat?", "A dog.", id="g", image="vg/VG_100K/missing.jpg"),
]
MIX_SHOWN: list[Any] = [
    ((("What is on the sofa?", "A cat."), ("Is it asleep?", "Yes")), CAT),
    ((("Read it.", "Stop"),), DOG),
    ((("Name a prime.", "Seven."),), None),
    ((("Name a colour.", "Red."),), None),
    ((("Name a town.", "Paris."),), None),
    ((("Why?", "Because."),), None),
    "no reply left",
    "missing picture",
]


def test_the_layout_of_the_665k_mix_is_read(put: Put) -> None:
    picture = put("coco/train2017/000000033471.jpg", CAT)
    put("ocr_vqa/images/1.png", DOG)
    for name, data, place in (
        ("llava_v1_5_mix665k.json", as_json(MIX), "record 0"),
        ("mix.jsonl", as_lines(MIX), "line 1"),
        ("mix.jsonl.gz", gzip.compress(as_lines(MIX)), "line 1"),
    ):
        path = put(name, data)
        found = read(path)
        assert [shown(item) for item in found] == MIX_SHOWN
        assert found[0].picture == Picture(picture, 0, CAT)
        assert found[0].where == f"{path}, {place} ('000000033471')"
        assert found[-1].detail.endswith("/vg/VG_100K/missing.jpg")


def test_the_layouts_of_sharegpt_with_a_list_of_images_are_read(put: Put) -> None:
    put("demo/1.jpg", CAT)
    one, two = {"images": ["demo/1.jpg"]}, {"images": ["demo/1.jpg", "demo/1.jpg"]}
    talk = ("<image>Who is he?", "Ben.", "Why?", "So.")
    again = ("<image>Who is he?", "Ben.", "Why?<image>", "So.")
    expected = ((("Who is he?", "Ben."), ("Why?", "So.")), CAT)
    records = [
        messages(*talk, **one),
        llava(*talk, **one),
        messages(*again, **two),
        messages(*again, **one),
        messages("Who?", "Ben.", images=[]),
        messages(*talk, **one, system="You see."),
    ]
    assert [shown(item) for item in read(put("demo.json", as_json(records)))] == [
        expected,
        expected,
        ((("Who is he?", "Ben."), ("Why?", "So.")), CAT),
        "marks and pictures disagree",
        ((("Who?", "Ben."),), None),
        ((("Who is he?", "Ben.", "You see."), ("Why?", "So.")), CAT),
    ]


def test_a_record_that_is_a_list_of_turns_is_a_conversation(put: Put) -> None:
    talks = [messages("Who?", "Ben.")["messages"], messages("Why?", "So.")["messages"], [], [1]]
    expected = [((("Who?", "Ben."),), None), ((("Why?", "So."),), None), "not a JSON object"]
    for name, data in (("a.json", as_json(talks)), ("b.jsonl", as_lines(talks))):
        assert [shown(item) for item in read(put(name, data))] == [*expected, expected[-1]]


def test_pictures_are_looked_for_in_the_folder_that_is_named(put: Put) -> None:
    put("elsewhere/a.jpg", DOG)
    put("text/a.jpg", CAT)
    path = put("text/talks.json", as_json([llava("<image>?", "Yes", image="a.jpg")]))
    assert [shown(x)[1] for x in read(path)] == [CAT]
    elsewhere = replace(OPTIONS, images=f"{put('', b'')}/elsewhere")
    assert [shown(x)[1] for x in read(path, elsewhere)] == [DOG]
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder of pictures"):
        read(path, replace(OPTIONS, images=f"{put('', b'')}/nowhere"))


def test_bad_records_are_rejected_with_their_place_and_good_ones_stay(put: Put) -> None:
    put("a.jpg", CAT)
    put("empty.jpg", b"")
    put("folder/a.jpg", CAT)
    good = llava("Why?", "So.")
    bad: list[tuple[Any, str]] = [
        (7, "not a JSON object"),
        (["Why?"], "not a JSON object"),
        ([good], "no conversation"),
        (None, "not a JSON object"),
        ({"text": "x"}, "no conversation"),
        (llava("", "So."), "empty turn"),
        (llava("Why?", "So.", system="\udc00"), "not Unicode"),
        (llava("Why?", "half \ud83d"), "not Unicode"),
        (llava("\udc00", "So."), "not Unicode"),
        (llava("<image>?", "So.", image="../a.jpg"), "picture outside the folder"),
        (llava("<image>?", "So.", image="/a.jpg"), "picture outside the folder"),
        (llava("<image>?", "So.", image="file:///a.jpg"), "picture outside the folder"),
        (llava("<image>?", "So.", image="a\x00.jpg"), "picture outside the folder"),
        (llava("<image>?", "So.", image="b.jpg"), "missing picture"),
        (llava("<image>?", "So.", image="folder"), "missing picture"),
        (llava("<image>?", "So.", image="x" * 5000), "missing picture"),
        (llava("<image>?", "So.", image="a.jpg/b.jpg"), "missing picture"),
        (llava("<image>?", "So.", image="empty.jpg"), "zero-byte picture"),
        (llava("<image>?", "So.", image={"bytes": "x"}), "not a picture name"),
    ]
    records = [record for pair in bad for record in (good, pair[0])]
    for name, write in (("a.json", as_json), ("a.jsonl", as_lines)):
        path = put(name, write(records))
        found = read(path)
        assert [shown(item) for item in found[::2]] == [((("Why?", "So."),), None)] * len(bad)
        assert [shown(item) for item in found[1::2]] == [reason for _, reason in bad]
        place = [f"record {n}" if write is as_json else f"line {n + 1}" for n in range(len(found))]
        assert [item.where for item in found] == [f"{path}, {at}" for at in place]


def test_bytes_that_are_no_utf8_cost_one_record(put: Put) -> None:
    data = as_json([llava("Why?", "So."), llava("caf@", "So."), llava("Why?", "Yes.")])
    found = read(put("a.json", data.replace(b"@", b"\xe9")))
    assert [type(item) for item in found] == [ConversationRecord, Reject, ConversationRecord]
    assert found[1].reason == "not UTF-8"


# Units.


def talk(number: int) -> dict[str, Any]:
    return llava(f"{number}?", "Yes.", id=str(number))


@given(num_records=st.integers(0, 25), unit_records=st.integers(1, 9), lines=st.booleans())
@settings(max_examples=40, deadline=None)
def test_units_hold_each_record_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, num_records: int, unit_records: int, lines: bool
) -> None:
    records = [talk(number) for number in range(num_records)]
    path = tmp_path_factory.getbasetemp() / ("talks.jsonl" if lines else "talks.json")
    # A blank line in the middle of a file is no record.
    path.write_bytes(as_lines(records).replace(b"\n", b"\n\n", 1) if lines else as_json(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_UNIT_RECORDS", unit_records)
        units = conversation_units([str(path)])
    assert len(units) == max(1, -(-num_records // unit_records))
    parts = [list(read_conversations(unit, OPTIONS)) for unit in units]
    assert all(len(part) <= unit_records for part in parts)
    found = [item for part in parts for item in part]
    assert [item.turns[0][0] for item in found] == [f"{n}?" for n in range(num_records)]
    assert len({item.where for item in found}) == num_records


def test_a_folder_is_its_llava_json_or_all_its_json_files(put: Put) -> None:
    put("b/two.json", as_json([talk(2)]))
    put("one.jsonl", as_lines([talk(1)]))
    put("notes.txt", b"[]")
    root = put("", b"")
    assert sorted(item.turns[0][0] for item in read(root)) == ["1?", "2?"]
    assert [item.turns[0][0] for item in read(f"{root}/*.jsonl")] == ["1?"]
    put("llava.json", as_json([talk(3)]))
    assert [item.turns[0][0] for item in read(root)] == ["3?"]


def test_what_is_not_there_or_unknown_is_refused(put: Put) -> None:
    path, other = put("a.json", b"[]"), put("a.csv", b"a,b")
    assert read(path) == []
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(f"{put('', b'')}/nothing")
    with pytest.raises(ValueError, match=r"a\.csv is of no known format"):
        read(other)


@pytest.mark.parametrize("unit_records", [1, 20_000])
def test_a_list_that_is_cut_at_any_byte_is_refused(
    put: Put, unit_records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_UNIT_RECORDS", unit_records)
    data = as_json([talk(1), talk(2)])
    units = conversation_units([put("a.json", data)])
    for wrong in (*(data[:end] for end in range(0, len(data), 5)), data + b"x"):
        path = put("a.json", wrong)
        with pytest.raises(ValueError, match=r"a\.json"):
            conversation_units([path])
        # Also where it is cut between the two readings.
        with pytest.raises(ValueError, match=r"a\.json"):
            [list(read_conversations(unit, OPTIONS)) for unit in units]


def test_roles_are_known_by_the_names_that_people_give_them(put: Put) -> None:
    names = [("Human", "GPT"), ("human", "chatgpt"), ("User", "model"), ("user", "bot")]
    talks = [
        {"conversations": [{"from": asks, "value": "Why?"}, {"from": answers, "value": "So."}]}
        for asks, answers in names
    ]
    found = read(put("talks.json", as_json(talks)))
    assert [type(item) for item in found] == [ConversationRecord] * len(names)


def test_the_real_sharegpt_sample_gives_its_records_with_their_pictures() -> None:
    found = read(shared("instruct_samples/llamafactory"))
    assert all(isinstance(item, ConversationRecord) for item in found)
    names = [[Path(picture.file).name for picture in item.pictures] for item in found]
    assert names == [["1.jpg", "1.jpg"], ["2.jpg"], ["3.jpg"]] * 2
    for item in found:
        assert len(item.turns) == 2
        assert [x.data for x in item.pictures] == [Path(x.file).read_bytes() for x in item.pictures]
    assert found[4].turns[0][0] == "他是谁？"
    # The second picture stands behind the second question.
    assert [turn.pictures for turn in found[3].turns] == [(0,), (7,)]
