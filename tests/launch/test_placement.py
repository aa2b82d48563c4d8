from collections.abc import Callable

import pytest
from pydantic import ValidationError

from midstream.config import Machine
from midstream.launch.local import machine_for
from midstream.study.studies import Study, Suite, study_from_json

MakeStudy = Callable[..., Study]


def test_a_studys_placement_counts_unless_the_run_says_otherwise(make_study: MakeStudy) -> None:
    study = make_study().model_copy(update={"machine": {"workers": 4, "threads": 3}})
    chosen = {"workers": 1, "threads": None}
    assert machine_for(study, chosen) == Machine(workers=1, threads=3)
    assert machine_for(make_study(), {}) == Machine()


def test_several_nodes_run_stages_one_by_one(make_study: MakeStudy) -> None:
    found = machine_for(make_study(), {"nodes": 2, "master": "a:1", "workers": 3})
    assert (found.nodes, found.workers) == (2, 1)


def test_a_placement_is_checked_with_its_study_and_kept_with_it(make_study: MakeStudy) -> None:
    plain = make_study()
    with pytest.raises(ValidationError, match=r"no field 'worker'; did you mean 'workers'"):
        Study.model_validate({**dict(plain), "machine": {"worker": 2}})
    study = Study.model_validate({**dict(plain), "machine": {"tracking": ["wandb"]}})
    again = study_from_json(study.model_dump_json())
    assert again.machine == {"tracking": ["wandb"]}
    assert Machine.model_validate(again.machine).tracking == ("wandb",)


def test_a_placement_changes_no_stage(make_study: MakeStudy) -> None:
    plain = make_study()
    placed = plain.model_copy(update={"machine": {"workers": 4, "tracking": ["wandb"]}})
    assert [one.identity for one in placed.results] == [one.identity for one in plain.results]


def test_a_suites_own_placement_counts_for_all_of_it(make_study: MakeStudy) -> None:
    study = make_study().model_copy(update={"machine": {"threads": 3}})
    suite = Suite(name="all", question="?", studies=(study,), machine={"workers": 5})
    assert machine_for(suite, {}) == Machine(workers=5)


def test_a_tracker_that_is_not_there_is_refused_before_anything_starts(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("midstream.launch.local.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'midstream\[tensorboard\]'"):
        machine_for(make_study(), {"tracking": ["tensorboard"]})
