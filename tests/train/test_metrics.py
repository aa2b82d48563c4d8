import json
from pathlib import Path

import pytest

from midstream.train.metrics import MetricsLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_behind_the_checkpoint_are_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write(step=1)
    log.write(step=2)
    kept = log.position
    log.write(step=3)
    log.close()
    assert steps(path) == [1, 2, 3]
    again = MetricsLog(path, kept)
    assert again.position == kept
    again.write(step=3)
    again.write(step=4)
    again.close()
    assert steps(path) == [1, 2, 3, 4]


def test_the_position_counts_what_a_killed_process_leaves(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write(step=1)
    position = log.position
    assert path.stat().st_size == position > 0
    log.write(step=2)
    log.sync()
    assert steps(path) == [1, 2]
    log.close()


def test_a_start_without_a_checkpoint_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path, 0).close()
    assert path.read_bytes() == b""


def test_a_file_shorter_than_its_checkpoint_says_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds 12 bytes.*1,000; delete"):
        MetricsLog(path, 1000)
    assert path.read_text() == '{"step": 1}\n'


def test_nan_is_refused(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.write(step=1, loss=float("nan"))
    log.close()
