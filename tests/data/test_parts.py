"""Examples that show any number of pictures anywhere: at rest, in rows, and cut between parts."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made import make_source, make_sources
from made_documents import Position, drawn_documents, make_documents, positions_of, row_of
from made_features import CONFIG, Encode, pixels_of, quiet

from inputs import png
from midstream.config import Amount, Amounts, Budget, Epochs, Mixture, Rows, Share
from midstream.core.tokens import TokenCount
from midstream.data import source_writer
from midstream.data.feature_store import FeatureStore, StoredImages
from midstream.data.images import LiveImages, encode_fixed
from midstream.data.lengths import SourceLengths, picture_views
from midstream.data.rows import build_row, plan_rows, shares_report
from midstream.data.source_writer import Image, ShardWriter, Shown
from midstream.data.sources import Source, content_hash
from midstream.order.stream import parts_of, pieces_of
from midstream.train import held_out

PATCHES = 4
PLACES = [[0, 3], [], [2], [1, 2, 5], [0]]


# At rest.


@pytest.mark.parametrize(("shards", "joined"), [(1, False), (2, True), (5, False), (5, True)])
def test_pictures_of_examples_are_read_back_by_example_and_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, joined: bool
) -> None:
    monkeypatch.setattr(source_writer, "MOST_SEPARATE", 0 if joined else 99)
    source = make_documents(tmp_path, "talks", PLACES, [6] * 5, kind="instruct", shards=shards)
    assert (source.folder / "columns").is_dir() == joined
    # Alone in its shard, the last example shows its picture as a caption does.
    classic = source.folder / f"shards/{shards - 1:06d}"
    assert (classic / "images.npy").exists() == (shards == 5) != (classic / "pictures.npy").exists()
    assert [source.places_of(example) for example in range(5)] == PLACES
    assert source.num_images == 7
    assert source.before(np.array([0, 1, 3, 5]))[:, 1].tolist() == [0, 2, 3, 7]
    examples = np.array([3, 1, 0, 4])
    found = source.pictures_of(examples)
    expected = [(3, 0), (3, 1), (3, 2), (0, 0), (0, 1), (4, 0)]
    assert list(map(tuple, found.which.tolist())) == expected
    numbers = {(0, 0): 0, (0, 1): 1, (2, 0): 2, (3, 0): 3, (3, 1): 4, (3, 2): 5, (4, 0): 6}
    for which, hashed in zip(expected, found.hashes, strict=True):
        assert source.image_bytes(*which) == png(numbers[which])
        assert hashed.tobytes() == content_hash(png(numbers[which]))
    assert source.index["distinct_images"] == 7
    longest = {shown: one["tokens"] for shown, one in source.index["longest"].items()}
    assert longest == dict.fromkeys(("2 images", "plain", "image", "3 images"), 6)
    assert list(source.index["lengths"]) == ["plain", "image", "2 images", "3 images"]


def test_documents_are_held_out_whole_with_their_pictures(tmp_path: Path) -> None:
    places = [[0, 2] for _ in range(40)]
    train = make_documents(tmp_path, "pages", places, [5] * 40, shards=2, validation=0.4)
    held = Source("pages", train.folder, tmp_path, "validation")
    assert len(train) + len(held) == 40 > len(train) > 0
    assert (train.num_images, held.num_images) == (2 * len(train), 2 * len(held))
    shown = [s.pictures_of(np.arange(len(s))).hashes for s in (train, held)]
    every = sorted(hashed.tobytes() for part in shown for hashed in part)
    assert every == sorted(content_hash(png(n)) for n in range(80))


@pytest.mark.parametrize("places", [[3, 1], [6], [-1], [0, 6]])
def test_places_that_disagree_with_the_tokens_are_refused_by_name(
    tmp_path: Path, places: list[int]
) -> None:
    writer = ShardWriter(tmp_path / "0", kind="interleaved", dtype="<u2", input_name="in")
    shown = [Shown(place, Image("a", 0, 1), b"x") for place in places]
    ones = np.ones(6, np.uint8)
    with pytest.raises(ValueError, match=r"line 7: its pictures stand before the tokens .*has 6"):
        writer.add(ones, ones, name="line 7", content=b"", pictures=shown)


def test_features_and_views_are_those_of_each_picture(tmp_path: Path) -> None:
    source = make_documents(tmp_path, "pages", PLACES, [6] * 5)
    store = FeatureStore(tmp_path / "store", CONFIG)
    assert store.fill(source, None, Encode(), quiet)
    assert len(store) == 7
    images = np.array([(0, 3, 2), (0, 0, 1), (0, 4, 0)])
    sources = {"pages": source}
    live = LiveImages(sources, ("pages",), CONFIG)(images)
    assert np.array_equal(live[2:], pixels_of(source, [4], CONFIG))
    stored = StoredImages(store, sources, ("pages",))(images)
    assert np.array_equal(stored.float(), encode_fixed(Encode(), live, CONFIG))
    again = Epochs(sources=("pages",), epochs=3)
    plan = plan_rows(sources, PATCHES, again, Rows(row_length=16, batch_rows=2), 0)
    views = picture_views(plan.quotas[0], source)
    assert views is not None
    assert (views.distinct, views.views, views.times) == (7, 21, ((3, 7),))


# In rows.


def test_planned_tokens_are_realised_to_the_token_in_300_mixtures(tmp_path: Path) -> None:
    worlds = []
    for seed in range(4):
        base = tmp_path / str(seed)
        sources = make_sources(base, seed, longest=20, begins=bool(seed % 2))
        for number in range(2):
            name = f"pages{number}"
            sources[name] = drawn_documents(base, name, 9 * seed + number, 15, longest=60)
        worlds.append(sources)
    random, num_cut, num_pictures = np.random.default_rng(5), 0, 0
    for turn in range(300):
        sources = worlds[turn % 4]
        pages = f"pages{int(random.integers(2))}"
        names = [pages, *(n for n in ("web", "pics", "talks") if random.integers(2))]
        num_patches = int(random.integers(1, 7))
        rows = Rows(row_length=int(random.integers(28, 60)), batch_rows=4)
        amounts = tuple(Amount(source=name, tokens=int(random.integers(40, 400))) for name in names)
        budget: Budget = Amounts(
            amounts=amounts,
            max_epochs=30,
            sampling="replacement" if random.integers(2) else "permutation",
        )
        plan = plan_rows(sources, num_patches, budget, rows, turn)
        built = [build_row(plan, sources, k, num_patches) for k in range(len(plan))]
        pieces: dict[tuple[int, int], int] = {}
        for k, row in enumerate(built):
            assert row.counts.total == rows.row_length
            shown = [tuple(image) for image in row.images.tolist()]
            for segment, placed in enumerate(plan.layout.row(k)):
                source = sources[plan.names[placed.source]]
                ids, targets, piece = row_of(source, placed, num_patches)
                here = slice(placed.column, placed.column + placed.length)
                assert row.input_ids[here].tolist() == ids
                assert row.targets[here].tolist() == targets
                assert row.position_ids[here].tolist() == list(range(placed.length))
                assert set(row.segment_ids[here].tolist()) == {segment}
                first = [n for n, one in enumerate(piece) if one[0] == "picture"][::num_patches]
                assert shown[: len(first)] == [
                    (placed.source, placed.example, piece[n][1]) for n in first
                ]
                starts = row.image_starts[(row.image_starts >= here.start)]
                assert starts[: len(first)].tolist() == [placed.column + n for n in first]
                shown = shown[len(first) :]
                num_pictures += len(first)
                key = (placed.source, placed.example)
                pieces[key] = pieces.get(key, 0) + placed.length
                if source.kind == "interleaved":
                    num_cut += placed.start > 0
                    whole = positions_of(source, placed.example, num_patches)
                    check_cut(whole, placed.start)
                    check_cut(whole, placed.start + placed.length)
            assert not shown
        for number, quota in enumerate(plan.quotas):
            parts = (row.sources.get(quota.name, TokenCount()) for row in built)
            assert sum(parts, TokenCount()).seen == quota.tokens
            taken = sum(length for (which, _), length in pieces.items() if which == number)
            assert taken == quota.tokens
            if sources[quota.name].kind == "interleaved":
                # Whole documents.
                views = quota.views()
                lengths = SourceLengths(sources[quota.name], num_patches)
                for example in np.flatnonzero(views).tolist():
                    each = int(lengths.of(np.array([example]))[0])
                    assert pieces[number, example] == views[example] * each
    assert num_cut > 100
    assert num_pictures > 1000


def check_cut(whole: list[Position], at: int) -> None:
    """No piece begins inside a picture or between it and the separator that ends it."""
    assert at in (0, len(whole)) or whole[at - 1][0] != "picture"


def test_a_document_is_cut_between_parts_and_a_longer_text_at_tokens() -> None:
    # Two pictures of five positions with their separators, texts of three and four.
    assert parts_of([0, 4], 9, 4) == [5, 3, 5, 4]
    assert pieces_of([5, 3, 5, 4], 10) == [8, 9]
    assert pieces_of(parts_of([0, 1], 2, 4), 10) == [10]
    assert pieces_of(parts_of([0, 1], 2, 4), 9) == [5, 5]
    # A text of 25 goes on where its room ends, behind its picture.
    assert pieces_of(parts_of([0], 26, 4), 10) == [10, 10, 10]
    assert pieces_of(parts_of([], 21, 4), 10) == [10, 10, 1]
    assert pieces_of(parts_of([9], 10, 4), 10) == [9, 5]


def test_two_hundred_pictures_of_one_document_go_through_many_rows(tmp_path: Path) -> None:
    source = make_documents(tmp_path, "pages", [range(0, 600, 3)], [601])
    rows = Rows(row_length=64, batch_rows=4)
    budget = Epochs(sources=("pages",), epochs=1)
    plan = plan_rows({"pages": source}, PATCHES, budget, rows, 0)
    built = [build_row(plan, {"pages": source}, k, PATCHES) for k in range(len(plan))]
    shown = sorted(tuple(image) for row in built for image in row.images.tolist())
    assert shown == [(0, 0, number) for number in range(200)]
    report = shares_report(plan, {"pages": source}, PATCHES)["pages"]
    # Nine pictures with their texts fill 63 positions of a row.
    assert report["cut"] == {"examples": 1, "tokens": 0, "pieces": 23}
    assert report["realised_tokens"] == 601 + 200 * PATCHES == report["largest_example_tokens"]


def test_the_plan_is_gone_through_for_its_cuts_only_where_documents_are_longer_than_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"pages": make_documents(tmp_path, "pages", [[0]] * 3, [6] * 3)}
    budget = Epochs(sources=("pages",), epochs=1)
    for row_length, cut in ((9, {"examples": 3, "tokens": 0, "pieces": 6}), (10, None)):
        rows = Rows(row_length=row_length, batch_rows=2)
        plan = plan_rows(sources, PATCHES, budget, rows, 0)
        if cut is None:
            monkeypatch.setattr(type(plan.quotas[0].stream), "places", None)
        report = shares_report(plan, sources, PATCHES)["pages"]
        assert report["cut"] == (cut or {"examples": 0, "tokens": 0, "pieces": 0})


def test_what_no_row_holds_is_refused_before_rows_are_planned(tmp_path: Path) -> None:
    source = make_documents(tmp_path, "pages", [[0, 8]], [16])
    one = {"pages": source}
    budget = Epochs(sources=("pages",), epochs=1)
    with pytest.raises(ValueError, match=r"of source 'pages' .* 17 positions, a row has 16"):
        plan_rows(one, 16, budget, Rows(row_length=16, batch_rows=2), 0)
    # What begins an example stands in one row with its picture, but for documents.
    at = [[1, 8]]
    talks = make_documents(tmp_path, "talks", at, [16], kind="instruct", begins=True)
    with pytest.raises(ValueError, match=r"of source 'talks' .* 18 positions, a row has 17"):
        plan_rows({"pages": talks}, 16, budget, Rows(row_length=17, batch_rows=2), 0, "cut")
    begun = {"pages": make_documents(tmp_path, "begun", at, [16], begins=True)}
    filled = plan_rows(begun, 16, budget, Rows(row_length=17, batch_rows=2), 0)
    assert sum(build_row(filled, begun, k, 16).counts.image for k in range(len(filled))) == 32
    padded = Rows(row_length=20, batch_rows=2, layout="padded", overflow="cut")
    with pytest.raises(ValueError, match=r"24 positions do not fit.*row of 20;.*filled rows"):
        plan_rows(one, 4, budget, padded, 0)
    longer = padded.model_copy(update={"row_length": 24})
    plan = plan_rows(one, 4, budget, longer, 0)
    assert build_row(plan, one, 0, 4).counts == TokenCount(interleaved=16, image=8, target=14)


def test_talks_with_several_pictures_are_cut_behind_the_last_reply_that_fits(
    tmp_path: Path,
) -> None:
    places = [[0, 1, 10], [5], [0, 12]]
    turn = [0, 0, 0, 1, 1]
    learnt = [turn * 3, turn * 4, [0] * 12 + turn]
    lengths = [len(marks) for marks in learnt]
    source = make_documents(tmp_path, "t", places, lengths, kind="instruct", learnt=learnt)
    one, budget = {"t": source}, Epochs(sources=("t",), epochs=1)
    for row_length in range(8, 40):
        rows = Rows(row_length=row_length, batch_rows=2)
        plan = plan_rows(one, PATCHES, budget, rows, 0, "cut")
        for k in range(len(plan)):
            row = build_row(plan, one, k, PATCHES)
            for placed in plan.layout.row(k):
                whole = positions_of(source, placed.example, PATCHES)
                assert placed.length == fitting(whole, learnt[placed.example], row_length)
                ids, targets, _ = row_of(source, placed, PATCHES)
                here = slice(placed.column, placed.column + placed.length)
                assert (row.input_ids[here].tolist(), row.targets[here].tolist()) == (ids, targets)


def fitting(whole: list[Position], marks: list[int], room: int) -> int:
    """Positions up to the end of the last reply within `room`, else all but a part of a picture."""
    ends = [
        at + 1
        for at, (this, following) in enumerate(pairwise(whole))
        if this[0] == "token"
        and marks[this[1]]
        and not (following[0] == "token" and marks[following[1]])
    ]
    within = [end for end in (*ends, len(whole)) if end <= room]
    room = min(room, len(whole))
    while room and whole[room - 1][0] == "picture":
        room -= 1
    return within[-1] if within else room


def test_shares_by_sequences_count_documents(tmp_path: Path) -> None:
    sources = {
        "pages": drawn_documents(tmp_path, "pages", 1, 30, longest=40),
        "web": make_source(tmp_path, "web", "text", [40] * 20),
    }
    shares = (Share(source="pages", share=0.5), Share(source="web", share=0.5))
    budget = Mixture(total_tokens=640, shares=shares, by="sequences")
    plan = plan_rows(sources, PATCHES, budget, Rows(row_length=32, batch_rows=2), 0)
    assert [(q.planned_sequences, q.examples) for q in plan.quotas] == [(10, 10), (10, 0)]


def test_pictures_of_documents_stand_for_those_of_other_documents(tmp_path: Path) -> None:
    # The second document shows the first one's picture again.
    source = make_documents(tmp_path, "pages", [[0, 2], [1], [0, 1, 3]], [4] * 3)
    budget = Epochs(sources=("pages",), epochs=1)
    plan = plan_rows({"pages": source}, 4, budget, Rows(row_length=32, batch_rows=2), 0)
    others = held_out._others(plan, source)
    assert set(others) == {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)}
    assert all(which[0] != other[0] for which, other in others.items())
    alone = make_documents(tmp_path, "one", [[0, 2]], [4])
    plan = plan_rows(
        {"one": alone}, 4, Epochs(sources=("one",), epochs=1), Rows(row_length=32, batch_rows=2), 0
    )
    assert held_out._others(plan, alone) == {}
