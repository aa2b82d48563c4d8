from pathlib import Path

import pytest
from pydantic import ValidationError

from midstream.config import ProjectorConfig, WarmupCosine
from midstream.cost.graph import order
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    FromScratch,
    Imported,
    InitFrom,
    LoadDecoder,
    StartText,
    overflow_of,
    stage_from_json,
)
from midstream.study.studies import Study


@pytest.fixture
def chat(study: Study) -> Finetune:
    """The fine-tuning of the study's first line, from its 20 % of text."""
    found = study.lines[0].result.of
    assert isinstance(found, Finetune)
    return found


def test_every_kind_of_stage_keeps_its_identity_through_json(study: Study, chat: Finetune) -> None:
    stages = order(study)
    assert {stage.kind for stage in stages} == {
        "prepare_world",
        "prepare_tokenizer",
        "prepare_source",
        "train_encoder",
        "pretrain",
        "continue",
        "finetune",
        "evaluate",
    }
    seen = chat.start
    assert isinstance(seen, Continue)
    assert isinstance(seen.start, ContinueFrom)
    high = seen.training.model_copy(update={"schedule": WarmupCosine(peak_rate=1e-3)})
    second = seen.model_copy(update={"start": InitFrom(stage=seen), "training": high})
    straight = StartText(stage=seen.start.stage, completion=0.2, encoder=seen.encoder)
    others = [second, *(Finetune(start=one, training=chat.training) for one in (second, straight))]
    assert len({stage.identity for stage in (*stages, *others)}) == len(stages) + 3
    for stage in (*stages, *others):
        read = stage_from_json(stage.model_dump_json())
        assert type(read) is type(stage)
        assert read.identity == stage.identity
        assert read.name == stage.name


def test_a_change_in_an_ancestor_changes_every_descendant(chat: Finetune) -> None:
    seen = chat.start
    assert isinstance(seen.start, ContinueFrom)
    text = seen.start.stage
    training = text.training.model_dump() | {"seed": 99}
    other_text = type(text)(**{**dict(text), "training": training})
    other_seen = Continue(
        **{**dict(seen), "start": ContinueFrom(stage=other_text, completion=seen.start.completion)}
    )
    other_chat = Finetune(start=other_seen, training=chat.training)
    for one, other in ((text, other_text), (seen, other_seen), (chat, other_chat)):
        assert one.identity != other.identity


def test_a_changed_copy_has_a_model_of_its_own(chat: Finetune) -> None:
    seen = chat.start
    projector, other = seen.model.projector, ProjectorConfig(num_layers=1)
    changed = seen.model_copy(update={"projector": other})
    assert changed.model.projector == other != projector
    assert seen.model.projector == projector
    assert stage_from_json(seen.model_dump_json()) == seen


def test_a_changed_copy_has_an_identity_of_its_own(study: Study) -> None:
    changes = {
        "prepare_world": ("world", "seed"),
        "prepare_tokenizer": ("tokenizer", "vocab_size"),
        "evaluate": ("evaluation", "limit"),
    }
    for stage in order(study):
        first = stage.identity
        assert stage.model_copy().identity == stage.model_copy(deep=True).identity == first
        if stage.kind == "prepare_source":
            part, value = "source", "other"
        else:
            part, name = changes.get(stage.kind, ("training", "seed"))
            value = getattr(stage, part).model_copy(update={name: 77})
        changed = stage.model_copy(update={part: value})
        assert type(changed) is type(stage)
        assert changed.identity != first
        # The same as that of a stage that was made so; the original is what it was.
        assert changed.identity == stage_from_json(changed.model_dump_json()).identity
        assert stage.identity == first


def test_stages_name_what_they_read_as_parents(study: Study, chat: Finetune) -> None:
    result = study.lines[0].result
    seen = chat.start
    kinds = [stage.kind for stage in result.parents]
    assert kinds == ["finetune", "prepare_tokenizer", "prepare_world", "train_encoder"]
    read = ["prepare_tokenizer", "prepare_source", "prepare_source", "train_encoder"]
    assert [stage.kind for stage in seen.parents] == [*read, "pretrain"]
    scratch = Continue(**{**dict(seen), "start": FromScratch()})
    assert [stage.kind for stage in scratch.parents] == read
    # Of a text model no encoder is needed.
    kinds = [stage.kind for stage in study.baselines["text only"].parents]
    assert kinds == ["pretrain", "prepare_tokenizer", "prepare_world"]


def test_stages_of_another_kind_are_refused_where_they_do_not_fit(study: Study) -> None:
    result = study.lines[0].result
    with pytest.raises(ValidationError):
        Evaluate(of=result.of.data, evaluation=result.evaluation)
    with pytest.raises(ValidationError):
        stage_from_json('{"kind": "distil"}')


def test_an_imported_model_has_no_milestone_to_fine_tune(chat: Finetune) -> None:
    seen = chat.start
    loaded = LoadDecoder(
        data=seen.data, checkpoint=Imported(folder=Path("x"), content="x"), decoder=seen.decoder
    )
    with pytest.raises(ValidationError, match="no weights at 40% but its own"):
        StartText(stage=loaded, completion=0.4, encoder=seen.encoder)


def test_fine_tuning_cuts_what_is_longer_than_its_row_and_other_stages_refuse_it(
    chat: Finetune,
) -> None:
    assert (overflow_of(chat), overflow_of(chat.start)) == ("cut", "refuse")  # type: ignore[arg-type]
    for asked in ("cut", "refuse"):
        rows = chat.training.rows.model_copy(update={"overflow": asked})
        training = chat.training.model_copy(update={"rows": rows})
        assert overflow_of(chat.model_copy(update={"training": training})) == asked
