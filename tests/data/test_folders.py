"""Folders: what is hidden, what is a note, what no reader takes; and the files of docs/data.md."""

import bz2
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_inputs import Put, as_lines, read_all, run, texts_of, write_pictures
from made_world import samples, write_tar

from inputs import png
from midstream.core.digests import is_note
from midstream.core.identity import text_column
from midstream.core.storage import read_json
from midstream.data.formats.files import find_files
from midstream.data.formats.read_documents import document_units, read_documents
from midstream.data.formats.records import ReadOptions, Section
from midstream.data.sources import Source


def lines(*texts: str) -> bytes:
    return as_lines([{"text": text} for text in texts])


def write(root: Path, **files: Any) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def heard(section: Any, source: Path, out: Path) -> tuple[Any, list[str]]:
    notices: list[str] = []
    return run(section, source, out, notice=notices.append), notices


HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.jsonl",
    ".Trash-0/files/a.jsonl",
    "__MACOSX/a.jsonl",
    "deep/.cache/b/a.jsonl",
    "._a.jsonl",
    ".DS_Store",
    "a.jsonl~",
]
NOTES = ["README", "readme.md", "LICENSE.txt", "requirements-dev.txt", "COPYING", "CITATION.cff"]


def test_hidden_files_and_notes_are_nobodys_data(put: Put) -> None:
    for name in [*HIDDEN, *NOTES, "a.jsonl", "deep/b.txt"]:
        put(name, name.encode())
    root = put("", b"")
    for source in (root, f"{root}/*", f"{root}/**/*"):
        found = find_files(source, (".jsonl", ".txt"))
        assert [name.rpartition("/")[2] for name in found] == ["a.jsonl", "b.txt"]


def test_a_note_or_a_hidden_file_that_is_named_is_read(put: Put) -> None:
    for name in ("LICENSE.txt", ".hidden/a.txt", ".hidden/.more/b.txt"):
        path = put(name, b"x")
        assert find_files(path, (".txt",)) == [path]
    hidden = put(".hidden/a.txt", b"x")
    root = put("", b"")
    for source in (f"{root}/.hidden", f"{root}/.hidden/*.txt", f"{root}/.hidden/**/*.txt"):
        assert [name.rpartition("put")[2] for name in find_files(source, (".txt",))] == [
            hidden.rpartition("put")[2]
        ]


def test_records_and_pictures_are_no_notes_whatever_they_are_called() -> None:
    names = ("notice-board.jsonl", "README.parquet", "licences.csv", "license_plate.jpg")
    assert not [name for name in (*names, "a.txt", "note") if is_note(name)]


def test_files_of_a_text_folder_that_no_reader_takes_are_named_once(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    files = {name: lines("x") for name in HIDDEN} | dict.fromkeys(NOTES, "note")
    files |= {"a.jsonl": lines("one"), "b.json.bz2": bz2.compress(lines("two")), "p.png": "p"}
    files |= {"C.JSONL": lines("c"), "d.csv": "d", "e.toml": "e"}
    write(root, **files)
    done, notices = heard("text", root, out)
    assert texts_of(Source("s", out)) == ["c", "one", "two"]
    names = ["d.csv", "e.toml", "p.png", "LICENSE.txt", "requirements-dev.txt"]
    first = [f"in/{name}" for name in names]
    assert done["unread"] == read_json(out / "source.json")["unread"]
    assert done["unread"] == {"files": 5, "first": first}
    (notice,) = notices
    assert notice.startswith(f"5 files are not read: {', '.join(first)}; ")
    assert "*.jsonl, *.json, " in notice
    assert ".lz4" in notice
    # Also where no shard is made anew.
    (root / "d.csv").unlink()
    done, notices = heard("text", root, out)
    assert done["shards"] == {"kept": 3, "new": 0}
    assert read_json(out / "source.json")["unread"]["files"] == 4
    assert notices[0].startswith("4 files are not read")


def test_a_folder_that_is_linked_into_itself_is_named_and_read_once(tmp_path: Path) -> None:
    write(tmp_path / "in", **{"deep/a.jsonl": lines("one")})
    (tmp_path / "in/deep/round").symlink_to("..")
    _, notices = heard("text", tmp_path / "in", tmp_path / "out")
    assert texts_of(Source("s", tmp_path / "out")) == ["one"]
    assert notices == ["links that go round in a circle are not entered again: in/deep/round"]


def test_many_unread_files_are_counted_and_some_are_named_readably(tmp_path: Path) -> None:
    names = ["000\udcff.pdf", *(f"{n:03d}.pdf" for n in range(1, 30))]
    write(tmp_path / "in", **{"a.txt": "a"} | {name: str(n) for n, name in enumerate(names)})
    done, notices = heard("text", tmp_path / "in", tmp_path / "out")
    assert done["unread"]["files"] == 30
    assert len(done["unread"]["first"]) == 20
    # A name that is no text.
    assert "in/000\\udcff.pdf" in done["unread"]["first"]
    assert "in/009.pdf and 20 more;" in notices[0]


def test_pictures_of_records_and_manifests_are_not_called_unread(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "captions", 3)
    write(pictures, **{"extra.JPG": png(9), "index.parquet": "x"})
    done, _ = heard("captions", pictures, tmp_path / "c")
    assert done["unread"] == {"files": 1, "first": ["captions/index.parquet"]}
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
    record = json.dumps([{"image": "p/1.png", "conversations": talk}])
    write(tmp_path / "talks", **{"llava.json": record, "p/1.png": png(1), "old.json": record})
    done, notices = heard("conversations", tmp_path / "talks", tmp_path / "t")
    assert done["unread"] == {"files": 1, "first": ["talks/old.json"]}
    assert notices[0].startswith("1 file is not read: talks/old.json; ")
    assert "or llava.json alone where the folder has it" in notices[0]
    write_tar(tmp_path / "ids/0.tar", {"0.json": b"[1, 2]"})
    write(tmp_path / "ids", **{"manifest.jsonl": '{"shard": "0", "num_sequences": 1}\n'})
    assert heard("text", tmp_path / "ids", tmp_path / "i")[1] == []


def test_a_pattern_names_what_it_matches_and_does_not_read(tmp_path: Path) -> None:
    write(tmp_path / "in", **{"a.jsonl": lines("a"), "a2.bz2": "x", "b.bz2": "x"})
    notices: list[str] = []
    run("text", [str(tmp_path / "in/a*")], tmp_path / "out", notice=notices.append)
    assert [note.partition(";")[0] for note in notices] == [
        f"1 file is not read: {tmp_path / 'in/a2.bz2'}"
    ]


def test_a_folder_with_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "in", **{"A.CSV": lines("a")})
    with pytest.raises(FileNotFoundError, match=r"\*\.jsonl, .*, but with A\.CSV; give"):
        run("text", tmp_path / "in", tmp_path / "out")


