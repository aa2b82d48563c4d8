"""How often pictures were seen, of studies whose axes are called as the ledger's own columns."""

import made_studies

from midstream.report.gather import flat_records, seen_grid, seen_records
from midstream.study.stages import Finetune
from midstream.study.store import Ledger


def test_axes_called_as_the_ledgers_own_columns_stay_apart(ledger: Ledger) -> None:
    axes, scores = ("stage", "views"), {("early", 1): (0.1,), ("late", 2): (0.2,)}
    study = made_studies.study(scores, axes=axes)
    for line in study.lines:
        times = int(line.axes["views"])
        pictures = {"distinct": 30, "views": 30 * times, "times": [[times, 30]]}
        share = {"planned_tokens": 9, "realised_tokens": 9, "largest_example_tokens": 3}
        stage = line.result.of
        assert isinstance(stage, Finetune)
        sources = {"talks": share | {"pictures": pictures}}
        made_studies.finish(ledger, stage, {"tokens_seen": 9, "sources": sources})
    records = seen_records(study, ledger)
    own = ("axis.stage", "axis.views", "stage", "source", "pictures", "views", "times")
    assert [tuple(one[name] for name in own) for one in flat_records(records)] == [
        ("early", 1, "finetune", "talks", 30, 30, "1:30"),
        ("late", 2, "finetune", "talks", 30, 60, "2:30"),
    ]
    rows = seen_grid(study, records).rows
    assert [(row[0], row[1], row[-2]) for row in rows] == [
        ("early, 1", "Fine-tuning", "1.00"),
        ("late, 2", "Fine-tuning", "2.00"),
    ]
