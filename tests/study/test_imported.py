"""The record of an imported folder, as planning reads it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from midstream.config import DecoderConfig
from midstream.storage import CorruptError, new_folder, read_json, write_bytes, write_json
from midstream.study.imported import (
    RECORD,
    ImportRecord,
    Position,
    as_imported,
    open_imported,
    read_import,
)

WRITTEN = ImportRecord(
    kind="decoder",
    source="EleutherAI/pythia-410m",
    revision="step71000",
    family="openlm",
    config=DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=64),
    vocabulary={"rows_before": 60, "rows_after": 64, "added": [{"token": "<x>", "id": 60}]},
    position=Position(tokens_seen=10, rate=1e-4, origins={"rate": "given"}),
    dropped=("a", "b"),
    has_moments=True,
    weights_digest="1" * 64,
    content="0123456789abcdef",
)


def folder_of(record: dict[str, Any], place: Path) -> Path:
    with new_folder(place) as temporary:
        write_bytes(temporary / "model.safetensors", b"weights")
        write_json(temporary / RECORD, record)
    return place


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    return folder_of(WRITTEN.model_dump(mode="json"), tmp_path / "model")


def test_a_record_is_read_as_it_was_written(imported: Path) -> None:
    assert read_import(imported) == WRITTEN
    assert as_imported(imported).content == WRITTEN.content
    assert as_imported(imported).folder == imported
    assert open_imported(as_imported(imported)) == WRITTEN


def test_a_folder_that_is_no_import_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} is no imported.*midstream import SR"):
        read_import(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no imported folder"):
        as_imported(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "projector"}, r"\(kind\)"),
        ({"content": None}, r"\(content\)"),
        ({"config": {"kind": "openlm"}}, r"config\.openlm\.hidden_size"),
    ],
)
def test_a_record_of_another_version_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    record = WRITTEN.model_dump(mode="json") | change
    with pytest.raises(ValueError, match=rf"{RECORD}.*{named}.*import the checkpoint again"):
        read_import(folder_of(record, tmp_path / "model"))


def test_a_changed_byte_is_found_before_a_stage_uses_it(imported: Path) -> None:
    planned = as_imported(imported)
    (imported / "model.safetensors").write_bytes(b"wejghts")
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        open_imported(planned)


def test_another_import_in_the_same_place_is_found(imported: Path) -> None:
    planned = as_imported(imported)
    record = read_json(imported / RECORD) | {"content": "f" * 16}
    folder_of(record, imported)
    with pytest.raises(ValueError, match=r"holds f{16}, the plan was made with 0123456789abcdef"):
        open_imported(planned)


def test_reading_a_record_needs_neither_torch_nor_transformers(imported: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from midstream.study.imported import read_import; "
        f"read_import(Path({str(imported)!r})); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
