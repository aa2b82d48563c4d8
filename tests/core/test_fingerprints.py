"""What stands for data: which files count, through links, and what another file renames."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from midstream.config import Evaluation, PublicFolder, TokenizerFile, TrainedTokenizer
from midstream.core import digests
from midstream.core.identity import file_sha256, kept_digests, text_column, world_fingerprint
from midstream.study.stages import ContinueFrom, Evaluate, Prepare

# What a stage is called in these tests, and the stage.
Chain = dict[str, str]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A world of small files; only their names and bytes count here."""
    root = tmp_path / "world"
    files = {
        "text/web/part-0.jsonl": '{"text": "one"}',
        "captions/pictures/00000.tar": "a tar",
        "instruct/talks/llava.json": "[]",
        "instruct/talks/images/0.jpg": "a picture",
        "bench/pope/coco_pope_random.json": "{}",
        "bench/pope/val2014/0.jpg": "another",
        "bench/gqa/testdev_balanced_questions.json": "{}",
        "text_tasks/quiz.jsonl": "{}",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    listed = {"visual_tasks": {"pope": {"format": "pope"}, "gqa": {"format": "gqa"}}}
    write_listing(root, listed | {"text_tasks": {"quiz": {"chance": 0.5}}})
    return root


def write_listing(root: Path, listed: dict[str, object]) -> None:
    (root / "world.json").write_text(json.dumps(listed))


def chain(root: Path, tokenizer: TrainedTokenizer | TokenizerFile | None = None) -> Chain:
    """The names of all stages of one line that asks pope and a text task."""
    data = Prepare(
        world=PublicFolder(root=root, fingerprint=world_fingerprint(root)),
        tokenizer=tokenizer or TrainedTokenizer(vocab_size=tiny.VOCAB_SIZE),
    )
    encoder = tiny.encoder_of(data)
    text = tiny.TEXT.model_copy(update={"data": data})
    seen = tiny.SEEN.model_copy(
        update={"data": data, "encoder": encoder, "start": ContinueFrom(stage=text)}
    )
    chat = tiny.CHAT.model_copy(update={"start": seen})
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))
    stages = {
        "tokenizer": data.vocabulary,
        "web": data.source("web"),
        "pictures": data.source("pictures"),
        "talks": data.source("talks"),
        "encoder": encoder,
        "text": text,
        "seen": seen,
        "chat": chat,
        "asked": Evaluate(of=chat, evaluation=asked),
        "asked gqa": Evaluate(of=chat, evaluation=Evaluation(visual_tasks=("gqa",))),
    }
    return {name: stage.name for name, stage in stages.items()}


def renamed(root: Path, change: Callable[[Path], None]) -> set[str]:
    before = chain(root)
    change(root)
    after = chain(root)
    return {name for name in before if before[name] != after[name]}


def written(name: str, text: str = "other") -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    return write


NO_DATA = (
    ".DS_Store",
    "notes.txt",
    "text/web/LICENSE",
    "text/web/part-1.jsonl.rar",
    "text/web/stats.csv",
    "text/web/.ipynb_checkpoints/part-0-checkpoint.jsonl",
    "captions/pictures/._00000.tar",
    "captions/.Trash-0/files/00000.tar",
    "instruct/talks/llava.json~",
    "bench/pope/.DS_Store",
    "text_tasks/.quiz.jsonl.swp",
)


def test_files_that_are_no_data_rename_nothing(world: Path) -> None:
    def add(root: Path) -> None:
        for name in NO_DATA:
            written(name)(root)

    assert renamed(world, add) == set()


CHAT_ON = {"chat", "asked", "asked gqa"}
SEEN_ON = {"seen", *CHAT_ON}
RENAMED = {
    "text/web/part-1.jsonl": {"tokenizer", "web", "pictures", "talks", "encoder", "text", *SEEN_ON},
    "text/web/part-0.jsonl": {"tokenizer", "web", "pictures", "talks", "encoder", "text", *SEEN_ON},
    "captions/pictures/00000.tar": {"pictures", "encoder", *SEEN_ON},
    "instruct/talks/images/0.jpg": {"talks", *CHAT_ON},
    "captions/more/00000.tar": set(),
    "instruct/unused/llava.json": set(),
    "bench/pope/coco_pope_random.json": {"asked"},
    "bench/pope/coco_pope_popular.json": {"asked"},
    "bench/pope/val2014/0.jpg": {"asked"},
    "bench/gqa/testdev_balanced_questions.json": {"asked gqa"},
    "text_tasks/quiz.jsonl": {"asked"},
    "text_tasks/more.jsonl": set(),
}


def test_a_file_renames_the_stages_that_rest_on_it_and_no_other(world: Path) -> None:
    for name, expected in RENAMED.items():
        assert renamed(world, written(name)) == expected, name


def test_a_change_behind_a_link_is_a_change(world: Path, tmp_path: Path) -> None:
    sections = ("text/web", "captions/pictures", "instruct/talks/images", "bench/pope")
    for section in sections:
        away = tmp_path / "disk" / section
        away.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(world / section, away)
        (world / section).symlink_to(away)
    one = world / "instruct/talks/llava.json"
    shutil.move(one, tmp_path / "disk/llava.json")
    one.symlink_to(tmp_path / "disk/llava.json")
    for name in RENAMED:
        if name.startswith(sections):
            assert renamed(world, written(name)) == RENAMED[name], name
    expected = {"talks", *CHAT_ON}
    assert renamed(world, written("instruct/talks/llava.json", "[1]")) == expected


