"""One rank, two and four: the same losses, the same weights within rounding, each other's files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import tiny
from midstream.config import Machine
from midstream.model.weights import read_tensors
from midstream.study.stages import Continue, ContinueFrom
from midstream.study.store import Ledger
from midstream.train import checkpoint
from ranked import STOPPED, run_ranks

# Some thirty steps of captions beside documents: rows of 1 to 190 targets.
LONG = tiny.image_run(
    ContinueFrom(stage=tiny.TEXT, completion=0.4, optimizer="carry"),
    # So few views of each picture that features are not stored, which is asked to stop as well.
    budget=tiny.mixture(22_000, pictures=0.2, web=0.8).model_copy(update={"max_epochs": 4}),
    checkpoint_every_steps=100,
)
# Rows of few pictures, one a micro-batch: some hold none, and at the end a rank has no row.
OWN_ENCODER = tiny.image_run(
    budget=tiny.mixture(4_000, pictures=0.1, web=0.9), encoder_rate_factor=0.1
)
FROZEN_DECODER = tiny.image_run(
    budget=tiny.mixture(5_000, pictures=0.3, web=0.7), encoder_rate_factor=0.1, freeze_decoder=True
)
# As measured, with two threads and one: 3e-7 of the loss, 6e-7 of the gradient's norm.
TOLERANCE = 1e-6

pytestmark = pytest.mark.slow


def store(tiny_ledger: Ledger, folder: Path) -> Ledger:
    return tiny.store_with(tiny_ledger, folder, tiny.DATA, tiny.ENCODER_STAGE, tiny.TEXT)


@pytest.fixture(scope="module")
def alone(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store for stages that run in one process."""
    mine = store(tiny_ledger, tmp_path_factory.mktemp("alone"))
    tiny.run_missing(mine, LONG)
    return mine


def column(ledger: Ledger, stage: Continue, name: str) -> list[float]:
    return [line[name] for line in ledger.metrics(stage)]


