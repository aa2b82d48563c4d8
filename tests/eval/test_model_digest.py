"""What stands for another's model: everything of its folder that an answer depends on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from midstream.eval import transformers_answerer
from midstream.eval.transformers_answerer import _digest as digest_of

PARTS = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_own.py",
    "parts/tower.py",
)
CONFIG = SimpleNamespace()


def _digest(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> str:
    return digest_of(folder, config, dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in PARTS:
        path = tmp_path / "model" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(part))
    return tmp_path / "model"


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_model_counts(folder: Path, part: str) -> None:
    before = _digest(folder, CONFIG)
    (folder / part).write_text("another")
    assert _digest(folder, CONFIG) != before
    (folder / part).unlink()
    assert _digest(folder, CONFIG) != before


def test_notes_hidden_files_results_and_the_place_do_not_count(folder: Path) -> None:
    before = _digest(folder, CONFIG)
    for name in ("README.md", ".gitattributes", "LICENSE"):
        (folder / name).write_text("about")
    (folder / "evaluations/model-1").mkdir(parents=True)
    (folder / "evaluations/model-1/results.json").write_text("{}")
    assert _digest(folder, CONFIG) == before
    assert _digest(folder.rename(folder.parent / "moved"), CONFIG) == before


def test_versions_that_change_answers_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _digest(folder, CONFIG)
    assert _digest(folder, CONFIG, torch.bfloat16) != before
    monkeypatch.setattr(
        transformers_answerer, "version", lambda name: {"transformers": "99"}.get(name, "1")
    )
    assert _digest(folder, CONFIG) != before


def test_a_hub_model_is_its_commit_and_one_without_is_never_the_same(tmp_path: Path) -> None:
    name = tmp_path / "org/model"
    one, other = (SimpleNamespace(_commit_hash=commit) for commit in ("abc", "def"))
    assert _digest(name, one) == _digest(name, one) != _digest(name, other)
    assert _digest(name, CONFIG) != _digest(name, CONFIG)
