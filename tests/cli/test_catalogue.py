"""Studies in files of a user's own: what they may use, and what is said of what they get wrong."""

import sys
from pathlib import Path

import pytest

from midstream.cli.catalogue import find_study

STUDY = """
from midstream.study.studies import Figure, Study


def study(name="own") -> Study:
    return Study(name=name, question="?", lines=(), figure=Figure(x="x", x_label="x"))
"""


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_file_may_import_what_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = "def late() -> Study:\n    from sizes_later import SIZE\n    return study(SIZE)\n"
    folder = written(
        tmp_path / "mine",
        sizes_beside="SIZE = 'beside'",
        sizes_later="SIZE = 'later'",
        json=f"from sizes_beside import SIZE\n{STUDY}\n{late}",
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    # Whatever the file is called: a module of that name stays what it is.
    assert find_study("mine/json.py:study", []).name == "own"
    assert find_study(f"{folder}/json.py:late", []).name == "later"
    assert sys.path == before
    assert sys.modules["json"].__file__ != str(folder / "json.py")


def test_a_file_may_define_classes_that_look_for_their_module(tmp_path: Path) -> None:
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", STUDY]
    lines += ["@dataclass", "class Size:", "    width: int = 1"]
    folder = written(tmp_path, mine="\n".join(lines))
    assert find_study(f"{folder}/mine.py:study", []).name == "own"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\ndef study(:\n", "mine.py, line 2: invalid syntax"),
        ("\nimport not_there\n", "mine.py, line 2: ModuleNotFoundError: .*beside the file"),
        ("from midstream.study.studies import Studdy\n", "mine.py, line 1: ImportError: .*Studdy"),
        ("import broken\n", "broken.py, line 3: "),
        ("def study():\n    return {}['seed']\n", "mine.py, line 2: KeyError: 'seed'"),
        ("def study():\n    a, b = (1, 2, 3)\n", "mine.py, line 2: ValueError: too many values"),
        ("def study():\n    return int('abc')\n", "mine.py, line 2: ValueError: invalid literal"),
        ("def study():\n    return sorted(3)\n", "mine.py, line 2: TypeError: 'int' object"),
    ],
)
def test_what_a_file_gets_wrong_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    folder = written(tmp_path, mine=text, broken="\n\nx = (\n")
    with pytest.raises(ValueError, match=told) as caught:
        find_study(f"{folder}/mine.py:study", [])
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_installed_beside_a_file_is_not_the_file(tmp_path: Path) -> None:
    folder = written(tmp_path, mine="from lib import ask\n\ndef study():\n    ask()\n")
    inner = folder / ".venv" / "site-packages"
    inner.mkdir(parents=True)
    (inner / "lib.py").write_text("def ask():\n    return {}['deep']\n")
    sys.path.append(str(inner))
    try:
        with pytest.raises(ValueError, match=r"mine\.py, line 4: KeyError: 'deep'"):
            find_study(f"{folder}/mine.py:study", [])
    finally:
        sys.path.remove(str(inner))
        sys.modules.pop("lib", None)


def test_two_studies_have_each_their_own_helpers(tmp_path: Path) -> None:
    text = STUDY.replace('"own"', "NAME")
    assert text != STUDY
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "common.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / "mine.py").write_text(f"from common import NAME\n{text}")
        assert find_study(f"{tmp_path / name}/mine.py:study", []).name == name


def test_a_file_that_is_named_without_its_function_says_how(tmp_path: Path) -> None:
    folder = written(tmp_path, mine=STUDY)
    with pytest.raises(ValueError, match=r"name a function of .*mine\.py: .*mine\.py:study;"):
        find_study(f"{folder}/mine.py", [])
    with pytest.raises(ValueError, match="no function 'studdy'; did you mean 'study'"):
        find_study(f"{folder}/mine.py:studdy", [])
    with pytest.raises(ValueError, match="no argument 'nam'; did you mean 'name'"):
        find_study(f"{folder}/mine.py:study", ["nam=x"])
