"""What a study can decide, before it runs and after its first seeds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import made_studies as made
import numpy as np
import pytest
from typer.testing import CliRunner

from midstream.cli import run_commands
from midstream.cli.app import app
from midstream.report.gather import gather
from midstream.report.power import Decision, decide, hours_each, powers
from midstream.study.store import Ledger
from midstream.study.studies import Claim, Study

PLACES = (0, 20, 40, 60, 80)
BETTER = Claim(text="80 is better than 20", higher={"x": 80}, lower={"x": 20})


def score(place: int, seed: int, spread: float = 0.02) -> float:
    """A score that varies with the seed, the same whenever it is asked for."""
    generator = np.random.default_rng([place, seed])
    return 0.3 + place / 1000 + spread * float(generator.normal())


def scores(seeds: int, spread: float = 0.02) -> dict[tuple[int, ...], tuple[float, ...]]:
    return {(p,): tuple(score(p, seed, spread) for seed in range(seeds)) for p in PLACES}


def run_here(ledger: Ledger, seeds: int, spread: float = 0.02) -> Study:
    study = made.study(scores(seeds), claims=(BETTER,))
    made.fill(ledger, study, scores(seeds, spread))
    return study


def test_by_a_given_spread_each_claim_has_a_detectable_difference(ledger: Ledger) -> None:
    study = made.study(scores(3), claims=(BETTER,))
    (found,) = powers(study, ledger, 0.02)
    assert (found.basis, found.repetitions) == ("given", 3)
    # sd of a difference 2.8 points, three seeds, pooled over five places: t of 8 and 80 % power.
    assert found.detectable == pytest.approx(0.02 * 2**0.5 / 3**0.5 * (2.306 + 0.889), rel=0.03)
    assert 8 <= found.needed <= 10


def test_the_stores_own_spread_counts_where_seeds_have_run(ledger: Ledger) -> None:
    study = made.study(scores(4), claims=(BETTER,))
    assert powers(study, ledger) == []
    run_here(ledger, 4)
    (found,) = powers(study, ledger)
    assert found.basis == "measured"
    assert 0.01 < found.spread < 0.06


def test_a_further_seed_costs_what_its_own_stages_cost() -> None:
    study = made.study(scores(2))
    names = [line.name for line in study.lines]
    users = {"text": names, "seen": names[:1], "more": names[1:2], "both": names[:2]}
    assert hours_each({"text": 9.0, "seen": 1.0, "more": 2.0, "both": 4.0}, users, study) == 1.5


def test_more_seeds_are_added_until_every_interval_is_as_narrow_as_asked(ledger: Ledger) -> None:
    study = run_here(ledger, 3)
    found = decide(study, ledger, 0.02, most=200)
    assert found.pilot == (0, 1, 2)
    assert not found.capped
    number = len(found.seeds)
    assert number > 3
    assert len(set(found.seeds)) == number
    whole = made.study(scores(number), claims=(BETTER,))
    order = {seed: at for at, seed in enumerate(found.seeds)}
    assert set(order) == set(range(number))
    study = found.study(whole)
    assert study.pilot == (0, 1, 2)
    made.fill(ledger, study, scores(number))
    for finding in gather(study, ledger).findings:
        if finding.claim or "highest" in finding.sentence:
            contrast = finding.comparison.contrast
            assert contrast.high - contrast.mean <= 0.02 + 1e-9


def test_seeds_are_added_where_they_are_needed_and_a_limit_is_said() -> None:
    needed = {(("x", 80),): 5, (("x", 20),): 40}
    found = Decision({place: min(n, 6) for place, n in needed.items()}, (0, 1, 2), capped=True)
    study = found.study(made.study({(p,): (0.0,) * 6 for p in PLACES}))
    counts = {p: sum(line.axes["x"] == p for line in study.lines) for p in PLACES}
    assert counts == {0: 3, 20: 6, 40: 3, 60: 3, 80: 5}
    assert found.sentence(2) == (
        "intervals of 2 points to either side take 5 to 6 seeds a place, where the limit ends; "
        "3 are done"
    )


@pytest.mark.parametrize(
    ("given", "most", "what"),
    [
        (scores(1), 9, "1 seed, and"),
        (scores(3), 3, "--max-seeds is 3"),
        ({(p,): (0.3, 0.3) for p in PLACES}, 9, "spread of zero"),
        ({(20,): (0.2, 0.3, 0.1)}, 9, "no claim and no two places"),
    ],
)
def test_what_cannot_be_decided_is_refused(
    ledger: Ledger, given: Mapping[Any, Any], most: int, what: str
) -> None:
    study = made.study(given)
    made.fill(ledger, study, given)
    with pytest.raises(ValueError, match=what):
        decide(study, ledger, 0.02, most)


RECIPE = """
import made_studies as made
from midstream.study.studies import Claim, Study

