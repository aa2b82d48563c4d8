"""Connectors against plain loops, and the batches that they meet."""

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from answerers import about
from midstream.config import (
    Attention,
    AttentionPool,
    AveragePool,
    DecoderConfig,
    EncoderConfig,
    FusedEncoder,
    PixelShuffle,
    ProjectorConfig,
    Resampler,
    VLMConfig,
)
from midstream.core.batch import Batch
from midstream.core.tokens import TokenCount
from midstream.model.generate import generate
from midstream.model.projector import Projector, build_reduction
from midstream.model.vlm import VLM
from midstream.model.weights import initialise

DECODER = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=50)
TOWER = EncoderConfig(
    image_size=18, patch_size=3, hidden_size=12, num_layers=2, num_heads=2, intermediate_size=16
)
REDUCTIONS: dict[str, Any] = {
    "none": None,
    "shuffle": PixelShuffle(window=3),
    "average": AveragePool(window=2),
    "attention": AttentionPool(window=3, num_heads=3),
    "resampler": Resampler(num_latents=5, num_layers=2, num_heads=2, head_dim=4),
}


def filled(reduction: Any, *, seed: int = 0) -> Projector:
    module = Projector(ProjectorConfig(reduction=reduction), in_width=12, out_width=32)
    initialise(module, seed)
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windows(picture: Tensor, window: int) -> list[Tensor]:
    """The patches [window², width] of each window of one picture, both in reading order."""
    side = math.isqrt(len(picture))
    corners = itertools.product(range(0, side, window), repeat=2)
    inside = list(itertools.product(range(window), repeat=2))
    return [
        torch.stack([picture[(row + i) * side + column + j] for i, j in inside])
        for row, column in corners
    ]


def heads_attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """One query after the other, head by head."""
    size, found = query.shape[1] // num_heads, torch.zeros_like(query)
    for at, head in itertools.product(range(len(query)), range(num_heads)):
        mine = slice(head * size, (head + 1) * size)
        weights = torch.softmax(key[:, mine] @ query[at, mine] / math.sqrt(size), dim=0)
        found[at, mine] = weights @ value[:, mine]
    return found


