"""What keeping a frozen encoder's outputs costs and saves, against numbers made by hand."""

import json
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from midstream.cli.app import app
from midstream.cli.catalogue import find_study
from midstream.config import (
    Amount,
    Amounts,
    EncoderConfig,
    Epochs,
    Machine,
    Mixture,
    Sampling,
    Share,
)
from midstream.config.model import encoder_flops, picture_bytes
from midstream.core.tokens import quantity
from midstream.cost.cost import cost
from midstream.cost.graph import order
from midstream.cost.known import sources_of
from midstream.cost.pictures import (
    LEAST_VIEWS,
    FeaturePlan,
    choice_for,
    choose,
    distinct_pictures,
    feature_folder,
    feature_plan,
    passes_seen,
    pictures_seen,
)
from midstream.cost.workload import taken, workload
from midstream.study.label import label
from midstream.study.stages import Continue, Finetune, PrepareSource, Stage, TrainEncoder
from midstream.study.store import Ledger
from midstream.study.studies import Study

AUTO = Machine()
# SigLIP so400m at 384 pixels, as the paper has it.
SO400M = EncoderConfig(
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    num_layers=27,
    num_heads=16,
    intermediate_size=4304,
)


def source(kind: str, examples: int, tokens: int, images: int) -> dict[str, Any]:
    """The counts of a prepared source whose pictures are all distinct."""
    counts = {"num_examples": examples, "num_tokens": tokens, "num_images": images}
    return {"kind": kind, "distinct_images": images, **counts}


SOURCES = {
    "stories": source("text", 50, 5_000, 0),
    "captions": source("caption", 100, 600, 100),
    "chats": source("instruct", 40, 700, 30),
}


def finish(ledger: Ledger, stage: Stage, results: dict[str, Any]) -> None:
    with ledger.open_stage(stage) as work:
        work.finish({"seconds": 1.0} | results)


def prepared(stages: tuple[Stage, ...], store: Path, sources: dict[str, Any]) -> Ledger:
    ledger = Ledger(store)
    for stage in stages:
        if isinstance(stage, PrepareSource):
            finish(ledger, stage, sources[stage.source])
    return ledger


@pytest.fixture
def first(study: Study) -> Continue:
    """The first image-text stage."""
    return next(stage for stage in order(study) if isinstance(stage, Continue))


@pytest.fixture
def ledger(study: Study, tmp_path: Path) -> Ledger:
    """A store in which the sources are prepared."""
    return prepared(order(study), tmp_path, SOURCES)


def with_budget(stage: Continue, budget: Mixture | Amounts | Epochs, **changes: Any) -> Continue:
    training = stage.training.model_copy(update={"budget": budget, **changes})
    return stage.model_copy(update={"training": training})


def only(stages: list[Stage], ledger: Ledger, machine: Machine = AUTO) -> FeaturePlan:
    (found,) = feature_plan(stages, ledger, machine)
    return found


def test_pictures_views_and_flops_of_a_study_are_those_counted_by_hand(
    study: Study, ledger: Ledger
) -> None:
    stages = order(study)
    found = only(list(stages), ledger)
    # Each of two Continue stages: 2,000 tokens of 6 + 4 a caption are 200 views of 100 pictures.
    # Each of two Finetune stages: 2 passes over 30 pictures.
    assert found.pictures == pytest.approx(130)
    assert found.views == pytest.approx(2 * 200 + 2 * 60)
    assert found.store_bytes == pytest.approx(130 * 4 * 24 * 2)
    each = encoder_flops(found.encoder.encoder)
    assert found.live_flops == pytest.approx(520 * each)
    assert found.stored_flops == pytest.approx(130 * each)
    training = [stage for stage in stages if isinstance(stage, Continue | Finetune)]
    flops = [cost(stage, ledger).flops for stage in training]
    assert found.training_flops == pytest.approx(sum(one for one in flops if one is not None))
    assert found.saved_fraction == pytest.approx(390 * each / found.training_flops)
    assert found.choice.decision == "stored"
    assert "4.00 times" in found.choice.reason


def test_stages_that_are_done_count_no_more(study: Study, ledger: Ledger) -> None:
    stages = order(study)
    training = [stage for stage in stages if isinstance(stage, Continue | Finetune)]
    finish(ledger, training[0], {})
    assert only(list(stages), ledger).views == pytest.approx(200 + 2 * 60)
    for stage in training[1:]:
        finish(ledger, stage, {})
    assert feature_plan(list(stages), ledger, AUTO) == []


