"""What a stage trains gets a gradient, what it freezes gets none: every way to see and connect."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from midstream.config import (
    AdamW,
    AnyEncoderConfig,
    ContinuedCosine,
    DecoderConfig,
    EncoderConfig,
    FusedEncoder,
    Mixture,
    PatchProjection,
    ProjectorConfig,
    Rows,
    Share,
    Training,
    VLMConfig,
)
from midstream.config.model import weight_flops
from midstream.core.batch import IGNORE, Batch
from midstream.core.tokens import TokenCount
from midstream.model.vision import build_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.train.parallel import Place
from midstream.train.step import freeze, make_optimizer, train_step

CPU = torch.device("cpu")
DECODER = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=48)
SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 32,
}
SIGLIP = EncoderConfig(**SIZES)
DINOV2 = EncoderConfig(**SIZES, family="dinov2", hidden_act="gelu")
ENCODERS: dict[str, AnyEncoderConfig] = {
    "siglip": SIGLIP,
    "siglip, last layer and its norm": EncoderConfig(**SIZES, feature_layer=-1, final_norm=True),
    "siglip, other resolution": EncoderConfig(**SIZES | {"image_size": 24}, position_size=16),
    "siglip2": EncoderConfig(**SIZES, family="siglip2"),
    "clip": EncoderConfig(**SIZES, family="clip"),
    "dinov2": DINOV2,
    "dinov3": EncoderConfig(**SIZES, family="dinov3", num_registers=2, ffn="swiglu"),
    "dinov2 with registers": DINOV2.model_copy(update={"num_registers": 2, "ffn": "swiglu"}),
    "fused": FusedEncoder(towers=(SIGLIP, DINOV2)),
    "patches": PatchProjection(image_size=16, patch_size=8, hidden_size=16),
}
PROJECTORS = {
    "linear": ProjectorConfig(num_layers=1),
    "two layers": ProjectorConfig(num_layers=2),
    "two layers at decoder width": ProjectorConfig(num_layers=2, hidden="decoder"),
    "three layers": ProjectorConfig(num_layers=3),
}
# Owned by the model, and the rate that the stage gives the encoder.
STAGES = {
    "frozen": (False, None),
    "trained": (True, 0.1),
    "trained before, frozen now": (True, None),
}


def training(factor: float | None, *, freeze_decoder: bool = False) -> Training:
    return Training(
        budget=Mixture(total_tokens=1, shares=(Share(source="x", share=1.0),)),
        rows=Rows(row_length=8, batch_rows=1),
        schedule=ContinuedCosine(),
        encoder_rate_factor=factor,
        freeze_decoder=freeze_decoder,
    )


def batch_of(encoder: AnyEncoderConfig, num_images: int) -> Batch:
    """Two rows that start with an image each, or rows of text alone."""
    patches = encoder.num_patches if num_images else 0
    length = patches + 6
    source = torch.Generator().manual_seed(3)
    input_ids = torch.randint(48, (2, length), generator=source)
    targets = input_ids.roll(-1, 1)
    targets[:, :patches] = IGNORE
    slots = torch.tensor([[row, 0] for row in range(num_images)], dtype=torch.int64).reshape(-1, 2)
    return Batch(
        input_ids=input_ids,
        targets=targets,
        position_ids=torch.arange(length).expand(2, -1),
        segment_ids=torch.zeros((2, length), dtype=torch.int64),
        image_slots=slots,
        images=torch.randn(
            (num_images, 3, encoder.image_size, encoder.image_size), generator=source
        ),
        counts=TokenCount(text=12, target=12),
    )


def model_of(encoder: AnyEncoderConfig | None = SIGLIP, **settings: Any) -> VLM:
    settings = {"owns_encoder": encoder is not None} | settings
    if isinstance(encoder, PatchProjection):
        settings["owns_encoder"] = True
    model = VLM(VLMConfig(decoder=DECODER, encoder=encoder, **settings))
    initialise(model, 0)
    return model


def stepped(
    model: VLM, batch: Batch, chosen: Training, settings: AdamW | None = None, steps: int = 1
) -> tuple[dict[str, Tensor], torch.optim.Optimizer, nn.Module | None]:
    """The parameters before some steps, the optimiser, and the encoder outside the model."""
    settings = settings or AdamW()
    optimizer = make_optimizer(model, settings, encoder_rate_factor=freeze(model, chosen))
    outside = None
    if model.encoder is None:
        assert model.config.encoder is not None
        outside = build_encoder(model.config.encoder).requires_grad_(False)
        initialise(outside, 1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    options: Any = {"rate": 1e-3, "settings": settings, "place": Place(CPU)}
    for _ in range(steps):
        train_step(model, optimizer, [batch], encode=outside, **options)
    return before, optimizer, outside


@pytest.mark.parametrize(
    ("encoder", "projector", "stage"),
    [
        *((encoder, "two layers", stage) for encoder in ENCODERS for stage in STAGES),
        *(("siglip", one, "trained") for one in PROJECTORS if one != "two layers"),
    ],
)
def test_gradients_reach_what_is_trained_and_nothing_else(
    encoder: str, projector: str, stage: str
) -> None:
    config, (owned, factor) = ENCODERS[encoder], STAGES[stage]
    patches = isinstance(config, PatchProjection)
    model = model_of(config, projector=PROJECTORS[projector], owns_encoder=owned)
    before, _, frozen = stepped(model, batch_of(config, 2), training(factor))
    trained_encoder = factor is not None or patches
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.") and not trained_encoder:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is not None, name
            # A key's bias adds the same to all logits of a query: only rounding is left.
            if not name.endswith("k_proj.bias"):
                assert parameter.grad.abs().sum() > 0, name
                assert not torch.equal(parameter, before[name]), name
    if frozen is not None:
        assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_step_without_pictures_gives_the_encoder_gradients_of_zero(encoder: str) -> None:
    config = ENCODERS[encoder]
    model = model_of(config)
    freeze(model, training(0.5))
    model(batch_of(config, 0), None).sum().backward()
    assert model.encoder is not None
    assert model.projector is not None
    for part in (model.encoder, model.projector):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_the_encoder_moves_at_its_share_of_the_rate() -> None:
    model = model_of()
    settings = AdamW(weight_decay=0.0, clip_norm=1e9)
    before, _, _ = stepped(model, batch_of(SIGLIP, 2), training(0.01), settings)
    # Adam's first step is the rate, whatever the gradient.
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue
        moved = (parameter.detach() - before[name]).abs().max()
        expected = 1e-5 if name.startswith("encoder.") else 1e-3
        assert moved == pytest.approx(expected, rel=0.05), name


def test_a_rate_without_an_own_encoder_and_nothing_to_train_are_refused() -> None:
    with pytest.raises(ValueError, match="owns no encoder"):
        freeze(model_of(owns_encoder=False), training(0.1))
    with pytest.raises(ValueError, match="nothing else to train"):
        freeze(model_of(None), training(None, freeze_decoder=True))


# Owned by the model, and the rate that the stage gives the encoder; the decoder is frozen.
BESIDE = {
    "projector alone": (False, None),
    "projector and encoder": (True, 0.5),
    "encoder trained before": (True, None),
}


@pytest.mark.parametrize("stage", BESIDE)
@pytest.mark.parametrize("encoder", ["siglip", "fused", "patches"])
def test_a_frozen_decoder_stays_bit_equal_while_what_sees_learns(encoder: str, stage: str) -> None:
    config, (owned, factor) = ENCODERS[encoder], BESIDE[stage]
    patches = isinstance(config, PatchProjection)
    model = model_of(config, owns_encoder=owned)
    chosen = training(factor, freeze_decoder=True)
    # One row of the two has no picture.
    before, optimizer, _ = stepped(model, batch_of(config, 1), chosen, steps=2)
    learns = {"projector"} | ({"encoder"} if factor is not None or patches else set())
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in learns:
            assert parameter in optimizer.state, name
            if not name.endswith("k_proj.bias"):
                assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None, name
            assert parameter not in optimizer.state, name
            assert torch.equal(parameter, before[name]), name


def test_a_frozen_decoder_gives_the_rest_the_gradients_of_a_trained_one() -> None:
    found = []
    for frozen in (True, False):
        model = model_of()
        freeze(model, training(0.5, freeze_decoder=frozen))
        model.losses(batch_of(SIGLIP, 2), None, 1e-4)[0].backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    mine, theirs = found
    for name, gradient in mine.items():
        if not name.startswith("decoder."):
            assert gradient is not None, name
            assert torch.equal(gradient, theirs[name]), name


def test_a_frozen_decoder_saves_the_products_of_its_weights_gradients() -> None:
    batch, flops = batch_of(SIGLIP, 2), []
    for frozen in (True, False):
        model = model_of()
        freeze(model, training(0.5, freeze_decoder=frozen))
        # All positions: the last block works on no selection of them.
        with FlopCounterMode(display=False) as counted:
            model(batch, None).sum().backward()
        flops.append(counted.get_total_flops())
    assert flops[1] - flops[0] == weight_flops(DECODER) * batch.input_ids.numel()
