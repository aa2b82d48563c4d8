"""What is wrong with a study is said before anything of it runs, with its remedy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import own_world
import tiny
from midstream.config import (
    Amount,
    Amounts,
    Budget,
    Config,
    ContinuedCosine,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Evaluation,
    ExpectedSource,
    Mixture,
    PatchProjection,
    Rows,
    Share,
    Training,
)
from midstream.data.rows import plan_rows
from midstream.open_data import open_sources
from midstream.storage import read_json, write_json
from midstream.study import check_tasks, checks
from midstream.study.checks import problems
from midstream.study.graph import plan
from midstream.study.imported import RECORD, ImportRecord
from midstream.study.ledger import Ledger
from midstream.study.problem import Problem, merged, refused
from midstream.study.stage import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    FromScratch,
    Imported,
    LoadDecoder,
    LoadEncoder,
    Prepare,
    Pretrain,
)
from midstream.study.studies import Figure, Line, Study

DECODER = DecoderConfig(hidden_size=16, num_layers=1, num_heads=2, vocab_size=own_world.VOCAB_SIZE)
PATCHES = PatchProjection(image_size=24, patch_size=12, hidden_size=16)
ROWS = Rows(row_length=64, batch_rows=2)
ASKED = Evaluation(text_tasks=("quiz",), limit=4)
Model = Pretrain | Continue | Finetune | LoadDecoder


def trained(budget: Budget, rows: Rows = ROWS, **changes: Any) -> Training:
    return Training(budget=budget, rows=rows, **({"schedule": tiny.warm()} | changes))


def mixed(tokens: int, max_epochs: int = 1, **shares: float) -> Mixture:
    parts = tuple(Share(source=name, share=share) for name, share in shares.items())
    return Mixture(total_tokens=tokens, shares=parts, max_epochs=max_epochs)


def text_run(data: Prepare, budget: Budget | None = None, **changes: Any) -> Pretrain:
    training = trained(budget or mixed(300, web=1.0))
    return Pretrain(data=data, decoder=DECODER, training=training, **changes)


def seen(data: Prepare, budget: Budget, rows: Rows = ROWS, **changes: Any) -> Continue:
    return Continue(
        data=data,
        encoder=PATCHES,
        decoder=DECODER,
        start=FromScratch(),
        training=trained(budget, rows, **changes),
    )


def study_of(*models: Model | Evaluate, asked: Evaluation = ASKED) -> Study:
    lines = tuple(
        Line(
            name=f"line {number}",
            axes={"number": number},
            result=model if isinstance(model, Evaluate) else Evaluate(of=model, evaluation=asked),
        )
        for number, model in enumerate(models)
    )
    figure = Figure(x="number", x_label="number")
    return Study(name="mine", question="Why?", lines=lines, figure=figure)


def told(ledger: Ledger, *models: Model | Evaluate, needed: float | None = None) -> list[Problem]:
    """Everything that is wrong with a study, but for benchmarks."""
    found = problems(plan(study_of(*models), ledger), ledger, needed)
    return [problem for problem in found if "task" not in problem.what]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_world.write_world(tmp_path_factory.mktemp("own") / "world")


@pytest.fixture(scope="module")
def prepared(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store in which all sources of the world are prepared."""
    ledger = Ledger(tmp_path_factory.mktemp("prepared"))
    all_of_it = Epochs(sources=("web", "pictures", "talks"), epochs=1)
    tiny.run_missing(ledger, *seen(own_world.data_of(world), all_of_it).parents)
    return ledger


