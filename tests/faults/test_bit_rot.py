"""A checkpoint that is not what was written is never loaded, and the one before it is."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from midstream.config import AdamW, VLMConfig
from midstream.core.storage import CorruptError
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.store import Ledger, Stopped
from midstream.train import checkpoint
from midstream.train.checkpoint import Progress
from midstream.train.step import make_optimizer, set_rate

PROGRESS = Progress(7, 4_321, 10_000, 0.01, TokenCount(text=4_321, target=4_000))
ORIGIN = {"stage": "one", "format": "4"}


def made(seed: int) -> tuple[VLM, torch.optim.Optimizer]:
    model = VLM(VLMConfig(decoder=tiny.DECODER))
    initialise(model, seed)
    return model, make_optimizer(model, AdamW())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with moments."""
    model, optimizer = made(0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rate(optimizer, 1e-2)
    optimizer.step()
    folder = tmp_path_factory.mktemp("sound") / "step-00000007"
    checkpoint.save(folder, model, optimizer, PROGRESS, origin=ORIGIN)
    return folder


@pytest.fixture(scope="module")
def target() -> tuple[VLM, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """A model to load into, and what it held before."""
    model, optimizer = made(5)
    return model, optimizer, {name: value.clone() for name, value in model.state_dict().items()}


def check_refused(
    folder: Path, target: tuple[VLM, torch.optim.Optimizer, dict[str, torch.Tensor]]
) -> None:
    """Loading raises with the folder's name, and nothing of the model or optimiser changes."""
    model, optimizer, before = target
    with pytest.raises((ValueError, FileNotFoundError), match=folder.name):
        checkpoint.load(folder, model, optimizer, origin=ORIGIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state


def json_equal(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def flipped(data: bytes, at: int, chance: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(7)]) + data[at + 1 :]


def cut(data: bytes, at: int, chance: random.Random) -> bytes:
    # Cutting off the line's end of a JSON file takes nothing away.
    return data[: min(at, len(data) - 2)]


@pytest.mark.parametrize("harm", [flipped, cut])
def test_two_hundred_harmed_files_are_all_refused(
    sound: Path,
    tmp_path: Path,
    target: tuple[VLM, torch.optim.Optimizer, dict[str, torch.Tensor]],
    harm: Callable[[bytes, int, random.Random], bytes],
) -> None:
    folder = tmp_path / sound.name
    shutil.copytree(sound, folder)
    chance, files = random.Random(1), sorted(path.name for path in sound.iterdir())
    for number in range(200):
        path = folder / files[number % len(files)]
        whole = path.read_bytes()
        data = harm(whole, chance.randrange(len(whole)), chance)
        # Space between the manifest's words says nothing, whatever it is.
        if path.name != "manifest.json" or not json_equal(data, whole):
            path.write_bytes(data)
            check_refused(folder, target)
            path.write_bytes(whole)
    model, optimizer = made(6)
    assert checkpoint.load(folder, model, optimizer, origin=ORIGIN) == PROGRESS


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        _remove("model.safetensors"),
        _remove("optimizer.safetensors"),
        _remove("progress.json"),
        _remove("origin.json"),
        _remove("manifest.json"),
        _write("manifest.json", "{}"),
        _write("manifest.json", "[]"),
        _write("stray.safetensors", ""),
    ],
    ids=["weights", "moments", "progress", "origin", "manifest", "empty", "list", "stray"],
)
def test_missing_and_foreign_files_are_refused(
    sound: Path,
    tmp_path: Path,
    target: tuple[VLM, torch.optim.Optimizer, dict[str, torch.Tensor]],
    damage: Callable[[Path], None],
) -> None:
    folder = tmp_path / sound.name
    shutil.copytree(sound, folder)
    damage(folder)
    check_refused(folder, target)


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ({"stage": "other", "format": "4"}, "stage 'one', now 'other'"),
        ({"stage": "one", "format": "5"}, "format '4', now '5'"),
        (ORIGIN | {"rows of a step": "16"}, "rows of a step None, now '16'"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_with_both_values(
    sound: Path,
    target: tuple[VLM, torch.optim.Optimizer, dict[str, torch.Tensor]],
    origin: dict[str, str],
    told: str,
) -> None:
    model, optimizer, _ = target
    with pytest.raises(ValueError, match=told):
        checkpoint.load(sound, model, optimizer, origin=origin)


def stopped(tiny_ledger: Ledger, folder: Path) -> tuple[Ledger, list[Path]]:
    """A text run that was stopped after seven steps, and its two checkpoints."""
    mine = tiny.store_with(tiny_ledger, folder, tiny.DATA)
    asked = iter(range(1, 100))
    with pytest.raises(Stopped):
        tiny.runner(mine, should_stop=lambda: next(asked) == 7).run(tiny.TEXT)
    kept = checkpoint.by_age(mine.folder(tiny.TEXT) / "checkpoints")
    assert [path.name for path in kept] == ["step-00000007", "step-00000005"]
    return mine, kept


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_stage_goes_on_from_the_checkpoint_before_a_broken_one_and_says_so(
    tiny_ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, kept = stopped(tiny_ledger, tmp_path)
    flip(kept[0] / "optimizer.safetensors")
    tiny.runner(mine).run(tiny.TEXT)
    said = capsys.readouterr().err
    assert "step-00000007" in said
    assert "the one before it is" in said
    assert tiny.bits(mine, tiny.TEXT) == tiny.bits(tiny_ledger, tiny.TEXT)


def test_a_stage_with_broken_checkpoints_alone_does_not_start_over(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    mine, kept = stopped(tiny_ledger, tmp_path)
    for folder in kept:
        flip(folder / "model.safetensors")
    with pytest.raises(CorruptError, match="differs from its manifest"):
        tiny.runner(mine).run(tiny.TEXT)
    assert mine.state(tiny.TEXT) == "failed"
    assert len(mine.metrics(tiny.TEXT)) == 7
