import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from midstream.config import AdamW, VLMConfig
from midstream.core import storage
from midstream.core.storage import CorruptError, remove_leftovers
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.stages import ContinueFrom
from midstream.study.store import Ledger
from midstream.train import checkpoint, parallel
from midstream.train.checkpoint import Progress
from midstream.train.parallel import ALONE, Place
from midstream.train.step import make_optimizer, set_rate
from tiny import DECODER, ENCODER, ROWS, TEXT

FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")
Saved = tuple[Path, dict[str, torch.Tensor]]
PROGRESS = Progress(
    step=7,
    tokens_seen=4_321,
    total_tokens=10_000,
    rate=1 / 3,
    counts=TokenCount(text=4_000, image=321, pad=12, target=3_900),
    loss=2.5,
    image_rows=3,
    image_row_pad=11,
    seconds=1.25,
    metrics_bytes=999,
)


def made(seed: int) -> tuple[VLM, torch.optim.Optimizer]:
    model = VLM(VLMConfig(decoder=DECODER, encoder=ENCODER))
    initialise(model, seed)
    return model, make_optimizer(model, AdamW())


def move(model: VLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step along random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    set_rate(optimizer, 1e-2)
    optimizer.step()


def state(model: VLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: value.detach().clone() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{key} of {name}"] = value.clone()
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint and what it holds; read only."""
    model, optimizer = made(0)
    move(model, optimizer, 1)
    move(model, optimizer, 2)
    folder = tmp_path_factory.mktemp("checkpoints") / "step-00000007"
    checkpoint.save(folder, model, optimizer, PROGRESS)
    return folder, state(model, optimizer)


@pytest.fixture
def saved(kept: Saved, tmp_path: Path) -> Saved:
    """A copy of it."""
    folder = tmp_path / "checkpoints" / kept[0].name
    return Path(shutil.copytree(kept[0], folder)), kept[1]


def test_a_checkpoint_brings_back_every_bit_of_weights_moments_and_progress(saved: Saved) -> None:
    folder, expected = saved
    model, optimizer = made(5)
    assert not equal(state(model, optimizer), expected)
    assert checkpoint.load(folder, model, optimizer) == PROGRESS
    found = state(model, optimizer)
    assert equal(found, expected)
    assert any(name.startswith("exp_avg_sq of projector") for name in found)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_missing_file_is_refused_before_a_tensor_is_written(
    saved: Saved, name: str
) -> None:
    folder, _ = saved
    whole = (folder / name).read_bytes()
    model, optimizer = made(5)
    before = state(model, optimizer)
    for place in (0.0, 0.03, 0.5, 0.97, None):
        if place is None:
            (folder / name).unlink()
        else:
            # Letters and digits rather than the manifest's spaces, which mean nothing.
            data, start = bytearray(whole), int(place * len(whole))
            at = next(i for i in range(start, len(data)) if data[i] not in b" \n")
            data[at] ^= 1
            (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=folder.name if place is not None else name):
            checkpoint.load(folder, model, optimizer)
        assert equal(state(model, optimizer), before), place


@pytest.mark.parametrize("stem", ["model", "optimizer"])
def test_a_start_reads_the_tensors_that_it_takes_and_no_others(saved: Saved, stem: str) -> None:
    folder, _ = saved
    path = folder / f"{stem}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoint.read_progress(folder) == PROGRESS
    other = ({"model", "optimizer"} - {stem}).pop()
    checkpoint.check_files(folder, stems=(other,))
    with pytest.raises(CorruptError, match=f"{path.name} differs from its manifest; delete"):
        checkpoint.check_files(folder, stems=(stem, other))


class Share(Place):
    """A rank that hears what its own part gave, and nothing of the others."""

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_ranks_hash_each_file_once_between_them(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved
    hashed, real = [], storage._entry
    monkeypatch.setattr(storage, "_entry", lambda path: hashed.append(path.name) or real(path))
    for rank in range(3):
        place = Share(torch.device("cpu"), rank=rank, world_size=3)
        checkpoint.check_files(folder, place=place, stems=("model", "optimizer"))
    assert sorted(hashed) == sorted({path.name for path in folder.iterdir()} - {"manifest.json"})


def test_a_stage_hashes_each_file_that_it_starts_from_once(
    tiny_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA, tiny.ENCODER_STAGE, TEXT)
    hashed, real = [], storage._entry
    monkeypatch.setattr(storage, "_entry", lambda path: hashed.append(path) or real(path))
    start = ContinueFrom(stage=TEXT, completion=0.4, optimizer="fresh")
    tiny.runner(mine).run(tiny.image_run(start, total_tokens=2_000))
    parent = checkpoint.milestone(mine.folder(TEXT), 0.4)
    read = Counter(path.name for path in hashed if path.parent == parent)
    assert read["model.safetensors"] == 1
    assert read["optimizer.safetensors"] == 0
    assert {path for path in hashed if path.parent == mine.folder(tiny.ENCODER_STAGE) / "weights"}


def test_what_is_saved_is_the_state_at_its_start_however_far_training_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made(0)
    move(model, optimizer, 1)
    expected, moved = state(model, optimizer), threading.Event()
    real = checkpoint.save_file

    def late(*arguments: Any) -> None:
        assert moved.wait(60)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", late)
    saver = checkpoint.Saver(ALONE, background=True)
    saver.start(tmp_path / "step-00000007", model, optimizer, PROGRESS)
    assert not saver.proceed()
    move(model, optimizer, 2)
    moved.set()
    saver.settle()
    assert not equal(state(model, optimizer), expected)
    other, other_optimizer = made(5)
    checkpoint.load(tmp_path / "step-00000007", other, other_optimizer)
    assert equal(state(other, other_optimizer), expected)


def test_what_fills_several_files_has_the_digests_and_tensors_of_one(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = saved
    model, optimizer = made(5)
    checkpoint.load(folder, model, optimizer)
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    monkeypatch.setattr(parallel, "FILE_BYTES", size // 2 - 1)
    other = folder.with_name("step-00000008")
    checkpoint.save(other, model, optimizer, PROGRESS)
    assert len(list(other.glob("model-*-of-00003.safetensors"))) == 3
    assert len(list(other.glob("optimizer-*-of-00005.safetensors"))) == 5
    assert checkpoint.stored_digests(other) == checkpoint.stored_digests(folder)
    again, again_optimizer = made(6)
    checkpoint.load(other, again, again_optimizer)
    assert equal(state(again, again_optimizer), expected)


@pytest.mark.parametrize("writer", ["save_file", "write_json", "finish_folder"])
def test_a_process_killed_between_files_leaves_the_previous_checkpoint(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    folder, expected = saved
    model, optimizer = made(5)
    move(model, optimizer, 3)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, writer, killed)
        # A killed process does not clean up either.
        patch.setattr(storage.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder.with_name("step-00000009"), model, optimizer, PROGRESS)
    assert len(list(folder.parent.iterdir())) == 2
    assert checkpoint.by_age(folder.parent) == [folder]
    other, other_optimizer = made(6)
    checkpoint.load(folder, other, other_optimizer)
    assert equal(state(other, other_optimizer), expected)
    assert remove_leftovers(folder.parent) == 1
    assert list(folder.parent.iterdir()) == [folder]


def test_only_the_newest_checkpoints_are_kept(kept: Saved, tmp_path: Path) -> None:
    for step in (95, 100, 5):
        shutil.copytree(kept[0], tmp_path / f"step-{step:08d}")
    for number, left in ((5, [100, 95, 5]), (2, [100, 95]), (1, [100])):
        checkpoint.keep_newest(tmp_path, number)
        found = [int(path.name.removeprefix("step-")) for path in checkpoint.by_age(tmp_path)]
        assert found == left
        assert len(list(tmp_path.iterdir())) == len(left)
    assert checkpoint.by_age(tmp_path / "nowhere") == []


def test_weights_without_moments_can_only_be_started_fresh(tmp_path: Path) -> None:
    model, optimizer = made(0)
    checkpoint.save(tmp_path / "weights", model, None, PROGRESS)
    with pytest.raises(FileNotFoundError, match="optimizer='fresh'"):
        checkpoint.load_moments(tmp_path / "weights", model, optimizer)


def test_a_checkpoint_of_another_model_is_refused_with_every_name(saved: Saved) -> None:
    folder, _ = saved
    model = VLM(VLMConfig(decoder=DECODER))
    with pytest.raises(ValueError, match=r"unexpected: projector\."):
        checkpoint.load(folder, model, make_optimizer(model, AdamW()))


def test_a_text_runs_milestone_lists_its_bytes_and_its_place_in_the_schedule(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    folder = checkpoint.milestone(tiny_ledger.folder(TEXT), 0.6)
    assert folder.name == "60"
    progress = checkpoint.read_progress(folder)
    assert progress.tokens_seen == progress.counts.seen
    assert progress.step * ROWS.batch_rows * ROWS.row_length == progress.counts.total
    shutil.copytree(folder, tmp_path / "60")
    (tmp_path / "60" / "progress.json").write_text("{}")
    with pytest.raises(CorruptError, match="differs from its manifest"):
        checkpoint.read_progress(tmp_path / "60")


def test_milestones_of_different_shares_have_different_folders(tmp_path: Path) -> None:
    shares = (0.005, 0.07, 0.29, 0.333, 0.334, 1.0)
    names = [checkpoint.milestone(tmp_path, share).name for share in shares]
    assert names == ["0.5", "7", "29", "33.3", "33.4", "100"]