@pytest.fixture
def empty(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are read in tests of their own."""
    monkeypatch.setattr(check_tasks, "_read", lambda requests: [None] * len(requests))


# ----------------------------------------------------------------------------------- budgets


def budgets_around(sources: dict[str, Any]) -> list[Budget]:
    """Budgets that ask for just what there is, and for one more."""
    patches = PATCHES.num_patches
    text, pictures = sources["web"], sources["pictures"]
    whole = pictures.num_tokens + patches * pictures.num_images
    found: list[Budget] = [Epochs(sources=("web", "talks"), epochs=9)]
    for more in (0, 1):
        found += [
            mixed(text.num_tokens + more, web=1.0),
            mixed(2 * whole + more, 2, pictures=1.0),
            mixed((len(pictures) + more) * ROWS.row_length, pictures=1.0).model_copy(
                update={"by": "sequences"}
            ),
            mixed((text.num_tokens // 64 + more) * 64, web=1.0).model_copy(
                update={"by": "sequences"}
            ),
            Amounts(
                amounts=(
                    Amount(source="web", epochs=3),
                    Amount(source="pictures", tokens=whole + more),
                )
            ),
            Mixture(
                total_tokens=9 * whole + more,
                shares=(Share(source="pictures", share=1.0),),
                sampling="replacement",
            ),
        ]
    return found


def refusal_of(budget: Budget, sources: dict[str, Any]) -> str:
    """Why the plan of rows refuses a budget; empty where it does not."""
    try:
        plan_rows(sources, PATCHES.num_patches, budget, ROWS, 0)
    except ValueError as reason:
        return str(reason)
    return ""


def test_a_budget_is_refused_exactly_where_the_plan_of_rows_would_refuse_it(
    world: Path, prepared: Ledger
) -> None:
    data = own_world.data_of(world)
    sources = open_sources(data, ("web", "pictures", "talks"), prepared)
    outcomes = set()
    for budget in budgets_around(sources):
        refusal = refusal_of(budget, sources)
        outcomes.add(bool(refusal))
        found = told(prepared, seen(data, budget))
        assert len(found) == bool(refusal)
        for problem in found:
            assert problem.what.startswith(refusal.partition(" tokens")[0].partition(" exam")[0])
            assert "the plan needs" in problem.what
            assert "raise max_epochs to" in problem.remedy
    assert outcomes == {True, False}


def test_a_budget_of_a_source_that_was_prepared_before_is_known_without_a_run(
    world: Path, prepared: Ledger, tmp_path: Path, empty: Ledger
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(world, mine)
    shutil.rmtree(mine / "text/web")
    made = prepared.folder(own_world.data_of(world).source("web"))
    shutil.copytree(made / "source", mine / "text/web")
    (problem,) = told(empty, text_run(own_world.data_of(mine), mixed(10**6, web=1.0)))
    assert problem.level == "wrong"
    assert "source 'web' holds" in problem.what
    assert "the plan needs 1,000,000" in problem.what


def test_what_a_recipe_expects_makes_a_budget_doubtful_and_no_more(
    tmp_path: Path, empty: Ledger
) -> None:
    root = own_world.write_world(tmp_path / "world")
    source = ExpectedSource(
        name="web", kind="text", num_examples=10, num_tokens=1_000, num_targets=990
    )
    data = own_world.data_of(root).model_copy(update={"expected": (source,)})
    (problem,) = told(empty, text_run(data, mixed(2_500, web=1.0)))
    assert problem.level == "doubtful"
    assert "is expected to hold 1,000 tokens, the plan needs 2,500" in problem.what
    assert "max_epochs to 3" in problem.remedy
    assert refused([problem]) == ()
    assert told(empty, text_run(data, mixed(2_500, 3, web=1.0))) == []


def test_one_problem_of_many_stages_is_one_line_that_says_the_gravest(
    world: Path, prepared: Ledger
) -> None:
    data = own_world.data_of(world)
    models = [text_run(data, mixed(10**5 + n, web=1.0)) for n in range(20)]
    (problem,) = told(prepared, *models)
    assert len(problem.stages) == 20
    assert str(problem).endswith(f"[{models[0].name} and 19 more]")
    gravest = merged([Problem("a", "b", key="k", weight=1), Problem("c", "d", key="k", weight=2)])
    assert [one.what for one in gravest] == ["c"]


# ------------------------------------------------------------------------- sources and examples


def test_a_source_that_the_world_does_not_hold_is_named_with_the_nearest(
    world: Path, empty: Ledger
) -> None:
    data = own_world.data_of(world)
    models = (
        seen(data, mixed(200, pictrues=0.5, web=0.5)),
        Continue(
            data=data,
            encoder=tiny.encoder_of(data, source="talkz"),
            decoder=DECODER,
            start=FromScratch(),
            training=trained(mixed(200, web=1.0), Rows(row_length=64, batch_rows=2)),
        ),
    )
    found = {problem.what: problem for problem in told(empty, *models)}
    pictures = found["no source 'pictrues' in the data; did you mean 'pictures'?"]
    assert "choose from pictures, talks, web" in pictures.remedy
    assert str(world) in pictures.remedy
    assert "no source 'talkz' in the data; did you mean 'talks'?" in found


def test_an_example_longer_than_its_row_is_named_unless_it_is_cut(
    world: Path, prepared: Ledger
) -> None:
    data = own_world.data_of(world)
    once = Epochs(sources=("pictures",), epochs=1)
    short = Rows(row_length=PATCHES.num_patches + 3, batch_rows=2)
    (problem,) = told(prepared, seen(data, once, short))
    assert f"positions do not fit into a row of {short.row_length}" in problem.what
    assert "shard.tar, sample" in problem.what
    assert "raise row_length" in problem.remedy
    cut = short.model_copy(update={"overflow": "cut"})
    assert told(prepared, seen(data, once, cut)) == []
    talks = Epochs(sources=("talks",), epochs=1)
    for overflow, number in ((None, 0), ("cut", 0), ("refuse", 1)):
        rows = short.model_copy(update={"overflow": overflow})
        chat = Finetune(start=seen(data, once), training=trained(talks, rows))
        assert len(told(prepared, chat)) == number


def test_a_caption_that_the_caption_tower_cannot_take_is_named(
    world: Path, prepared: Ledger
) -> None:
    data = own_world.data_of(world)
    lengths = {}
    for length in (2, 500):
        encoder = tiny.encoder_of(data, max_text_tokens=length)
        model = seen(data, mixed(200, web=1.0)).model_copy(update={"encoder": encoder})
        lengths[length] = [problem.remedy for problem in told(prepared, model)]
    assert lengths == {2: ["raise max_text_tokens"], 500: []}


@pytest.mark.parametrize(
    ("held", "caption", "refused_for"),
    [
        ({"original": 5, "synthetic": 0}, "synthetic", "synthetic"),
        ({"original": 5}, "random", "synthetic"),
        ({"original": 0, "synthetic": 5}, "original", "original"),
        ({"original": 5, "synthetic": 4}, "random", "synthetic"),
        ({"original": 5, "synthetic": 5}, "random", None),
        (None, "synthetic", None),
    ],
)
def test_a_caption_that_a_source_lacks_is_refused_by_name(
    world: Path,
    tmp_path: Path,
    empty: Ledger,
    held: dict[str, int] | None,
    caption: str,
    refused_for: str | None,
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(world, mine)
    counts = {"examples": 5, "tokens": 50, "images": 5}
    index = {"kind": "caption", "fingerprint": "1" * 16, "train": counts, "longest": {}}
    kinds = {} if held is None else {"captions": held}
    write_json(mine / "captions/pictures/source.json", index | kinds)
    share = Share.model_validate({"source": "pictures", "share": 1.0, "caption": caption})
    budget = Mixture(total_tokens=30, shares=(share,))
    found = told(empty, seen(own_world.data_of(mine), budget))
    if refused_for is None:
        assert found == []
    else:
        (problem,) = found
        assert f"of the 5 examples of source 'pictures' have {refused_for}" in problem.what
        assert f"caption={caption!r} asks for one of each" in problem.what


def test_a_budget_counts_the_captions_that_it_asks_for(
    world: Path, tmp_path: Path, empty: Ledger
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(world, mine)
    counts = {"examples": 5, "tokens": 50, "images": 5}
    seen_as = {"synthetic": {"num_tokens": 400, "longest": {"image": 70}}}
    index = {"kind": "caption", "fingerprint": "1" * 16, "train": counts, "longest": {"image": 11}}
    index |= {"captions": {"original": 5, "synthetic": 5}, "seen": seen_as}
    write_json(mine / "captions/pictures/source.json", index)
    data = own_world.data_of(mine)

    def wrong(caption: str) -> list[str]:
        share = Share.model_validate({"source": "pictures", "share": 1.0, "caption": caption})
        model = seen(data, Mixture(total_tokens=300, shares=(share,)))
        return [problem.what for problem in told(empty, model)]

    (own,) = wrong("original")
    assert "holds 70 tokens, 4 patches a picture among them, the plan needs 300" in own
    (synthetic,) = wrong("synthetic")
    assert "its longest example: 74 positions do not fit into a row of 64" in synthetic


def test_a_frozen_decoder_that_sees_no_picture_and_joined_captions_are_refused(
    world: Path, prepared: Ledger
) -> None:
    data = own_world.data_of(world)
    frozen = seen(data, mixed(200, web=1.0), freeze_decoder=True)
    joined = seen(data, mixed(200, pictures=1.0), ROWS.model_copy(update={"layout": "joined"}))
    found = [problem.what for problem in told(prepared, frozen, joined)]
    assert any("web hold no picture" in what for what in found)
    assert any("the joined layout is for text only, pictures" in what for what in found)
    assert len(found) == 2


# ----------------------------------------------------------------------- what a stage starts from


def test_a_completion_that_is_no_milestone_is_refused_with_those_there_are(
    world: Path, empty: Ledger
) -> None:
    text = text_run(own_world.data_of(world), milestones=(0.2, 0.3, 1.0))
    budget = mixed(200, pictures=1.0)

    def after(completion: float) -> Continue:
        start = ContinueFrom(stage=text, completion=completion)
        return seen(text.data, budget).model_copy(update={"start": start})

    # 0.1 + 0.2 is not 0.3, but names the same folder.
    assert told(empty, after(0.2), after(0.1 + 0.2), after(1.0)) == []
    evaluated = Evaluate(of=text, completion=0.7, evaluation=ASKED)
    found = told(empty, after(0.5), evaluated)
    assert [problem.what for problem in found] == [
        f"{text.name} keeps its weights at 20, 30, 100 %, not at {share} %" for share in (50, 70)
    ]
    assert "add 0.5 to its milestones" in found[0].remedy


def test_a_schedule_that_cannot_go_on_from_its_milestone_is_refused(
    world: Path, empty: Ledger
) -> None:
    text = text_run(own_world.data_of(world), milestones=(0.4, 1.0))
    schedule = ContinuedCosine(end_rate=tiny.END_RATE)
    numbers = {}
    for completion in (0.4, 1.0):
        model = seen(text.data, mixed(200, pictures=1.0), schedule=schedule)
        start = ContinueFrom(stage=text, completion=completion)
        found = told(empty, model.model_copy(update={"start": start}))
        numbers[completion] = [problem.remedy for problem in found]
    assert numbers == {0.4: [], 1.0: ["re-warm with WarmupCosine instead"]}


TOWER = EncoderConfig(
    image_size=24, patch_size=12, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=32
)


def imported(folder: Path, config: Config, content: str = "c" * 16) -> Imported:
    record = ImportRecord.model_validate(
        {
            "kind": "encoder" if isinstance(config, EncoderConfig) else "decoder",
            "source": "someone/model",
            "family": "openlm",
            "config": config.model_dump(mode="json"),
            "weights_digest": "1" * 64,
            "content": content,
        }
    )
    write_json(folder / RECORD, record.model_dump(mode="json"))
    return Imported(folder=folder, content="c" * 16)


def test_imported_folders_of_another_model_or_content_are_refused(
    world: Path, empty: Ledger, tmp_path: Path
) -> None:
    data = own_world.data_of(world)

    def decoder(place: str, config: Config, **changes: Any) -> list[Problem]:
        checkpoint = imported(tmp_path / place, config, **changes)
        return told(empty, LoadDecoder(data=data, checkpoint=checkpoint, decoder=DECODER))

    assert decoder("same", DECODER) == []
    (other,) = decoder("other", DECODER.model_copy(update={"hidden_size": 32, "num_layers": 2}))
    assert f"{tmp_path / 'other'} holds another decoder than the recipe takes" in other.what
    assert "hidden_size 16 (it has 32), num_layers 1 (it has 2)" in other.what
    (anew,) = decoder("anew", DECODER, content="d" * 16)
    assert f"{tmp_path / 'anew'} holds dddd" in anew.what
    assert "plan again" in anew.remedy
    checkpoint = Imported(folder=tmp_path / "gone", content="c" * 16)
    (gone,) = told(empty, LoadDecoder(data=data, checkpoint=checkpoint, decoder=DECODER))
    assert f"{tmp_path / 'gone'} is no imported folder" in gone.what


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, None),
        # Shown otherwise, of the same weights; without the last block, which is not looked at.
        ({"resize": "crop", "feature_layer": -1}, None),
        ({"num_layers": 2, "feature_layer": -1}, None),
        ({"num_layers": 1, "feature_layer": -1}, "num_layers 2 (it has 1)"),
        ({"intermediate_size": 64}, "intermediate_size 32 (it has 64)"),
        ({"image_size": 48}, "position_patches 4 (it has 16)"),
    ],
)
def test_an_imported_tower_is_held_to_what_its_weights_are_made_of(
    world: Path, empty: Ledger, tmp_path: Path, changes: dict[str, Any], differs: str | None
) -> None:
    tower = imported(tmp_path / "tower", TOWER.model_copy(update=changes))
    encoder = LoadEncoder(towers=(tower,), encoder=TOWER)
    model = seen(own_world.data_of(world), mixed(200, pictures=1.0))
    found = told(empty, model.model_copy(update={"encoder": encoder}))
    assert [differs in problem.what for problem in found] == ([] if differs is None else [True])


# --------------------------------------------------------------------------------- this machine


def test_a_disk_without_room_is_told_with_both_numbers(
    world: Path, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_run(own_world.data_of(world))
    asked: list[Path] = []

    def usage(place: Path) -> Any:
        asked.append(place)
        return shutil._ntuple_diskusage(10 * 2**30, 0, 3 * 2**30)  # type: ignore[attr-defined]

    monkeypatch.setattr(checks.shutil, "disk_usage", usage)
    assert told(empty, text, needed=3 * 2**30) == []
    (problem,) = told(empty, text, needed=3.5 * 2**30)
    assert problem.level == "lacking"
    assert "may grow by 3.5 GiB, 3 GiB are free on its disk" in problem.what
    assert "make room" in problem.remedy
    # The store is not there yet: the folder that it will lie in says it.
    assert set(asked) == {empty.store.parent}


def test_inputs_that_a_study_was_planned_without_join_the_list(
    tmp_path: Path, empty: Ledger
) -> None:
    from midstream.catalogue import find_study

    study = find_study("paper.table_5", ["scale=79m"])
    found = problems(plan(study, empty), empty)
    missing = [problem for problem in found if "was planned without" in problem.what]
    assert [problem.level for problem in missing] == ["lacking"]
    assert "(--set)" in missing[0].remedy


def test_a_world_or_tokenizer_that_has_gone_since_planning_is_named(
    world: Path, tmp_path: Path, empty: Ledger
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(world, mine)
    text = text_run(own_world.data_of(mine))
    shutil.rmtree(mine)
    assert f"data folder {mine} does not exist" in [one.what for one in told(empty, text)]


# ----------------------------------------------------------------------------------- benchmarks


def read_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are read from now on, by their names."""
    from midstream.read_tasks import read

    names: list[str] = []

    def reading(requests: list[dict[str, Any]]) -> list[str | None]:
        told: list[str | None] = []
        for request in requests:
            names.append(request["task"])
            try:
                read(request)
                told.append(None)
            except (ValueError, OSError) as reason:
                told.append(str(reason))
        return told

    monkeypatch.setattr(check_tasks, "_read", reading)
    return names


def cut_last_line(root: Path) -> None:
    path = root / "text_tasks/quiz.jsonl"
    path.write_text(path.read_text()[:-9])


def remove_a_picture(root: Path) -> None:
    (root / "bench/pope/val2014/3.jpg").unlink()


def break_a_picture(root: Path) -> None:
    path = root / "bench/pope/val2014/4.jpg"
    path.write_bytes(path.read_bytes()[:200])


def remove_a_task(root: Path) -> None:
    shutil.rmtree(root / "bench/pope")


def forget_a_task(root: Path) -> None:
    about = json.loads((root / "world.json").read_text())
    write_json(root / "world.json", about | {"text_tasks": {"quizz": {"chance": 0.5}}})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_last_line, "quiz.jsonl line 14 is not JSON"),
        (remove_a_picture, "val2014/3.jpg, which does not exist"),
        (break_a_picture, "val2014/4.jpg cannot be decoded"),
        (remove_a_task, "bench/pope does not exist"),
        (forget_a_task, "did you mean quizz?"),
    ],
)
def test_a_benchmark_that_is_not_whole_is_told_before_anything_runs(
    tmp_path: Path,
    empty: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    said: str,
) -> None:
    read_requests(monkeypatch)
    root = own_world.write_world(tmp_path / "world")
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))

    def found() -> tuple[Problem, ...]:
        model = seen(own_world.data_of(root), mixed(200, web=1.0))
        return problems(plan(study_of(model, asked=asked), empty), empty)

    assert found() == ()
    harm(root)
    (problem,) = found()
    assert said in str(problem)
    assert problem.level == "wrong"
    assert problem.stages[0].startswith("evaluate-")


