"""Captions of another set joined with pictures by uid: what is joined, lost, and read of it."""

from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_captions import SYNTHETIC, apple, img2dataset, picture, read, write_tar
from made_inputs import as_json

from midstream.data import join_captions as joining
from midstream.data.formats.records import CaptionRecord, ReadOptions
from midstream.data.join_captions import join_captions
from midstream.data.uids import CAPTIONS, PICTURES, join_partition, partition_of


def uid(number: int) -> str:
    return f"{number:032x}"


def write_sets(
    folder: Path, pictures: Iterable[Iterable[int]], captions: Iterable[Iterable[int]]
) -> None:
    """Archives of these samples on both sides."""
    for side, sets, make in (
        ("p", pictures, img2dataset),
        ("s", captions, lambda n: apple(uid(n))),
    ):
        for number, samples in enumerate(sets):
            members = {name: data for n in samples for name, data in make(n).items()}
            write_tar(folder / side / f"{number:05d}.tar", list(members.items()))


def joined(folder: Path, workers: int = 1) -> dict[str, int]:
    return join_captions(
        str(folder / "p"),
        str(folder / "s"),
        folder / "out",
        workers=workers,
        progress=lambda done, note: None,
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_pictures_get_their_own_and_five_synthetic_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(joining, "RUN_TARS", 2 if workers == 1 else 16)
    monkeypatch.setattr(joining, "PARTITION_TARS", 1 if workers == 1 else 64)
    write_sets(tmp_path, [[1, 2, 3], [4, 5], [6]], [[6, 3], [9, 2, 1], [5], []])
    counts = joined(tmp_path, workers)
    assert counts["joined"] == 5
    assert (counts["pictures: no caption"], counts["captions: no picture"]) == (1, 1)
    records = read(str(tmp_path / "out"), ReadOptions(require="synthetic"))
    assert all(isinstance(record, CaptionRecord) for record in records)
    for number, record in zip([1, 2, 3, 5, 6], records, strict=True):
        assert isinstance(record, CaptionRecord)
        assert record.caption == f"caption {number}"
        assert record.synthetic == tuple(f"{text} of {uid(number)}" for text in SYNTHETIC)
        assert record.picture.data == picture(number)
        assert record.picture.file.startswith(str(tmp_path / "p"))
        assert record.where.startswith(str(tmp_path / "p"))
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_sets_at_urls_are_joined_and_read_there(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1, 2], [3]], [[3, 1, 2]])
    system = fsspec.filesystem("memory")
    for file in tmp_path.rglob("*.tar"):
        system.pipe_file(f"/joining/{file.relative_to(tmp_path)}", file.read_bytes())
        file.unlink()
    places = ("memory://joining/p", "memory://joining/s/*.tar")
    join_captions(*places, tmp_path / "out", workers=1, progress=lambda done, note: None)
    records = read(str(tmp_path / "out"))
    system.rm("/joining", recursive=True)
    assert [r.picture.data for r in records if isinstance(r, CaptionRecord)] == [
        picture(number) for number in (1, 2, 3)
    ]


def test_of_several_captions_the_first_that_is_one_is_kept(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1]], [[1]])
    members = img2dataset(1)
    key = next(iter(members)).partition(".")[0]
    del members[f"{key}.txt"]
    members[f"{key}.json"] = as_json({"uid": uid(1), "caption": [" ", "a", "b"]})
    write_tar(next((tmp_path / "p").glob("*.tar")), list(members.items()))
    assert joined(tmp_path)["pictures: further captions left out"] == 2
    (record,) = read(str(tmp_path / "out"))
    assert isinstance(record, CaptionRecord)
    assert record.caption == "a"


