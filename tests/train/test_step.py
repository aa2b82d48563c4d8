import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from midstream.config import AdamW, VLMConfig
from midstream.core.batch import IGNORE, PADDING, Batch, Row, stack_rows
from midstream.core.tokens import TokenCount
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.store import Ledger
from midstream.train.parallel import PARTS, Clock, Place
from midstream.train.step import NonFiniteError, StepResult, make_optimizer, set_rate, train_step
from tiny import DECODER, ENCODER, TEXT

LENGTH = 48
PATCHES = ENCODER.num_patches
# Supervised positions of each row: as uneven as captions beside documents.
TARGETS = (1, 40, 2, 47, 0, 17)
Whole = tuple[StepResult, dict[str, torch.Tensor]]
CPU = torch.device("cpu")


def same(images: torch.Tensor) -> torch.Tensor:
    return images


def row(index: int, num_targets: int) -> Row:
    """A row with an image where `index` is even, its targets at the end."""
    rng = np.random.default_rng(index)
    input_ids = rng.integers(0, DECODER.vocab_size, LENGTH)
    targets = np.full(LENGTH, IGNORE, dtype=np.int64)
    if num_targets:
        targets[-num_targets:] = rng.integers(0, DECODER.vocab_size, num_targets)
    shown = index % 2 == 0
    segment_ids = np.zeros(LENGTH, dtype=np.int64)
    if index == 4:
        segment_ids[-5:] = PADDING
    return Row(
        input_ids=input_ids,
        targets=targets,
        position_ids=np.arange(LENGTH),
        segment_ids=segment_ids,
        image_starts=np.zeros(int(shown), dtype=np.int64),
        images=np.zeros((int(shown), 2), dtype=np.int64),
        counts=TokenCount(text=LENGTH, target=num_targets),
    )


def batch_of(indices: Sequence[int]) -> Batch:
    rows = [row(index, TARGETS[index]) for index in indices]
    shape = (PATCHES, ENCODER.hidden_size)
    images = [
        torch.randn(shape, generator=torch.Generator().manual_seed(index))
        for index in indices
        if index % 2 == 0
    ]
    return stack_rows(rows, torch.stack(images) if images else torch.zeros((0, *shape)))


def cut(sizes: Sequence[int]) -> list[Batch]:
    ends = np.cumsum(sizes)
    return [
        batch_of(range(int(end - size), int(end))) for end, size in zip(ends, sizes, strict=True)
    ]


def made() -> VLM:
    model = VLM(VLMConfig(decoder=DECODER, encoder=ENCODER))
    initialise(model, 3)
    return model


@pytest.fixture
def vlm() -> VLM:
    return made()


Settings = AdamW(clip_norm=1e6)


def step(
    model: VLM,
    batches: Sequence[Batch],
    settings: AdamW = Settings,
    rate: float = 1e-3,
    encode: Callable[[torch.Tensor], torch.Tensor] = same,
    optimizer: torch.optim.Optimizer | None = None,
) -> StepResult:
    return train_step(
        model,
        optimizer or make_optimizer(model, settings),
        batches,
        encode=encode,
        rate=rate,
        settings=settings,
        place=Place(CPU),
    ).read()


def gradients(model: VLM) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def whole() -> Whole:
    """The step as one batch."""
    model = made()
    result = step(model, cut([6]), rate=0.0)
    return result, gradients(model)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (5, 1), (3, 3), (1, 2, 3)])
def test_cutting_a_step_into_micro_batches_changes_neither_loss_nor_gradient(
    vlm: VLM, whole: Whole, sizes: tuple[int, ...]
) -> None:
    expected, expected_gradients = whole
    found = step(vlm, cut(sizes), rate=0.0)
    assert found.num_targets == expected.num_targets == sum(TARGETS)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    mine = gradients(vlm)
    assert mine.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        far = float((mine[name] - gradient).norm())
        assert far <= 1e-6 * expected.grad_norm, name