@torch.no_grad()
@pytest.mark.parametrize(("window", "kind"), itertools.product((2, 3), ("shuffle", "average")))
def test_windows_are_put_side_by_side_or_averaged(window: Any, kind: str) -> None:
    config = PixelShuffle(window=window) if kind == "shuffle" else AveragePool(window=window)
    features = random(2, 36, 12)
    found = build_reduction(config, 12)(features)
    for picture, mine in zip(features, found, strict=True):
        cut = windows(picture, window)
        flat = [one.flatten() if kind == "shuffle" else one.mean(dim=0) for one in cut]
        torch.testing.assert_close(mine, torch.stack(flat), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_windows_mean_asks_its_patches() -> None:
    module = filled(AttentionPool(window=3, num_heads=3))
    features, weights = random(2, 36, 12), dict(module.named_parameters())

    def layer(name: str, values: Tensor) -> Tensor:
        start = f"reduction.{name}."
        return linear(values, weights[f"{start}weight"], weights[f"{start}bias"])

    found = module[0](features)
    for picture, mine in zip(features, found, strict=True):
        for at, cut in enumerate(windows(picture, 3)):
            query = layer("query", cut.mean(dim=0, keepdim=True))
            mixed = heads_attend(query, layer("key", cut), layer("value", cut), 3)
            torch.testing.assert_close(mine[at], layer("out", mixed)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_learned_queries_ask_patches_and_each_other() -> None:
    config = REDUCTIONS["resampler"]
    module, features = filled(config), random(2, 36, 12)
    weights = dict(module.named_parameters())
    found = module[0](features)
    for picture, mine in zip(features, found, strict=True):
        latents = weights["reduction.latents"]
        for index in range(config.num_layers):
            part = {
                name.split(".")[3]: value
                for name, value in weights.items()
                if name.startswith(f"reduction.layers.{index}.")
            }
            asking = layer_norm(latents, (12,), part["latent_norm"])
            seen = torch.cat((layer_norm(picture, (12,), part["patch_norm"]), asking))
            key, value = linear(seen, part["key_value"]).chunk(2, dim=-1)
            mixed = heads_attend(linear(asking, part["query"]), key, value, 2)
            latents = latents + linear(mixed, part["out"])
            inner = gelu(linear(layer_norm(latents, (12,), part["ffn_norm"]), part["up"]))
            latents = latents + linear(inner, part["down"])
        expected = layer_norm(latents, (12,), weights["reduction.norm.weight"])
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_a_batch_without_pictures_gives_every_parameter_a_gradient_of_zero(kind: str) -> None:
    module = filled(REDUCTIONS[kind])
    module(torch.zeros(0, 36, 12)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def rows(starts: list[list[int]], length: int) -> Batch:
    """Rows of documents of these first columns; each begins with a picture, its text behind it."""
    ids = torch.arange(len(starts) * length).view(len(starts), length) % 50
    segment_ids, position_ids = torch.zeros((2, len(starts), length), dtype=torch.int64)
    for row, columns in enumerate(starts):
        for segment, (low, high) in enumerate(itertools.pairwise([*columns, length])):
            segment_ids[row, low:high] = segment
            position_ids[row, low:high] = torch.arange(high - low)
    slots = [[row, column] for row, columns in enumerate(starts) for column in columns]
    return Batch(
        input_ids=ids,
        targets=ids.roll(-1, 1),
        position_ids=position_ids,
        segment_ids=segment_ids,
        image_slots=torch.tensor(slots),
        images=torch.zeros(len(slots), 0),
        counts=TokenCount(),
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *((kind, "latest") for kind in REDUCTIONS if kind != "average"),
        *(("average", attention) for attention in get_args(Attention)[1:]),
    ],
)
def test_a_document_is_computed_alike_alone_and_packed(kind: str, attention: Any) -> None:
    config = VLMConfig(
        decoder=DECODER,
        encoder=TOWER,
        projector=ProjectorConfig(reduction=REDUCTIONS[kind]),
        attention=attention,
    )
    model, features, size = VLM(config), random(3, 36, 12), config.image_tokens
    initialise(model, 0)
    length = size + 7
    packed = rows([[0, length, 2 * length]], 3 * length)
    together = model(packed, features)[0]
    for index in range(3):
        alone = rows([[0]], length)
        mine = slice(index * length, (index + 1) * length)
        alone.input_ids[:] = packed.input_ids[:, mine]
        alone.targets[:] = packed.targets[:, mine]
        found = model(alone, features[index : index + 1])[0]
        torch.testing.assert_close(found, together[mine], atol=1e-5, rtol=1e-5)
        losses = [
            float(cross_entropy(model.decoder.output(hidden), alone.targets[0]))
            for hidden in (found, together[mine])
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("begin", [None, 7])
@pytest.mark.parametrize("attention", ["pictures", "latest"])
def test_answers_are_made_by_the_rule_of_training(attention: Any, begin: int | None) -> None:
    projector = ProjectorConfig(reduction=REDUCTIONS["average"])
    config = VLMConfig(decoder=DECODER, encoder=TOWER, projector=projector, attention=attention)
    model, features, first = VLM(config), random(1, 36, 12), int(begin is not None)
    initialise(model, 0)
    asked = [3, 4, 5]
    found = generate(
        model,
        [about(asked, 0, begin)],
        features,
        max_new_tokens=4,
        stop_ids=frozenset(),
        batch_size=2,
    )[0]
    whole = [7] * first + [0] * 9 + asked + found
    batch = rows([[first]], len(whole))
    batch.input_ids[:] = torch.tensor([whole])
    batch.segment_ids[:], batch.position_ids[:] = 0, torch.arange(len(whole))
    likeliest = model.decoder.output(model(batch, features))[0].argmax(dim=-1).tolist()
    assert likeliest[-5:-1] == found


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        (PixelShuffle(window=2), "window 2 of the shuffle .* 27 x 27 patches; 3, 9, 27 would"),
        (AveragePool(window=4), "window 4 of the average .* 27 x 27 patches; 3, 9, 27 would"),
        (AttentionPool(window=3, num_heads=7), "num_heads 7 .* width 16; 1, 2, 4, 8, 16 would"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(reduction: Any, words: str) -> None:
    tower = TOWER.model_copy(update={"image_size": 27 * 3 + 2, "hidden_size": 8})
    fused = FusedEncoder(towers=(tower, tower))
    projector = ProjectorConfig(reduction=reduction)
    with pytest.raises(ValueError, match=words):
        VLMConfig(decoder=DECODER, encoder=fused, projector=projector)


@pytest.mark.parametrize(
    ("reduction", "tokens"),
    [
        (None, 729),
        (PixelShuffle(window=3), 81),
        (AveragePool(window=9), 9),
        (AttentionPool(window=3, num_heads=4), 81),
        (Resampler(), 64),
    ],
)
def test_a_picture_takes_as_many_positions_as_its_connector_leaves(
    reduction: Any, tokens: int
) -> None:
    tower = TOWER.model_copy(update={"image_size": 27 * 3})
    model = VLMConfig(
        decoder=DECODER, encoder=tower, projector=ProjectorConfig(reduction=reduction)
    )
    assert model.image_tokens == tokens
    assert tower.num_patches == 729
