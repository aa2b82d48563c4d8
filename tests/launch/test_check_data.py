"""What a study asks of its data that they do not hold is said before anything of it runs."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

import own_world
import tiny
from midstream.config import (
    Amount,
    Amounts,
    Budget,
    Epochs,
    ExpectedSource,
    LoRA,
    Mixture,
    Rows,
    Share,
    TokenizerFile,
)
from midstream.core.storage import read_json, write_json
from midstream.data.rows import plan_rows
from midstream.launch import check_data
from midstream.launch.check_data import Problem, data_problems, merged, refused
from midstream.study.label import label
from midstream.study.stages import Continue, Finetune, FromScratch
from midstream.study.store import Ledger
from midstream.work.open_model import open_sources
from own_studies import DECODER, PATCHES, ROWS, mixed, seen, text_run, told, trained

pytestmark = pytest.mark.usefixtures("no_process")


@pytest.fixture(scope="module")
def prepared(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store in which all sources of the world are prepared."""
    ledger = Ledger(tmp_path_factory.mktemp("prepared"))
    all_of_it = Epochs(sources=("web", "pictures", "talks"), epochs=1)
    tiny.run_missing(ledger, *seen(own_world.data_of(world), all_of_it).parents)
    return ledger


def made(world: Path, **changes: Any) -> None:
    """Five captions of the world count as prepared."""
    index: dict[str, Any] = {"kind": "caption", "fingerprint": "1" * 16, "longest": {}}
    index |= {"train": {"examples": 5, "tokens": 50, "images": 5}}
    index |= {"tokenizer": {"vocab_size": 9}}
    write_json(world / "captions/pictures/source.json", index | changes)


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


def test_a_pool_that_is_none_and_one_too_small_for_its_budget_are_named_beforehand(
    world: Path, prepared: Ledger
) -> None:
    data = own_world.data_of(world)
    sources = open_sources(data, ("web", "pictures", "talks"), prepared)
    have, row = len(sources["pictures"]), ROWS.row_length

    def budget(name: str, pool: int, number: int) -> Mixture:
        shares = (Share(source=name, share=1.0, pool=pool),)
        return Mixture(total_tokens=number * row, shares=shares, by="sequences", max_epochs=3)

    for given, said in (
        (budget("pictures", have + 1, 1), f"'pictures' holds {have} examples, the pool asks for"),
        (budget("web", 2, 1), "'web' holds text, and a pool is of pictures"),
        (budget("pictures", 2, 7), "pool of 2 of source 'pictures' holds 2 examples"),
    ):
        (problem,) = told(prepared, seen(data, given))
        assert (problem.level, said in problem.what) == ("wrong", True)
        assert said in refusal_of(given, sources)
    assert "raise max_epochs to 4" in problem.remedy
    assert told(prepared, seen(data, budget("pictures", 2, 6))) == []


