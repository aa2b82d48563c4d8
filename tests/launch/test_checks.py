"""What is wrong with a study is said before anything of it runs, with its remedy."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors

import own_world
import tiny
from midstream.config import Config, ContinuedCosine, EncoderConfig, TokenizerFile
from midstream.core.identity import file_sha256
from midstream.core.storage import write_json
from midstream.launch import checks
from midstream.launch.check_data import Problem
from midstream.launch.checks import exhibits
from midstream.study.imported import RECORD, ImportRecord
from midstream.study.label import label
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Imported,
    LoadDecoder,
    LoadEncoder,
)
from midstream.study.store import Ledger
from midstream.study.studies import Claim, Figure, Line, Study, Table
from own_studies import ASKED, DECODER, mixed, seen, text_run, told

pytestmark = pytest.mark.usefixtures("no_process")


def test_a_completion_that_is_no_milestone_is_refused_with_those_there_are(
    world: Path, empty: Ledger
) -> None:
    text = text_run(own_world.data_of(world), milestones=(0.2, 0.3, 1.0))
    budget = mixed(200, pictures=1.0)

    def after(completion: float) -> Continue:
        start = ContinueFrom(stage=text, completion=completion)
        return seen(text.data, budget).model_copy(update={"start": start})

    # 0.1 + 0.2 is not 0.3, but names the same folder.
    assert told(empty, after(0.2), after(0.1 + 0.2), after(1.0)) == []
    evaluated = Evaluate(of=text, completion=0.7, evaluation=ASKED)
    found = told(empty, after(0.5), evaluated)
    assert [problem.what for problem in found] == [
        f"{label(text)} keeps its weights at 20, 30, 100 %, not at {share} %" for share in (50, 70)
    ]
    assert "add 0.5 to its milestones" in found[0].remedy
    # None are kept before the first step, whatever is asked.
    text = text_run(text.data, milestones=(0.0, 1.0))
    (found_early,) = told(empty, after(0.0))
    assert "keeps no weights from before its first step" in found_early.what
    assert "FromScratch()" in found_early.remedy


def test_a_schedule_that_cannot_go_on_from_its_milestone_is_refused(
    world: Path, empty: Ledger
) -> None:
    text = text_run(own_world.data_of(world), milestones=(0.4, 1.0))
    schedule = ContinuedCosine(end_rate=tiny.END_RATE)
    numbers = {}
    for completion in (0.4, 1.0):
        model = seen(text.data, mixed(200, pictures=1.0), schedule=schedule)
        start = ContinueFrom(stage=text, completion=completion)
        found = told(empty, model.model_copy(update={"start": start}))
        numbers[completion] = [problem.remedy for problem in found]
    assert numbers == {0.4: [], 1.0: ["re-warm with WarmupCosine instead"]}


TOWER = EncoderConfig(
    image_size=24, patch_size=12, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=32
)


def imported(folder: Path, config: Config, content: str = "c" * 16) -> Imported:
    record = ImportRecord.model_validate(
        {
            "kind": "encoder" if isinstance(config, EncoderConfig) else "decoder",
            "source": "someone/model",
            "family": "openlm",
            "config": config.model_dump(mode="json"),
            "weights_digest": "1" * 64,
            "content": content,
        }
    )
    write_json(folder / RECORD, record.model_dump(mode="json"))
    return Imported(folder=folder, content="c" * 16)


def test_imported_folders_of_another_model_or_content_are_refused(
    world: Path, empty: Ledger, tmp_path: Path
) -> None:
    data = own_world.data_of(world)

    def decoder(place: str, config: Config, **changes: Any) -> list[Problem]:
        checkpoint = imported(tmp_path / place, config, **changes)
        return told(empty, LoadDecoder(data=data, checkpoint=checkpoint, decoder=DECODER))

    assert decoder("same", DECODER) == []
    (other,) = decoder("other", DECODER.model_copy(update={"hidden_size": 32, "num_layers": 2}))
    assert f"{tmp_path / 'other'} holds another decoder than the recipe takes" in other.what
    assert "hidden_size 16 (it has 32), num_layers 1 (it has 2)" in other.what
    (anew,) = decoder("anew", DECODER, content="d" * 16)
    assert f"{tmp_path / 'anew'} holds dddd" in anew.what
    assert "plan again" in anew.remedy
    checkpoint = Imported(folder=tmp_path / "gone", content="c" * 16)
    (gone,) = told(empty, LoadDecoder(data=data, checkpoint=checkpoint, decoder=DECODER))
    assert f"{tmp_path / 'gone'} is no imported folder" in gone.what


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, None),
        # Shown otherwise, of the same weights; without the last block, which is not looked at.
        ({"resize": "crop", "feature_layer": -1}, None),
        ({"num_layers": 2, "feature_layer": -1}, None),
        ({"num_layers": 1, "feature_layer": -1}, "num_layers 2 (it has 1)"),
        ({"intermediate_size": 64}, "intermediate_size 32 (it has 64)"),
        ({"image_size": 48}, "position_patches 4 (it has 16)"),
    ],
)
def test_an_imported_tower_is_held_to_what_its_weights_are_made_of(
    world: Path, empty: Ledger, tmp_path: Path, changes: dict[str, Any], differs: str | None
) -> None:
    tower = imported(tmp_path / "tower", TOWER.model_copy(update=changes))
    encoder = LoadEncoder(towers=(tower,), encoder=TOWER)
    model = seen(own_world.data_of(world), mixed(200, pictures=1.0))
    found = told(empty, model.model_copy(update={"encoder": encoder}))
    assert [differs in problem.what for problem in found] == ([] if differs is None else [True])


def test_a_disk_without_room_is_told_with_both_numbers(
    world: Path, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_run(own_world.data_of(world))
    asked: list[Path] = []

    def usage(place: Path) -> Any:
        asked.append(place)
        return shutil._ntuple_diskusage(10 * 2**30, 0, 3 * 2**30)  # type: ignore[attr-defined]

    monkeypatch.setattr(checks.shutil, "disk_usage", usage)
    assert told(empty, text, needed=3 * 2**30) == []
    (problem,) = told(empty, text, needed=3.5 * 2**30)
    assert problem.level == "lacking"
    assert "may grow by 3.5 GiB, 3 GiB are free on its disk" in problem.what
    assert "make room" in problem.remedy
    # The store is not there yet: the folder that it will lie in says it.
    assert set(asked) == {empty.store.parent}


def test_a_world_or_tokenizer_that_has_gone_since_planning_is_named(
    mine: Path, empty: Ledger
) -> None:
    text = text_run(own_world.data_of(mine))
    shutil.rmtree(mine)
    assert f"data folder {mine} does not exist" in [one.what for one in told(empty, text)]


def test_a_tokenizer_with_a_rule_that_the_study_does_not_state_is_refused(
    world: Path, tmp_path: Path, empty: Ledger
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    data = own_world.data_of(world)
    for file, refused in (
        (TokenizerFile(path=path, sha256=file_sha256(path)), True),
        (TokenizerFile.read(path), False),
        (TokenizerFile.read(path, "none"), False),
    ):
        text = text_run(data.model_copy(update={"tokenizer": file}))
        found = [one for one in told(empty, text) if "begins each text with a token" in one.what]
        assert len(found) == refused


def test_a_figure_a_table_and_a_claim_are_of_axes_that_the_lines_have(world: Path) -> None:
    """What a report would miss when all has run is said before."""
    text = text_run(own_world.data_of(world))
    line = Line(
        name="one", axes={"share": 0.5, "seed": 7}, result=Evaluate(of=text, evaluation=ASKED)
    )
    study = Study(name="mine", question="?", lines=(line,), figure=Figure(x="share", x_label="x"))
    claim = Claim(text="more is more", higher={"share": 0.9}, lower={"share": 0.5})
    whole = {"claims": (claim,), "table": Table(title="t", rows="share", scores=("stable.text",))}
    assert not list(exhibits(study.model_copy(update=whole)))
    claim = claim.model_copy(update={"lower": {"shares": 0.5}})
    table = Table(title="t", rows="scores", columns="part", scores=("stable.text",))
    wrong = {
        "claims": (claim,),
        "table": table,
        "figure": Figure(x="shares", x_label="x", by="seed"),
        "lines": (line.model_copy(update={"axes": {"share": float("nan"), "seed": 7}}),),
    }
    found = "\n".join(map(str, exhibits(study.model_copy(update=wrong))))
    assert "drawn over 'shares', and line 'one' has only share, seed; give" in found
    assert "lies at share nan" in found
    assert "claim 'more is more' of 'mine' is about 'shares'" in found
    assert "table of 'mine' is about 'part', which is no axis of its lines; choose from" in found
    (nothing,) = exhibits(study.model_copy(update={"lines": ()}))
    assert "has no lines" in nothing.what
    assert nothing.level == "wrong"