def test_what_is_lost_is_counted_on_each_side(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1, 2], [2, 3, 4]], [[1, 2, 3], [3, 7]])
    shas = {1: "a" * 64, 2: "b" * 64}
    for number, sha in shas.items():
        members = apple(uid(10 + number)) | {
            f"{uid(10 + number)}.json": as_json({"uid": uid(10 + number), "sha256": sha})
        }
        write_tar(tmp_path / "s" / f"1{number}.tar", list(members.items()))
        shown = img2dataset(10 + number)
        name = next(name for name in shown if name.endswith(".json"))
        shown[name] = as_json({"uid": uid(10 + number), "sha256": "a" * 64})
        write_tar(tmp_path / "p" / f"1{number}.tar", list(shown.items()))
    bad = img2dataset(20)
    name = next(name for name in bad if name.endswith(".json"))
    bad[name] = as_json({"uid": "not one"})
    del (none := img2dataset(21))[next(iter(none))]
    write_tar(tmp_path / "p/2.tar", [*bad.items(), *none.items()])
    assert {key: value for key, value in joined(tmp_path).items() if value} == {
        "pictures: samples": 9,
        "pictures: uids": 7,
        "pictures: no uid of 32 hex digits": 1,
        "pictures: sample without a picture": 1,
        "captions: samples": 7,
        "captions: uids": 7,
        "pictures: uid twice": 1,
        "captions: uid twice": 1,
        "pictures: no caption": 1,
        "captions: no picture": 1,
        "sha256 differs": 1,
        "joined": 4,
        "joined without a sha256 to compare": 3,
    }


def test_a_uid_in_capitals_or_with_dashes_is_the_same(tmp_path: Path) -> None:
    numbers = {0xABCDEF: str.upper, 0xFEDCBA: lambda text: str(UUID(text))}
    write_sets(tmp_path, [numbers], [])
    made = {}
    for number, write in numbers.items():
        sample = {f"{uid(number)}.json": as_json({"uid": write(uid(number))})}
        made |= apple(uid(number)) | sample
    write_tar(tmp_path / "s/0.tar", list(made.items()))
    assert joined(tmp_path)["joined"] == 2


def test_sets_that_have_nothing_to_join_and_other_folders_are_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    write_sets(tmp_path, [[1, 2]], [[3]])
    with pytest.raises(ValueError, match=r"no uid in common: of 2 pictures and 1 captions none"):
        joined(tmp_path)
    assert not out.exists()
    sample = {name: data for name, data in img2dataset(1).items() if not name.endswith("json")}
    write_tar(tmp_path / "p/00000.tar", list(sample.items()))
    with pytest.raises(ValueError, match=r"no sample of the pictures .*save_additional_columns"):
        joined(tmp_path)
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(ValueError, match=r"out holds something else; give a new folder"):
        joined(tmp_path)
    (out / "mine").unlink()
    # Sides that change places are another join than the one that is done.
    write_sets(tmp_path, [[1], [2]], [[1], [2]])
    joined(tmp_path)
    places = str(tmp_path / "s"), str(tmp_path / "p")
    with pytest.raises(ValueError, match=r"no sample of the pictures .*pictures come first"):
        join_captions(*places, out, workers=1, progress=lambda done, note: None)


def test_half_a_tar_is_named_and_what_was_read_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "RUN_TARS", 1)
    write_sets(tmp_path, [[1], [2]], [[1, 2]])
    whole = (tmp_path / "p/00001.tar").read_bytes()
    (tmp_path / "p/00001.tar").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"p/00001.tar is not a whole tar file .*fetch it again"):
        joined(tmp_path)
    assert not (tmp_path / "out").exists()
    (tmp_path / "p/00001.tar").write_bytes(whole)
    read_files = []
    samples_of = joining.samples_of

    def noting(path: str) -> object:
        read_files.append(Path(path).name)
        return samples_of(path)

    monkeypatch.setattr(joining, "samples_of", noting)
    assert joined(tmp_path)["joined"] == 2
    assert read_files == ["00001.tar"]
    # Done, and with other inputs done anew.
    assert joined(tmp_path)["joined"] == 2
    assert read_files == ["00001.tar"]
    write_sets(tmp_path, [], [[1]])
    assert joined(tmp_path)["joined"] == 1


