"""The files that docs/data.md shows are files that the readers read."""

import re
import shutil
from pathlib import Path

import pytest
from made import png
from made_inputs import run, texts_of
from made_world import write_tar

from midstream.core.identity import text_column
from midstream.data.formats.records import Section
from midstream.data.sources import Source

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
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the page shows and the picture that they name."""
    found = tmp_path / "in"
    (found / "coco").mkdir(parents=True)
    (found / "coco/1.png").write_bytes(png(1))
    for name, text in SHOWN.items():
        (found / name).write_text(text, encoding="utf-8")
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_that_the_page_shows_is_read_as_it_says(
    folder: Path, tmp_path: Path, name: str
) -> None:
    section, texts = EXPECTED[name]
    done = run(section, folder / name, tmp_path / "out")
    found = texts_of(Source("s", tmp_path / "out"))
    assert [text.replace("Ċ", "\n") for text in found] == texts
    dropped = {"question without a reply": 1, "tool turn": 1} if name == "chats.jsonl" else {}
    assert done["dropped_turns"] == dropped
    assert done["rejects"] == {}


def test_the_manifest_that_the_page_shows_belongs_to_its_shard(
    folder: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    write_tar(shards / "shard_00000000.tar", {"0.json": b"[1, 2]", "1.json": b"[3]"})
    shutil.copy(folder / "manifest.jsonl", shards)
    assert run("text", shards, tmp_path / "out")["train"]["tokens"] == 3


def test_the_world_that_the_page_shows_names_a_column(folder: Path) -> None:
    (folder / "text/starcoder").mkdir(parents=True)
    assert text_column(folder, "starcoder") == "content"