def test_a_benchmark_more_changed_or_gone_renames_only_what_asks_it(world: Path) -> None:
    listed = json.loads((world / "world.json").read_text())
    more = {**listed["visual_tasks"], "vsr": {"format": "vsr"}}
    (world / "bench/vsr").mkdir()
    assert (
        renamed(world, lambda root: write_listing(root, {**listed, "visual_tasks": more})) == set()
    )
    other = {**more, "pope": {"format": "pope", "chance": 0.4}}
    changed = {**listed, "visual_tasks": other}
    assert renamed(world, lambda root: write_listing(root, changed)) == {"asked"}
    assert renamed(world, lambda root: shutil.rmtree(root / "bench/gqa")) == {"asked gqa"}


def test_a_named_column_of_a_source_is_part_of_what_it_is(world: Path) -> None:
    listed = json.loads((world / "world.json").read_text())
    named = {**listed, "text": {"web": {"column": "content"}}}
    assert "web" in renamed(world, lambda root: write_listing(root, named))
    write_listing(world, {**named, "text": {"wbe": {"column": "content"}}})
    with pytest.raises(ValueError, match="names the source 'wbe'; did you mean 'web'"):
        world_fingerprint(world)


def say(root: Path, said: Any) -> None:
    (root / "text/starcoder").mkdir(parents=True, exist_ok=True)
    (root / "text/web").mkdir(exist_ok=True)
    (root / "world.json").write_text(json.dumps(said))


def test_a_world_says_where_a_source_keeps_its_text(tmp_path: Path) -> None:
    say(tmp_path, {"name": "w", "text": {"starcoder": {"column": "content"}}})
    assert text_column(tmp_path, "starcoder") == "content"
    assert text_column(tmp_path, "web") is None
    say(tmp_path, {"name": "w"})
    assert text_column(tmp_path, "starcoder") is None
    (tmp_path / "world.json").unlink()
    assert text_column(tmp_path, "starcoder") is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"starcodr": {"column": "content"}}, "'starcodr'; did you mean 'starcoder'.*web"),
        ({"code": {"column": "content"}}, "'code'; .*text holds starcoder, web"),
        ({"web": {"columns": "content"}}, "says {'columns': 'content'} of 'web'; write"),
        ({"web": {"column": "content", "kind": "x"}}, "of 'web'; write"),
        ({"web": {"column": 3}}, "of 'web'; write"),
        ({"web": {"column": ""}}, "of 'web'; write"),
        ({"web": "content"}, "says 'content' of 'web'; write"),
        (["web"], "'text' is \\['web'\\]; write"),
    ],
)
def test_a_world_that_says_it_wrongly_is_refused_by_name(
    tmp_path: Path, said: Any, message: str
) -> None:
    say(tmp_path, {"text": said})
    with pytest.raises(ValueError, match=rf"world\.json: .*{message}"):
        text_column(tmp_path, "starcoder")


def test_a_tokenizer_file_shields_the_text_from_other_texts(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    tokenizer = TokenizerFile(path=path, sha256=file_sha256(path))
    before = chain(world, tokenizer)
    written("text/more/part-0.jsonl")(world)
    assert chain(world, tokenizer) == before
    moved = tmp_path / "moved"
    shutil.move(world, moved)
    assert chain(moved, tokenizer) == before


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes are read from here on; every change is long past."""
    read: list[Path] = []
    plain = digests.read_sha256

    def note(path: Path) -> str:
        read.append(Path(path))
        return plain(path)

    monkeypatch.setattr(digests, "read_sha256", note)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    return read


def test_bytes_are_read_once_and_again_only_where_a_file_changed(
    world: Path, tmp_path: Path, counted: list[Path]
) -> None:
    kept = tmp_path / "store" / "digests.sqlite"
    with kept_digests(kept):
        one = world_fingerprint(world)
    assert len(counted) == 8
    counted.clear()
    with kept_digests(kept):
        assert world_fingerprint(world) == one
    assert counted == []
    path = world / "text/web/part-0.jsonl"
    before = path.stat()
    path.write_text('{"text": "two"}')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with kept_digests(kept):
        assert world_fingerprint(world) != one
    assert counted == [path]
    counted.clear()
    with kept_digests(kept, again=True):
        world_fingerprint(world)
    assert len(counted) == 8


@pytest.mark.parametrize("left", [b"", b"no database, as a full disk or a cut copy leaves one" * 9])
def test_kept_digests_that_are_broken_are_made_anew(
    world: Path, tmp_path: Path, counted: list[Path], left: bytes
) -> None:
    kept = tmp_path / "digests.sqlite"
    kept.write_bytes(left)
    for _ in range(2):
        with kept_digests(kept):
            world_fingerprint(world)
    assert len(counted) == 8


def test_a_file_that_may_still_be_changing_is_read_again(
    world: Path, tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 3600.0)
    for _ in range(2):
        with kept_digests(tmp_path / "digests.sqlite"):
            world_fingerprint(world)
    assert len(counted) == 16


def test_nothing_is_kept_where_a_store_may_only_be_read(
    world: Path, tmp_path: Path, counted: list[Path]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for _ in range(2):
        with kept_digests(tmp_path / "file" / "digests.sqlite"):
            world_fingerprint(world)
    assert len(counted) == 16
