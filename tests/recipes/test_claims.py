"""Every claim that a recipe makes can be judged by the lines that it plans."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from midstream.cli.catalogue import catalogue, find_study
from midstream.report.findings import claim_sides, column_of
from midstream.report.line_rows import line_rows
from midstream.report.verdicts import compare
from midstream.study.store import Ledger
from midstream.study.studies import Study

# Those that need a model or data of the user's say so; the suite's claims are those of its figures.
OTHERS = ("own_model.", "paper.suite")


@pytest.mark.parametrize("name", [n for n in sorted(catalogue()) if not n.startswith(OTHERS)])
def test_both_sides_of_a_claim_share_repetitions(name: str, tmp_path: Path) -> None:
    study = find_study(name, [])
    if not isinstance(study, Study):
        return
    rows, numbers = line_rows(study, Ledger(tmp_path)), count()
    for claim in study.claims:
        column = column_of(claim.score)
        scored = [replace(row, values={**row.values, column: next(numbers)}) for row in rows]
        comparison = compare(study, scored, column, claim_sides(claim))
        assert comparison.contrast.n == len({line.axes.get("seed") for line in study.lines})
