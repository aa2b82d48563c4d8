"""`midstream run`: its options for a cluster, and what it refuses before or after preparation."""

from pathlib import Path

import pytest

import own_world
from inputs import midstream
from midstream.cli.run_commands import slurm_settings as settings_of
from midstream.config import SlurmSettings


def test_the_command_line_goes_before_the_file_and_a_kind_before_all(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(
        'partition = "gpu"\ngpus = 8\nextra = { exclude = "node1" }\n'
        "[stages.pretrain]\nnodes = 4\n[stages.evaluate]\ngpus = 2\nextra = { exclusive = true }\n"
    )
    found = settings_of(True, file, ["partition=fast", "evaluate.gpus=1", "restarts=2"], False)
    assert found is not None
    assert (found.partition, found.gpus, found.restarts) == ("fast", 8, 2)
    evaluate, pretrain = found.resources("evaluate"), found.resources("pretrain")
    assert (evaluate.gpus, evaluate.partition, evaluate.nodes) == (1, "fast", 1)
    assert evaluate.extra == {"exclude": "node1", "exclusive": True}
    assert (pretrain.gpus, pretrain.nodes) == (8, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["time_minutes=2"], "greater than or equal to 10"),
        (["warn_seconds=400", "time_minutes=10"], "more than half of time_minutes 10"),
        (["partiton=x"], "did you mean 'partition'"),
        (["evaluate.gpu=1"], "did you mean 'gpus'"),
        (["evaluated.gpus=1"], "no stage is of kind 'evaluated'; kinds are"),
        (['extra={"--job-name": "mine"}'], "extra gives job-name, .* leave it out"),
        (['evaluate.extra={"mem": "1G"}'], "extra gives mem; give memory in its place"),
    ],
)
def test_bad_settings_are_named(settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings_of(True, None, settings, False)


def test_numbers_are_names_of_accounts_and_a_text_is_the_lines_of_a_setup() -> None:
    given = ["account=2004567", "setup=module load cuda\nulimit -c 0", 'extra={"--exclusive":true}']
    found = settings_of(True, None, given, False)
    assert found is not None
    assert (found.account, found.extra) == ("2004567", {"exclusive": True})
    assert found.setup == ("module load cuda", "ulimit -c 0")


@pytest.mark.parametrize("said", ["stages=3", 'stages={"pretrain": 2}'])
def test_stages_that_are_no_tables_are_refused_with_their_form(tmp_path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=r"such as \[stages.pretrain\]"):
        settings_of(True, None, [said], False)
    file = tmp_path / "cluster.toml"
    file.write_text("stages.pretrain = 2")
    with pytest.raises(ValueError, match=r"such as \[stages.pretrain\]"):
        settings_of(True, file, [], False)


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("partition: gpu")
    with pytest.raises(ValueError, match=r"cluster.toml is not TOML"):
        settings_of(True, file, [], False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--detach"], "go with --slurm"),
        (["--slurm-set", "gpus=1"], "go with --slurm"),
        (["--slurm", "--nodes", "2"], "--slurm-set nodes=N"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: list[str], said: str) -> None:
    result = midstream("run", "pocket.when_images_arrive", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_without_a_word_nothing_of_slurm_is_asked() -> None:
    assert settings_of(False, None, [], False) is None
    assert settings_of(True, None, [], False) == SlurmSettings()


STUDY_FILE = """
from pathlib import Path

from own_studies import *
from own_world import data_of

from midstream.study.stages import ContinueFrom


def study(root: Path, tokens: int = 200) -> Study:
    text = text_run(data_of(root), mixed(200, web=1.0))
    model = seen(text.data, mixed(tokens, pictures=1.0))
    return study_of(model.model_copy(update={"start": ContinueFrom(stage=text)}))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A study of a small world, as it is named on the command line."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "study.py").write_text(STUDY_FILE)
    root = own_world.write_world(folder / "world")
    return f"{folder / 'study.py'}:study", "--set", f"root={root}"


@pytest.mark.slow
def test_a_budget_that_the_data_cannot_give_ends_a_run_before_its_text_run(
    asked: tuple[str, str, str], tmp_path: Path
) -> None:
    where = ("--set", "tokens=90000", "--store", tmp_path)
    # What raw files hold is not known before they are prepared.
    assert midstream("plan", *asked, *where).exit_code == 0
    result = midstream("run", *asked, *where, "--workers", 2, "--device", "cpu")
    assert result.exit_code == 2, result.output
    error, heading, told = result.stderr.splitlines()
    assert error.startswith("error: the data is prepared, nothing else was started")
    assert heading == "wrong with the study or its data:"
    assert "source 'pictures' holds" in told
    assert "the plan needs 90,000; raise max_epochs to" in told
    kinds = {path.parent.name.partition("-")[0] for path in tmp_path.glob("*/SUCCESS")}
    assert kinds == {"preparetokenizer", "preparesource"}
    stages = {path.parent.name.partition("-")[0] for path in tmp_path.glob("*/stage.json")}
    assert stages == kinds
    # From now on a plan says it, and so does a run at once.
    for command in ("plan", "run"):
        again = midstream(command, *asked, *where)
        assert again.exit_code == 2
        assert "source 'pictures' holds" in again.output
    skipped = midstream("run", *asked, *where, "--skip-checks", "--device", "cpu")
    assert skipped.exit_code == 1
    assert "raise max_epochs above 1 or lower the budget" in skipped.stderr
    kinds = {path.parent.name.partition("-")[0] for path in tmp_path.glob("*/SUCCESS")}
    assert "pretrain" in kinds


@pytest.mark.slow
def test_a_study_with_nothing_wrong_runs_to_its_end(
    asked: tuple[str, str, str], tmp_path: Path
) -> None:
    result = midstream("run", *asked, "--store", tmp_path, "--workers", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert midstream("plan", *asked, "--store", tmp_path).exit_code == 0
