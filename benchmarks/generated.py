"""What the training benchmarks share: generated sources, the pocket recipe's sizes, features."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from midstream.config import (
    AnyEncoderConfig,
    Mixture,
    PocketWorld,
    Rows,
    Share,
    TrainedTokenizer,
)
from midstream.data.prepare import (
    open_source,
    prepare_tokenizer,
    prepare_world,
    prepare_world_source,
    tokenizer_path,
)
from midstream.data.rows import RowDataset, plan_rows
from midstream.data.sources import Source
from midstream.recipes.pocket import when_images_arrive
from midstream.study.stages import Continue, Finetune

WORLD = PocketWorld(
    num_documents=1000,
    num_captions=600,
    num_conversations=200,
    num_pages=400,
    num_questions=12,
    num_text_items=8,
)
# A source may be repeated this often, so that a small world serves any number of steps.
MAX_EPOCHS = 1000


@contextmanager
def pocket_sources() -> Iterator[dict[str, Source]]:
    """The indexed sources of a small pocket world, in a temporary folder."""
    stage = continue_stage()
    tokenizer = TrainedTokenizer(vocab_size=stage.decoder.vocab_size)
    with tempfile.TemporaryDirectory(prefix="midstream-benchmark-") as name:
        folder = Path(name)
        root, names = folder / "world", WORLD.source_names
        prepare_world(WORLD, folder)
        prepare_tokenizer(tokenizer, WORLD, root, names, folder)
        for one in names:
            prepare_world_source(
                WORLD,
                root,
                one,
                tokenizer_path(folder),
                folder / one,
                workers=1,
                progress=lambda _done, _note: None,
            )
        yield {one: open_source(root, one, folder / one) for one in names}


def continue_stage() -> Continue:
    """The image-text stage of the pocket recipe, whose sizes the benchmarks take."""
    finetuned = when_images_arrive().lines[0].result.of
    assert isinstance(finetuned, Finetune)
    assert isinstance(finetuned.start, Continue)
    return finetuned.start


def rows_of(
    sources: dict[str, Source],
    encoder: AnyEncoderConfig,
    rows: Rows,
    shares: dict[str, float],
    total_tokens: int,
) -> RowDataset:
    """A planned mixture whose images are random features of the encoder's shape."""
    budget = Mixture(
        total_tokens=total_tokens,
        shares=tuple(Share(source=name, share=share) for name, share in shares.items()),
        max_epochs=MAX_EPOCHS,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (encoder.num_patches, encoder.hidden_size)
    # One picture for all: what it shows changes no time.
    picture = torch.randn(shape, generator=generator)

    def images(wanted: np.ndarray) -> torch.Tensor:
        return picture.expand(len(wanted), *shape)

    plan = plan_rows(sources, encoder.num_patches, budget, rows, seed=0)
    return RowDataset(plan, sources, encoder.num_patches, images)