def check_equal(found: Ledger, expected: Ledger, stage: Continue) -> None:
    """Step logs within rounding, counts and results exactly."""
    for name in ("loss", "grad_norm"):
        assert column(found, stage, name) == pytest.approx(
            column(expected, stage, name), rel=TOLERANCE
        )
    for name in ("step", "tokens_seen", "num_targets", "rate"):
        assert column(found, stage, name) == column(expected, stage, name)
    results = [ledger.results(stage) for ledger in (found, expected)]
    for key in ("tokens_seen", "steps", "tokens", "sources", "pad_fraction", "last_rate"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize(
    ("stage", "ranks", "machine"),
    [
        (LONG, 2, {}),
        pytest.param(LONG, 4, {}, marks=pytest.mark.faults),
        (OWN_ENCODER, 2, {"micro_batch_rows": 1, "shard_ranks": 1}),
        pytest.param(LONG, 4, {"shard_ranks": 2}, marks=pytest.mark.faults),
        (OWN_ENCODER, 2, {"micro_batch_rows": 1}),
        pytest.param(FROZEN_DECODER, 2, {"micro_batch_rows": 1}, marks=pytest.mark.faults),
        pytest.param(LONG, 2, {"activation_checkpointing": "blocks"}, marks=pytest.mark.faults),
    ],
    ids=["two", "four", "copies", "hybrid", "own-encoder", "frozen-decoder", "checkpointed"],
)
def test_ranks_train_as_one_process_does(
    alone: Ledger,
    tiny_ledger: Ledger,
    tmp_path: Path,
    stage: Continue,
    ranks: int,
    machine: dict[str, object],
) -> None:
    tiny.run_missing(alone, stage)
    mine = store(tiny_ledger, tmp_path)
    ended = run_ranks(mine, stage, ranks, **machine)
    assert ended.returncode == 0, ended.stderr
    assert len(mine.metrics(stage)) >= (28 if stage is LONG else 5)
    check_equal(mine, alone, stage)
    weights = read_tensors(mine.folder(stage) / "weights")
    whole = load_file(alone.folder(stage) / "weights" / "model.safetensors")
    assert weights.keys() == whole.keys()
    for name, value in whole.items():
        assert (weights[name] - value).abs().max() < 1e-4, name


def test_two_ranks_give_equal_bits_each_time(tiny_ledger: Ledger, tmp_path: Path) -> None:
    stage = tiny.image_run(total_tokens=3_000)
    found = []
    for name in ("one", "two"):
        mine = store(tiny_ledger, tmp_path / name)
        assert run_ranks(mine, stage, 2).returncode == 0
        found.append(tiny.bits(mine, stage))
    assert found[0] == found[1]


def chain(
    ledger: Ledger, stage: Continue, worlds: Sequence[int], steps: int
) -> list[dict[str, str]]:
    """Stop after `steps` on each number of ranks but the last, which goes to the end; the digests
    of what each that was stopped has saved."""
    saved = []
    for ranks in worlds[:-1]:
        ended = run_ranks(ledger, stage, ranks, stop_after=steps)
        assert ended.returncode != 0
        assert ledger.state(stage) == "stopped", ended.stderr
        newest = checkpoint.by_age(ledger.folder(stage) / "checkpoints")[0]
        saved.append(json.loads((newest / "origin.json").read_text())["digests"])
    ended = run_ranks(ledger, stage, worlds[-1])
    assert ended.returncode == 0, ended.stderr
    return saved


@pytest.mark.parametrize(
    "worlds",
    [(2, 1), pytest.param((4, 2, 1, 2), marks=pytest.mark.faults)],
    ids=lambda worlds: "-".join(map(str, worlds)),
)
def test_a_stage_goes_on_with_another_number_of_ranks(
    alone: Ledger, tiny_ledger: Ledger, tmp_path: Path, worlds: tuple[int, ...]
) -> None:
    mine = store(tiny_ledger, tmp_path)
    saved = chain(mine, LONG, worlds, 8)
    check_equal(mine, alone, LONG)
    starts = [
        json.loads(line) for line in (mine.folder(LONG) / "starts.jsonl").read_text().splitlines()
    ]
    assert [start["ranks"] for start in starts] == list(worlds)
    assert [start["step"] for start in starts] == [8 * index for index in range(len(worlds))]
    # To the bit what another number of ranks has saved.
    for start, stored in zip(starts[1:], saved, strict=True):
        assert start["weights_digest"] == stored["model"]
        assert start["moments_digest"] == stored["optimizer"]


def test_ranks_of_another_number_than_the_machine_says_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from midstream.train.parallel import set_up

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 processes were started, the machine says 2 ranks"):
        set_up(Machine(device="cpu", ranks=2))


def stored(ledger: Ledger) -> dict[bytes, bytes]:
    """By the picture's hash: the bytes of its features; no picture is stored twice."""
    found: dict[bytes, bytes] = {}
    for part in sorted((ledger.store / "features").glob("*/part-*")):
        hashes = np.load(part / "hashes.npy")
        rows = np.fromfile(part / "features.bin", np.uint8).reshape(len(hashes), -1)
        mine = {key.tobytes(): row.tobytes() for key, row in zip(hashes, rows, strict=True)}
        assert not found.keys() & mine.keys()
        found |= mine
    return found


def test_ranks_store_the_features_of_one_process_and_all_stop_where_one_is_asked(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    stage = tiny.image_run(total_tokens=3_000)
    whole, mine = store(tiny_ledger, tmp_path / "one"), store(tiny_ledger, tmp_path / "two")
    storing = tiny.MACHINE.model_copy(update={"features": "stored"})
    tiny.runner(whole, machine=storing).run(stage)
    expected = stored(whole)
    # The second rank alone gets the signal, after its first batch.
    stopped = run_ranks(mine, stage, 2, stop_after=2, stopped_rank=1, features="stored")
    assert (stopped.returncode, mine.state(stage)) == (STOPPED, "stopped"), stopped.stderr
    assert 0 < len(stored(mine)) < len(expected)
    ended = run_ranks(mine, stage, 2, features="stored")
    assert ended.returncode == 0, ended.stderr
    assert stored(mine) == expected
    check_equal(mine, whole, stage)
