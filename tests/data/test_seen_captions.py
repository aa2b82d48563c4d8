"""Which of a picture's captions is seen: as the budget says, drawn for each view, priced so."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source, supervised
from made_inputs import run, texts_of, tokenizer_file
from made_world import jpeg, write_tar

from midstream.config import (
    Amount,
    Amounts,
    Caption,
    ContrastiveTraining,
    Epochs,
    Mixture,
    Rows,
    Share,
    WarmupCosine,
)
from midstream.core.batch import IGNORE
from midstream.cost.known import facts_of_results
from midstream.data.examples import TextCodec
from midstream.data.formats.records import ReadOptions
from midstream.data.lengths import SourceLengths
from midstream.data.rows import build_row, plan_rows, shares_report
from midstream.data.sources import Kind, Source
from midstream.order import stream
from midstream.order.stream import Stream
from midstream.study.results import SourceResult
from midstream.train.contrastive import Captions

PATCHES = 3
SYNTHETIC = [f"a made caption number {number}" for number in range(5)]


def captioned(folder: Path, seed: int, count: int, *, shards: int = 1, most: int = 4) -> Source:
    """Pictures of one to `most` synthetic captions each, and an own one."""
    random = np.random.default_rng(seed)
    made = [random.integers(2, 9, random.integers(1, most + 1)).tolist() for _ in range(count)]
    lengths = random.integers(2, 12, count).tolist()
    pictures = [number % 3 for number in range(count)]
    return make_source(
        folder, "dr", "caption", lengths, pictures=pictures, shards=shards, synthetic=made
    )


def stored(source: Source) -> list[list[list[int]]]:
    """By example and caption: its tokens, read from the files of the shards and nothing else."""
    found: list[list[list[int]]] = []
    for folder in sorted((source.folder / "shards").iterdir()):
        tokens = np.fromfile(folder / "tokens.bin", dtype="<u4").astype(int)
        rows = np.atleast_2d(np.load(folder / "offsets.npy"))
        for example in range(rows.shape[1] - 1):
            parts = [tokens[row[example] : row[example + 1]].tolist() for row in rows]
            found.append(parts)
    return found


def budget_of(kind: str, caption: Caption, tokens: int) -> Mixture | Amounts:
    if kind == "epochs":
        return Amounts(amounts=(Amount(source="dr", epochs=3, caption=caption),))
    sampling: Literal["permutation", "replacement"] = (
        "replacement" if kind == "replacement" else "permutation"
    )
    return Mixture(
        total_tokens=tokens,
        shares=(Share(source="dr", share=1.0, caption=caption),),
        max_epochs=4,
        sampling=sampling,
    )


@given(
    seed=st.integers(0, 999),
    caption=st.sampled_from(["original", "synthetic", "random"]),
    layout=st.sampled_from(["filled", "padded"]),
    kind=st.sampled_from(["epochs", "permutation", "replacement"]),
    shards=st.integers(1, 3),
    chunks=st.sampled_from([4, 64]),
)
@settings(max_examples=24, deadline=None)
def test_rows_hold_the_asked_caption_and_the_plan_is_exact(
    seed: int,
    caption: Caption,
    layout: Literal["filled", "padded"],
    kind: str,
    shards: int,
    chunks: int,
) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # Few chunks: neighbours are read together, as in a source of very many pictures.
        patch.setattr(stream, "MAX_CHUNKS", chunks)
        patch.setattr(stream, "MIN_CHUNK", 4)
        patch.setattr(stream, "GROUP_EXAMPLES", 8)
        source = captioned(Path(folder), seed, 30, shards=shards)
        sources, texts = {"dr": source}, stored(source)
        rows = Rows(row_length=20, batch_rows=4, layout=layout)
        plan = plan_rows(sources, PATCHES, budget_of(kind, caption, 300), rows, seed)
        views = Counter[int]()
        total = 0
        for index in range(len(plan)):
            row = build_row(plan, sources, index, PATCHES)
            total += row.counts.seen
            for placed in plan.layout.row(index):
                seen = texts[placed.example][placed.caption]
                views[placed.example] += 1
                assert (placed.caption > 0) == (caption != "original")
                assert placed.caption == 1 or caption != "synthetic"
                assert placed.length == PATCHES + len(seen)
                text = slice(placed.column + PATCHES, placed.column + placed.length)
                assert row.input_ids[text].tolist() == seen
                if placed.caption:
                    assert row.targets[text].tolist() == [*seen[1:], IGNORE]
                assert (row.targets[placed.column : text.start] == IGNORE).all()
        (quota,) = plan.quotas
        assert total == quota.tokens == plan.seen_tokens
        assert sum(views.values()) == quota.examples
        if kind == "epochs":
            assert set(views.values()) == {3}
        else:
            longest = shares_report(plan, sources, PATCHES)["dr"]["largest_example_tokens"]
            assert abs(total - 300) <= longest


@given(seed=st.integers(0, 999), size=st.integers(1, 9), most=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_totals_of_chunks_are_those_of_their_examples(seed: int, size: int, most: int) -> None:
    with TemporaryDirectory() as folder:
        # Of the same number each, or of another number from picture to picture.
        source = captioned(Path(folder), seed, 40, shards=2, most=most)
        lengths = SourceLengths(source, PATCHES, "random")
        chunks = np.random.default_rng(seed).permutation(-(-40 // size))
        drawn = stream.draws(chunks, f"{seed}")
        for chunk, draw, total in zip(
            chunks, drawn, lengths.totals(chunks, size, drawn), strict=True
        ):
            examples = np.arange(chunk * size, min((chunk + 1) * size, 40))
            assert total == lengths.of(examples, np.repeat(draw, len(examples))).sum()


def views_of(source: Source, seed: int, passes: int) -> np.ndarray:
    """Which caption each example is seen with, by pass: [passes, examples]."""
    order = Stream(SourceLengths(source, PATCHES, "random"), f"{seed}/dr")
    found = np.zeros((passes, len(source)), dtype=int)
    for epoch in range(passes):
        part = order.places(epoch * len(source), (epoch + 1) * len(source))
        found[epoch, part.examples] = part.captions
    return found


def test_every_pass_shows_other_captions_and_each_of_them_as_often(tmp_path: Path) -> None:
    made = [[3] * (1 + number % 5) for number in range(50)]
    source = make_source(tmp_path, "dr", "caption", [2] * 50, pictures=[0] * 50, synthetic=made)
    found = views_of(source, 0, 400)
    assert np.array_equal(found[:50], views_of(source, 0, 50))
    assert not np.array_equal(found[:50], views_of(source, 1, 50))
    for example, captions in enumerate(made):
        times = np.bincount(found[:, example], minlength=6)[1:]
        assert times[len(captions) :].sum() == 0
        # Of 400 views as many for each: a standard deviation is below 10.
        assert abs(times[: len(captions)] - 400 / len(captions)).max() < 45
    several = np.array([len(captions) > 1 for captions in made])
    assert (found[0] != found[1])[several].mean() > 0.4


def test_a_caption_follows_from_the_plan_and_its_place_whatever_was_asked_before(
    tmp_path: Path,
) -> None:
    source = captioned(tmp_path, 3, 60)
    rows, budget = Rows(row_length=20, batch_rows=4), budget_of("permutation", "random", 900)
    there, back = (plan_rows({"dr": source}, PATCHES, budget, rows, 5) for _ in range(2))
    forwards = [there.layout.row(index) for index in range(len(there))]
    backwards = [back.layout.row(index) for index in reversed(range(len(back)))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("asked", ["synthetic", "random", "original"])
def test_a_source_that_lacks_the_asked_caption_is_refused_with_both_numbers(
    tmp_path: Path, asked: Caption
) -> None:
    own = [0, 4, 4] if asked == "original" else [4, 4, 4]
    made = [[3], [3], []] if asked != "original" else [[3], [3], [3]]
    source = make_source(
        tmp_path, "dr", "caption", own, pictures=[0, 1, 2], synthetic=made, shards=2
    )
    rows = Rows(row_length=20, batch_rows=4)
    with pytest.raises(ValueError, match=r"source 'dr': 2 of its 3 pictures.*--require"):
        plan_rows({"dr": source}, PATCHES, budget_of("epochs", asked, 0), rows, 0)
    other: Caption = "synthetic" if asked == "original" else "original"
    assert plan_rows({"dr": source}, PATCHES, budget_of("epochs", other, 0), rows, 0).seen_tokens


def test_what_has_no_captions_is_refused_synthetic_ones(tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("text", "instruct")
    for kind in kinds:
        source = make_source(tmp_path, kind, kind, [3, 4])
        source.check_caption("original")
        told = rf"source '{kind}' holds {kind}, which has no synthetic"
        with pytest.raises(ValueError, match=told):
            source.check_caption("random")


def test_a_budget_that_the_drawn_captions_cannot_meet_is_refused_and_the_next_smaller_is_met(
    tmp_path: Path,
) -> None:
    source, rows = captioned(tmp_path, 8, 20), Rows(row_length=20, batch_rows=4)

    def plan(tokens: int) -> Any:
        share = Share(source="dr", share=1.0, caption="random")
        budget = Mixture(total_tokens=tokens, shares=(share,), max_epochs=2)
        return plan_rows({"dr": source}, PATCHES, budget, rows, 1)

    whole = Amounts(amounts=(Amount(source="dr", epochs=2, caption="random"),))
    held = plan_rows({"dr": source}, PATCHES, whole, rows, 1).seen_tokens
    assert plan(held).quotas[0].examples == 40
    with pytest.raises(ValueError, match=f"'dr' holds {held:,} tokens, the plan needs {held + 1}"):
        plan(held + 1)


# From files to views.


def datacompdr(number: int, captions: list[str], own: bytes | None = b"its own text") -> Any:
    found = {f"k{number}.jpg": jpeg(number)}
    if own is not None:
        found[f"k{number}.txt"] = own
    if captions:
        found[f"k{number}.syn.json"] = json.dumps({"syn_text": captions}).encode()
    return found


def make_tars(folder: Path) -> None:
    """Pictures 0-2 have both kinds of captions, 3 its own, 4 synthetic ones, 5 none."""
    both = {k: v for n in range(3) for k, v in datacompdr(n, SYNTHETIC[: n + 1]).items()}
    write_tar(folder / "0.tar", both)
    rest = datacompdr(3, []) | datacompdr(4, [*SYNTHETIC, " "], None) | datacompdr(5, [], b"")
    write_tar(folder / "1.tar", rest)


def test_all_captions_of_a_picture_are_prepared_and_stored_once(tmp_path: Path) -> None:
    make_tars(tmp_path / "in")
    summary = run("captions", tmp_path / "in", tmp_path / "out", max_reject_fraction=0.5)
    assert summary["captions"] == {"original": 4, "synthetic": 4, "left_out": 1}
    assert summary["rejects"] == {"empty caption": 1}
    source = Source("dr", tmp_path / "out")
    assert source.num_with == {"original": 4, "synthetic": 4}
    assert texts_of(source) == ["its own text"] * 4 + [""]
    assert source.num_synthetic(np.arange(5)).tolist() == [1, 2, 3, 0, 5]
    for example, number in enumerate((1, 2, 3, 0, 5)):
        lengths = [len(source.input_ids(example, caption=c)) for c in range(1, 1 + number)]
        assert lengths == [len(text) + 2 for text in SYNTHETIC[:number]]
        assert supervised(source, example, number) is not None
    total = sum((tmp_path / f"out/shards/{n:06d}/tokens.bin").stat().st_size // 2 for n in range(2))
    assert total == 4 * len("its own text") + 8 + sum(
        len(text) + 2 for number in (1, 2, 3, 0, 5) for text in SYNTHETIC[:number]
    )


def test_what_lacks_the_required_caption_is_left_out_and_the_source_can_be_asked_for_it(
    tmp_path: Path,
) -> None:
    make_tars(tmp_path / "in")
    kinds: tuple[Caption, ...] = ("synthetic", "original")
    for require in kinds:
        options, out = ReadOptions(require=require), tmp_path / require  # type: ignore[arg-type]
        summary = run("captions", tmp_path / "in", out, options=options, max_reject_fraction=0.5)
        assert summary["train"]["examples"] == summary["captions"][require] == 4
        assert sum(summary["rejects"].values()) == 2
        Source("dr", out).check_caption(require)


def test_captions_of_a_picture_that_are_too_long_are_left_out_and_the_others_stay(
    tmp_path: Path,
) -> None:
    write_tar(tmp_path / "in/0.tar", datacompdr(0, ["short", "much " * 9, "brief"]))
    options = ReadOptions(max_tokens=10)
    summary = run("captions", tmp_path / "in", tmp_path / "out", options=options)
    assert summary["captions"] == {"original": 0, "synthetic": 1, "left_out": 2}
    source = Source("dr", tmp_path / "out")
    assert [len(source.input_ids(0, caption=c)) for c in (0, 1, 2)] == [0, 7, 7]


@given(seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_plans_count_with_the_captions_that_are_seen(seed: int) -> None:
    with TemporaryDirectory() as folder:
        source = captioned(Path(folder), seed, 25, shards=2)
        index = source.index
        summary: Mapping[str, Any] = {
            "seconds": 1.0,
            "kind": "caption",
            "num_examples": 25,
            "num_tokens": index["train"]["tokens"],
            "num_images": 25,
            **{name: index[name] for name in ("captions", "seen", "num_targets", "lengths")},
        }
        texts = stored(source)
        made = [[len(text) for text in parts[1:] if text] for parts in texts]
        expected = {
            "original": [[len(parts[0])] for parts in texts],
            "synthetic": [lengths[:1] for lengths in made],
            "random": made,
        }
        for caption, lengths in expected.items():
            seen = SourceResult.model_validate(summary).with_caption(caption)  # type: ignore[arg-type]
            assert seen is not None
            facts = facts_of_results(seen)
            mean = sum(np.mean(part) for part in lengths)
            assert facts.tokens == pytest.approx(mean, abs=1)
            squares = sum(np.mean(np.square(np.array(part) + PATCHES)) for part in lengths)
            kept_squares = sum(
                s + 2 * PATCHES * t + n * PATCHES**2 for n, t, s in dict(facts.shown)[1]
            )
            assert kept_squares == pytest.approx(squares, rel=1e-9)
            if caption != "original":
                assert facts.targets == pytest.approx(mean - 25, abs=1)
        kept = dict(summary, captions={"original": 25, "synthetic": 24})
        assert SourceResult.model_validate(kept).with_caption("random") is None


def test_epochs_name_no_caption_and_show_the_pictures_own(tmp_path: Path) -> None:
    source, rows = captioned(tmp_path, 2, 9), Rows(row_length=20, batch_rows=4)
    plan = plan_rows({"dr": source}, PATCHES, Epochs(sources=("dr",), epochs=1), rows, 0)
    assert plan.seen_tokens == source.num_tokens + 9 * PATCHES


def test_an_encoder_is_trained_on_other_captions_in_every_epoch(tmp_path: Path) -> None:
    made = [[4] * (1 + number % 3) for number in range(300)]
    source = make_source(
        tmp_path, "dr", "caption", [3] * 300, pictures=[0] * 300, shards=2, synthetic=made
    )
    codec, views = TextCodec.from_file(tokenizer_file()), np.arange(300)

    def seen(caption: Caption, views: np.ndarray, seed: int = 0) -> Any:
        training = ContrastiveTraining(
            source="dr",
            text_hidden_size=8,
            text_num_layers=1,
            max_text_tokens=4,
            num_steps=1,
            schedule=WarmupCosine(peak_rate=1e-3),
            seed=seed,
            caption=caption,
        )
        return Captions(source, codec, training).seen(np.arange(300), views).numpy()

    fixed: list[tuple[Caption, int]] = [("original", 0), ("synthetic", 1)]
    for caption, number in fixed:
        for example, tokens in enumerate(seen(caption, views).tolist()):
            own = source.input_ids(example, number)[1:].tolist()
            assert tokens == own + [codec.end_of_text] * (4 - len(own))
    first, second = seen("random", views), seen("random", views + 300)
    assert np.array_equal(first, seen("random", views))
    assert not np.array_equal(first, seen("random", views, seed=1))
    # A third of the pictures has one synthetic caption, which is seen each time.
    alike = (first == second).all(axis=1)
    assert alike[::3].all()
    assert 0.2 < alike[np.arange(300) % 3 > 0].mean() < 0.6