def test_the_loss_is_the_mean_over_all_targets_of_the_step(vlm: VLM) -> None:
    result = step(vlm, cut([2, 4]), AdamW(z_loss=0.0), rate=0.0)
    total = 0.0
    for index, num in enumerate(TARGETS):
        batch = batch_of([index])
        with torch.no_grad():
            hidden = vlm(batch, batch.images if len(batch.images) else None)
            logits = vlm.decoder.output(hidden).double()
        kept = batch.targets != IGNORE
        assert int(kept.sum()) == num
        if num:
            chances = logits[kept].log_softmax(-1)
            total -= float(chances.gather(1, batch.targets[kept][:, None]).sum())
    assert result.loss == pytest.approx(total / sum(TARGETS), rel=1e-6)


def test_a_micro_batch_without_image_still_gives_the_projector_a_gradient(vlm: VLM) -> None:
    step(vlm, [batch_of([1, 3])], rate=0.0)
    for name, parameter in vlm.projector.named_parameters():
        assert not parameter.grad.any(), name


def test_the_gradient_is_clipped_and_its_norm_before_that_is_told(vlm: VLM) -> None:
    free = step(vlm, cut([3, 3]), AdamW(clip_norm=1e6), rate=0.0).grad_norm
    result = step(vlm, cut([3, 3]), AdamW(clip_norm=free / 50), rate=0.0)
    assert result.grad_norm == pytest.approx(free, rel=1e-6)
    clipped = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(vlm).values()))
    assert clipped == pytest.approx(free / 50, rel=1e-4)


def test_a_step_moves_the_weights_by_the_rate_it_is_given(vlm: VLM) -> None:
    settings = AdamW(weight_decay=0.0, eps=1e-20)
    before = {n: p.detach().clone() for n, p in vlm.named_parameters()}
    step(vlm, cut([6]), settings, rate=0.0)
    assert all(torch.equal(before[n], p) for n, p in vlm.named_parameters())
    step(vlm, cut([6]), settings, rate=2e-3)
    # Adam's first step is the rate in every entry that has a gradient.
    moved = (vlm.decoder.output.weight - before["decoder.output.weight"]).abs().max()
    assert float(moved.detach()) == pytest.approx(2e-3, rel=1e-2)


@pytest.mark.parametrize("where", ["weight", "feature", "infinite weight"])
def test_a_step_that_is_not_finite_stops_before_the_optimiser_moves(vlm: VLM, where: str) -> None:
    settings = AdamW()
    optimizer = make_optimizer(vlm, settings)
    step(vlm, cut([6]), settings, optimizer=optimizer)
    batches = cut([3, 3])
    if where == "feature":
        batches[1].images[0, 1, 2] = float("nan")
    else:
        bad = float("inf") if where == "infinite weight" else float("nan")
        with torch.no_grad():
            vlm.decoder.output.weight[5, 5] = bad
    before = [p.detach().clone() for p in vlm.parameters()]
    moments = [
        {key: value.clone() for key, value in optimizer.state[p].items()} for p in vlm.parameters()
    ]
    with pytest.raises(NonFiniteError, match=r"loss .*gradient norm"):
        step(vlm, batches, settings, optimizer=optimizer)
    for old, parameter in zip(before, vlm.parameters(), strict=True):
        assert torch.equal(old.view(torch.int32), parameter.detach().view(torch.int32))
    for held, parameter in zip(moments, vlm.parameters(), strict=True):
        for key, value in held.items():
            assert torch.equal(value, optimizer.state[parameter][key])


def test_the_optimiser_never_moves_again_behind_a_step_that_is_not_finite(vlm: VLM) -> None:
    optimizer = make_optimizer(vlm, Settings)
    options: Any = {"encode": same, "rate": 1e-3, "settings": Settings, "place": Place(CPU)}
    step(vlm, cut([6]), optimizer=optimizer)
    before = [value.detach().clone() for value in vlm.parameters()]
    batches = cut([3, 3])
    batches[0].images[0, 1, 2] = float("inf")
    # Both are on their way before anybody reads the first one.
    first = train_step(vlm, optimizer, batches, **options)
    second = train_step(vlm, optimizer, cut([6]), **options)
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        first.read()
    assert second.read().loss > 0
    for old, value in zip(before, vlm.parameters(), strict=True):
        assert torch.equal(old, value)
        assert optimizer.state[value]["step"] == 1