@pytest.mark.parametrize(
    ("budget", "views"),
    [
        # 10 tokens a caption with its 4 patches; a third of a picture's tokens seen is a third.
        (Mixture(total_tokens=500, shares=(Share(source="captions", share=1.0),)), 50),
        # 900 tokens of 64 a row are 14 sequences, half of them captions.
        (
            Mixture(
                total_tokens=900,
                by="sequences",
                shares=(Share(source="captions", share=0.5), Share(source="stories", share=0.5)),
            ),
            7,
        ),
        # Three in four conversations show a picture.
        (
            Mixture(total_tokens=1280, by="sequences", shares=(Share(source="chats", share=1.0),)),
            15,
        ),
        (Amounts(amounts=(Amount(source="captions", tokens=300),)), 30),
        (Amounts(amounts=(Amount(source="chats", epochs=1),)), 30),
        (Epochs(sources=("captions", "stories"), epochs=1), 100),
        (Mixture(total_tokens=900, shares=(Share(source="stories", share=1.0),)), 0),
    ],
)
def test_views_follow_from_every_kind_of_budget(
    first: Continue, ledger: Ledger, budget: Mixture | Amounts | Epochs, views: int
) -> None:
    found = only([with_budget(first, budget)], ledger)
    assert found.views == pytest.approx(views)
    assert found.pictures == pytest.approx(views)
    assert found.choice.decision == ("live" if views else "stored")


def test_encoders_and_data_are_planned_apart(first: Continue, ledger: Ledger) -> None:
    wider = first.encoder.encoder.model_copy(update={"hidden_size": 48})
    second = first.model_copy(
        update={"encoder": first.encoder.model_copy(update={"encoder": wider})}
    )
    once = with_budget(second, Epochs(sources=("captions",), epochs=1))
    found = feature_plan([first, once], ledger, AUTO)
    assert [one.encoder.identity for one in found] == [
        first.encoder.identity,
        once.encoder.identity,
    ]
    assert [one.choice.decision for one in found] == ["stored", "live"]
    decisions = [choice_for(stage, found) for stage in (first, once)]
    assert decisions == [one.choice for one in found]
    assert choice_for(first.encoder, found) is None


def test_nothing_is_known_before_the_data_is_prepared(study: Study, tmp_path: Path) -> None:
    stages = list(order(study))
    found = only(stages, Ledger(tmp_path))
    assert (found.pictures, found.views, found.store_bytes) == (None, None, None)
    assert (found.live_flops, found.stored_flops, found.saved_fraction) == (None, None, None)
    assert found.choice.decision == "unknown"
    assert "unknown, until its data is prepared" in found.sentence()
    for forced in ("stored", "live"):
        machine = Machine.model_validate({"features": forced})
        assert only(stages, Ledger(tmp_path), machine).choice.decision == forced


