"""Features: what an encoder makes of each picture, the same stored and live, computed once."""

import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source, png
from made_features import CODED, CONFIG, NUM_PICTURES, WHOLE, Encode, pixels_of, quiet
from torch import Tensor

from midstream.config import EncoderConfig
from midstream.config.model import FILL_BATCH, picture_bytes
from midstream.core.storage import CorruptError, read_json
from midstream.data import feature_store
from midstream.data.feature_store import LOCKS, NUM_LOTS, FeatureStore, HashIndex
from midstream.data.images import (
    encode_fixed,
    encode_raw,
    pack,
    unpack,
)
from midstream.data.sources import Source
from midstream.model.vision import build_encoder
from midstream.model.weights import initialise


class Breaks(Encode):
    """Gives a number that is none for one picture."""

    def __call__(self, pixels: Tensor) -> Tensor:
        features = super().__call__(pixels)
        features[2, 1, 3] = float("nan")
        return features


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def stored_pictures(folder: Path) -> int:
    return sum(len(np.load(part / "hashes.npy")) for part in parts(folder))


def check_all(store: FeatureStore, source: Source, shown: list[int | None]) -> None:
    """Every stored feature is what encoding the picture alone gives, bit by bit."""
    for example, picture in enumerate(shown):
        if picture is not None:
            pixels = pixels_of(source, [example], store.config)
            live = encode_fixed(Encode(), pixels, store.config)[0]
            stored = store.read_many([(source, example)])[0]
            # Half the bytes on their way to a GPU; the model widens them.
            narrow = store.config.feature_dtype == "bfloat16"
            assert stored.dtype == (torch.bfloat16 if narrow else torch.float32)
            assert torch.equal(stored.float(), live)


def numbers(low: int, high: int) -> Iterator[np.ndarray]:
    """Examples one plan block after the other."""
    for start in range(low, high, 5):
        yield np.arange(start, min(start + 5, high))


@pytest.fixture(scope="module")
def shown() -> list[int | None]:
    """Which picture each conversation shows, some none, many the same."""
    random = np.random.default_rng(0)
    order = [*range(NUM_PICTURES), *random.integers(0, NUM_PICTURES, 40).tolist()]
    return [None if x % 5 == 3 and at >= NUM_PICTURES else x for at, x in enumerate(order)]


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, shown: list[int | None]) -> Source:
    """Conversations about shared pictures, in three shards."""
    base = tmp_path_factory.mktemp("talks")
    return make_source(base, "talks", "instruct", [3] * len(shown), pictures=shown, shards=3)


@pytest.mark.parametrize("config", [CONFIG, CODED, WHOLE], ids=["bfloat16", "int8", "float32"])
def test_stored_features_are_the_live_ones_and_each_picture_is_computed_once(
    tmp_path: Path, talks: Source, shown: list[int | None], config: EncoderConfig
) -> None:
    store, encode = FeatureStore(tmp_path, config), Encode()
    store.fill(talks, None, encode, quiet)
    # All batches have the one shape whose last bits are known.
    assert (encode.calls, encode.sizes) == (-(-NUM_PICTURES // FILL_BATCH), {FILL_BATCH})
    assert len(store) == stored_pictures(tmp_path) == NUM_PICTURES
    assert sum((p / "features.bin").stat().st_size for p in parts(tmp_path)) == (
        NUM_PICTURES * picture_bytes(config)
    )
    check_all(store, talks, shown)
    check_all(FeatureStore(tmp_path, config), talks, shown)
    again = Encode()
    FeatureStore(tmp_path, config).fill(talks, None, again, quiet)
    assert again.calls == 0


@pytest.mark.parametrize("config", [CONFIG, CODED, WHOLE], ids=["bfloat16", "int8", "float32"])
@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, 11), min_size=1, max_size=8))
def test_live_features_do_not_depend_on_how_pictures_are_grouped(
    talks: Source, config: EncoderConfig, cuts: list[int]
) -> None:
    examples = [number % NUM_PICTURES for number in range(sum(cuts))]
    pixels = pixels_of(talks, examples, config)
    alone = torch.cat([encode_fixed(Encode(), one[None], config) for one in pixels])
    grouped = [encode_fixed(Encode(), part, config) for part in torch.split(pixels, cuts)]
    assert torch.equal(torch.cat(grouped), alone)


