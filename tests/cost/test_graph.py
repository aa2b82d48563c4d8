from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midstream.config import WarmupCosine
from midstream.cost.graph import order, plan
from midstream.study import first_stages as stage_module
from midstream.study.stages import Continue, ContinueFrom, Evaluate, Finetune, Stage, StartText
from midstream.study.store import Ledger
from midstream.study.studies import Study

MakeStudy = Callable[..., Study]


def test_order_lists_each_stage_once_and_parents_first(make_study: MakeStudy) -> None:
    stages = order(make_study((0.2, 0.6, 1.0), (0, 1)))
    names = [stage.name for stage in stages]
    assert len(names) == len(set(names)) == 7 + 3 * 6 + 1
    for index, stage in enumerate(stages):
        assert {parent.name for parent in stage.parents} <= set(names[:index])


def test_order_does_not_depend_on_which_objects_stand_for_equal_stages(
    make_study: MakeStudy,
) -> None:
    study = make_study()
    copied = Study.model_validate_json(study.model_dump_json())
    assert [stage.name for stage in order(copied)] == [stage.name for stage in order(study)]


def test_plan_names_the_lines_that_share_a_stage(make_study: MakeStudy, tmp_path: Path) -> None:
    work = plan(make_study(), Ledger(tmp_path))
    lines = {row.stage.kind: row.lines for row in work.rows}
    whole = ("0.2 0", "1.0 0", "text only")
    assert lines["prepare_tokenizer"] == lines["prepare_world"] == lines["pretrain"] == whole
    assert lines["train_encoder"] == ("0.2 0", "1.0 0")
    assert lines["finetune"] == ("1.0 0",)
    assert work.num_shared == 7
    assert work.num_alone == 10 + 10 + 5


def test_plan_compares_the_flops_of_sharing_with_those_of_lines_alone(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    work = plan(make_study(), Ledger(tmp_path))
    flops = [(row.stage.kind, row.cost.flops or 0.0) for row in work.rows]
    uses = {"train_encoder": 2.0, "pretrain": 0.2 + 1.0 + 1.0}
    assert work.shared_flops == pytest.approx(sum(value for _, value in flops))
    assert work.naive_flops == pytest.approx(
        sum(value * uses.get(kind, 1.0) for kind, value in flops)
    )
    assert work.naive_flops > work.shared_flops > 0
    # What sees is unknown until its data is prepared or expected.
    assert work.num_unknown == 4
    once, alone = work.text_given
    assert 0 < once < work.shared_flops
    assert once < alone < work.naive_flops


def test_plan_counts_what_is_done_and_leaves_the_store_alone(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study, ledger = make_study(), Ledger(tmp_path / "store")
    assert plan(study, ledger).num_done == 0
    assert not ledger.store.exists()
    first = order(study)[0]
    with ledger.open_stage(first) as work:
        work.finish({})
    after = plan(study, ledger)
    assert after.num_done == 1
    assert first.name not in {row.stage.name for row in after.to_run}
    assert len(after.to_run) == len(after.rows) - 1


def test_plan_of_300_lines_computes_each_identity_once(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    digest = stage_module.digest

    def counted(value: Any) -> str:
        identity = digest(value)
        calls[identity] += 1
        return identity

    monkeypatch.setattr(stage_module, "digest", counted)
    study = make_study(tuple(step / 100 for step in range(1, 101)), (0, 1, 2))
    work = plan(study, Ledger(tmp_path))
    assert len(study.lines) == 300
    assert len(work.rows) == 7 + 3 * 300 + 1
    assert set(calls.values()) == {1}
    # The world's is made once for the whole process, by whoever asks first.
    assert len(work.rows) - len(calls) in (0, 1)


class Waits(Continue):
    """An image-text stage of somebody's own that also wants what is fine-tuned from it."""

    @property
    def parents(self) -> tuple[Stage, ...]:
        schedule = WarmupCosine(peak_rate=1e-3)
        chat = Finetune(
            start=self, training=self.training.model_copy(update={"schedule": schedule})
        )
        return (*super().parents, chat)


def test_a_cycle_is_refused_and_its_stages_are_named(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study((0.2,))
    line = study.lines[0]
    chat = line.result.of
    assert isinstance(chat, Finetune)
    waits = Waits(**{name: getattr(chat.start, name) for name in Continue.model_fields})
    result = Evaluate(of=waits, evaluation=line.result.evaluation)
    looped = study.model_copy(
        update={"lines": (line.model_copy(update={"result": result}),), "baselines": {}}
    )
    message = rf"a stage waits for itself: {waits.name} needs finetune-\w+ needs {waits.name};"
    with pytest.raises(ValueError, match=message):
        order(looped)
    with pytest.raises(ValueError, match=message):
        plan(looped, Ledger(tmp_path))


def test_a_text_model_that_is_fine_tuned_directly_counts_up_to_its_milestone(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = make_study((0.2, 1.0))
    chat = study.lines[0].result.of
    assert isinstance(chat, Finetune)
    assert isinstance(chat.start, Continue)
    assert isinstance(chat.start.start, ContinueFrom)
    start = StartText(stage=chat.start.start.stage, completion=0.2, encoder=chat.start.encoder)
    direct = Evaluate(
        of=Finetune(start=start, training=chat.training),
        evaluation=study.lines[0].result.evaluation,
    )
    lines = (study.lines[1], study.lines[1].model_copy(update={"name": "d", "result": direct}))
    work = plan(study.model_copy(update={"lines": lines}), Ledger(tmp_path))
    needs = {row.stage.kind: row.needs for row in work.rows if row.stage.kind == "pretrain"}
    assert needs["pretrain"] == {"1.0 0": 1.0, "d": 0.2, "text only": 1.0}


def test_two_lines_of_one_name_are_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study()
    twice = study.model_copy(update={"lines": (*study.lines, study.lines[0])})
    with pytest.raises(ValueError, match=r"'0\.2 0' twice"):
        plan(twice, Ledger(tmp_path))