def test_what_a_part_of_a_source_holds_is_doubtful_near_the_border_and_no_more(
    world: Path, prepared: Ledger
) -> None:
    data, pool = own_world.data_of(world), 5
    sources = open_sources(data, ("web", "pictures", "talks"), prepared)

    def budget(tokens: int) -> Amounts:
        return Amounts(amounts=(Amount(source="pictures", tokens=tokens, pool=pool),))

    (held,) = re.findall("holds ([0-9,]+) tokens", refusal_of(budget(10**6), sources))
    exactly = int(held.replace(",", ""))
    for more in (0, 1):
        assert bool(refusal_of(budget(exactly + more), sources)) == bool(more)
        (problem,) = told(prepared, seen(data, budget(exactly + more)))
        assert (problem.level, "is expected to hold" in problem.what) == ("doubtful", True)
        assert "raise max_epochs to 2" in problem.remedy
    assert told(prepared, seen(data, budget(exactly // 3))) == []
    (problem,) = told(prepared, seen(data, budget(3 * exactly)))
    assert problem.level == "wrong"


def test_a_budget_of_a_source_that_was_prepared_before_is_known_without_a_run(
    world: Path, prepared: Ledger, mine: Path, empty: Ledger
) -> None:
    shutil.rmtree(mine / "text/web")
    source = prepared.folder(own_world.data_of(world).source("web"))
    shutil.copytree(source / "source", mine / "text/web")
    (problem,) = told(empty, text_run(own_world.data_of(mine), mixed(10**6, web=1.0)))
    assert problem.level == "wrong"
    assert "source 'web' holds" in problem.what
    assert "the plan needs 1,000,000" in problem.what


def test_a_source_without_a_file_that_is_read_is_told_when_it_is_planned(
    mine: Path, empty: Ledger
) -> None:
    shutil.rmtree(mine / "text/web")
    (mine / "text/web").mkdir()
    for name in ("README.md", "a.csv", ".hidden.jsonl"):
        (mine / "text/web" / name).touch()
    (problem,) = data_problems([own_world.data_of(mine).source("web")], empty)
    assert f"{mine / 'text/web'} holds no file that a source of text is read from" in problem.what
    (mine / "text/web/a.jsonl").touch()
    assert [*data_problems([own_world.data_of(mine).source("web")], empty)] == []


def test_a_prepared_source_of_another_kind_or_tokenizer_is_told_when_it_is_planned(
    world: Path, prepared: Ledger, mine: Path, empty: Ledger
) -> None:
    source = own_world.data_of(world).source("pictures")
    for place in ("text/web", "captions/pictures"):
        shutil.rmtree(mine / place)
        shutil.copytree(prepared.folder(source) / "source", mine / place)
    (problem,) = data_problems([own_world.data_of(mine).source("web")], empty)
    assert f"{mine / 'text/web'} is prepared as caption and lies among the sources of text" in (
        problem.what
    )
    assert [*data_problems([own_world.data_of(mine).source("pictures")], empty)] == []
    index = read_json(mine / "captions/pictures/source.json")
    index["tokenizer"]["vocab_size"] += 1
    write_json(mine / "captions/pictures/source.json", index)
    (problem,) = data_problems([own_world.data_of(mine).source("pictures")], empty)
    assert "captions/pictures is prepared with a tokenizer of " in problem.what
    assert f"{mine / 'captions/pictures/tokenizer.json'}" in problem.remedy


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
    assert str(problem).endswith(f"[{label(models[0])} and 19 more]")
    gravest = merged([Problem("a", "b", key="k", weight=1), Problem("c", "d", key="k", weight=2)])
    assert [one.what for one in gravest] == ["c"]


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
    few = "give more of them, or load an encoder (midstream import)"
    assert lengths == {2: [few, "raise max_text_tokens"], 500: [few]}


@pytest.mark.parametrize(
    ("examples", "remedy"),
    [(100, "give more of them"), (260, "lower batch_images to 4"), (272, None)],
)
def test_an_encoder_needs_captions_beside_those_that_are_held_apart(
    world: Path, empty: Ledger, examples: int, remedy: str | None
) -> None:
    held = ExpectedSource(
        name="pictures", kind="caption", num_examples=examples, num_tokens=4_000, num_targets=4_000
    )
    data = own_world.data_of(world).model_copy(update={"expected": (held,)})
    found = list(data_problems([tiny.encoder_of(data)], empty))
    assert [(one.level, one.remedy.partition(",")[0]) for one in found] == (
        [("doubtful", remedy)] if remedy else []
    )


@pytest.mark.parametrize(
    ("held", "caption", "refused_for"),
    [
        ({"original": 5, "synthetic": 0}, "synthetic", "synthetic"),
        ({"original": 5, "synthetic": 0}, "random", "synthetic"),
        ({"original": 0, "synthetic": 5}, "original", "original"),
        ({"original": 5, "synthetic": 4}, "random", "synthetic"),
        ({"original": 5, "synthetic": 5}, "random", None),
        (None, "synthetic", None),
    ],
)
def test_a_caption_that_a_source_lacks_is_refused_by_name(
    mine: Path,
    empty: Ledger,
    held: dict[str, int] | None,
    caption: str,
    refused_for: str | None,
) -> None:
    made(mine, **({} if held is None else {"captions": held}))
    share = Share.model_validate({"source": "pictures", "share": 1.0, "caption": caption})
    budget = Mixture(total_tokens=30, shares=(share,))
    found = told(empty, seen(own_world.data_of(mine), budget))
    if refused_for is None:
        assert found == []
    else:
        (problem,) = found
        assert "source 'pictures': " in problem.what
        assert f"{held[refused_for] if held else 0} of its 5 pictures" in problem.what
        assert f"{refused_for} caption" in problem.what
        assert f"--require {refused_for}" in problem.remedy
        assert f"caption={caption!r} asks for one of each" in problem.what


def test_a_budget_counts_the_captions_that_it_asks_for(mine: Path, empty: Ledger) -> None:
    seen_as = {"synthetic": {"num_tokens": 400, "longest": {"image": 70}}}
    counts = {"original": 5, "synthetic": 5}
    made(mine, longest={"image": 11}, captions=counts, seen=seen_as)
    data = own_world.data_of(mine)

    def wrong(caption: str) -> list[str]:
        share = Share.model_validate({"source": "pictures", "share": 1.0, "caption": caption})
        model = seen(data, Mixture(total_tokens=300, shares=(share,)))
        return [problem.what for problem in told(empty, model)]

    (own,) = wrong("original")
    assert "holds 70 tokens, 4 patches a picture among them, the plan needs 300" in own
    (synthetic,) = wrong("synthetic")
    assert "its longest example: 74 positions do not fit into a row of 64" in synthetic


def test_a_picture_needs_room_for_what_begins_its_example(mine: Path, empty: Ledger) -> None:
    rows = Rows(row_length=PATCHES.num_patches + 1, batch_rows=2, overflow="cut")
    for kind, begin, is_refused in (
        ("caption", "<s>", True),
        ("caption", "", False),
        ("interleaved", "<s>", False),
    ):
        made(mine, kind=kind, longest={"image": 11})
        tokenizer = TokenizerFile(path=mine / "none.json", sha256="1" * 64, begin_of_text=begin)
        data = own_world.data_of(mine).model_copy(update={"tokenizer": tokenizer})
        model = seen(data, Epochs(sources=("pictures",), epochs=1), rows)
        found = [problem.what for problem in told(empty, model)]
        assert any("take 6 positions, a row has 5" in what for what in found) == is_refused, found


def test_a_tokenizers_file_with_more_ids_than_the_decoder_is_refused(
    world: Path, empty: Ledger, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = TokenizerFile.read(tmp_path / "tokenizer.json")
    data = own_world.data_of(world).model_copy(update={"tokenizer": file})
    for size, expected in ((2, ["tokenizer.json has 3 ids, the decoder has 2"]), (3, [])):
        model = seen(data, mixed(200, web=1.0))
        decoder = model.decoder.model_copy(update={"vocab_size": size})
        found = told(empty, model.model_copy(update={"decoder": decoder, "start": FromScratch()}))
        assert [one.what.rpartition("/")[2] for one in found] == expected


def test_adapters_without_peft_are_told_before_anything_runs(
    world: Path, prepared: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = seen(own_world.data_of(world), mixed(200, web=1.0), lora=LoRA(rank=1, alpha=1))
    for there, expected in ((None, ["lora is given, and peft is not installed"]), (1, [])):
        monkeypatch.setattr(check_data, "find_spec", lambda _, there=there: there)
        assert [problem.what for problem in told(prepared, stage)] == expected


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


def test_a_budget_of_less_than_one_sequence_is_refused(world: Path, empty: Ledger) -> None:
    data = own_world.data_of(world)
    length = ROWS.row_length
    for total, refused_ones in ((length - 1, 1), (length, 0)):
        budget = mixed(total, pictures=0.5, web=0.5).model_copy(update={"by": "sequences"})
        found = told(empty, seen(data, budget))
        assert len(found) == refused_ones, found
        assert all(f"raise total_tokens to {length}" in problem.remedy for problem in found)
