"""From its first forward pass to its optimiser's end no step waits for a device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from midstream.config import AdamW, GatedBlocks, ProjectorConfig, Resampler, VLMConfig
from midstream.core.batch import IGNORE, PADDING, Batch, Row, stack_rows
from midstream.core.tokens import TokenCount
from midstream.data.images import encode_fixed
from midstream.model.vision import build_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.store import Ledger
from midstream.train import loop, step
from midstream.train.checkpoint import Saver
from midstream.train.parallel import Place
from midstream.train.step import Taken, make_optimizer, placed, totals_of, train_step

# Long enough that segments are cut apart.
LENGTH = 256
DECODER = tiny.DECODER.model_copy(update={"vocab_size": 50})
ENCODER = tiny.ENCODER.model_copy(update={"feature_dtype": "int8"})
SETTINGS = AdamW()
OPERATIONS = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
}
# What reads a tensor on a CPU without an operation.
METHODS = {"tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "item"}


class WaitedError(AssertionError):
    """The host asked a device for a number."""


class Operations(TorchDispatchMode):
    """Refuses the operations whose result a host must see before it goes on."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATIONS:
            raise WaitedError(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            places = [one for one in args[1] if one is not None]
            if any(one.dtype in (torch.bool, torch.uint8) for one in places):
                raise WaitedError(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Refuses the methods of tensors that hand numbers to Python."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise WaitedError(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def refusing(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    with Operations(), Methods():
        yield


# Of each row the segments: a text's length, or pictures and the text behind each.
Segment = int | tuple[int, ...]
TEXTS: list[list[Segment]] = [[LENGTH], [100, 120]]
CAPTIONS: list[list[Segment]] = [[(20,), (30,), 90], [(240,)]]
DOCUMENTS: list[list[Segment]] = [[(9, 30, 12), 40, (7, 50)], [130, (40, 20)]]


def row_of(segments: Sequence[Segment], width: int, seed: int) -> Row:
    """Texts learn everything, pictures what stands behind their last position."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(1, DECODER.vocab_size, LENGTH)
    targets, position_ids = np.full(LENGTH, IGNORE), np.zeros(LENGTH, dtype=np.int64)
    segment_ids = np.full(LENGTH, PADDING)
    end, starts = 0, list[int]()
    for number, segment in enumerate(segments):
        first = end
        for text in (segment,) if isinstance(segment, int) else segment:
            if not isinstance(segment, int):
                starts.append(end)
                input_ids[end : end + width] = 0
                end += width
            text = min(text, LENGTH - end)
            targets[max(end - 1, first) : end + text - 1] = 7
            end += text
        segment_ids[first:end] = number
        position_ids[first:end] = np.arange(end - first)
    return Row(
        input_ids=input_ids,
        targets=targets,
        position_ids=position_ids,
        segment_ids=segment_ids,
        image_starts=np.array(starts, dtype=np.int64),
        images=np.zeros((len(starts), 3), dtype=np.int64),
        counts=TokenCount(text=end, target=int((targets != IGNORE).sum())),
    )


def batch_of(rows: list[list[Segment]], config: VLMConfig) -> Batch:
    made = [row_of(row, config.image_tokens, seed) for seed, row in enumerate(rows)]
    number = sum(len(row.image_starts) for row in made)
    size = ENCODER.image_size
    chance = torch.Generator().manual_seed(0)
    return stack_rows(made, torch.randn((number, 3, size, size), generator=chance))


GATED = ProjectorConfig(
    num_layers=0,
    reduction=Resampler(num_latents=3, num_layers=1, num_heads=2, head_dim=4),
    gated=GatedBlocks(every=1, num_heads=2, head_dim=4),
)
MODELS = {
    "text": VLMConfig(decoder=DECODER),
    "joined text": VLMConfig(decoder=DECODER, attention="causal"),
    **{
        rule: VLMConfig(decoder=DECODER, encoder=ENCODER, attention=rule)
        for rule in ("causal", "segments", "prefix", "pictures", "latest")
    },
    "own encoder": VLMConfig(decoder=DECODER, encoder=ENCODER, owns_encoder=True),
    "gated": VLMConfig(decoder=DECODER, encoder=ENCODER, projector=GATED),
}
ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_several_micro_batches_waits_for_nothing(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, place = MODELS[name], Place(torch.device(device))
    model = VLM(config)
    initialise(model, 0)
    model.to(place.device)
    encode: Callable[[Tensor], Tensor] | None = None
    if config.encoder is not None and not config.owns_encoder:
        tower = build_encoder(ENCODER).requires_grad_(False)
        initialise(tower, 1)
        encode = partial(encode_fixed, tower.to(place.device), config=ENCODER)
    kinds = (TEXTS, TEXTS) if config.encoder is None else (CAPTIONS, TEXTS, DOCUMENTS)
    batches = [batch_of(rows, config) for rows in kinds]
    optimizer = make_optimizer(model, SETTINGS)
    settings: Any = {"encode": encode, "rate": 1e-3, "settings": SETTINGS, "place": place}
    if device == "cuda":  # kernels are compiled, which waits
        train_step(model, optimizer, batches, **settings).read()
    # What the host finds out of its own tensors is none of a device's business.
    waiting = iter([placed(model, batch, place) for batch in batches])
    monkeypatch.setattr(step, "placed", lambda *_: next(waiting))
    totals = totals_of(batches, place)
    with refusing(place.device):
        taken = train_step(model, optimizer, batches, totals=totals, **settings)
    found = taken.read()
    assert (found.num_targets, found.num_images) == (totals.counts.target, sum(totals.num_images))
    assert 0 < found.loss < 6


@pytest.mark.parametrize(
    "ask",
    [
        lambda one: one.item(),
        lambda one: one.tolist(),
        lambda one: float(one),
        lambda one: bool(one > 0),
        lambda one: one[one > 0],
        lambda one: one.expand(2).nonzero(),
        lambda one: torch.unique(one.expand(2)),
        lambda one: torch.equal(one, one),
        lambda one: one.expand(2).clone().index_put_((one.expand(2) > 0,), one),
    ],
)
def test_what_a_step_may_not_do_is_refused(ask: Callable[[Tensor], object]) -> None:
    with pytest.raises(WaitedError), refusing(torch.device("cpu")):
        ask(torch.ones(()))


def test_a_step_is_read_when_the_next_one_is_taken_and_before_anything_is_kept(
    tiny_ledger: Ledger, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    read, start = Taken.read, Saver.start
    numbers = dict[int, int]()

    def taking(*given: Any, **options: Any) -> Taken:
        taken = train_step(*given, **options)
        numbers[id(taken)] = len(numbers) + 1
        said.append(f"take {len(numbers)}")
        kept.append(taken)
        return taken

    def reading(self: Taken) -> Any:
        if said[-1] != f"read {numbers[id(self)]}":
            said.append(f"read {numbers[id(self)]}")
        return read(self)

    def saving(self: Any, folder: Any, *given: Any, **options: Any) -> None:
        said.append(f"keep {folder.name}")
        start(self, folder, *given, **options)

    kept = list[Taken]()
    monkeypatch.setattr(loop, "train_step", taking)
    monkeypatch.setattr(Taken, "read", reading)
    monkeypatch.setattr(Saver, "start", saving)
    mine = tiny.store_with(tiny_ledger, tmp_path, tiny.DATA)
    stage = tiny.text_run(total_tokens=5_500).model_copy(update={"milestones": (1.0,)})
    tiny.runner(mine).run(stage)
    assert mine.results(stage)["steps"] == 8
    # The first step is checked at once, a checkpoint follows the fifth.
    expected = ["take 1", "read 1", "take 2", "take 3", "read 2", "take 4", "read 3", "take 5"]
    expected += ["read 4", "read 5", "keep step-00000005", "take 6", "take 7", "read 6", "take 8"]
    assert said[: len(expected)] == expected
    assert said[len(expected) :] == ["read 7", "read 8", "keep 100"]
