import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.train.checkpoint import Progress
from midstream.train.metrics import MetricsLog, Record
from midstream.train.parallel import ALONE, Clock
from midstream.train.step import NonFiniteError, Taken, totals_of


def taken(loss: float, norm: float = 1.0) -> Taken:
    return Taken(torch.tensor([loss, norm]), totals_of([], ALONE), ())


def reached(step: int) -> Progress:
    return Progress(step, 10 * step, 100, 0.1, TokenCount())


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    return MetricsLog(tmp_path / "metrics.jsonl", 0)


@pytest.fixture
def record(log: MetricsLog) -> Record:
    return Record(log, Clock(torch.device("cpu")), lambda event: None, reached(0), rows=(4, 10))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_that_cannot_be_read_leave_the_line_of_the_step_before(
    record: Record, log: MetricsLog, tmp_path: Path
) -> None:
    def steps() -> Iterator[list[Batch]]:
        yield []
        raise ValueError("a broken picture")

    rows = steps()
    assert record.next_rows(rows) == []
    assert not record.has_begun
    record.hold(reached(1), taken(2.5, 0.5), 0.1)
    with pytest.raises(ValueError, match="a broken picture"):
        record.next_rows(rows)
    log.close()
    (line,) = lines(tmp_path)
    assert (line["step"], line["loss"], line["grad_norm"], line["rate"]) == (1, 2.5, 0.5, 0.1)
    assert record.write().loss == 2.5


@pytest.mark.parametrize("numbers", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_is_named_by_its_rows_and_has_no_line(
    record: Record, log: MetricsLog, tmp_path: Path, numbers: tuple[float, float]
) -> None:
    record.hold(reached(2), taken(2.5), 0.1)
    assert record.write().step == 2
    record.hold(reached(3), taken(*numbers), 0.1)
    # The plan ends within the third step.
    for ask in (record.read, record.write):
        with pytest.raises(NonFiniteError, match=r"step 2, rows 8 to 9: loss .*before the step"):
            ask()
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [2]
