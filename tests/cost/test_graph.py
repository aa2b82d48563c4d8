"""A study's stages as one graph; what a store holds, who needs it, and that nothing else goes."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

import tiny
from midstream.cli.app import app
from midstream.cost.graph import (
    check,
    forget_study,
    order,
    other_bytes,
    plan,
    remove_stages,
    stored_stages,
    unneeded,
)
from midstream.study import first_stages as stage_module
from midstream.study.label import label
from midstream.study.stages import Evaluate, Finetune, StartText
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study

MakeStudy = Callable[..., Study]


def test_order_lists_each_stage_once_and_parents_first(make_study: MakeStudy) -> None:
    stages = order(make_study((0.2, 0.6, 1.0), (0, 1)))
    names = [stage.name for stage in stages]
    assert len(names) == len(set(names)) == 7 + 3 * 6 + 1
    for index, stage in enumerate(stages):
        assert {parent.name for parent in stage.parents} <= set(names[:index])


def test_order_does_not_depend_on_which_objects_stand_for_equal_stages(study: Study) -> None:
    copied = Study.model_validate_json(study.model_dump_json())
    assert [stage.name for stage in order(copied)] == [stage.name for stage in order(study)]


def test_plan_names_the_lines_that_share_a_stage(study: Study, tmp_path: Path) -> None:
    work = plan(study, Ledger(tmp_path))
    lines = {row.stage.kind: row.lines for row in work.rows}
    whole = ("0.2 0", "1.0 0", "text only")
    assert lines["prepare_tokenizer"] == lines["prepare_world"] == lines["pretrain"] == whole
    assert lines["train_encoder"] == ("0.2 0", "1.0 0")
    assert lines["finetune"] == ("1.0 0",)
    assert work.num_shared == 7
    assert work.num_alone == 10 + 10 + 5


def test_plan_compares_the_flops_of_sharing_with_those_of_lines_alone(
    study: Study, tmp_path: Path
) -> None:
    work = plan(study, Ledger(tmp_path))
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


def test_plan_counts_what_is_done_and_leaves_the_store_alone(study: Study, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "store")
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
    # What comes before the lines is made once for the whole process, by whoever asks first.
    assert 0 <= len(work.rows) - len(calls) <= 7


def test_a_text_model_that_is_fine_tuned_directly_counts_up_to_its_milestone(
    study: Study, tmp_path: Path
) -> None:
    chat = study.lines[0].result.of
    start = StartText(stage=chat.start.start.stage, completion=0.2, encoder=chat.start.encoder)
    direct = Evaluate(
        of=Finetune(start=start, training=chat.training),
        evaluation=study.lines[0].result.evaluation,
    )
    lines = (study.lines[1], study.lines[1].model_copy(update={"name": "d", "result": direct}))
    work = plan(study.model_copy(update={"lines": lines}), Ledger(tmp_path))
    needs = {row.stage.kind: row.needs for row in work.rows if row.stage.kind == "pretrain"}
    assert needs["pretrain"] == {"1.0 0": 1.0, "d": 0.2, "text only": 1.0}


def test_two_lines_of_one_name_are_refused(study: Study, tmp_path: Path) -> None:
    twice = study.model_copy(update={"lines": (*study.lines, study.lines[0])})
    with pytest.raises(ValueError, match=r"'0\.2 0' twice"):
        plan(twice, Ledger(tmp_path))


RESULT = Evaluate(of=tiny.TEXT, evaluation=tiny.EVALUATION.model_copy(update={"visual_tasks": ()}))


def asks(name: str = "kept") -> Study:
    line = Line(name="line", axes={"x": 1}, result=RESULT)
    return Study(name=name, question="?", lines=(line,), figure=Figure(x="x", x_label="x"))


@pytest.fixture
def ledger(tiny_ledger: Ledger, tmp_path: Path) -> Ledger:
    """Data, an encoder and a text run; a study that needs all but the encoder."""
    folder = tmp_path / "store"
    own = tiny.store_with(tiny_ledger, folder, tiny.DATA, tiny.ENCODER_STAGE, tiny.TEXT)
    own.save_study(asks())
    return own


def run(*words: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["store", *map(str, words)], env={"COLUMNS": "200"})
    return found.exit_code, found.output


# The study is one of text alone.
UNNEEDED_DATA = {stage.name for stage in tiny.PREPARED[3:]}


def test_a_stage_is_needed_by_the_studies_that_lead_to_it(ledger: Ledger) -> None:
    ledger.save_study(asks("other"))
    needed = {stage.name: stage.studies for stage in stored_stages(ledger)}
    assert needed == {
        **dict.fromkeys((stage.name for stage in tiny.PREPARED[:3]), ("kept", "other")),
        **dict.fromkeys(UNNEEDED_DATA, ()),
        tiny.TEXT.name: ("kept", "other"),
        tiny.ENCODER_STAGE.name: (),
    }
    sizes = {stage.name: stage.num_bytes for stage in stored_stages(ledger)}
    text = ledger.folder(tiny.TEXT)
    assert sizes[tiny.TEXT.name] == sum(
        path.stat().st_size for path in text.rglob("*") if path.is_file()
    )
    assert tiny.ENCODER_STAGE.name in {stage.name for stage in unneeded(ledger)}
    assert other_bytes(ledger)["studies"] > 0
    shutil.copytree(text, ledger.store / "pretrain-0123456789abcdef")
    (stale,) = (s for s in stored_stages(ledger) if s.name == "pretrain-0123456789abcdef")
    assert (stale.state, stale.kind, stale.studies) == ("stale", "pretrain", ())


def test_only_what_no_study_needs_is_deleted(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match=r"text, 16 k .* is needed by kept; forget"):
        remove_stages(ledger, [tiny.ENCODER_STAGE.name, tiny.TEXT.name])
    assert ledger.is_done(tiny.ENCODER_STAGE)
    freed = remove_stages(ledger, [tiny.ENCODER_STAGE.name])
    assert freed > 1000
    assert not ledger.folder(tiny.ENCODER_STAGE).exists()
    assert ledger.is_done(tiny.TEXT)
    forget_study(ledger, "kept")
    assert {stage.name for stage in unneeded(ledger)} == {
        stage.name for stage in (*tiny.PREPARED, tiny.TEXT)
    }
    with pytest.raises(FileNotFoundError, match="no study 'kept'"):
        forget_study(ledger, "kept")


def test_a_running_stage_and_an_unknown_one_stay(ledger: Ledger) -> None:
    folder = ledger.folder(tiny.ENCODER_STAGE)
    (folder / "SUCCESS").unlink()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "running"}))
    with FileLock(folder / "lock"):
        assert {stage.name for stage in unneeded(ledger)} == UNNEEDED_DATA
        with pytest.raises(ValueError, match="is running"):
            remove_stages(ledger, [folder.name])
    with pytest.raises(ValueError, match="no stage 'pretrain-x'"):
        remove_stages(ledger, ["pretrain-x"])
    with (
        FileLock(ledger.store / "launch.lock"),
        pytest.raises(ValueError, match="in use by another launcher"),
    ):
        remove_stages(ledger, [folder.name])
    assert folder.is_dir()


def test_a_study_that_cannot_be_read_keeps_everything(ledger: Ledger) -> None:
    (ledger.store / "studies" / "old.json").write_text('{"name": "old"}')
    with pytest.raises(ValueError, match=r"study old .* is of another version"):
        unneeded(ledger)


def test_a_flipped_byte_and_a_foreign_stage_are_found(ledger: Ledger) -> None:
    assert check(ledger).problems == ()
    assert check(ledger).num_folders > 3
    weights = sorted(ledger.folder(tiny.TEXT).rglob("*.safetensors"))[0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    strange = ledger.store / "pretrain-0123456789abcdef"
    shutil.copytree(ledger.folder(tiny.WORLD), strange)
    (strange / "stage.json").write_text('{"kind": "pretrain"}')
    found = dict(check(ledger).problems)
    assert weights.name in found[label(tiny.TEXT)]
    assert "another version" in found["pretrain · 0123456"]


def test_the_commands_say_what_they_would_delete_before_they_do(ledger: Ledger) -> None:
    code, told = run("ls", "--store", ledger.store)
    assert code == 0
    assert [line.split()[-1] for line in told.splitlines() if label(tiny.TEXT) in line] == ["kept"]
    assert "of these unneeded" in run("du", "--store", ledger.store)[1]
    code, told = run("rm", "--unneeded", "--store", ledger.store)
    assert (code, label(tiny.ENCODER_STAGE) in told) == (0, True)
    assert "say --yes" in told
    assert ledger.is_done(tiny.ENCODER_STAGE)
    for wanted in (tiny.ENCODER_STAGE.identity[:7], tiny.ENCODER_STAGE.name):
        code, told = run("rm", wanted, "--store", ledger.store)
        assert (code, "1 stage would go" in told) == (0, True)
    # What --yes refuses is not promised.
    code, told = run("rm", tiny.TEXT.name, "--store", ledger.store)
    assert (code, "is needed by kept" in told) == (2, True)
    assert run("rm", "fffffff", "--store", ledger.store)[0] == 2
    code, told = run("rm", "--unneeded", "--yes", "--store", ledger.store)
    assert (code, "deleted 3 stages" in told) == (0, True)
    assert not ledger.folder(tiny.ENCODER_STAGE).exists()
    assert run("verify", "--store", ledger.store)[0] == 0
    (ledger.folder(tiny.TEXT) / "results.json").write_text("{")
    code, _ = run("verify", "--store", ledger.store)
    assert code == 1
    assert run("rm", "--store", ledger.store)[0] == 2
    assert run("ls", "--store", ledger.store / "none")[0] == 2
    assert run("forget", "kept", "--store", ledger.store)[0] == 0
    assert ledger.study_names() == []
