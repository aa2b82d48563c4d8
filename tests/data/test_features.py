"""Stored features: what an encoder makes of each picture, computed once."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_source, png
from torch import Tensor

from midstream.config import EncoderConfig
from midstream.data.features import FILL_BATCH, FeatureStore, encode_fixed, gather, load_pixels
from midstream.data.sources import Source, SourceWriter

CONFIG = EncoderConfig(
    image_size=8, patch_size=4, hidden_size=6, num_layers=2, num_heads=1, intermediate_size=8
)
# More pictures than one batch, and examples that share them.
NUM_PICTURES = FILL_BATCH + 9


class Encode:
    """A small fixed encoder that counts its calls: least, greatest and mean of each patch."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at, self.sizes = 0, fails_at, set[int]()

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.add(len(pixels))
        if self.calls == self.fails_at:
            raise RuntimeError("the machine is gone")
        patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).flatten(3)
        parts = [patches.amin(-1), patches.amax(-1)]
        return torch.cat(parts, dim=1).transpose(1, 2).contiguous()


def no_progress(done: float, what: str) -> None:
    assert 0 <= done < 1
    assert "talks" in what


def check_all(store: FeatureStore, source: Source, shown: list[int | None]) -> None:
    """Every stored feature is what encoding the picture alone gives, bit by bit."""
    for example, picture in enumerate(shown):
        if picture is not None:
            pixels = load_pixels(source, example, CONFIG)
            live = encode_fixed(Encode(), pixels[None])[0]
            stored = store.read(source, example)
            assert stored.dtype == np.float32
            assert np.array_equal(stored, live)


@pytest.fixture
def shown() -> list[int | None]:
    """Which picture each conversation shows, some none, many the same."""
    random = np.random.default_rng(0)
    order = [*range(NUM_PICTURES), *random.integers(0, NUM_PICTURES, 40).tolist()]
    return [None if x % 5 == 3 and at >= NUM_PICTURES else x for at, x in enumerate(order)]


@pytest.fixture
def talks(tmp_path: Path, shown: list[int | None]) -> Source:
    """Conversations about shared pictures."""
    return make_source(tmp_path, "talks", "instruct", [3] * len(shown), pictures=shown)


def test_features_are_those_of_live_encoding_with_shared_pictures_stored_once(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    store, encode = FeatureStore(tmp_path / "features", CONFIG), Encode()
    store.fill(talks, encode, no_progress)
    # Two batches, both of the one shape whose last bits are known.
    assert (encode.calls, encode.sizes) == (2, {FILL_BATCH})
    array = np.load(tmp_path / "features" / "talks.npy")
    assert array.shape == (NUM_PICTURES, CONFIG.num_patches, CONFIG.hidden_size)
    assert array.dtype == np.float32
    check_all(store, talks, shown)
    check_all(FeatureStore(tmp_path / "features", CONFIG), talks, shown)


def test_pictures_of_one_file_are_told_apart_in_any_order(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(12).tolist() * 2
    blobs = [png(number) for number in range(12)]
    (tmp_path / "all.bin").write_bytes(b"".join(blobs))
    writer = SourceWriter(tmp_path / "talks", kind="instruct", dtype="<u2")
    for at in order:
        place = ("all.bin", sum(map(len, blobs[:at])), len(blobs[at]))
        writer.add(np.ones(3), np.ones(3), name="a", image=place)
    writer.close()
    source = Source("talks", tmp_path / "talks", tmp_path)
    store = FeatureStore(tmp_path / "features", CONFIG)
    store.fill(source, Encode(), no_progress)
    assert len(np.load(tmp_path / "features" / "talks.npy")) == 12
    check_all(store, source, order)


@pytest.mark.parametrize("count", [1, 2, 17, FILL_BATCH])
def test_features_do_not_depend_on_how_many_pictures_are_encoded_together(
    talks: Source, count: int
) -> None:
    pixels = np.stack([load_pixels(talks, example, CONFIG) for example in range(count)])
    together = encode_fixed(Encode(), pixels)
    alone = [encode_fixed(Encode(), pixels[at : at + 1])[0] for at in range(count)]
    assert np.array_equal(together, np.stack(alone))


def test_a_second_fill_computes_nothing(tmp_path: Path, talks: Source) -> None:
    FeatureStore(tmp_path / "features", CONFIG).fill(talks, Encode(), no_progress)
    encode = Encode()
    FeatureStore(tmp_path / "features", CONFIG).fill(talks, encode, no_progress)
    assert encode.calls == 0


def test_fills_at_the_same_time_compute_once(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    encodes = [Encode() for _ in range(3)]
    together = threading.Barrier(len(encodes))

    def fill(encode: Encode) -> Callable[[], None]:
        def work() -> None:
            together.wait()
            FeatureStore(tmp_path / "features", CONFIG).fill(talks, encode, no_progress)

        return work

    threads = [threading.Thread(target=fill(encode)) for encode in encodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(encode.calls for encode in encodes) == [0, 0, 2]
    check_all(FeatureStore(tmp_path / "features", CONFIG), talks, shown)


def test_a_fill_that_fails_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, talks: Source, shown: list[int | None]
) -> None:
    store = FeatureStore(tmp_path / "features", CONFIG)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        store.fill(talks, Encode(fails_at=2), no_progress)
    assert [p.name for p in (tmp_path / "features").iterdir() if p.suffix != ".lock"] == []
    store.fill(talks, Encode(), no_progress)
    check_all(store, talks, shown)


def test_a_broken_picture_stops_the_fill_by_its_record(tmp_path: Path, talks: Source) -> None:
    size = len(png(4))
    (tmp_path / "world" / "4.png").write_bytes(b"<html>".ljust(size))
    with pytest.raises(ValueError, match=r"source 'talks', .*sample 4: the picture cannot be"):
        FeatureStore(tmp_path / "features", CONFIG).fill(talks, Encode(), no_progress)
    assert not (tmp_path / "features" / "talks.npy").exists()


def test_gathered_features_are_in_the_order_asked_for_over_sources(tmp_path: Path) -> None:
    sources = {
        "talks": make_source(tmp_path, "talks", "instruct", [3, 3, 3], pictures=[2, None, 0]),
        "pics": make_source(tmp_path, "pics", "caption", [3, 3], number=1, pictures=[1, 2]),
    }
    store, names = FeatureStore(tmp_path / "features", CONFIG), ("pics", "talks")
    for source in sources.values():
        store.fill(source, Encode(), lambda done, what: None)
    wanted = [(1, 2), (0, 0), (0, 1), (1, 0), (0, 0)]
    found = gather(store, sources, names, np.array(wanted))
    expected = [
        encode_fixed(Encode(), load_pixels(sources[names[s]], e, CONFIG)[None])[0]
        for s, e in wanted
    ]
    assert np.array_equal(found.numpy(), np.stack(expected))
    # Talk 0 and caption 1 show the same picture; the other features are others.
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[1])
    none = gather(store, sources, names, np.zeros((0, 2), np.int64))
    assert none.shape == (0, CONFIG.num_patches, CONFIG.hidden_size)
