"""Pictures of rows: stored features and live pixels, in the order asked for, also in workers."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from made import make_source, mixture
from made_features import CONFIG, Encode, pixels_of, quiet
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from midstream.config import Rows as Lengths
from midstream.data.feature_store import FeatureStore, StoredImages, unchanged
from midstream.data.images import LiveImages, encode_fixed
from midstream.data.rows import RowDataset, load_steps, plan_rows
from midstream.data.sources import Source


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """Conversations and captions that share a picture."""
    base = tmp_path_factory.mktemp("two")
    return {
        "talks": make_source(base, "talks", "instruct", [3, 3, 3], pictures=[2, None, 0]),
        "pics": make_source(base, "pics", "caption", [3, 3], number=1, pictures=[1, 2]),
    }


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, two: dict[str, Source]) -> Path:
    """A store of their features, which is only read."""
    folder = tmp_path_factory.mktemp("filled")
    store = FeatureStore(folder, CONFIG)
    for source in two.values():
        store.fill(source, None, Encode(), quiet)
    return folder


NAMES = ("pics", "talks")
WANTED = np.array([(1, 2, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 0)])


class Rows(Dataset[Tensor]):
    """One picture a row, made where a loader's worker is."""

    def __init__(self, images: StoredImages | LiveImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(WANTED)

    def __getitem__(self, index: int) -> Tensor:
        return self.images(WANTED[index : index + 1])


def test_images_of_rows_come_in_the_order_asked_for_stored_as_live(
    filled: Path, two: dict[str, Source]
) -> None:
    stored = StoredImages(FeatureStore(filled, CONFIG), two, NAMES)
    live = LiveImages(two, NAMES, CONFIG)
    expected = torch.cat([pixels_of(two[NAMES[s]], [e], CONFIG) for s, e, _ in WANTED.tolist()])
    assert torch.equal(live(WANTED), expected)
    found = stored(WANTED)
    assert torch.equal(found, encode_fixed(Encode(), live(WANTED), CONFIG))
    # Talk 0 and caption 1 show the same picture; the other features are others.
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[1])


def test_stored_features_are_loaded_as_narrow_as_they_lie_on_disk(
    filled: Path, two: dict[str, Source]
) -> None:
    store = FeatureStore(filled, CONFIG)
    budget, rows = mixture(8, {"pics": 1.0}), Lengths(row_length=4, batch_rows=2)
    plan = plan_rows(two, 1, budget, rows, 0)
    data = RowDataset(plan, two, 1, StoredImages(store, two, plan.names))
    options: dict[str, int] = {"first_row": 0, "micro_rows": 1, "world_size": 2}
    ranks = [load_steps(data, rank=rank, **options) for rank in range(2)]
    batches = [batch for steps in ranks for step in steps for batch in step]
    assert sum(len(batch.images) for batch in batches) > 0
    assert {batch.images.dtype for batch in batches} == {torch.bfloat16}
    assert {unchanged(batch.trimmed().images).dtype for batch in batches} == {torch.bfloat16}


def test_rows_without_images_have_tensors_of_no_images(
    tmp_path: Path, two: dict[str, Source]
) -> None:
    none = np.zeros((0, 2), np.int64)
    stored = StoredImages(FeatureStore(tmp_path, CONFIG), two, NAMES)(none)
    assert stored.shape == (0, CONFIG.num_patches, CONFIG.hidden_size)
    live = LiveImages(two, NAMES, CONFIG)(none)
    assert live.shape == (0, 3, CONFIG.image_size, CONFIG.image_size)
    encode = Encode()
    assert encode_fixed(encode, live, CONFIG).shape == stored.shape
    assert encode.calls == 0


def test_what_is_pickled_is_small_and_reads_the_same(filled: Path, two: dict[str, Source]) -> None:
    stored = StoredImages(FeatureStore(filled, CONFIG), two, NAMES)
    expected = stored(WANTED)
    assert torch.equal(pickle.loads(pickle.dumps(stored))(WANTED), expected)
    # Neither maps nor hashes travel: the size is that of a store that was never read.
    fresh = StoredImages(FeatureStore(filled, CONFIG), two, NAMES)
    assert len(pickle.dumps(stored)) == len(pickle.dumps(fresh))


@pytest.mark.slow
def test_loader_workers_read_features_and_pixels(filled: Path, two: dict[str, Source]) -> None:
    stored = StoredImages(FeatureStore(filled, CONFIG), two, NAMES)
    for images in (stored, LiveImages(two, NAMES, CONFIG)):
        expected = images(WANTED)
        loader = DataLoader(
            Rows(images), batch_size=None, num_workers=2, multiprocessing_context="forkserver"
        )
        assert torch.equal(torch.cat(list(loader)), expected)
