"""Typed results: files as they are written today, of earlier versions and of later ones."""

from pathlib import Path
from typing import Any, get_args

import pytest

import tiny
from midstream.config import StageKind
from midstream.core.storage import read_json, write_json
from midstream.core.tokens import TokenCount
from midstream.cost.graph import check
from midstream.study.results import (
    RESULTS,
    EvaluationResult,
    SourceResult,
    StageResult,
    TrainingResult,
    checked,
)
from midstream.study.store import Ledger

SHARE = {"planned_tokens": None, "realised_tokens": 9, "largest_example_tokens": 3}
SOURCE = {"seconds": 2.0, "kind": "caption", "num_examples": 4, "num_tokens": 40, "num_images": 4}
TASK = {"kind": "vision", "metric": "accuracy", "score": 0.5, "chance": 0.25, "num_examples": 8}


def read(model: type[StageResult], **found: Any) -> Any:
    return checked(model, {"seconds": 2.0, **found}, Path("stage/results.json"))


def test_every_kind_of_stage_has_its_model() -> None:
    assert set(RESULTS) == set(get_args(StageKind))


def test_todays_files_are_read_whole_and_unchanged(tiny_ledger: Ledger) -> None:
    for stage in (*tiny.PREPARED, tiny.ENCODER_STAGE, tiny.TEXT):
        result = tiny_ledger.result(stage, RESULTS[stage.kind])
        assert result.unknown_keys() == []
        assert result.model_dump(mode="json", exclude_unset=True) == tiny_ledger.results(stage)


def test_what_earlier_versions_did_not_write_has_its_meaning() -> None:
    trained = read(TrainingResult, tokens_seen=9, sources={"news": SHARE})
    assert (trained.sources["news"].seen, trained.meters, trained.tracking) == (None, {}, {})
    source = read(SourceResult, **SOURCE)
    assert (source.num_targets, source.lengths, source.longest) == (None, None, {})
    # Captions that nobody counted are the pictures' own.
    assert source.with_caption("original") is source
    assert source.with_caption("synthetic") is None
    asked = read(EvaluationResult, tasks={"pope": TASK}, stable={"vision": 0.25})
    assert (asked.suites, asked.stable.text, asked.tasks["pope"].shortened) == ({}, None, None)


def test_other_captions_have_counts_of_their_own() -> None:
    seen = {"synthetic": {"num_tokens": 28, "longest": {"image": 12}}}
    counted = {"original": 4, "synthetic": 4}
    source = read(SourceResult, **SOURCE, captions=counted, seen=seen)
    other = source.with_caption("synthetic")
    assert other is not None
    assert (other.num_tokens, other.longest, other.num_images) == (28, {"image": 12}, 4)


def test_keys_of_later_versions_are_named_and_kept() -> None:
    shares = {"news": SHARE | {"colour": "red"}}
    trained = read(TrainingResult, tokens_seen=9, sources=shares, mood=1)
    assert trained.unknown_keys() == ["mood", "sources.news.colour"]
    assert trained.model_dump()["mood"] == 1
    asked = read(EvaluationResult, tasks={"pope": TASK}, stable={"smell": 0.5})
    assert asked.unknown_keys() == ["stable.smell"]
    assert trained.tokens == TokenCount()


def test_a_file_that_lacks_what_every_version_wrote_is_refused(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path, tiny.TEXT)
    path = ledger.folder(tiny.TEXT) / "results.json"
    found = read_json(path)
    del found["tokens_seen"]
    write_json(path, found)
    with pytest.raises(ValueError, match=rf"{path} .*tokens_seen: .*delete its folder"):
        ledger.result(tiny.TEXT, TrainingResult)
    assert ledger.result(tiny.TEXT, StageResult).seconds == found["seconds"]


def test_verify_names_what_is_of_another_version(tiny_ledger: Ledger, tmp_path: Path) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path, tiny.TOKENIZER)
    path = ledger.folder(tiny.TOKENIZER) / "results.json"
    assert check(ledger).problems == ()
    write_json(path, read_json(path) | {"mood": 1})
    assert [what for _, what in check(ledger).problems] == [
        "results.json has keys of another version: mood"
    ]
