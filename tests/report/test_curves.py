"""The rates of a study before it runs."""

from pathlib import Path
from typing import Any

import pytest

import tiny
from midstream.config import Constant, WarmupCosine
from midstream.config.training import rate_at
from midstream.recipes import paper
from midstream.report import curves as module
from midstream.report.curves import NUM_POINTS, Curve, curves, rates_figure, stretch, write_curves
from midstream.study.label import label
from midstream.study.stages import Continue, ContinueFrom, Evaluate, InitFrom
from midstream.study.store import Ledger
from midstream.study.studies import Figure, Line, Study


def study_of(*results: Evaluate) -> Study:
    lines = tuple(
        Line(name=f"line {number}", axes={"x": number}, result=result)
        for number, result in enumerate(results)
    )
    return Study(name="s", question="?", lines=lines, figure=Figure(x="x", x_label="x"))


def evaluated(**changes: object) -> Evaluate:
    start = ContinueFrom(stage=tiny.TEXT, completion=0.4, **changes)  # type: ignore[arg-type]
    return Evaluate(of=tiny.image_run(start), evaluation=tiny.EVALUATION)


def test_a_continued_stage_begins_where_its_parent_stood_at_the_parents_rate() -> None:
    found, missing = curves(study_of(evaluated()))
    assert missing == []
    text, seen = found
    assert (text.kind, seen.kind) == ("pretrain", "continue")
    assert seen.tokens[0] == 6_400
    at = text.tokens.index(6_400)
    rate = rate_at(tiny.TEXT.training.schedule, 6_400, 16_000)
    assert seen.rates[0] == rate == pytest.approx(text.rates[at], rel=0.2)
    assert seen.tokens[-1] == 6_400 + 8_000
    assert seen.rates[-1] == pytest.approx(tiny.END_RATE)
    assert len(seen.rates) == NUM_POINTS + 1


def test_a_second_image_text_stage_goes_on_where_and_as_fast_as_the_first_ended() -> None:
    high = WarmupCosine(peak_rate=4e-3, end_rate=1e-3, warmup_fraction=0.1)
    first = tiny.image_run(schedule=high)
    second = Continue(**{**dict(tiny.image_run()), "start": InitFrom(stage=first)})
    found, _ = curves(study_of(Evaluate(of=second, evaluation=tiny.EVALUATION)))
    _, before, after = found
    assert after.tokens[0] == before.tokens[-1] == 6_400 + 8_000
    assert after.rates[0] == before.rates[-1] == 1e-3
    assert after.rates[-1] == pytest.approx(tiny.END_RATE)


def test_moments_that_warm_up_hold_the_rate_back_at_the_start() -> None:
    (_, carried), (_, warm) = (
        curves(study_of(evaluated(optimizer=kind)))[0] for kind in ("carry", "warm")
    )
    # One step of a stage of eleven is more than a hundredth of it.
    assert warm.rates == carried.rates
    long = tiny.image_run(
        ContinueFrom(stage=tiny.TEXT, completion=0.4, optimizer="warm"), total_tokens=2_000_000
    )
    held = curves(study_of(Evaluate(of=long, evaluation=tiny.EVALUATION)))[0][1]
    assert held.rates[0] < 0.1 * held.rates[5]


def test_a_stage_of_unknown_length_is_named_and_drawn_once_its_data_is_prepared(
    tiny_ledger: Ledger,
) -> None:
    study = study_of(tiny.RESULT)
    found, (sentence,) = curves(study)
    assert {curve.kind for curve in found} == {"pretrain", "continue"}
    assert sentence.startswith(label(tiny.CHAT))
    assert "once its data is prepared" in sentence
    found, missing = curves(study, tiny_ledger)
    assert missing == []
    assert found[-1].kind == "finetune"
    assert found[-1].tokens[0] == found[-2].tokens[-1]


@pytest.fixture(scope="module")
def drawn() -> list[Curve]:
    """The curves of the paper's figure 4 at its size."""
    found, missing = curves(paper.figure_4(scale="1b"))
    assert missing == []
    return found


def test_a_text_run_whose_checkpoints_are_given_is_drawn_and_each_start_stands_on_it(
    drawn: list[Curve],
) -> None:
    (given,) = [curve for curve in drawn if curve.kind == "given"]
    assert (given.tokens[-1], max(given.rates)) == (4_319_385_600_000, 1e-2)
    seen = {curve.start: curve for curve in drawn if curve.kind == "continue"}
    assert list(seen) == [
        "0 %, warmed up again",
        *(f"{share} %, continued" for share in (20, 40, 60, 80)),
        "100 %, warmed up again",
    ]
    for curve in list(seen.values())[1:5]:
        near = min(given.tokens, key=lambda token: abs(token - curve.leaves))
        assert curve.tokens[0] == curve.leaves == pytest.approx(near, rel=0.02)
        # The records' checkpoints lie up to 0.3 % beside their nominal shares.
        assert curve.rates[0] == pytest.approx(given.rates[given.tokens.index(near)], rel=0.012)
        assert curve.rates[-1] == pytest.approx(3e-5)
    # Every chain ends in fine-tuning, behind its own start.
    chats = {curve.start for curve in drawn if curve.kind == "finetune"}
    assert chats == set(seen)


def test_image_stages_are_drawn_ten_times_as_long_as_in_the_paper(drawn: list[Curve]) -> None:
    assert stretch(drawn) == 10
    assert stretch([curve for curve in drawn if curve.kind != "given"]) is None


def test_the_text_run_is_dashed_and_every_start_has_a_colour_and_a_label(
    drawn: list[Curve], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(module, "saved", lambda figure, _: figures.append(figure) or {})
    rates_figure(drawn, 10)
    axes = figures[0].axes[0]
    lines = dict(zip([(c.kind, c.start) for c in drawn], axes.lines, strict=True))
    assert lines["given", ""].get_linestyle() == "--"
    seen = [line.get_color() for (kind, _), line in lines.items() if kind == "continue"]
    assert len(set(seen)) == 6
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert {start for kind, start in lines if kind == "continue"} <= set(labels)


def test_equal_curves_are_one_and_a_rate_of_zero_is_refused() -> None:
    found, _ = curves(study_of(evaluated(), evaluated(optimizer="carry")))
    assert len(found) == 2
    flat = tiny.text_run(schedule=Constant(peak_rate=0.0))
    with pytest.raises(ValueError, match=r"· \w{7}: the learning rate is 0"):
        curves(study_of(Evaluate(of=flat, evaluation=tiny.EVALUATION)))


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_the_picture_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "sub" / f"rates{suffix}"
    write_curves(curves(study_of(evaluated()))[0], path)
    assert path.stat().st_size > 5_000


def test_another_ending_and_nothing_to_draw_are_refused(tmp_path: Path) -> None:
    drawn = curves(study_of(evaluated()))[0]
    with pytest.raises(ValueError, match=r"rates\.jpg is no \.png"):
        write_curves(drawn, tmp_path / "rates.jpg")
    with pytest.raises(ValueError, match="no stage of this study has a length"):
        write_curves([], tmp_path / "rates.png")
