"""What a store holds, who needs it, and that nothing else is deleted."""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

import tiny
from midstream.cli.app import app
from midstream.cost.graph import (
    check,
    forget_study,
    other_bytes,
    remove_stages,
    stored_stages,
    unneeded,
)
from midstream.study.label import label
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study

RESULT = Evaluate(of=tiny.TEXT, evaluation=tiny.EVALUATION.model_copy(update={"visual_tasks": ()}))


def study(name: str = "kept") -> Study:
    line = Line(name="line", axes={"x": 1}, result=RESULT)
    return Study(name=name, question="?", lines=(line,), figure=Figure(x="x", x_label="x"))


@pytest.fixture
def ledger(tiny_ledger: Ledger, tmp_path: Path) -> Ledger:
    """Data, an encoder and a text run; a study that needs all but the encoder."""
    folder = tmp_path / "store"
    own = tiny.store_with(tiny_ledger, folder, tiny.DATA, tiny.ENCODER_STAGE, tiny.TEXT)
    own.save_study(study())
    return own


def run(*words: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["store", *map(str, words)], env={"COLUMNS": "200"})
    return found.exit_code, found.output


# The study is one of text alone.
UNNEEDED_DATA = {stage.name for stage in tiny.PREPARED[3:]}


def test_a_stage_is_needed_by_the_studies_that_lead_to_it(ledger: Ledger) -> None:
    ledger.save_study(study("other"))
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
