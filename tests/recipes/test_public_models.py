"""Studies along other people's checkpoints, and what is said where some are missing."""

from pathlib import Path

import pytest

import tiny
from checkpoints import save_checkpoint
from midstream.cli.catalogue import find_study
from midstream.config import WarmupCosine
from midstream.cost.graph import missing_inputs, order, plan
from midstream.exchange.import_model import import_model
from midstream.exchange.import_source import ImportRequest
from midstream.launch.checks import lacking
from midstream.recipes import paper
from midstream.recipes.scales import find_scale
from midstream.report.curves import curves
from midstream.study.families import PUBLIC_MODELS, SHARES
from midstream.study.imported import what_can_run
from midstream.study.stages import Continue, LoadDecoder
from midstream.study.store import Ledger


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_figure_4_is_planned_along_a_public_models_revisions(name: str, tmp_path: Path) -> None:
    study = find_study("paper.figure_4", [f"scale={name}"])
    work = plan(study, Ledger(tmp_path))
    assert len(study.lines) == 6
    assert work.num_unknown == 0
    assert sum(isinstance(row.stage, LoadDecoder) for row in work.rows) == 5
    told = " ".join(missing_inputs(study))
    for share in SHARES:
        source = PUBLIC_MODELS[name].source(share)
        assert f"midstream import {source} --out checkpoints/{name}/{share * 100:.0f}" in told


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_revisions_stand_near_their_shares_and_have_public_rates(name: str) -> None:
    model = PUBLIC_MODELS[name]
    for share in SHARES:
        position = model.position(share)
        assert position.tokens_seen / position.total_tokens == pytest.approx(share, abs=0.035)
        assert position.rate is not None


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("pythia-160m", 162.3),
        ("pythia-1.4b", 1414.6),
        ("smollm2-360m", 361.8),
        ("olmo2-1b", 1484.9),
    ],
)
def test_sizes_are_those_of_the_published_models(name: str, millions: float) -> None:
    found = PUBLIC_MODELS[name].decoder.num_parameters / 1e6
    assert found == pytest.approx(millions, abs=0.05)


def test_rates_start_where_the_models_own_schedule_stood() -> None:
    drawn, missing = curves(paper.figure_4(scale="pythia-160m"))
    assert missing == []
    given = next(curve for curve in drawn if curve.kind == "given")
    assert max(given.rates) == pytest.approx(6e-4, rel=1e-3)
    starts = {curve.start for curve in drawn if curve.kind == "continue"}
    assert starts == {
        "0 %, warmed up again",
        *(f"{share} %, continued" for share in (20.3, 39.9, 60.1, 79.7)),
        "100 %, warmed up again",
    }


def test_a_study_asks_for_the_checkpoints_that_its_lines_use_and_no_others() -> None:
    told = [one for one in missing_inputs(paper.table_8(scale="1b")) if "language model" in one]
    assert len(told) == 1
    assert "checkpoints/80" in told[0]
    stages = order(find_study("paper.figure_4", ["scale=1b", "completions=[0.0,0.2]"]))
    assert [s.planned_tokens for s in stages if isinstance(s, LoadDecoder)] == [863_877_120_000]


def test_what_can_be_run_without_missing_checkpoints_is_named() -> None:
    assert what_can_run(paper.figure_8(scale="pocket")) is None
    assert "paper.figure_6.1b" in (what_can_run(paper.sections(scale="1b")) or "")
    (problem,) = lacking(paper.figure_4(scale="1b"))
    assert "1 of 8 lines and baselines can be run: text_completion 0" in str(problem)
    assert "none of the 1 lines" in (what_can_run(paper.table_8(scale="1b")) or "")


def test_claims_that_no_line_can_decide_are_left_out() -> None:
    study = paper.figure_4(scale="1b", completions=(0.0, 0.8))
    assert [claim.lower for claim in study.claims] == [{"text_completion": 0.0}]


def test_own_checkpoints_without_any_and_a_text_run_of_a_public_model_are_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="named by the percentage"):
        find_scale("imported", inputs=str(tmp_path))
    with pytest.raises(ValueError, match="is there already"):
        find_scale("pythia-70m", text="trained")


def test_checkpoints_of_ones_own_are_a_scale_with_the_starts_that_are_there(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    inputs = _inputs(tiny_ledger, tmp_path, {"20": (2_000, 2e-3), "100": (10_000, 1e-4)})
    study = find_study("paper.figure_4", ["scale=imported", f"inputs={inputs}", "text_mixture=web"])
    assert [line.axes["text_completion"] for line in study.lines] == [0.0, 20.0, 100.0]
    assert what_can_run(study) is None
    loaded = [stage for stage in order(study) if isinstance(stage, LoadDecoder)]
    assert [(one.planned_tokens, one.planned_rate) for one in loaded] == [
        (2_000, 2e-3),
        (10_000, 1e-4),
    ]
    continued = [stage for stage in order(study) if isinstance(stage, Continue)]
    assert all(stage.decoder == loaded[0].decoder for stage in continued)
    # The peak that the imports tell, and a hundredth of it.
    assert continued[0].training.schedule == WarmupCosine(
        peak_rate=3e-3, end_rate=3e-5, warmup_fraction=0.05
    )
    chart, _ = curves(study)
    assert "20 %, continued" in {curve.start for curve in chart}


def test_checkpoints_that_are_there_are_used_and_the_others_planned(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    inputs = _inputs(tiny_ledger, tmp_path, {"pythia-160m/80": (8_000, 1e-3)})
    told = missing_inputs(find_study("paper.figure_8", ["scale=pythia-160m", f"inputs={inputs}"]))
    assert not any("language model" in one for one in told)
    told = missing_inputs(find_study("paper.figure_4", ["scale=pythia-160m", f"inputs={inputs}"]))
    assert sum("language model" in one for one in told) == 4


def _inputs(tiny_ledger: Ledger, folder: Path, kept: dict[str, tuple[int, float]]) -> Path:
    """A folder of inputs: the tiny world, and imports of a tiny model at these tokens and rates."""
    inputs = folder / "inputs"
    inputs.mkdir()
    (inputs / "data").symlink_to(tiny_ledger.folder(tiny.WORLD) / "world")
    source = save_checkpoint("gpt_neox", folder / "hub" / "neox")
    for name, (tokens, rate) in kept.items():
        request = {
            "source": str(source),
            "out": str(inputs / "checkpoints" / name),
            "tokens_seen": tokens,
            "total_tokens": 10_000,
            "rate": rate,
            "peak_rate": 3e-3,
        }
        (inputs / "checkpoints" / name).parent.mkdir(parents=True, exist_ok=True)
        import_model(ImportRequest.model_validate(request))
    return inputs