def test_splits_that_are_read_as_one_source_are_named(tmp_path: Path) -> None:
    for number, (names, splits) in enumerate(
        [
            (["train-0.jsonl", "validation-0.jsonl", "test-0.jsonl"], "test, train, validation"),
            (["train/0.jsonl", "train/1.jsonl", "val/2.jsonl"], "train, validation"),
            (["train-0.jsonl", "train-1.jsonl", "contest.jsonl"], ""),
        ]
    ):
        folder = tmp_path / str(number)
        write(folder / "in", **{name: lines(name) for name in names})
        _, notices = heard("text", folder / "in", folder / "out")
        expected = [f"files of the splits {splits}"] if splits else []
        assert [note.partition(" are read as one")[0] for note in notices] == expected


def test_without_a_notice_the_progress_tells_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", samples(0, ["a boat"]))
    write(tmp_path / "in", **{"0.tsv": "x"})
    told: list[tuple[float, str]] = []
    run("captions", tmp_path / "in", tmp_path / "out", progress=lambda *what: told.append(what))
    assert told[0][0] == 0.0
    assert told[0][1].startswith("1 file is not read: in/0.tsv; files of captions are *.tar, ")


# The page.

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
_FILE = re.compile(r"<!-- test: file (\S+) -->\n```\w*\n(.*?)```", re.DOTALL)
SHOWN = dict(_FILE.findall(PAGE.read_text(encoding="utf-8")))
EXPECTED: dict[str, tuple[Section, list[str]]] = {
    "part-000.jsonl": ("text", ["The river is wide.", "Two lines\nof one document."]),
    "mix.json": (
        "conversations",
        [
            "In: What is on the sofa?\nOut: A cat.In: Is it asleep?\nOut: Yes.",
            "In: Name a prime.\nOut: Seven.",
        ],
    ),
    "chats.jsonl": (
        "conversations",
        [
            "Be brief.\nIn: What is it?\nOut: A boat.",
            "In: Say hello.\nOut: Hello.",
            "In: Thanks.\nOut: Any time.",
        ],
    ),
    "parts.jsonl": (
        "conversations",
        ["In: What is it?\nOut: A boat.", "In: \nOut: A boat on a river."],
    ),
    "pairs.jsonl": (
        "conversations",
        [
            "In: Translate.\nBoot\nOut: Boat.",
            "In: What is it?\nOut: A boat.",
            "Be brief.\nIn: Say hello.\nOut: Hello.",
        ],
    ),
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The files that the page shows and the picture that they name."""
    found = tmp_path / "in"
    (found / "coco").mkdir(parents=True)
    (found / "coco/1.png").write_bytes(png(1))
    for name, text in SHOWN.items():
        (found / name).write_text(text, encoding="utf-8")
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_that_the_page_shows_is_read_as_it_says(
    page: Path, tmp_path: Path, name: str
) -> None:
    section, texts = EXPECTED[name]
    done = run(section, page / name, tmp_path / "out")
    found = texts_of(Source("s", tmp_path / "out"))
    assert [text.replace("Ċ", "\n") for text in found] == texts
    dropped = {"question without a reply": 1, "tool turn": 1} if name == "chats.jsonl" else {}
    assert done["dropped_turns"] == dropped
    assert done["rejects"] == {}


def test_several_pictures_stand_where_the_page_says(page: Path) -> None:
    for name in ("a.png", "b.png", "coco/1.png", "1.png"):
        (page / name).write_bytes(png(1))
    talks = read_all("conversations", str(page / "several.jsonl"))
    assert [turn.pictures for item in talks for turn in item.turns] == [(0, 0), (6, 15)]
    documents = [
        [isinstance(part, str) for part in item.parts]
        for name in ("pages.jsonl", "mmc4.jsonl", "marked.jsonl")
        for unit in document_units([str(page / name)], ReadOptions())
        for item in read_documents(unit, ReadOptions())
    ]
    assert documents == [[True, False, True]] * 3


def test_the_manifest_that_the_page_shows_belongs_to_its_shard(page: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_tar(shards / "shard_00000000.tar", {"0.json": b"[1, 2]", "1.json": b"[3]"})
    shutil.copy(page / "manifest.jsonl", shards)
    assert run("text", shards, tmp_path / "out")["train"]["tokens"] == 3


def test_the_world_that_the_page_shows_names_a_column(page: Path) -> None:
    (page / "text/starcoder").mkdir(parents=True)
    assert text_column(page, "starcoder") == "content"