def test_a_real_encoder_gives_equal_bits_alone_and_in_any_company() -> None:
    # Its widths are such that the CPU's matrix products differ between one picture and eight.
    config = EncoderConfig(
        image_size=100, patch_size=20, hidden_size=88, num_layers=3, num_heads=2,
        intermediate_size=200,
    )  # fmt: skip
    encoder = build_encoder(config)
    initialise(encoder, 0)
    pixels = torch.randn((11, 3, 100, 100), generator=torch.Generator().manual_seed(1))
    alone = torch.cat([encode_raw(encoder, one[None], config) for one in pixels])
    for order in (torch.arange(11), torch.arange(10, -1, -1), torch.arange(11).roll(3)):
        assert torch.equal(encode_raw(encoder, pixels[order], config), alone[order])


def test_pictures_are_shared_over_sources_and_preparations(tmp_path: Path) -> None:
    first = make_source(tmp_path / "a", "pics", "caption", [3] * 12, pictures=[*range(12)])
    # Another preparation, other names, another order; pictures 4 to 11 are the same bytes.
    order: list[int | None] = [15, 11, *range(4, 11), 14, 13, 12]
    second = make_source(tmp_path / "b", "talks", "instruct", [2] * 12, pictures=order)
    store = FeatureStore(tmp_path / "store", CONFIG)
    store.fill(first, None, Encode(), quiet)
    encode = Encode()
    store.fill(second, None, encode, quiet)
    assert encode.calls == 1
    assert len(store) == 16
    check_all(store, first, list(range(12)))
    check_all(store, second, order)


