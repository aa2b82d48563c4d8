"""The record of an imported folder, as planning reads it."""

from pathlib import Path
from typing import Any

import pytest

import own_studies
import tiny
from midstream.config import (
    DecoderConfig,
    FusedEncoder,
    PatchProjection,
    ProjectorConfig,
    VLMConfig,
)
from midstream.core.storage import CorruptError, new_folder, read_json, write_bytes, write_json
from midstream.study.imported import (
    RECORD,
    ImportRecord,
    Position,
    as_imported,
    load_model,
    open_imported,
    read_import,
    tower_folders,
)
from midstream.study.label import label
from midstream.study.stages import (
    Continue,
    Finetune,
    InitFrom,
    LoadModel,
    came_from,
    stage_from_json,
)
from midstream.study.store import Ledger

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


def whole(place: Path, model: VLMConfig, content: str = "fedcba9876543210") -> Path:
    """An imported vision-language model with its towers, each of a content of its own."""
    changes = {"kind": "model", "config": model.decoder, "model": model, "content": content}
    record = WRITTEN.model_copy(update=changes).model_dump(mode="json")
    with new_folder(place) as temporary:
        write_bytes(temporary / "model.safetensors", b"weights")
        write_json(temporary / RECORD, record)
        for number, name in enumerate(tower_folders(model)):
            tower = {"kind": "encoder", "config": tiny.ENCODER, "content": f"{number:016x}"}
            told = WRITTEN.model_copy(update=tower | {"vocabulary": None, "position": None})
            folder_of(told.model_dump(mode="json"), temporary / name)
    return place


SEES = VLMConfig(decoder=tiny.DECODER, encoder=tiny.ENCODER)
PATCHES = PatchProjection(image_size=24, patch_size=12, hidden_size=16)
FUSED = FusedEncoder(towers=(tiny.ENCODER, tiny.ENCODER))


@pytest.mark.parametrize(("encoder", "num_towers"), [(tiny.ENCODER, 1), (FUSED, 2), (PATCHES, 0)])
def test_an_imported_model_is_a_stage_that_others_start_from(
    encoder: Any, num_towers: int, tmp_path: Path
) -> None:
    model = SEES.model_copy(update={"encoder": encoder, "owns_encoder": num_towers == 0})
    loaded = load_model(whole(tmp_path / "whole", model), tiny.DATA)
    assert loaded.model == model
    assert open_imported(loaded.checkpoint).model == model
    found = loaded.encoder_stage
    assert (0 if found is None else len(found.towers)) == num_towers
    assert (found in loaded.parents) == (found is not None)
    talks = tiny.CHAT.model_copy(update={"start": loaded})
    parts = {"encoder": loaded.encoder, "start": InitFrom(stage=loaded)}
    goes_on = tiny.SEEN.model_copy(update=parts)
    asked = tiny.RESULT.model_copy(update={"of": loaded})
    for stage in (loaded, talks, goes_on, asked):
        read = stage_from_json(stage.model_dump_json())
        assert read == stage
        assert read.identity == stage.identity
        assert stage is loaded or loaded in stage.parents
        assert "imported model whole" in label(stage)
    assert came_from(talks) == came_from(goes_on) == (loaded, 1.0)
    assert talks.model.owns_encoder == (num_towers == 0)
    other = load_model(whole(tmp_path / "other", model, content="0" * 16), tiny.DATA)
    assert other.identity != loaded.identity
    moved = load_model(whole(tmp_path / "moved", model), tiny.DATA)
    assert moved.identity == loaded.identity


def test_a_stage_that_goes_on_with_other_parts_is_refused(tmp_path: Path) -> None:
    loaded = load_model(whole(tmp_path / "whole", SEES), tiny.DATA)
    with pytest.raises(ValueError, match="the encoder differs from that of loadmodel-"):
        Continue(**dict(tiny.image_run()) | {"start": InitFrom(stage=loaded)})


def test_a_plan_tells_what_is_wrong_with_an_imported_model(tmp_path: Path) -> None:
    loaded = load_model(whole(tmp_path / "whole", SEES), tiny.DATA)
    ledger = Ledger(tmp_path / "store")
    chat = tiny.CHAT.model_copy(update={"start": loaded})

    def told(model: LoadModel) -> list[str]:
        talks = Finetune(start=model, training=chat.training)
        return [problem.what for problem in own_studies.told(ledger, talks)]

    assert told(loaded) == []
    three = loaded.model_copy(update={"projector": ProjectorConfig(num_layers=3)})
    assert ["holds another model" in one for one in told(three)] == [True]
    whole(tmp_path / "whole", SEES, content="0" * 16)
    assert ["the plan was made with fedcba9876543210" in one for one in told(loaded)] == [True]
