"""The digest of a benchmark: what changes it, and what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from midstream.core.digests import file_sha256
from midstream.core.identity import benchmark_digest, published_files


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A world of two visual tasks, whose pictures are one linked folder's, and two of text."""
    root, pictures = tmp_path / "world", tmp_path / "shared"
    pictures.mkdir()
    (pictures / "0.jpg").write_bytes(b"picture")
    for task in ("hue", "odd"):
        (root / "bench" / task).mkdir(parents=True)
        (root / "bench" / task / "questions.json").write_text(f'{{"about": "{task}"}}')
        (root / "bench" / task / "images").symlink_to(pictures)
    (root / "text_tasks").mkdir()
    (root / "text_tasks/letters.jsonl").write_text("{}")
    (root / "text_tasks/copa.jsonl").write_text("{}")
    visual = {task: {"format": "gqa", "chance": 0.1} for task in ("hue", "odd")}
    listed = {"visual_tasks": visual, "text_tasks": {"letters": {"chance": 0.5}}}
    (root / "world.json").write_text(json.dumps(listed))
    return root


TASKS = ("hue", "odd", "letters", "copa", "winogrande")


def digests(world: Path) -> dict[str, str]:
    return {task: benchmark_digest(world, task) for task in TASKS}


def add(path: str, text: str) -> Callable[[Path], None]:
    def change(world: Path) -> None:
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).write_text(text)

    return change


def other_chance(world: Path) -> None:
    listed = json.loads((world / "world.json").read_text())
    listed["visual_tasks"]["hue"]["chance"] = 0.2
    (world / "world.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("change", "renamed"),
    [
        (other_chance, {"hue"}),
        (add("bench/odd/images/notice.jpg", "read"), {"hue", "odd"}),
        (add("text_tasks/copa.jsonl", "[]"), {"copa"}),
        (add("COPA/val.jsonl", "{}"), {"copa"}),
        (add("text_tasks/winogrande/validation.jsonl", "{}"), {"winogrande"}),
        (add("bench/hue/images/.ipynb_checkpoints/0.jpg", "x"), set()),
        (add("text/web/copa.jsonl", "trained on"), set()),
    ],
)
def test_a_change_renames_the_benchmarks_whose_files_it_touches(
    world: Path, change: Callable[[Path], None], renamed: set[str]
) -> None:
    before = digests(world)
    change(world)
    after = digests(world)
    assert {task for task in TASKS if before[task] != after[task]} == renamed


def test_a_copy_elsewhere_has_the_same_digests(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(world, copy, symlinks=False)
    assert digests(copy) == digests(world)


def test_a_listed_benchmark_that_is_not_there_is_named(world: Path) -> None:
    shutil.rmtree(world / "bench/odd")
    with pytest.raises(FileNotFoundError, match=r"bench/odd does not exist; there: hue"):
        benchmark_digest(world, "odd")
    (world / "text_tasks/letters.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"letters\.jsonl does not exist"):
        benchmark_digest(world, "letters")
    with pytest.raises(FileNotFoundError, match="did you mean letters"):
        benchmark_digest(world, "leters")


@pytest.mark.parametrize("place", ["bench/gqa", "gqa", "."])
def test_official_files_are_found_without_a_world(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(f"{place}/questions.json", "{}")(tmp_path)
    hashed: list[Path] = []

    def remember(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    monkeypatch.setattr("midstream.core.identity.file_sha256", remember)
    one = benchmark_digest(tmp_path, "gqa")
    assert hashed == [tmp_path / place / "questions.json"]
    add(f"{place}/questions.json", "[]")(tmp_path)
    assert benchmark_digest(tmp_path, "gqa") != one


def test_published_files_are_one_release_from_one_folder(tmp_path: Path) -> None:
    assert published_files(tmp_path, "piqa") == ()
    add("a/valid.jsonl", "{}")(tmp_path)
    add("a/valid-labels.lst", "0")(tmp_path)
    add("b/valid-labels.lst", "1")(tmp_path)
    paths = (tmp_path / "a/valid.jsonl", tmp_path / "a/valid-labels.lst")
    assert published_files(tmp_path, "piqa") == paths
    add("c/math_qa.jsonl", "{}")(tmp_path)
    add("d/MathQA/test.json", "[]")(tmp_path)
    assert published_files(tmp_path, "mathqa") == (tmp_path / "d/MathQA/test.json",)