def test_the_reference_sizes_are_live_at_the_default_limit_and_stored_above_it(
    first: Continue, tmp_path: Path
) -> None:
    assert picture_bytes(SO400M) == 729 * 1152 * 2 == 1_679_616
    assert encoder_flops(SO400M.model_copy(update={"feature_layer": -1})) == pytest.approx(
        0.666e12, rel=0.01
    )
    encoder = first.encoder.model_copy(update={"encoder": SO400M})
    first = first.model_copy(update={"encoder": encoder})
    sources = {
        "web": source("text", 1, 10**12, 0),
        "pairs": source("caption", 10**9, 30 * 10**9, 10**9),
        "mix": source("instruct", 665_000, 2 * 10**8, 340_000),
    }
    shares = (Share(source="pairs", share=0.1), Share(source="web", share=0.9))
    budget = Mixture(total_tokens=28 * 10**9, by="sequences", shares=shares)
    rows = first.training.rows.model_copy(update={"row_length": 1024})
    pairs = with_budget(first, budget, rows=rows)
    ledger = prepared(tuple(map(first.data.source, ("web", "pairs", "mix"))), tmp_path, sources)

    # A tenth of 28 B tokens: 2.7 M pictures, none of them twice.
    alone = only([pairs], ledger, Machine(max_feature_gib=5000))
    assert alone.store_bytes == pytest.approx(4.6e12, rel=0.01)
    assert alone.views == pytest.approx(28e9 // 1024 / 10) == pytest.approx(alone.pictures)
    assert alone.choice.decision == "live"
    # Lines that share the order see the same ones, but 4.6 TB are more than 64 GiB.
    again = pairs.model_copy(update={"decoder": pairs.decoder.model_copy(update={"norm_eps": 1.0})})
    both = only([pairs, again], ledger)
    assert both.pictures == pytest.approx(alone.pictures)
    assert both.choice.decision == "live"
    assert "4,277 GiB on disk (at most 64)" in both.choice.reason
    assert only([pairs, again], ledger, Machine(max_feature_gib=4500)).choice.decision == "stored"

    chat = with_budget(first, Epochs(sources=("mix",), epochs=4))
    mixed = only([chat], ledger)
    assert mixed.store_bytes == pytest.approx(571e9, rel=0.001)
    assert (mixed.choice.decision, mixed.views) == ("live", 4 * 340_000)
    assert only([chat], ledger, Machine(max_feature_gib=600)).choice.decision == "stored"
    coded = SO400M.model_copy(update={"feature_dtype": "int8"})
    assert picture_bytes(coded) == 729 * (1152 + 2)


@given(
    pictures=st.floats(0, 1e9),
    often=st.floats(0, 20),
    kept=st.integers(0, 10**9),
    size=st.integers(1, 10**7),
    limit=st.floats(0, 1e6),
)
def test_auto_stores_where_it_saves_and_fits(
    pictures: float, often: float, kept: int, size: int, limit: float
) -> None:
    machine, views = Machine(max_feature_gib=limit), often * pictures
    found = choose(pictures=pictures, views=views, kept=kept, picture_bytes=size, machine=machine)
    missing = max(0.0, pictures - kept)
    fits = max(pictures, kept) * size <= limit * 2**30
    # At the very border either answer will do.
    if abs(views - LEAST_VIEWS * missing) > 1e-6 * views:
        assert found.decision == ("stored" if fits and views >= 1.5 * missing else "live")
    for forced in ("stored", "live"):
        other = Machine.model_validate({"features": forced, "max_feature_gib": limit})
        choice = choose(
            pictures=pictures, views=views, kept=kept, picture_bytes=size, machine=other
        )
        assert choice.decision == forced


def test_features_that_are_kept_already_are_used_for_a_single_view(
    first: Continue, ledger: Ledger
) -> None:
    stage = with_budget(first, Epochs(sources=("captions",), epochs=1))
    assert feature_folder(ledger, stage.encoder) is None
    assert only([stage], ledger).choice.decision == "live"
    finish(ledger, stage.encoder, {"weights_digest": "abc"})
    folder = feature_folder(ledger, stage.encoder)
    for name, pictures in (("part-a", 60), ("part-b", 20)):
        (folder / name).mkdir(parents=True)
        (folder / name / "features.bin").write_bytes(bytes(pictures * 4 * 24 * 2))
    found = only([stage], ledger)
    assert (found.kept, found.choice.decision) == (80, "stored")
    assert found.stored_flops == pytest.approx(20 * encoder_flops(stage.encoder.encoder))
    assert found.store_bytes == 100 * 4 * 24 * 2


def test_the_folder_stands_for_weights_and_configuration_alone(
    first: Continue, tmp_path: Path
) -> None:
    encoder = first.encoder

    def folder_of(weights: str = "abc", steps: int = 10, **changes: Any) -> Path:
        training = encoder.training.model_copy(update={"num_steps": steps})
        config = encoder.encoder.model_copy(update=changes)
        stage = encoder.model_copy(update={"encoder": config, "training": training})
        ledger = Ledger(tmp_path / f"{stage.identity} {weights}")
        finish(ledger, stage, {"weights_digest": weights})
        return feature_folder(ledger, stage).relative_to(ledger.store)

    here = folder_of()
    assert folder_of(steps=11) == here
    changes = ("feature_dtype", "int8"), ("feature_layer", -1), ("resize", "crop")
    others = [folder_of(**{name: value}) for name, value in changes]
    others += [folder_of("abd"), folder_of(pixel_mean=(0.1, 0.5, 0.5))]
    assert len({here, *others}) == 6


@pytest.mark.parametrize("num_images", [1, 5])
@pytest.mark.parametrize(("low", "high"), [(0, 3), (1, 1), (2, 3)])
def test_distinct_pictures_are_what_all_draws_have_on_average(
    num_images: int, low: int, high: int
) -> None:
    everything = range(num_images)
    one = [set(s) for s in combinations(everything, min(low, num_images))]
    other = [set(s) for s in combinations(everything, min(high, num_images))]
    expected = fmean(len(a | b) for a, b in product(one, other))
    draws: list[Any] = [(0, "permutation", low), (1, "permutation", high)]
    assert distinct_pictures(num_images, draws) == pytest.approx(expected)
    # One seed means one order, of which both see the beginning.
    draws = [(7, "permutation", low), (7, "permutation", high)]
    longer = min(max(low, high), num_images)
    assert distinct_pictures(num_images, draws) == pytest.approx(longer)
    drawn = [set(s) for s in product(everything, repeat=low + high)]
    draws = [(0, "replacement", low), (1, "replacement", high)]
    expected = fmean(len(s) for s in drawn)
    assert distinct_pictures(num_images, draws) == pytest.approx(expected)


def test_drawing_few_of_a_billion_pictures_loses_no_precision() -> None:
    assert distinct_pictures(10**9, [(0, "replacement", 1000.0)]) == pytest.approx(999.9995)
    assert distinct_pictures(0, [(0, "replacement", 1000.0)]) == 0


def test_a_plan_says_in_one_line_what_it_decides_and_why(study: Study, ledger: Ledger) -> None:
    found = only(list(order(study)), ledger)
    text = found.sentence()
    assert "\n" not in text
    assert text.startswith(f"features of {label(found.encoder)} (4 x 24 bfloat16): stored, ")
    assert "130 pictures (0 kept already), 520 views" in text
    assert f"{quantity(found.live_flops)}FLOPs live" in text
    assert f"({100 * (found.saved_fraction or 0):.1f} % saved)" in text


def test_the_plan_command_prints_each_encoder_as_text_and_as_json(tmp_path: Path) -> None:
    study, ledger = find_study("pocket.when_images_arrive", []), Ledger(tmp_path)
    stages = order(study)
    encoder = next(stage for stage in stages if isinstance(stage, TrainEncoder))
    command = ["plan", "pocket.when_images_arrive", "--store", str(tmp_path)]
    names = {
        name
        for stage in stages
        if isinstance(stage, Continue | Finetune)
        for name in stage.training.budget.source_names
    }
    sources = {name: SOURCES["chats" if name == "talks" else "captions"] for name in names}
    for name, source in sources.items():
        finish(ledger, encoder.data.source(name), source | {"seconds": 1.0})
    found = CliRunner().invoke(app, [*command, "--json"])
    assert found.exit_code in (0, 2), repr(found.exception)
    (values,) = json.loads(found.stdout)["features"]
    assert values == only(list(stages), ledger).values()
    assert values["decision"] == "stored"
    shown = CliRunner().invoke(app, [*command, "--max-feature-gib", "0"]).output
    assert f"features of {label(encoder)}" in shown
    assert "(at most 0); raise max_feature_gib" in shown
    wrong = CliRunner().invoke(app, [*command, "--features", "somewhere"])
    assert wrong.exit_code == 2


def pooled(pool: int | None, tokens: int, **changes: Any) -> Mixture:
    """Half captions, half text."""
    shares = (Share(source="captions", share=0.5, pool=pool), Share(source="stories", share=0.5))
    return Mixture(total_tokens=tokens, shares=shares, max_epochs=99, **changes)


def test_passes_over_pools_and_whole_sources_are_told(first: Continue, ledger: Ledger) -> None:
    # A caption is 6 tokens and 4 patches: 1,000 tokens are 100 views.
    stages = [
        with_budget(first, pooled(pool, tokens))
        for pool, tokens in ((None, 1_000), (20, 1_000), (20, 2_000), (50, 2_000))
    ]
    assert passes_seen(stages, ledger) == [
        "passes over source 'captions' (20 pictures): 2.5 to 5",
        "passes over source 'captions' (50 pictures): 2",
        "passes over source 'captions' (100 pictures): 0.5",
    ]
    assert "50 to 100 with shares of tokens" in pictures_seen(stages, ledger)[0]


def test_a_text_that_comes_again_is_told(first: Continue, ledger: Ledger) -> None:
    stories = sources_of(first.data, {"stories": "original"}, ledger)
    held = stories["stories"].size(0)
    stages = [with_budget(first, pooled(20, round(2 * held * part))) for part in (0.5, 1)]
    assert len(passes_seen(stages, ledger)) == 1
    stages.append(with_budget(first, pooled(20, 6 * held)))
    assert passes_seen(stages, ledger)[1].endswith("tokens): 0.5 to 3")
    assert "'stories'" in passes_seen(stages, ledger)[1]


@pytest.mark.parametrize(
    ("sampling", "seen"), [("permutation", 30), ("replacement", 30 * (1 - (29 / 30) ** 200))]
)
def test_a_store_of_features_holds_the_largest_pool_of_a_seed(
    first: Continue, ledger: Ledger, sampling: Sampling, seen: float
) -> None:
    stages: list[Any] = [
        with_budget(first, pooled(pool, 4_000, sampling=sampling)) for pool in (10, 30)
    ]
    found = only(stages, ledger)
    assert found.pictures == pytest.approx(seen, rel=0.01)
    assert found.views == pytest.approx(400)


def test_amounts_of_a_pool_and_their_work_are_those_of_so_many_pictures(
    first: Continue, ledger: Ledger
) -> None:
    def work(**given: Any) -> tuple[float, float, int]:
        budget = Amounts(amounts=(Amount(source="captions", **given),), max_epochs=99)
        stage = with_budget(first, budget)
        sources = sources_of(stage.data, budget.captions, ledger)
        part = taken(stage.training, sources, stage.model)["captions"]
        found = workload(stage.model, stage.training, sources, "cpu")
        return part.examples, found.images, found.tokens

    assert work(epochs=3, pool=20) == pytest.approx((60, 60, 600))
    assert work(tokens=600, pool=20) == pytest.approx(work(tokens=600))