def study(seeds: list[int] = [0, 1, 2]) -> Study:
    made_up = made.study(
        {(place,): (0.0,) * (max(seeds) + 1) for place in (0, 20, 40, 60, 80)},
        claims=(Claim(text="80 is better", higher={"x": 80}, lower={"x": 20}),),
    )
    lines = [line for line in made_up.lines if line.axes["seed"] in seeds]
    return made_up.model_copy(update={"lines": tuple(lines)})
"""


def test_run_decide_runs_the_first_seeds_and_then_those_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    ran: list[Study] = []

    def run(study: Study, ledger: Ledger, *_: Any, **__: Any) -> int:
        ran.append(study)
        made.fill(ledger, study, scores(200))
        return 0

    monkeypatch.setattr(run_commands, "run_and_tell", run)
    command = ["run", f"{tmp_path / 'mine.py'}:study", "--store", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, [*command, "--decide", "2", "--max-seeds", "150"])
    assert result.exit_code == 0, result.output
    first, second = ran
    assert (len(first.lines), first.pilot) == (15, ())
    assert second.pilot == (0, 1, 2)
    assert {line.result.identity for line in first.lines} <= {
        line.result.identity for line in second.lines
    }
    assert "intervals of 2 points to either side take" in result.output


def test_plan_says_what_the_claims_can_decide(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RECIPE)
    command = ["plan", f"{tmp_path / 'mine.py'}:study", "--store", str(tmp_path / "runs")]
    told = CliRunner().invoke(app, command).output
    assert "is not known before two seeds have run here" in " ".join(told.split())
    told = " ".join(CliRunner().invoke(app, [*command, "--spread", "2"]).output.split())
    assert "x 80 against x 20: 3 seeds find 5.2 points; 9 make the interval" in told
    assert "one more seed at every place" in told
    values = json.loads(CliRunner().invoke(app, [*command, "--spread", "2", "--json"]).output)
    assert [one["needed"] for one in values["decides"]] == [9]


def test_what_cannot_be_decided_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_commands, "run_and_tell", lambda *_, **__: pytest.fail("it ran"))
    (tmp_path / "mine.py").write_text(RECIPE)
    (tmp_path / "fixed.py").write_text(
        RECIPE.replace("seeds: list[int] = [0, 1, 2]", "")
        .replace("(max(seeds) + 1)", "3")
        .replace('if line.axes["seed"] in seeds', "")
    )
    for file, more, what in (
        ("mine", ["--set", "seeds=[1]"], "1 seed, and"),
        ("mine", ["--max-seeds", "3"], "--max-seeds is 3"),
        ("fixed", [], "no argument 'seeds'"),
    ):
        command = ["run", f"{tmp_path / file}.py:study", "--store", str(tmp_path / "runs")]
        result = CliRunner().invoke(app, [*command, "--decide", "2", *more])
        assert result.exit_code == 2, result.output
        assert what in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("given", "spread", "needed"),
    [(scores(1), 0.02, None), ({(20,): (0.2, 0.3), (80,): (0.4, 0.5)}, 0.0005, 3)],
)
def test_one_seed_or_two_of_two_places_find_nothing(
    ledger: Ledger, given: Mapping[Any, Any], spread: float, needed: int | None
) -> None:
    (found,) = powers(made.study(given, claims=(BETTER,)), ledger, spread)
    assert found.detectable is None
    assert needed in (None, found.needed)
