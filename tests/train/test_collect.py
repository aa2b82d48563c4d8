"""Every rank holds of a sharded model what it writes of it, whole, and nothing else."""

import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tiny
from lives import DEADLINE_SECONDS, server
from midstream.config import AdamW, VLMConfig
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM
from midstream.model.weights import initialise, read_tensors, shard_rows
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress
from midstream.train.parallel import ALONE, Place, deal, gathered
from midstream.train.step import build_model, make_optimizer

PROGRESS = Progress(3, 900, 1_000, 0.02, TokenCount(text=900))
# So that rows are not the same number on each of four ranks, and of some nothing is on the last.
DECODER = tiny.DECODER.model_copy(update={"vocab_size": 401})


def made(place: Place, seed: int) -> tuple[VLM, torch.optim.Optimizer]:
    """A model laid over the ranks, and moments that are exact functions of its weights."""
    config = VLMConfig(decoder=DECODER, encoder=tiny.ENCODER)
    model = build_model(config, tiny.text_run().training, place)
    initialise(model, seed)
    optimizer = make_optimizer(model, AdamW())
    for value in model.parameters():
        weights = value.detach()
        moments = {"exp_avg": weights * 0.5, "exp_avg_sq": weights * weights}
        optimizer.state[value] = {**moments, "step": torch.tensor(float(seed))}
    return model, optimizer


def rank_of(number: int, ranks: int, folder: str) -> None:
    """Save over all ranks, as one copy and with four of them as two; and load what one saved."""
    base = Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{base}/meeting-{ranks}",
        rank=number,
        world_size=ranks,
        timeout=timedelta(seconds=DEADLINE_SECONDS),
    )
    meshes = {"shards": (ranks,)} | ({"copies": (2, 2)} if ranks == 4 else {})
    for name, shape in meshes.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        cpu = torch.device("cpu")
        place = Place(cpu, rank=number, world_size=ranks, mesh=mesh, scalars=dist.new_group())
        model, optimizer = made(place, 1)
        checkpoint.save(base / f"{ranks}-{name}", model, optimizer, PROGRESS, place=place)
        tensors = model.state_dict()
        files = deal(tensors, ranks)
        assert [key for key, _ in gathered(tensors, files, place)] == files[number]
        model, optimizer = made(place, 2)
        checkpoint.load(base / "one", model, optimizer, place=place)
        loaded = checkpoint.digests(model, optimizer, place=place)
        assert loaded == checkpoint.stored_digests(base / "one")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.faults), 4])
def test_one_two_and_four_ranks_save_the_same_tensors_and_load_each_others(
    tmp_path: Path, ranks: int
) -> None:
    model, optimizer = made(ALONE, 1)
    checkpoint.save(tmp_path / "one", model, optimizer, PROGRESS)
    context = server()
    arguments = [(number, ranks, str(tmp_path)) for number in range(ranks)]
    processes = [context.Process(target=rank_of, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE_SECONDS)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks
    expected = read_tensors(tmp_path / "one")
    for folder in tmp_path.glob(f"{ranks}-*"):
        told = checkpoint.stored_digests(folder)
        assert (
            told
            == checkpoint.stored_digests(tmp_path / "one")
            == checkpoint.digests(model, optimizer)
        )
        found = read_tensors(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        index = json.loads((folder / "optimizer.safetensors.index.json").read_text())
        sizes = [path.stat().st_size for path in folder.glob("optimizer-*.safetensors")]
        assert len(sizes) == len(set(index["weight_map"].values())) == ranks
        assert max(sizes) < 1.5 * min(sizes)


def test_a_rank_has_the_rows_that_torch_gives_it() -> None:
    for rows in range(1, 12):
        for parts in range(1, 6):
            whole = torch.arange(rows)
            expected = (
                [*whole.chunk(parts), *[whole[:0]] * parts][:parts] if rows else [whole] * parts
            )
            found = [whole[shard_rows(rows, parts, index)] for index in range(parts)]
            assert [one.tolist() for one in found] == [one.tolist() for one in expected]
