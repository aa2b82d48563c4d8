"""The small files in docs/evaluation.md are read by the readers that they document."""

import json
import pickle
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from midstream.eval.scoring import BENCHMARKS
from midstream.eval.tasks import VISUAL_FORMATS, _format
from midstream.eval.text import read_text_task

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
BLOCKS: dict[str, dict[str, str]] = defaultdict(dict)
for place, text in re.findall(r"```json (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
    BLOCKS[place.split("/")[0]][place.split("/", 1)[1]] = text
# Formats whose files another one's block shows.
SHOWN_AS = {"refcoco_plus": "refcoco", "refcocog": "refcoco"}
QUESTIONS = {"vqav2": 1, "textvqa": 1, "textvqa_ocr": 1, "vizwiz": 1, "ai2d": 1}
QUESTIONS |= {"refcoco": 2, "refcoco_plus": 2, "refcocog": 2}


def lay_out(folder: Path, name: str) -> None:
    for file, text in BLOCKS[name].items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".p":
            path.write_bytes(pickle.dumps(json.loads(text)))
        else:
            path.write_text(text)


@pytest.mark.parametrize("name", VISUAL_FORMATS)
def test_every_format_has_an_example_that_its_reader_takes(name: str, tmp_path: Path) -> None:
    lay_out(tmp_path, SHOWN_AS.get(name, name))
    if name == "textvqa_ocr":
        lay_out(tmp_path, "textvqa")
    if name == "refcocog":
        shutil.move(tmp_path / "refs(unc).p", tmp_path / "refs(umd).p")
    examples = VISUAL_FORMATS[name].read(tmp_path, pictures=False)
    assert len(examples) == QUESTIONS.get(name, 3)
    assert all(example.question for example in examples)


def test_the_text_task_of_ones_own_is_read(tmp_path: Path) -> None:
    lay_out(tmp_path, "text_tasks")
    items = read_text_task(tmp_path / "colours.jsonl")
    assert [item["gold"] for item in items] == [0, 1, 1]


def test_no_block_is_of_a_format_that_does_not_exist() -> None:
    assert set(BLOCKS) - {"text_tasks"} <= set(VISUAL_FORMATS)


def test_a_new_format_without_a_chance_level_is_refused_by_name() -> None:
    with pytest.raises(AssertionError, match=r"give mine a level under \[chance\.visual\]"):
        _format("mine", BENCHMARKS["visual"]["gqa"])
