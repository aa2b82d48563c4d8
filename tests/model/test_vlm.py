from dataclasses import replace
from typing import Literal

import pytest
import torch
from test_generate import ENCODER, OPENLM
from torch import Tensor
from torch.nn.functional import gelu, linear

from midstream.config import EncoderConfig, ProjectorConfig, VLMConfig
from midstream.core.batch import IGNORE, Batch
from midstream.core.tokens import TokenCount
from midstream.model.projector import Projector
from midstream.model.vlm import VLM, scatter_image_features, slot_positions, summed_loss
from midstream.model.weights import initialise


def vlm_of(num_layers: Literal[2, 3] = 2, *, encoder: EncoderConfig | None = ENCODER) -> VLM:
    projector = ProjectorConfig(num_layers=num_layers)
    vlm = VLM(VLMConfig(decoder=OPENLM, encoder=encoder, projector=projector))
    initialise(vlm, 0)
    return vlm


def batch_of(slots: list[tuple[int, int]], length: int = 12) -> Batch:
    source = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, 40, (2, length), generator=source)
    targets = torch.full_like(input_ids, IGNORE)
    targets[:, -4:] = 3
    for row, start in slots:
        input_ids[row, start : start + 4] = 0
    return Batch(
        input_ids=input_ids,
        targets=targets,
        position_ids=torch.arange(length).expand(2, length).contiguous(),
        segment_ids=torch.zeros_like(input_ids),
        image_slots=torch.tensor(slots, dtype=torch.int64).reshape(-1, 2),
        images=torch.randn(len(slots), 3, 8, 8, generator=source),
        counts=TokenCount(text=24, target=8),
    )


def loss_of(vlm: VLM, batch: Batch, features: Tensor | None) -> Tensor:
    return vlm.losses(batch, features, 1e-4)[0]


def test_features_land_in_their_slots_and_nowhere_else() -> None:
    embeddings = torch.zeros(2, 6, 1)
    features = torch.arange(1.0, 7.0).reshape(3, 2, 1)
    slots = torch.tensor([[0, 4], [1, 0], [1, 3]])
    placed = scatter_image_features(embeddings, features, slot_positions(slots, 2, 6))
    assert placed[:, :, 0].tolist() == [[0, 0, 0, 0, 1, 2], [3, 4, 0, 5, 6, 0]]
    assert embeddings.abs().max() == 0


def test_images_that_do_not_agree_with_the_slots_are_refused() -> None:
    embeddings, slots = torch.zeros(2, 6, 1), torch.tensor([[0, 4], [1, 0]])
    with pytest.raises(ValueError, match="3 images were given, the rows have 2 slots"):
        scatter_image_features(embeddings, torch.zeros(3, 2, 1), slot_positions(slots, 2, 6))
    with pytest.raises(ValueError, match="3 positions starts at column 4 of rows of 6"):
        slot_positions(slots, 3, 6)
    with pytest.raises(ValueError, match=r"\(patches, width\) \(5, 24\).*\(4, 24\)"):
        vlm_of()(batch_of([(0, 0)]), torch.zeros(1, 5, 24))
    with pytest.raises(ValueError, match="0 images were given, the rows have 1 slots"):
        vlm_of()(batch_of([(0, 0)]), None)
    with pytest.raises(ValueError, match="1 images, the model no encoder"):
        vlm_of(encoder=None)(batch_of([(0, 0)]), None)
    with pytest.raises(ValueError, match="without an encoder"):
        vlm_of(encoder=None)(batch_of([]), torch.zeros(1, 4, 24))


@torch.no_grad()
def test_token_ids_under_an_image_do_not_matter() -> None:
    vlm, batch = vlm_of(), batch_of([(0, 2)])
    features = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(1))
    before = vlm(batch, features)
    batch.input_ids[0, 2:6] = 17
    assert torch.equal(before, vlm(batch, features))