def test_only_the_pictures_asked_for_are_computed(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    store = FeatureStore(tmp_path, CONFIG)
    last = len(shown)
    store.fill(talks, numbers(last - 12, last), Encode(), quiet)
    wanted = {picture for picture in shown[last - 12 :] if picture is not None}
    assert len(store) == len(wanted) < NUM_PICTURES
    missing = next(n for n, picture in enumerate(shown) if picture not in wanted)
    with pytest.raises(ValueError, match=rf"sample {missing}: none of the .* fill the store"):
        store.read_many([(talks, missing)])
    # A store that is open already sees what another fills.
    FeatureStore(tmp_path, CONFIG).fill(talks, numbers(0, last), Encode(), quiet)
    check_all(store, talks, shown)


def test_an_example_without_a_picture_has_no_features(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    store = FeatureStore(tmp_path, CONFIG)
    store.fill(talks, None, Encode(), quiet)
    with pytest.raises(ValueError, match="shows no picture"):
        store.read_many([(talks, shown.index(None))])


@pytest.mark.parametrize("pictures", [1, 3, FILL_BATCH, FILL_BATCH + 1])
def test_parts_are_no_larger_than_asked(
    tmp_path: Path, talks: Source, shown: list[int | None], pictures: int
) -> None:
    room = pictures * picture_bytes(CONFIG) + 5
    store = FeatureStore(tmp_path, CONFIG, part_bytes=room)
    store.fill(talks, None, Encode(), quiet)
    sizes = [(part / "features.bin").stat().st_size for part in parts(tmp_path)]
    assert max(sizes) <= room
    assert len(sizes) == -(-NUM_PICTURES // pictures)
    check_all(FeatureStore(tmp_path, CONFIG), talks, shown)


def in_process(work: Callable[[], None]) -> "multiprocessing.process.BaseProcess":
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_a_fill_that_is_killed_keeps_its_finished_parts_and_continues(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    folder, log = tmp_path / "store", tmp_path / "log"
    room = FILL_BATCH * picture_bytes(CONFIG)

    def dies() -> None:
        FeatureStore(folder, CONFIG, room).fill(talks, None, Encode(log, dies_at=2), quiet)

    process = in_process(dies)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(FeatureStore(folder, CONFIG)) == FILL_BATCH
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"]
    store, encode = FeatureStore(folder, CONFIG, room), Encode()
    store.fill(talks, None, encode, quiet)
    assert encode.calls == -(-(NUM_PICTURES - FILL_BATCH) // FILL_BATCH)
    assert len(store) == NUM_PICTURES
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    check_all(store, talks, shown)


def test_a_fill_can_be_stopped_by_whom_it_tells(tmp_path: Path, talks: Source) -> None:
    def impatient(done: float, note: str) -> None:
        if f" {FILL_BATCH} computed" in note:
            raise InterruptedError

    room = FILL_BATCH * picture_bytes(CONFIG)
    with pytest.raises(InterruptedError):
        FeatureStore(tmp_path, CONFIG, room).fill(talks, None, Encode(), impatient)
    assert len(FeatureStore(tmp_path, CONFIG)) == FILL_BATCH


def features_of(folder: Path) -> dict[bytes, bytes]:
    """The stored bytes of every picture, by its hash."""
    found = {}
    for part in parts(folder):
        hashes = np.load(part / "hashes.npy")
        rows = np.fromfile(part / "features.bin", np.uint8).reshape(len(hashes), -1)
        found |= {key.tobytes(): row.tobytes() for key, row in zip(hashes, rows, strict=True)}
    return found


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_fill_that_is_asked_to_stop_keeps_its_batches_and_none_is_computed_twice(
    tmp_path: Path, talks: Source, shown: list[int | None], batches: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted, first, second = Encode(), Encode(), Encode()
    assert FeatureStore(whole, CONFIG).fill(talks, None, uninterrupted, quiet)
    # One part would hold all: what was computed is kept even though its part was not full.
    store = FeatureStore(stopped, CONFIG)
    assert not store.fill(talks, None, first, quiet, lambda: first.calls >= batches)
    assert first.calls == batches
    assert len(store) == stored_pictures(stopped) == batches * FILL_BATCH
    assert not list(stopped.glob("*.tmp"))
    assert FeatureStore(stopped, CONFIG).fill(talks, None, second, quiet)
    assert first.calls + second.calls == uninterrupted.calls
    assert features_of(stopped) == features_of(whole)
    assert (stopped / "measured.json").is_file()
    check_all(FeatureStore(stopped, CONFIG), talks, shown)


def test_a_fill_that_waits_for_another_process_stops_when_asked(
    tmp_path: Path, talks: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "WAIT_SECONDS", 0.05)
    said, encode = list[str](), Encode()

    def told(done: float, note: str) -> None:
        said.append(note)

    (tmp_path / LOCKS).mkdir()
    store = FeatureStore(tmp_path, CONFIG)
    with ExitStack() as held:
        for lot in range(NUM_LOTS):
            held.enter_context(FileLock(tmp_path / LOCKS / f"lot-{lot:02}.lock"))
        assert not store.fill(talks, None, encode, told, lambda: bool(said))
    assert ("waiting for other processes" in said[0], encode.calls) == (True, 0)
    assert store.fill(talks, None, encode, quiet)


def test_a_fill_goes_round_what_another_process_computes_and_takes_it_last(
    tmp_path: Path, talks: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "WAIT_SECONDS", 0.05)
    (tmp_path / LOCKS).mkdir()
    (first,) = talks.hashes_of(np.array([0]))
    lock, said = FileLock(tmp_path / LOCKS / f"lot-{first[0] % NUM_LOTS:02}.lock"), list[int]()
    store = FeatureStore(tmp_path, CONFIG)

    def told(done: float, note: str) -> None:
        if "waiting" in note:
            said.append(len(store))
            lock.release()

    with lock:
        assert store.fill(talks, None, Encode(), told)
    # All but that lot were there when it began to wait.
    assert NUM_PICTURES - 3 <= said[0] < NUM_PICTURES
    assert (len(said), stored_pictures(tmp_path)) == (1, NUM_PICTURES)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_compute_a_share_each_and_store_the_bytes_of_one_process(
    tmp_path: Path, talks: Source, shown: list[int | None], num_ranks: int
) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "store"
    FeatureStore(alone, CONFIG).fill(talks, None, Encode(), quiet)
    together = multiprocessing.get_context("fork").Barrier(num_ranks)

    def fill(rank: int) -> None:
        store, encode = FeatureStore(folder, CONFIG), Encode(tmp_path / f"{rank}.log")

        def at_once(pixels: Tensor) -> Tensor:
            if not encode.calls:  # all of them hold their first lots
                together.wait(60)
            return encode(pixels)

        store.fill(talks, None, at_once, quiet, share=(rank, num_ranks))
        assert len(store) == NUM_PICTURES

    processes = [in_process(lambda rank=rank: fill(rank)) for rank in range(num_ranks)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * num_ranks
    assert all((tmp_path / f"{rank}.log").is_file() for rank in range(num_ranks))
    assert features_of(folder) == features_of(alone)
    assert stored_pictures(folder) == NUM_PICTURES
    assert not list(folder.glob(".*"))
    check_all(FeatureStore(folder, CONFIG), talks, shown)


def test_a_rank_that_is_killed_leaves_its_lots_to_the_others(tmp_path: Path, talks: Source) -> None:
    alone, folder = tmp_path / "alone", tmp_path / "store"
    FeatureStore(alone, CONFIG).fill(talks, None, Encode(), quiet)
    together = multiprocessing.get_context("fork").Barrier(2)

    def fill(rank: int) -> None:
        encode = Encode(dies_at=1 if rank else None)

        def at_once(pixels: Tensor) -> Tensor:
            if not encode.calls:
                together.wait(60)
            return encode(pixels)

        FeatureStore(folder, CONFIG).fill(talks, None, at_once, quiet, share=(rank, 2))

    processes = [in_process(lambda rank=rank: fill(rank)) for rank in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    assert features_of(folder) == features_of(alone)
    assert not list(folder.glob(".*"))


def test_processes_that_fill_at_the_same_time_compute_each_picture_once(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    folder = tmp_path / "store"
    room = 2 * picture_bytes(CONFIG)
    together = multiprocessing.get_context("fork").Barrier(3)

    def fill() -> None:
        together.wait(60)
        FeatureStore(folder, CONFIG, room).fill(talks, None, Encode(), quiet)

    processes = [in_process(fill) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    # A part holds two pictures at most, and each is in one of them.
    assert stored_pictures(folder) == NUM_PICTURES
    check_all(FeatureStore(folder, CONFIG), talks, shown)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.0, 8.0), patches_of_zeros=st.booleans())
def test_an_int8_feature_is_off_by_half_a_step_of_its_patch_at_most(
    seed: int, spread: float, patches_of_zeros: bool
) -> None:
    random = np.random.default_rng(seed)
    scales = np.exp(spread * random.normal(size=(5, CODED.num_patches, 1)))
    if patches_of_zeros:
        scales[0, 0] = scales[-1, -1] = 0
    features = torch.from_numpy(
        (scales * random.normal(size=(5, CODED.num_patches, CODED.hidden_size))).astype(np.float32)
    )
    packed = pack(features, CODED)
    assert packed.shape == (5, picture_bytes(CODED))
    found = unpack(packed, CODED)
    # A step is the patch's largest magnitude over 127, rounded to eight bits.
    step = features.abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)
    assert ((found - features).abs() <= step * 0.5 * (1 + 1e-6)).all()
    assert (found[features.abs().amax(-1) == 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_bfloat16_feature_keeps_eight_bits(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = (3, CONFIG.num_patches, CONFIG.hidden_size)
    features = torch.from_numpy(
        (np.exp(9 * random.normal(size=shape)) * random.normal(size=shape)).astype(np.float32)
    )
    found = unpack(pack(features, CONFIG), CONFIG)
    assert ((found - features).abs() <= features.abs() * 2**-8).all()
    assert torch.equal(found.bfloat16().float(), found)
    assert not torch.equal(found, features)
    assert torch.equal(unpack(pack(features, WHOLE), WHOLE), features)


def test_rounding_errors_are_measured_and_kept_with_the_store(
    tmp_path: Path, talks: Source
) -> None:
    store = FeatureStore(tmp_path, CODED)
    store.fill(talks, None, Encode(), quiet)
    found = read_json(tmp_path / "measured.json")
    pixels = pixels_of(talks, range(NUM_PICTURES), CODED)
    raw = encode_raw(Encode(), pixels, CODED).double()
    assert not torch.equal(encode_fixed(Encode(), pixels, CODED).double(), raw)
    rms = raw.square().mean().sqrt()
    for config in (CONFIG, CODED):
        wrong = encode_fixed(Encode(), pixels, config).double() - raw
        entry = found[config.feature_dtype]
        assert entry["pictures"] == NUM_PICTURES
        assert entry["rms_error"] == pytest.approx(float(wrong.square().mean().sqrt() / rms))
        assert entry["max_error"] == pytest.approx(float(wrong.abs().max() / rms))
    assert 0 < found["bfloat16"]["rms_error"] < found["int8"]["rms_error"] < 0.01


@pytest.mark.parametrize("config", [CONFIG, CODED, WHOLE], ids=["bfloat16", "int8", "float32"])
def test_features_that_are_no_numbers_stop_the_fill_by_their_record(
    tmp_path: Path, talks: Source, config: EncoderConfig
) -> None:
    with pytest.raises(ValueError, match=r"source 'talks', .*sample 2: .*not finite"):
        FeatureStore(tmp_path, config).fill(talks, None, Breaks(), quiet)
    assert parts(tmp_path) == []


def test_weights_of_another_encoder_are_refused(talks: Source) -> None:
    wider = CONFIG.model_copy(update={"hidden_size": 7})
    pixels = pixels_of(talks, [0], wider)
    with pytest.raises(ValueError, match=r"\(4, 6\) a picture, its configuration says \(4, 7\)"):
        encode_fixed(Encode(), pixels, wider)


def test_a_picture_that_changed_stops_the_fill_by_its_record(tmp_path: Path) -> None:
    source = make_source(tmp_path, "talks", "instruct", [3] * 3, pictures=[0, 1, 2])
    (tmp_path / "world" / "1.png").write_bytes(b"<html>".ljust(len(png(1))))
    with pytest.raises(ValueError, match=r"source 'talks', .*sample 1: the picture in 1\.png"):
        FeatureStore(tmp_path / "store", CONFIG).fill(source, None, Encode(), quiet)
    assert parts(tmp_path / "store") == []


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, talks: Source) -> Path:
    """A store of one part."""
    folder = tmp_path_factory.mktemp("filled")
    FeatureStore(folder, CONFIG).fill(talks, None, Encode(), quiet)
    return folder


@pytest.mark.parametrize("name", ["features.bin", "hashes.npy", "sums.npy", "manifest.json"])
def test_a_part_with_a_file_cut_short_or_lost_is_refused(
    tmp_path: Path, filled: Path, talks: Source, name: str
) -> None:
    folder = tmp_path / "store"
    for cut in (1, None):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(filled, folder)
        file = parts(folder)[0] / name
        if cut is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-cut])
        # A manifest cut by its last line end is still whole.
        if cut is None or name != "manifest.json":
            with pytest.raises(CorruptError, match=rf"delete .*{parts(folder)[0].name}"):
                FeatureStore(folder, CONFIG).read_many([(talks, 0)])
            with pytest.raises(CorruptError, match="run again"):
                FeatureStore(folder, CONFIG).fill(talks, None, Encode(), quiet)


@settings(deadline=None, max_examples=40)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_reaches_a_reader(
    filled: Path, talks: Source, where: float, bit: int
) -> None:
    part = parts(filled)[0]
    names = ("features.bin", "hashes.npy", "sums.npy")
    sizes = [(part / name).stat().st_size for name in names]
    at = int(where * sum(sizes))
    ends = np.cumsum(sizes)
    number = int(np.searchsorted(ends, at, side="right"))
    name, at = names[number], at - int(ends[number] - sizes[number])
    good = (part / name).read_bytes()
    (part / name).write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
    try:
        with pytest.raises(CorruptError, match="delete"):
            FeatureStore(filled, CONFIG).read_many([(talks, n) for n in range(NUM_PICTURES)])
    finally:
        (part / name).write_bytes(good)


def test_a_store_of_another_encoder_is_refused(filled: Path, talks: Source) -> None:
    with pytest.raises(CorruptError, match=r"19 pictures of this encoder take 608"):
        FeatureStore(filled, CODED).read_many([(talks, 0)])


@settings(deadline=None, max_examples=60)
@given(
    groups=st.lists(
        st.lists(st.binary(min_size=2, max_size=2), min_size=1, max_size=9, unique=True),
        max_size=12,
    ),
    flip=st.booleans(),
)
def test_hashes_are_found_wherever_zeros_stand_in_them(
    groups: list[list[bytes]], flip: bool
) -> None:
    index, expected = HashIndex(), dict[bytes, int]()
    for group in groups:
        keys = [(bytes(14) + key if flip else key + bytes(14)) for key in group]
        keys = [key for key in keys if key not in expected]
        places = np.arange(len(expected), len(expected) + len(keys))
        index.add(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), places)
        expected |= dict(zip(keys, places.tolist(), strict=True))
    assert len(index) == len(expected)
    asked = [*expected, *(bytes([7, n]) + bytes([1] * 14) for n in range(9)), b"\x01" * 16]
    found = index.find(np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16))
    assert found.tolist() == [expected.get(key, -1) for key in asked]
