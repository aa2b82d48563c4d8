"""Conversations in the layouts of other programs: what is read, what is refused, what is learnt."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_inputs import Put, as_json, as_lines, as_parquet, read_all, tokenizer_file

from inputs import png, tar
from midstream.data.examples import TextCodec, Turn, conversation_example
from midstream.data.formats.conversations import Conversation, conversation_of
from midstream.data.formats.records import ReadOptions
from midstream.data.source_writer import Reject, RejectedError

CODEC = TextCodec.from_file(tokenizer_file())
Record = dict[str, Any]


def ask(content: Any, **others: Any) -> Record:
    return {"role": "user", "content": content, **others}


def reply(content: Any, **others: Any) -> Record:
    return {"role": "assistant", "content": content, **others}


def talk(*turns: Any, **others: Any) -> Record:
    return {"messages": list(turns), **others}


def asked(
    question: str, *pictures: str | bytes, places: tuple[int, ...] | None = None
) -> Conversation:
    """One question with the reply "R."; its pictures stand before it where no places are given."""
    places = (0,) * len(pictures) if places is None else places
    return Conversation((Turn(question, "R.", "", places),), pictures)


HISTORY = Conversation((Turn("A?", "a"), Turn("Q?", "R.")))
SYSTEM = Conversation((Turn("Q?", "R.", "S."),))
PAIRED: list[tuple[Record, Conversation]] = [
    ({"instruction": "Add.", "input": "1 2", "output": "R."}, asked("Add.\n1 2")),
    ({"instruction": "Q?", "input": "", "output": "R.", "image": "a"}, asked("Q?", "a")),
    ({"instruction": "Q?", "context": "C", "response": "R."}, asked("Q?\nC")),
    ({"instruction": "Q?", "output": "R.", "history": [["A?", "a"]]}, HISTORY),
    ({"query": "<image>Q?", "response": "R.", "images": ["a"], "history": None}, asked("Q?", "a")),
    ({"image_url": "http://a", "question": "Q?", "answer": "R."}, asked("Q?", "http://a")),
    ({"label": False, "question": "Q?", "answer": "R."}, asked("Q?")),
    ({"question": "Q?", "answer": 3}, Conversation((Turn("Q?", "3"),))),
    (talk(ask("Q?"), reply(3.5)), Conversation((Turn("Q?", "3.5"),))),
    ({"image": "a", "prefix": "Q?", "suffix": "R."}, asked("Q?", "a")),
    ({"prompt": "Q?", "completion": "R.", "system": "S."}, SYSTEM),
    ({"prompt": [{"role": "system", "content": "S."}, ask("Q?")], "completion": "R."}, SYSTEM),
    ({"system_prompt": "S.", "question": "Q?", "response": "R."}, SYSTEM),
    ({"conversation": [{"system": "S.", "input": "Q?", "output": "R."}]}, SYSTEM),
    ({"conversation": [{"human": "Q?", "assistant": "R."}], "system": "S."}, SYSTEM),
    ({"conversation": [[ask("Q?")], [reply("R.")]], "images": ["a"]}, asked("Q?", "a")),
]


@pytest.mark.parametrize(("record", "expected"), PAIRED)
def test_pairs_are_conversations_alone_in_lists_and_behind_their_history(
    record: Record, expected: Conversation
) -> None:
    assert conversation_of(record) == expected


def text_part(text: str) -> Record:
    return {"type": "text", "text": text}


AB = {"images": ["a", "b"]}
BASE64 = base64.b64encode(png(1)).decode()
NOTHING = {"bytes": None, "path": None}
BOTH = Conversation((Turn("Q?", "R.", "", (0,)), Turn("And?", "R.", "", (0,))), ("a", "b"))
LETTERS = Conversation((Turn("Q", "R.", "", (0,)), Turn("A", "R.", "", (0,))), ("a", "b"))
TWELVE = {f"<image_{n}>": f"{n}.jpg" for n in range(12)}
SHOWN: list[tuple[Record, Conversation]] = [
    # Nothing marks them: before the first question.
    (talk(ask("Q?"), reply("R."), **AB), asked("Q?", "a", "b")),
    (talk(ask("Q?"), reply("R."), image_path="a"), asked("Q?", "a")),
    (talk(ask("Q?"), reply("R."), image="a", images=["a"]), asked("Q?", "a")),
    # Beside the text of a turn: at its marks, else before it.
    (talk(ask("Q?", images=["a"]), reply("R."), ask("And?", image="b"), reply("R.")), BOTH),
    (talk(*({"images": [n], "user": q, "assistant": "R."} for n, q in ("aQ", "bA"))), LETTERS),
    (talk(ask("Is <image> red?", images=["a"]), reply("R."), image=None), asked("Is  red?", "a")),
    (talk(ask("<image_placeholder>Q?", images=["a"]), reply("R.")), asked("Q?", "a")),
    # Marks of other programs.
    (talk(ask("<|image|>Q?"), reply("R."), image=["a"]), asked("Q?", "a")),
    (talk(ask("[IMG]\n[IMG]Q?"), reply("R."), **AB), asked("Q?", "a", "b")),
    (
        talk(
            ask("<|vision_start|><|image_pad|><|image_pad|><|vision_end|>Q?"),
            reply("R."),
            image="a",
        ),
        asked("Q?", "a"),
    ),
    (
        talk(ask("<|image_2|>or <|image_1|>Q?"), reply("R."), **AB),
        asked("or Q?", "b", "a", places=(0, 3)),
    ),
    (
        talk(
            ask("<image_01> or <image_00>"),
            reply("R."),
            image={"<image_01>": "b", "<image_00>": "a"},
        ),
        asked("or", "b", "a", places=(0, 2)),
    ),
    (
        talk(ask("".join(f"<image_{n}>" for n in range(12))), reply("R."), image=TWELVE),
        asked("", *TWELVE.values()),
    ),
    # Parts by their number, and with their text under other names.
    (
        talk(ask([{"type": "image", "index": n} for n in (1, 0)]), reply("R."), **AB),
        asked("", "b", "a"),
    ),
    (
        talk(ask([{"type": "image", "value": "a"}, {"type": "text", "value": "Q?"}]), reply("R.")),
        asked("Q?", "a"),
    ),
    (
        talk(ask("Picture 1: <img>https://x/a?b=1</img>Q?"), reply("R.")),
        asked("Q?", "https://x/a?b=1"),
    ),
    # A number is no picture's name, nor is that of any file.
    (talk(ask("Q?"), reply("R."), file_name="chat.txt", pictures=0, video=False), asked("Q?")),
    (talk(ask("Q?"), reply("R."), file_name="a.JPG?b=1"), asked("Q?", "a.JPG?b=1")),
    ({"question": "Q?", "answer": "R.", "choices": "[]", "hint": ""}, asked("Q?")),
    # Names in Qwen-VL's marks, and such marks in a talk about pages.
    (
        talk(ask("<img>1.png</img>Q?"), reply("R."), image="1.png", images=[None, NOTHING]),
        asked("Q?", "1.png"),
    ),
    (talk(ask("Picture 1: <img>1.png</img>\nQ?"), reply("R.")), asked("Q?", "1.png")),
    (talk(ask("<img>x</img>?"), reply("<img>")), Conversation((Turn("<img>x</img>?", "<img>"),))),
    # A content of one part, texts under other names, and a system text of parts.
    (talk(ask(text_part("Q?")), reply(text_part("R.")), images=[None]), asked("Q?")),
    (
        talk(ask([{"type": "text", "content": "Q?"}]), reply("R."), system=[text_part("S.")]),
        SYSTEM,
    ),
    # Pictures in base64, in parts without a type too, and lists as text.
    *(
        (talk(ask([part, {"text": "Q?"}]), reply([{"text": "R."}])), asked("Q?", png(1)))
        for part in (
            {"type": "image_url", "image_url": {"url": BASE64}},
            {"type": "image", "source": {"type": "base64", "data": BASE64}},
            {"type": "image", "base64": BASE64},
            {"image": BASE64},
        )
    ),
    (talk(ask("<image>Q?"), reply("R."), image=BASE64), asked("Q?", png(1))),
    (
        {"images": json.dumps([BASE64]), "messages": json.dumps([ask("<image>Q?"), reply("R.")])},
        asked("Q?", png(1)),
    ),
    # NaN is nothing.
    (
        talk(ask("Q?"), reply("R."), image="a", video=float("nan"), system=float("nan")),
        asked("Q?", "a"),
    ),
]


@pytest.mark.parametrize(("record", "expected"), SHOWN)
def test_pictures_are_found_where_other_programs_name_and_mark_them(
    record: Record, expected: Conversation
) -> None:
    assert conversation_of(record) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Q?", "chosen": "R.", "rejected": "No."}, "preference pair"),
        (talk(ask("Q?"), reply("R."), rejected_response="No."), "preference pair"),
        (talk(ask("Q?"), reply("R."), label=False), "reply judged bad"),
        (talk(ask("Q?"), reply("<bbox>"), objects={"bbox": [[1, 2]]}), "placeholder not filled in"),
        (talk(ask("Q?"), reply("R.", weight=0.5)), "weight other than 0 and 1"),
        (talk(ask("Q?"), reply("R.", train_detail=[[0, 1]])), "weight other than 0 and 1"),
        (talk(ask("Q?"), reply("R.", weight=0)), "no reply left"),
        (talk(ask("Q?", video="a.mp4"), reply("R.")), "video or sound"),
        (talk(ask("<image>", images=["a", "b"]), reply("R.")), "marks and pictures disagree"),
        (talk(ask("Q?"), reply("R.", image="a")), "picture outside a question"),
        (talk(ask("<|image_1|>Q?"), reply("R."), **AB), "marks and pictures disagree"),
        (talk(ask("<image_1><image_3>Q?"), reply("R."), **AB), "marks and pictures disagree"),
        (talk(ask("<image_2><image_3>Q?"), reply("R."), **AB), "marks and pictures disagree"),
        (talk(ask("<|vision_start|>Q?"), reply("R.")), "<image> without a picture"),
        ({"question": "Q?", "answer": "B", "choices": ["cat", "dog"]}, "options beside a question"),
        ({"question": "Q?", "answer": "B", "hint": "H"}, "options beside a question"),
        (talk({"question": "Q?", "answer": "B", "options": "['a']"}), "options beside a question"),
        ({"question": "Q?", "answer": "R.", "video_url": "a.mp4"}, "video or sound"),
        (talk(ask("<Image>Q?"), reply("R."), image="a"), "picture without <image>"),
        (talk(ask("Q?"), {"role": "oracle", "content": "R."}), "unknown role"),
        ({"image": "a", "question": "Q?", "answer": ["R.", "r"]}, "more than one reply"),
        ({"image": "a", "question": "Q?", "answers": ["R."]}, "no conversation"),
        (talk([ask("Q?"), reply("R.")], [ask("Q?"), reply("R.")]), "several conversations"),
        ({"instruction": ["Q?", "Q?"], "output": ["R."]}, "several conversations"),
        (talk(ask("<IMG_CONTEXT>Q?"), reply("R."), image="a"), "picture without <image>"),
        (talk(ask("< image >Q?"), reply("R."), image="a"), "picture without <image>"),
        (talk(ask("<im_start><image><im_end>"), reply("R.")), "marks and pictures disagree"),
        (talk(ask("<image></image>Q?"), reply("R."), image="a"), "marks and pictures disagree"),
        # What would be learnt as text alone.
        (talk(ask("Q?"), reply("R."), photo="1"), "picture under another key"),
        (talk(ask("Q?"), reply("R."), Image="a.jpg"), "picture under another key"),
        (talk(ask("<image>Q?"), reply("R."), image_1=["a"]), "picture under another key"),
        ({"image_id": 458752, "question": "Q?", "answer": "R."}, "picture under another key"),
        (talk(ask("Q?"), reply("R."), scan=["b/a.png"]), "picture under another key"),
        (talk(ask("Q?"), reply("R."), scan={"bytes": png(1)}), "picture under another key"),
        (talk(ask([["Q?"]]), reply("R.")), "no conversation"),
        (talk(ask([None, "Q?"]), reply("R.")), "no conversation"),
    ],
)
def test_what_would_be_learnt_wrongly_is_refused_with_its_reason(
    record: Record, reason: str
) -> None:
    with pytest.raises(RejectedError) as caught:
        conversation_of(record)
    assert caught.value.reason == reason


def test_what_speaks_of_no_picture_leaves_a_text_alone() -> None:
    silent: list[Record] = [
        {"id": "a.jpg", "image_id": None, "image_1": "", "num_images": 0},
        {"source": "a.jpg or b.jpg\nc.jpg", "blob": b"abc", "image_size": [2, 3]},
        {"title": "How do I save a .png?", "avatar": "https://a.b/c.png", "photo": False},
        {"speech": b"RIFF\x00\x00\x00\x00WAVEfmt "},
    ]
    for others in silent:
        assert conversation_of(talk(ask("Q?"), reply("R."), **others)) == asked("Q?")
    # Nor does a key beside the pictures that are read.
    found = conversation_of(talk(ask("Q?"), reply("R."), image="a", mask="a.png"))
    assert found == asked("Q?", "a")


@pytest.mark.parametrize("first", [png(1), None])
def test_pictures_in_a_column_that_is_not_read_are_refused_by_its_name(
    put: Put, first: bytes | None
) -> None:
    rows = [{"decoded": {"bytes": held, "path": None}, "image": None} for held in (first, png(1))]
    data = as_parquet([row | {"question": "Q?", "answer": "R."} for row in rows])
    with pytest.raises(ValueError, match=r"a\.parquet has a column 'decoded' of pictures, which"):
        read_all("conversations", put("a.parquet", data))


def test_replies_before_the_first_question_are_left_out_and_counted() -> None:
    found = conversation_of(talk(reply("Hi."), ask("<image>Q?"), reply("R."), image="a"))
    assert found == replace(asked("Q?", "a"), left_out=("reply without a question",))


@pytest.mark.parametrize("no", [{"weight": 0}, {"loss": False}, {"train": "false"}])
def test_a_reply_of_weight_0_is_seen_and_not_learnt(no: Record) -> None:
    yes = dict.fromkeys(no, 1)
    turns = [ask("Q?", **no), reply("Bad.", **no), ask("Again?"), reply("Good.", **yes)]
    found = conversation_of(talk(*turns))
    assert [turn.learnt for turn in found.turns] == [False, True]
    example = conversation_example(CODEC, found.turns)
    ids = np.asarray(example.input_ids)
    learnt = ids[example.supervised == 1].tolist()
    assert learnt == [*CODEC.encode(" Good."), CODEC.separator]
    bad = CODEC.encode(" Bad.")
    assert bad in [ids[n : n + len(bad)].tolist() for n in range(len(ids))]


def test_messages_of_a_prompt_are_not_learnt() -> None:
    prompt = [ask("A?"), reply("a"), ask("Q?")]
    found = conversation_of({"prompt": prompt, "completion": [reply("R.")]})
    assert found.turns == (Turn("A?", "a", learnt=False), Turn("Q?", "R."))
    assert "weight" not in prompt[1]


def test_lines_and_lists_of_pairs_are_read_whatever_the_file_is_called(put: Put) -> None:
    records = [{"question": f"{n}?", "answer": "R."} for n in range(2)]
    for name, write in (("a.json", as_lines), ("b.jsonl", as_lines), ("c.json", as_json)):
        found = read_all("conversations", put(name, write(records)))
        assert [x.turns[0].question for x in found] == ["0?", "1?"]
    (found,) = read_all("conversations", put("d.jsonl", b'{"prompt": "Q?", "chosen": "R."}\n'))
    assert isinstance(found, Reject)


def test_a_file_in_utf16_is_read_and_a_comma_too_many_is_named(put: Put) -> None:
    record = {"question": "Q?", "answer": "R."}
    for name, data in (("a.json", as_json([record])), ("b.jsonl", as_lines([record]))):
        (talk,) = read_all("conversations", put(name, data.decode().encode("utf-16")))
        assert talk.turns == (Turn("Q?", "R."),)
    found = read_all("conversations", put("c.json", b'[{"question": "Q?", "answer": "R."},]'))
    assert [isinstance(x, Reject) for x in found] == [False, True]
    assert "a comma too many" in found[1].detail


def fetched(folder: Path) -> tuple[Path, Path]:
    """Lines of two pictures' addresses and a folder in which img2dataset left the first."""
    images = folder / "fetched"
    images.mkdir()
    about = json.dumps({"url": "https://files.example/0"}).encode()
    (images / "00000.tar").write_bytes(tar({"0.json": about, "0.png": png(3)}))
    urls = [f"https://files.example/{number}" for number in range(2)]
    records = [{"image_url": url, "question": "Q?", "answer": "R."} for url in urls]
    (folder / "talks.jsonl").write_bytes(as_lines(records))
    return folder / "talks.jsonl", images


def test_pictures_at_addresses_are_those_that_img2dataset_fetched(tmp_path: Path) -> None:
    path, images = fetched(tmp_path)
    bare = read_all("conversations", str(path))
    assert [x.reason for x in bare] == ["missing picture"] * 2
    assert "with --images" in bare[0].detail
    options = ReadOptions(images=str(images))
    found, lost = read_all("conversations", str(path), options=options)
    assert [x.data for x in found.pictures] == [png(3)]
    assert found.pictures[0].file == str(images / "00000.tar")
    assert lost.reason == "missing picture"


def test_a_folder_of_pictures_is_not_searched_without_an_address(tmp_path: Path) -> None:
    path, images = fetched(tmp_path)
    talk = {"url": "https://a", "question": "https://b?", "answer": "https://c"}
    path.write_bytes(as_lines([talk]))
    read_all("conversations", str(path), options=ReadOptions(images=str(images)))
    assert [x.name for x in images.iterdir()] == ["00000.tar"]
