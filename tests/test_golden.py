"""Twenty steps of loss of a tiny text run and of its continuation with images, pinned.

The data is made here, so that only the path from text to loss can move the numbers: tokenizer,
plan, packing, initialiser, model, schedule, optimiser. `python tests/test_golden.py` writes the
files anew; say why in the commit body.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image

from midstream.config import (
    ContinuedCosine,
    Epochs,
    Mixture,
    PublicFolder,
    Rows,
    TrainedTokenizer,
    Training,
    VLMConfig,
)
from midstream.core.identity import world_fingerprint
from midstream.core.storage import write_json
from midstream.data.rows import RowDataset, plan_rows
from midstream.model.vlm import VLM, scatter_image_features
from midstream.model.weights import initialise
from midstream.train import checkpoint
from midstream.train.loop import Job, Start, train
from midstream.train.parallel import set_up
from preparing import open_sources, prepare
from tiny import DECODER, ENCODER, MACHINE, mixture, warm

GOLDEN = Path(__file__).parent / "golden"
NUM_STEPS = 20
ROWS = Rows(row_length=64, batch_rows=4)
WORDS = (
    *("a", "the", "red", "blue", "green", "circle", "square", "star", "is"),
    *("left", "right", "above", "below", "of", "and", "one", "two"),
)


def sentence(rng: np.random.Generator, length: int) -> str:
    return " ".join(WORDS[int(index)] for index in rng.integers(0, len(WORDS), length)) + "."


def write_world(root: Path) -> PublicFolder:
    """Documents and captioned pictures of one colour, the same on every machine."""
    rng = np.random.Generator(np.random.Philox(5))
    lines = [json.dumps({"text": sentence(rng, int(n))}) for n in rng.integers(3, 40, 400)]
    (root / "text" / "words").mkdir(parents=True)
    (root / "text" / "words" / "all.jsonl").write_text("\n".join(lines) + "\n")
    (root / "captions" / "colours").mkdir(parents=True)
    with tarfile.open(root / "captions" / "colours" / "all.tar", "w") as shard:
        for number in range(120):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (number, 2 * number, 0)).save(picture, "PNG")
            caption = sentence(rng, int(rng.integers(2, 12))).encode()
            for suffix, data in (("png", picture.getvalue()), ("txt", caption)):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    return PublicFolder(root=root, fingerprint=world_fingerprint(root))


def features(images: np.ndarray) -> torch.Tensor:
    """Standing in for an encoder: normal numbers by example."""
    shape = (ENCODER.num_patches, ENCODER.hidden_size)
    seeds = (torch.Generator().manual_seed(int(example)) for _, example, _ in images)
    found = [torch.randn(shape, generator=seed) for seed in seeds]
    return torch.stack(found) if found else torch.zeros((0, *shape))


def losses(folder: Path, world: PublicFolder, training: Training, start: Start) -> list[float]:
    """The losses of a stage's steps; weights are kept at its 40 %."""
    place = set_up(MACHINE)
    seen = start.folder is not None
    model = VLM(VLMConfig(decoder=DECODER, encoder=ENCODER if seen else None))
    initialise(model, training.seed)
    patches = ENCODER.num_patches if seen else 0
    sources = open_sources(world, folder.parent / "data")
    budget: Mixture | Epochs = training.budget
    plan = plan_rows(sources, patches, budget, training.rows, training.seed)
    dataset = RowDataset(plan, sources, patches, features)
    folder.mkdir()
    job = Job(model, training, dataset, lambda x: x, start, folder, (0.4,))
    train(job, MACHINE, place, report=lambda event: None, should_stop=lambda: False)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines][:NUM_STEPS]


def computed(folder: Path) -> dict[str, list[float]]:
    """By golden file: the losses."""
    world = write_world(folder / "world")
    tokenizer = TrainedTokenizer(vocab_size=300, sources=("words", "colours"))
    prepare(world, tokenizer, folder / "data")
    text = Training(budget=mixture(6_000, words=1.0), rows=ROWS, schedule=warm())
    found = {"pretrain": losses(folder / "pretrain", world, text, Start())}
    milestone = checkpoint.milestone(folder / "pretrain", 0.4)
    start = Start(
        folder=milestone,
        parts=("decoder",),
        moments="carry",
        parent_rate=checkpoint.read_progress(milestone).rate,
    )
    budget = mixture(6_000, words=0.7, colours=0.3).model_copy(update={"max_epochs": 2})
    seen = Training(budget=budget, rows=ROWS, schedule=ContinuedCosine(), seed=1)
    return found | {"continue": losses(folder / "continue", world, seen, start)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return computed(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("kind", ["pretrain", "continue"])
def test_twenty_steps_have_the_losses_they_always_had(
    found: dict[str, list[float]], kind: str
) -> None:
    expected = json.loads((GOLDEN / f"losses_{kind}.json").read_text())
    assert len(expected) == NUM_STEPS
    assert found[kind] == pytest.approx(expected, rel=1e-6)


def test_shapes_in_signatures_are_checked_while_tests_run() -> None:
    slots = torch.zeros((1, 2), dtype=torch.long)
    with pytest.raises(TypeCheckError, match="features"):
        scatter_image_features(torch.zeros((2, 3, 4)), torch.zeros((5, 4)), slots)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for kind, values in computed(Path(name)).items():
            write_json(GOLDEN / f"losses_{kind}.json", values)
