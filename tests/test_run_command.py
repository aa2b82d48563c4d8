"""`midstream run`'s options for a cluster."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from midstream.cli import app
from midstream.config import SlurmSettings
from midstream.run_command import _slurm_settings as settings_of


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
        (["evaluated.gpus=1"], "no field 'evaluated.gpus'"),
    ],
)
def test_bad_settings_are_named(settings: list[str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings_of(True, None, settings, False)


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
    result = CliRunner().invoke(app, ["run", "pocket.when_images_arrive", *options])
    assert result.exit_code == 2
    assert said in result.stderr


def test_without_a_word_nothing_of_slurm_is_asked() -> None:
    assert settings_of(False, None, [], False) is None
    assert settings_of(True, None, [], False) == SlurmSettings()