def test_a_step_without_a_target_is_refused(vlm: VLM) -> None:
    with pytest.raises(ValueError, match="holds no target"):
        step(vlm, [batch_of([4])])


def test_pixels_go_through_the_encoder_once_a_micro_batch(vlm: VLM) -> None:
    shapes = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        shapes.append(len(images))
        return images

    step(vlm, [batch_of([0, 1, 2]), batch_of([1, 3]), batch_of([4, 5])], encode=encode)
    assert shapes == [2, 1]


# ------------------------------------------------------------------------------ the optimiser


def text_model() -> VLM:
    model = VLM(VLMConfig(decoder=DECODER))
    initialise(model, 0)
    return model


def after_a_step_without_gradient(vlm: VLM, settings: AdamW) -> dict[str, float]:
    """By parameter: the length of its vector after the step over that before."""
    before = {name: value.detach().clone() for name, value in vlm.named_parameters()}
    optimizer = make_optimizer(vlm, settings)
    set_rate(optimizer, 0.5)
    for value in vlm.parameters():
        value.grad = torch.zeros_like(value) if value.requires_grad else None
    optimizer.step()
    return {n: float(v.detach().norm() / before[n].norm()) for n, v in vlm.named_parameters()}


def test_every_weight_decays_as_in_openlm_or_matrices_only_as_in_prismatic() -> None:
    shrunk = pytest.approx(1 - 0.5 * 0.1, rel=1e-5)
    everything = after_a_step_without_gradient(text_model(), AdamW(weight_decay=0.1, decay="all"))
    assert all(ratio == shrunk for ratio in everything.values())
    vlm = text_model()
    matrices = after_a_step_without_gradient(vlm, AdamW(weight_decay=0.1, decay="matrices"))
    vectors = {name for name, value in vlm.named_parameters() if value.ndim < 2}
    assert vectors
    for name, ratio in matrices.items():
        assert ratio == (1.0 if name in vectors else shrunk), name


def test_frozen_parameters_are_left_out() -> None:
    vlm = text_model()
    vlm.decoder.output.weight.requires_grad_(False)
    optimizer = make_optimizer(vlm, AdamW(decay="matrices"))
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert held == {id(v) for v in vlm.parameters()} - {id(vlm.decoder.output.weight)}


def test_rate_betas_and_epsilon_are_set_in_every_group() -> None:
    optimizer = make_optimizer(
        text_model(), AdamW(decay="matrices", beta1=0.8, beta2=0.7, eps=1e-5)
    )
    for rate in (0.0, 0.25):
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]
        set_rate(optimizer, 0.25)
    assert all(g["betas"] == (0.8, 0.7) and g["eps"] == 1e-5 for g in optimizer.param_groups)


# --------------------------------------------------------------------------------- the meters


def test_a_clock_adds_up_and_goes_on_from_before() -> None:
    clock = Clock(torch.device("cpu"), {"data": 2.0})
    with clock.part("data"):
        time.sleep(0.01)
    with clock.part("model", on_device=True):
        pass
    read = clock.read()
    assert read.keys() == set(PARTS)
    assert 2.01 <= read["data"] < 3.0
    assert read["encoder"] == 0.0


def test_a_stage_keeps_its_meters(tiny_ledger: Ledger) -> None:
    results = tiny_ledger.results(TEXT)
    meters = results["meters"]
    assert meters["useful_tokens_per_second"] <= meters["tokens_per_second"]
    assert meters["images_per_second"] == 0.0
    assert 0.0 < meters["product_share"] < 1.0
    assert meters["gpu"] is meters["model_flops_utilisation"] is None
    assert meters["memory_of"] == results["memory_of"] == "processes"
    assert meters["peak_memory_bytes"] <= results["peak_memory_bytes"]
    assert meters["time_shares"]["model"] > 0.1
    assert sum(meters["time_shares"].values()) == pytest.approx(1.0, abs=0.05)
    seconds = sum(line["seconds"] for line in tiny_ledger.metrics(TEXT))
    assert results["seconds"] >= seconds * 0.9