def test_a_tar_that_changed_since_it_was_joined_is_named(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1, 2]], [[1, 2]])
    joined(tmp_path)
    write_sets(tmp_path, [[2, 1]], [])
    with pytest.raises(ValueError, match=r"p/00000.tar, sample .* another than when .*join capt"):
        read(str(tmp_path / "out"))
    (tmp_path / "p").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"p/00000.tar is gone, .*--images"):
        read(str(tmp_path / "out"))
    write_sets(tmp_path, [[1, 2]], [])
    (tmp_path / "moved/00000.tar").write_bytes((tmp_path / "p/00000.tar").read_bytes())
    (tmp_path / "p/00000.tar").unlink()
    assert len(read(str(tmp_path / "out"), ReadOptions(images=str(tmp_path / "moved")))) == 2


def test_a_table_that_is_gone_is_made_again_and_neighbours_are_left_alone(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1, 2]], [[1, 2]])
    neighbour = tmp_path / f".out.v2.{'0' * 32}.tmp"
    neighbour.mkdir()
    assert joined(tmp_path)["joined"] == 2
    assert neighbour.is_dir()
    (table,) = (tmp_path / "out").glob("*.parquet")
    table.unlink()
    assert joined(tmp_path)["joined"] == 2
    assert table.is_file()


def test_a_joined_set_has_neither_splits_nor_further_fields(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1]], [[1]])
    joined(tmp_path)
    for options, what in (
        (ReadOptions(split="train"), "says no split"),
        (ReadOptions(text_key="alt"), "keeps no field alt"),
    ):
        with pytest.raises(ValueError, match=what):
            read(str(tmp_path / "out"), options)


NUMBERS = st.lists(st.integers(0, 6), max_size=12)


@given(shown=NUMBERS, told=NUMBERS, shas=st.lists(st.sampled_from([None, 1, 2]), min_size=24))
@settings(max_examples=60, deadline=None)
def test_a_partition_joins_what_dictionaries_join(
    shown: list[int], told: list[int], shas: list[int | None]
) -> None:
    def keys(numbers: list[int], sha: list[int | None]) -> list[pa.Array]:
        uids = [number.to_bytes(16, "big") for number in numbers]
        return [pa.array(uids, pa.binary(16)), pa.array(sha[: len(numbers)], pa.uint64())]

    places = [pa.array([n % 3 for n in range(len(shown))], pa.int32())]
    places.append(pa.array(range(len(shown)), pa.int32()))
    texts = [pa.array([str(n).encode() for n in range(len(told))], pa.binary())]
    rows, at, lost = join_partition(
        pa.table([*keys(shown, shas[12:]), *places], schema=PICTURES),
        pa.table([*keys(told, shas), *texts], schema=CAPTIONS),
    )
    first = {number: place for place, number in reversed(list(enumerate(told)))}
    expected, seen, other = {}, set(), 0
    for place, number in enumerate(shown):
        if number in first and number not in seen:
            mine, theirs = shas[12 + place], shas[first[number]]
            if mine is None or theirs is None or mine == theirs:
                expected[place] = first[number]
            else:
                other += 1
        seen.add(number)
    assert dict(zip(rows.tolist(), at.tolist(), strict=True)) == expected
    assert lost["sha256 differs"] == other
    assert lost["pictures: uid twice"] == len(shown) - len(seen)
    assert lost["pictures: no caption"] == len(seen - set(told))
    assert lost["captions: no picture"] == len(set(told) - seen)


def test_uids_that_are_counted_up_fall_evenly_into_partitions() -> None:
    uids = pa.array([number.to_bytes(16, "big") for number in range(8000)], pa.binary(16))
    sizes = np.bincount(partition_of(uids, 8), minlength=8)
    assert sizes.min() > 800
    assert sizes.max() < 1200
    assert partition_of(uids.slice(100), 8).tolist() == partition_of(uids, 8)[100:].tolist()


def test_a_set_behind_a_link_is_written_there(tmp_path: Path) -> None:
    write_sets(tmp_path, [[1]], [[1]])
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to("large")
    for captions in ([[1]], [[1, 2]]):
        write_sets(tmp_path, [[1]], captions)
        assert joined(tmp_path)["joined"] == 1
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "large/000000.parquet").is_file()
