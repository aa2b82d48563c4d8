"""A ladder of sizes: what changes with the size, what is held out, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from inputs import midstream
from midstream.cli.catalogue import find_study
from midstream.config import DECODERS, Rows
from midstream.recipes import ladder
from midstream.recipes.pocket import pocket_scale
from midstream.recipes.scales import Scale, find_scale
from midstream.report.gather import gather, repeated
from midstream.report.line_rows import parts_of
from midstream.study.stages import Continue, Finetune, FromScratch, Pretrain
from midstream.study.store import Ledger
from midstream.study.studies import Ladder, Line, Study


def parts(line: Line) -> tuple[Pretrain, Continue, Finetune]:
    tuned = line.result.of
    assert not isinstance(tuned.start.start, FromScratch)
    return tuned.start.start.stage, tuned.start, tuned


def peak(stage: Pretrain | Finetune) -> float:
    return stage.training.schedule.peak_rate


def test_pocket_sizes_differ_in_width_and_rates_and_see_the_same_tokens() -> None:
    at = find_scale("pocket", shrink=ladder.POCKET_SHARE)
    study = ladder.sizes(shares=(0.1, 0.5), seeds=(1, 2))
    assert len(study.lines) == 4 * 2 * 2
    for line in study.lines:
        text, seen, tuned = parts(line)
        width = text.decoder.hidden_size
        assert width in ladder.WIDTHS
        assert seen.decoder == text.decoder
        assert line.axes["size"] == pytest.approx(text.decoder.num_parameters / 1e6, rel=1e-3)
        slower = at.decoder.hidden_size / width
        assert peak(text) == pytest.approx(peak(at.text) * slower)
        assert peak(tuned) == pytest.approx(at.finetune_rate * slower)
        assert text.training.budget == at.text.training.budget
    assert study.ladder.predict == max(float(line.axes["size"]) for line in study.lines)


def test_a_further_size_that_is_named_is_predicted() -> None:
    study = find_study("ladder.sizes", ["sizes=16,28,52,96", "predict=16", "seeds=1,2"])
    assert study.studies[0].ladder.predict == min(float(li.axes["size"]) for li in study.lines)


def test_repetitions_draw_all_but_the_encoder_and_every_stage_reads_what_is_held_out() -> None:
    study = ladder.sizes(seeds=(1, 2))
    assert repeated(study)["own"] == ["pretrain", "continue", "finetune"]
    encoders = set()
    for line in study.lines:
        text, seen, tuned = parts(line)
        encoders.add(seen.encoder.identity)
        for stage in (text, seen, tuned, seen.encoder):
            world = stage.data.world
            assert world.validation_fraction == ladder.POCKET_HELD_OUT
    assert len(encoders) == 1


def test_the_papers_sizes_have_their_own_tokens_and_rates() -> None:
    study = ladder.sizes(scale="paper", sizes=("79m", "11m", "154m", "411m"), seeds=(1, 2))
    tokens = {}
    for line in study.lines:
        text, seen, _ = parts(line)
        assert seen.data.world.validation_fraction == ladder.FOLDER_HELD_OUT
        tokens[text.decoder.num_parameters] = text.training.budget.total_tokens  # type: ignore[union-attr]
    assert set(tokens) == {DECODERS[name].num_parameters for name in ladder.PAPER}
    assert len({round(total / size) for size, total in tokens.items()}) == 1


@pytest.mark.parametrize(
    "sizes",
    [("79m", "154m", "411m", "1b"), ("pythia-70m", "pythia-160m", "pythia-410m", "pythia-1.4b")],
)
def test_sizes_whose_text_is_given_are_a_ladder_of_what_follows_it(sizes: tuple[str, ...]) -> None:
    study = ladder.sizes(scale="paper", sizes=sizes, seeds=(1, 2), draws=("image-text",))
    assert len({line.axes["size"] for line in study.lines}) == 4
    assert repeated(study)["own"] == ["continue", "finetune"]


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"sizes": (16, 28, 52)}, "give four or more"),
        ({"sizes": (16, 28, 52, 52)}, "give four or more"),
        ({"seeds": (7,)}, "one model of a size tells no spread"),
        ({"predict": 64}, "none of the sizes 16, 28, 52, 96"),
        ({"sizes": ("11m", 16, 28, 52)}, "are widths"),
        ({"scale": "411m"}, "'pocket' or 'paper'"),
        ({"scale": "paper", "sizes": ("11m", "79m", "154m", "1b")}, "leave text out of draws"),
    ],
)
def test_what_makes_no_ladder_is_refused(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ladder.sizes(**given)


def test_a_prepared_source_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "captions" / "mine" / "source.json"
    index.parent.mkdir(parents=True)
    for held, refused in ((0, True), (3, False)):
        index.write_text(json.dumps({"validation": {"examples": held}}))
        if refused:
            with pytest.raises(ValueError, match=r"captions/mine holds nothing out.*--validation"):
                ladder._check_prepared(tmp_path, "mine")
        else:
            ladder._check_prepared(tmp_path, "mine")


def few_steps(name: str, **given: Any) -> Scale:
    """The pocket scale in a few steps."""
    at = pocket_scale(0.01)
    # So many conversations that some are held out.
    world = tiny.DATA.world.model_copy(update={"num_conversations": 160})
    data = tiny.DATA.model_copy(update={"world": world})
    rows = Rows(row_length=192, batch_rows=4, layout="filled")
    training = at.text.training.model_copy(
        update={"budget": tiny.mixture(3_000, web=1.0), "rows": rows}
    )
    decoder = tiny.DECODER
    return replace(
        at,
        data=data,
        decoder=decoder,
        text=at.text.model_copy(update={"data": data, "decoder": decoder, "training": training}),
        encoders={"SigLIP": tiny.ENCODER_STAGE},
        image_text_tokens=2_000,
        rows=rows,
        finetune_rows=rows,
        asked=tiny.EVALUATION.model_copy(update={"limit": 2, "visual_tasks": ()}),
        draws=("text", "image-text"),
    )


def run_as(ledger: Ledger, line: Line, done: Line) -> None:
    """A line counts as run with what the stages of another gave; a larger model has less loss."""
    size, own = (one.result.of.model.decoder.num_parameters for one in (done, line))
    made = {kind: part.stage for kind, part in parts_of(done.result).items()}
    for kind, part in parts_of(line.result).items():
        if ledger.is_done(part.stage):
            continue
        results = ledger.results(made[kind])
        for held in results.get("held_out", {}).values():
            held["loss"] *= (size / own) ** 0.1 + 0.001 * float(line.axes["seed"])
        with ledger.open_stage(part.stage) as work:
            told = shutil.ignore_patterns("*.json", "SUCCESS", "lock")
            shutil.copytree(ledger.folder(made[kind]), work.folder, ignore=told, dirs_exist_ok=True)
            work.finish(results)


@pytest.mark.slow
def test_a_ladder_goes_from_its_plan_to_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "find_scale", few_steps)
    ledger = Ledger(tmp_path / "store")
    given = ["sizes=8,16,24,32", "shares=0.5", "onsets=1.0", "seeds=1,2"]
    command = ["ladder.sizes", "--store", ledger.store]
    command += [word for one in given for word in ("--set", one)]
    planned = midstream("plan", *command)
    assert planned.exit_code == 0, planned.output
    assert "for the sizes that laws are fitted to" in planned.output
    priced = json.loads(midstream("plan", "--json", *command).stdout)["ladders"][0]
    assert priced["flops"]["predicted"] > 0
    study = find_study("ladder.sizes", given).studies[0]
    first, *others = study.lines
    tiny.run_missing(ledger, first.result)
    for line in others:
        run_as(ledger, line, first)
    facts = gather(study, ledger)
    titles = [law.title for law in facts.laws]
    assert titles == [
        "loss on held-out pictures, after the image-text stage",
        "loss on held-out web, after the image-text stage",
        "loss on held-out talks, after fine-tuning",
    ]
    for law in facts.laws:
        assert [len(rung.values) for rung in law.rungs] == [2, 2, 2, 2]
        assert [rung.predicted for rung in law.rungs] == [False, False, False, True]
    told = midstream("report", *command)
    assert told.exit_code == 0, told.output
    folder = ledger.store / "reports" / study.name
    for name in ("ladder.svg", "ladder.png", "ladder.csv", "index.html"):
        assert (folder / name).is_file()
    assert "held-out pictures" in (folder / "index.html").read_text()


def test_a_ladder_along_no_axis_of_its_lines_is_refused_before_it_runs() -> None:
    study = ladder.sizes(shares=(0.1,), seeds=(1, 2))
    for wrong in (Ladder(axis="sise", predict=0.3449), Ladder(axis="size", predict=0.345)):
        with pytest.raises(ValueError, match=rf"ladder along '{wrong.axis}' that leaves out"):
            Study(**{**dict(study), "ladder": wrong})