def test_a_benchmark_that_was_read_whole_is_read_again_only_when_it_changes(
    tmp_path: Path, empty: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = read_requests(monkeypatch)
    root = own_world.write_world(tmp_path / "world")
    empty.store.mkdir()
    asked = Evaluation(visual_tasks=("pope",), text_tasks=("quiz",))

    def read_now() -> list[str]:
        names.clear()
        models = [seen(own_world.data_of(root), mixed(n, web=1.0)) for n in (200, 300)]
        problems(plan(study_of(*models, asked=asked), empty), empty)
        return list(names)

    assert read_now() == ["pope", "quiz"]
    assert read_now() == []
    path = root / "text_tasks/quiz.jsonl"
    path.write_text(path.read_text() + json.dumps({"query": "x", "choices": ["a", "b"], "gold": 1}))
    assert read_now() == ["quiz"]
    remove_a_picture(root)
    assert read_now() == ["pope"]
    # What is not whole is read again, until it is.
    assert read_now() == ["pope"]


def test_the_process_that_reads_names_what_is_wrong_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    root = own_world.write_world(tmp_path / "world")
    break_a_picture(root)
    own = {"world": str(root), "limit": None}
    pope = own | {"task": "pope", "kind": "visual", "slim": False, "blind": True}
    first, second = check_tasks._read([pope, own | {"task": "quiz", "kind": "text"}])
    assert first is not None
    assert "4.jpg cannot be decoded" in first
    assert second is None
    assert read_json(root / "world.json")
