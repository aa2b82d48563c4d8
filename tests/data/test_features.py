"""Features: what an encoder makes of each picture, the same stored and live, computed once."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_source
from made_features import (
    CODED,
    CONFIG,
    NUM_PICTURES,
    WHOLE,
    Encode,
    check_all,
    parts,
    pixels_of,
    quiet,
    stored_pictures,
)
from torch import Tensor

from inputs import png
from midstream.config import EncoderConfig
from midstream.config.model import FILL_BATCH, picture_bytes
from midstream.core.storage import CorruptError, read_json
from midstream.data.feature_store import FeatureStore, HashIndex
from midstream.data.images import encode_fixed, encode_raw, pack, unpack
from midstream.data.sources import Source
from midstream.model.vision import build_encoder
from midstream.model.weights import initialise


class Breaks(Encode):
    """Gives a number that is none for one picture."""

    def __call__(self, pixels: Tensor) -> Tensor:
        features = super().__call__(pixels)
        features[2, 1, 3] = float("nan")
        return features


def numbers(low: int, high: int) -> Iterator[np.ndarray]:
    """Examples one plan block after the other."""
    for start in range(low, high, 5):
        yield np.arange(start, min(start + 5, high))


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
        store.read_many([(talks, missing, 0)])
    with pytest.raises(ValueError, match="shows no picture"):
        store.read_many([(talks, shown.index(None), 0)])
    # A store that is open already sees what another fills.
    FeatureStore(tmp_path, CONFIG).fill(talks, numbers(0, last), Encode(), quiet)
    check_all(store, talks, shown)


@pytest.mark.parametrize("pictures", [3, FILL_BATCH])
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


SIZES = {"whole": 2**20, "apart": picture_bytes(CODED)}


def measured(folder: Path, source: Source, part_bytes: int) -> Any:
    """What is kept with a store whose parts have so many bytes."""
    FeatureStore(folder, CODED, part_bytes).fill(source, None, Encode(), quiet)
    return read_json(folder / "measured.json")


def test_rounding_errors_are_measured_and_kept_with_the_store_whatever_its_parts(
    tmp_path: Path, talks: Source
) -> None:
    found, apart = (measured(tmp_path / name, talks, size) for name, size in SIZES.items())
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
        # Over smaller parts too.
        assert apart[config.feature_dtype]["pictures"] == NUM_PICTURES
        assert apart[config.feature_dtype]["rms_error"] == pytest.approx(entry["rms_error"])
    assert 0 < found["bfloat16"]["rms_error"] < found["int8"]["rms_error"] < 0.01


def test_features_that_are_no_numbers_stop_the_fill_by_their_record(
    tmp_path: Path, talks: Source
) -> None:
    for config in (CONFIG, CODED, WHOLE):
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
                FeatureStore(folder, CONFIG).read_many([(talks, 0, 0)])
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
            FeatureStore(filled, CONFIG).read_many([(talks, n, 0) for n in range(NUM_PICTURES)])
    finally:
        (part / name).write_bytes(good)


def test_a_store_of_another_encoder_is_refused(filled: Path, talks: Source) -> None:
    with pytest.raises(CorruptError, match=r"19 pictures of this encoder take 608"):
        FeatureStore(filled, CODED).read_many([(talks, 0, 0)])


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