@torch.no_grad()
def test_a_text_batch_is_computed_as_the_language_model_alone_does() -> None:
    seeing, plain, batch = vlm_of(), vlm_of(encoder=None), batch_of([])
    assert torch.equal(seeing(batch, None), plain(batch, None))


@pytest.mark.parametrize(("num_layers", "count"), [(2, 14_752_256), (3, 18_948_608)])
def test_projector_has_the_size_of_the_published_one(num_layers: int, count: int) -> None:
    with torch.device("meta"):
        config = ProjectorConfig.model_validate({"num_layers": num_layers})
        projector = Projector(config, in_width=1152, out_width=2048)
    assert sum(p.numel() for p in projector.parameters()) == count


CASES = {
    "linear": (ProjectorConfig(num_layers=1), (6, 10)),
    "two layers": (ProjectorConfig(num_layers=2), (6, 24, 10)),
    "at decoder width": (ProjectorConfig(num_layers=2, hidden="decoder"), (6, 10, 10)),
    "three layers": (ProjectorConfig(num_layers=3), (6, 24, 10, 10)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_projector_is_its_linear_layers_with_exact_gelu_between(case: str) -> None:
    config, widths = CASES[case]
    module = Projector(config, in_width=6, out_width=10)
    initialise(module, 0)
    assert config.widths(6, 10) == widths
    named = dict(module.named_parameters())
    expected = hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    for index in range(len(widths) - 1):
        expected = gelu(expected) if index else expected
        layer = f"{2 * index}."
        expected = linear(expected, named.pop(f"{layer}weight"), named.pop(f"{layer}bias"))
    assert not named
    assert torch.equal(module(hidden), expected)


def test_decoder_width_is_for_two_layers() -> None:
    with pytest.raises(ValueError, match="hidden='decoder' is for two layers, the projector has 3"):
        ProjectorConfig(num_layers=3, hidden="decoder")


def test_features_in_half_precision_and_autocast_are_taken() -> None:
    vlm, batch = vlm_of(), batch_of([(0, 2)])
    features = torch.randn(1, 4, 24, generator=torch.Generator().manual_seed(1))
    exact = vlm(batch, features)
    torch.testing.assert_close(vlm(batch, features.half()), exact, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(vlm, batch, features.half())
    assert float(loss.detach()) == pytest.approx(float(loss_of(vlm, batch, features)), rel=0.02)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_last_block_works_where_there_are_targets_with_the_gradients_of_working_everywhere(
    share: float,
) -> None:
    drawn = torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    found = {}
    for how in ("asked", "everywhere"):
        vlm, batch = vlm_of(), batch_of([(0, 2), (1, 5)])
        batch = replace(batch, targets=torch.where(drawn < share, 3, IGNORE))
        features = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0))
        if how == "asked":
            total, loss = vlm.losses(batch, features, 1e-4)
        else:
            kept = batch.targets != IGNORE
            hidden = vlm(batch, features)[kept]
            weight = vlm.decoder.output.weight
            total, loss = summed_loss(hidden, weight, batch.targets[kept], 1e-4)
        total.backward()
        found[how] = [total.detach(), loss, *(value.grad for value in vlm.parameters())]
    for one, other in zip(*found.values(), strict=True):
        assert one is not None
        # As measured: 6e-7 of values up to 40.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_last_block_computes_no_more_than_is_asked_for() -> None:
    vlm, batch = vlm_of(), batch_of([])
    seen = []
    for layer in vlm.decoder.layers:
        layer.feed_forward.register_forward_hook(
            lambda _module, given, _out: seen.append(given[0].shape)
        )
    asked = vlm.losses(batch, None, 0.0)
    assert [tuple(shape) for shape in seen] == [(2, 12, 32), (8, 32)]
    vlm.whole_blocks = True
    torch.testing.assert_close(vlm.losses(batch, None, 0.0), asked)
    assert [tuple(shape) for shape in seen[2:]] == [(2, 12, 32)] * 2
