"""Flamingo's blocks: what they add, to whom, and how they are trained and asked."""

import math
from dataclasses import replace

import pytest
import torch
from test_projector import TOWER, random, rows
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from midstream.config import (
    AdamW,
    DecoderConfig,
    GatedBlocks,
    ProjectorConfig,
    Resampler,
    VLMConfig,
)
from midstream.config.connectors import gated_flops, gated_parameters
from midstream.core.batch import IGNORE, Batch
from midstream.cost.cost import model_parameters
from midstream.model.generate import choice_logprobs, generate
from midstream.model.projector import GatedStack, latest_pictures, shown
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.train.parallel import ALONE
from midstream.train.step import make_optimizer, train_step

DECODER = DecoderConfig(hidden_size=32, num_layers=4, num_heads=2, vocab_size=50)
GATED = GatedBlocks(every=2, num_heads=2, head_dim=4)
RESAMPLER = Resampler(num_latents=3, num_layers=1, num_heads=2, head_dim=4)
CONFIG = VLMConfig(
    decoder=DECODER,
    encoder=TOWER,
    projector=ProjectorConfig(num_layers=0, reduction=RESAMPLER, gated=GATED),
)


def opened(config: VLMConfig = CONFIG) -> VLM:
    """A model whose gates let something through."""
    model = VLM(config)
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.7)
    return model


def batch_of(slots: list[list[int]], segments: list[list[int]]) -> Batch:
    segment_ids = torch.tensor(segments)
    position_ids = torch.stack(
        [torch.tensor([row[:at].count(one) for at, one in enumerate(row)]) for row in segments]
    )
    base = rows([[0]] * len(segments), len(segments[0]))
    return replace(
        base,
        segment_ids=segment_ids,
        position_ids=position_ids,
        image_slots=torch.tensor(slots).reshape(-1, 2).long(),
        images=torch.zeros(len(slots), 0),
    )


@torch.no_grad()
def test_a_model_begins_as_its_decoder_alone() -> None:
    model, batch = VLM(CONFIG), batch_of([[0, 0], [0, 6], [1, 2]], [[0] * 6 + [1] * 6, [0] * 12])
    initialise(model, 0)
    assert CONFIG.image_tokens == 1
    found = model(batch, random(3, 36, 12))
    other = model(batch, random(3, 36, 12, seed=2))
    assert torch.equal(found, other)
    embeddings = model.decoder.embed(batch.input_ids)
    assert model.gated is not None
    for row, column in batch.image_slots.tolist():
        embeddings[row, column] = model.gated.picture
    seen = (batch.segment_ids[:, :, None] == batch.segment_ids[:, None]).tril()
    plain = model.decoder(embeddings, batch.position_ids, seen[:, None])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_text_hears_of_pictures_before_it_and_of_the_latest_through_the_blocks() -> None:
    # Two pictures in the first document, none in the second, padding, one in another row.
    segments = [[0] * 8 + [1] * 3 + [-1], [0] * 12]
    slots = [[0, 1], [0, 5], [1, 0]]
    batch = batch_of(slots, segments)
    expected = [[-1, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1], [2] * 12]
    assert latest_pictures(batch.image_slots, batch.segment_ids).tolist() == expected
    model, features = opened(), random(3, 36, 12)
    before = model(batch, features)
    for image in range(3):
        other = features.clone()
        other[image] += 1
        differs = (model(batch, other) != before).any(dim=-1)
        row, column = slots[image]
        heard = torch.zeros_like(differs)
        heard[row, column : segments[row].count(0)] = True
        assert torch.equal(differs, heard)


@torch.no_grad()
def test_a_block_is_what_flamingos_formula_says() -> None:
    stack = GatedStack(GATED, num_layers=4, width=32, seen_width=12)
    initialise(stack, 1)
    hidden, features = random(2, 6, 32), random(3, 5, 12)
    image_of = torch.tensor([[-1, 0, 0, 2, 2, 2], [1, 1, -1, -1, 1, 1]])
    assert list(stack.blocks) == ["1", "3"]
    part = dict(stack.blocks["1"].named_parameters())
    part["gate"].fill_(0.5)
    part["ffn_gate"].fill_(-0.3)
    found = stack(1, hidden, shown(features, image_of))
    for row in range(2):
        for column in range(6):
            stream, image = hidden[row, column], int(image_of[row, column])
            if image >= 0:
                query = linear(layer_norm(stream, (32,), part["norm.weight"]), part["query.weight"])
                key, value = linear(features[image], part["key_value.weight"]).chunk(2, dim=-1)
                heads = []
                for head in (slice(0, 4), slice(4, 8)):
                    scores = torch.softmax(key[:, head] @ query[head] / math.sqrt(4), dim=0)
                    heads.append(scores @ value[:, head])
                stream = stream + math.tanh(0.5) * linear(torch.cat(heads), part["out.weight"])
            normed = layer_norm(stream, (32,), part["ffn_norm.weight"])
            inner = linear(gelu(linear(normed, part["up.weight"])), part["down.weight"])
            expected = stream + math.tanh(-0.3) * inner
            torch.testing.assert_close(found[row, column], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(stack(0, hidden, None), hidden)


@torch.no_grad()
def test_a_document_is_computed_alike_alone_and_packed() -> None:
    model, features = opened(), random(3, 36, 12)
    packed = batch_of([[0, 1], [0, 4], [0, 8]], [[0] * 7 + [1] * 5])
    together = model(packed, features)[0]
    for segment, low, high, slots, images in (
        (0, 0, 7, [[0, 1], [0, 4]], slice(0, 2)),
        (1, 7, 12, [[0, 1]], slice(2, 3)),
    ):
        alone = batch_of(slots, [[segment] * (high - low)])
        alone = replace(alone, input_ids=packed.input_ids[:, low:high])
        found = model(alone, features[images])[0]
        torch.testing.assert_close(found, together[low:high], atol=1e-5, rtol=1e-5)
        losses = [
            float(cross_entropy(model.decoder.output(hidden), packed.input_ids[0, low:high]))
            for hidden in (found, together[low:high])
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def losses(model: VLM, batch: Batch, features: Tensor, *, steps: int) -> list[float]:
    settings = AdamW()
    optimizer = make_optimizer(model, settings)
    batch = replace(batch, counts=replace(batch.counts, target=batch.targets.numel()))
    return [
        train_step(
            model,
            optimizer,
            [replace(batch, images=features)],
            encode=lambda images: images,
            rate=1e-2,
            settings=settings,
            place=ALONE,
        )
        .read()
        .loss
        for _ in range(steps)
    ]


def test_blocks_learn_what_pictures_show_while_the_decoder_stays() -> None:
    model = VLM(CONFIG)
    initialise(model, 0)
    model.decoder.requires_grad_(requires_grad=False)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batch, features = batch_of([[0, 0], [1, 0]], [[0] * 8, [0] * 8]), random(2, 36, 12)
    batch = replace(batch, input_ids=batch.input_ids[:1].expand(2, -1).clone())
    # Equal texts before different pictures, followed by different ones.
    targets = torch.full((2, 8), IGNORE)
    targets[0, 2:], targets[1, 2:] = 3, 4
    batch = replace(batch, targets=targets)
    found = losses(model, batch, features, steps=60)
    assert found[-1] < found[0] / 10
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("decoder."), name


def test_every_parameter_has_a_gradient_with_pictures_and_one_of_zero_without() -> None:
    model = opened()
    features, slots = random(2, 36, 12), [[0, 0], [1, 0]]
    for images, given in ((slots, features), ([], None)):
        model.zero_grad(set_to_none=True)
        model.losses(batch_of(images, [[0] * 8, [0] * 8]), given, 0.0)[0].backward()
        for name, value in model.named_parameters():
            assert value.grad is not None, name
            seeing = name.startswith(("projector.", "gated.")) and "ffn" not in name
            if seeing and ".up." not in name and ".down." not in name:
                assert bool(value.grad.any()) == bool(images), name


def logits_of(
    model: VLM, whole: list[int], more: list[int], slots: list[list[int]], given: Tensor | None
) -> Tensor:
    """Of the last position of `whole` and those behind it, in a row of their own."""
    batch = batch_of(slots, [[0] * len(whole + more)])
    batch = replace(batch, input_ids=torch.tensor([whole + more]))
    logits: Tensor = model.decoder.output(model(batch, given))[0, len(whole) - 1 :]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_answers_are_those_of_the_whole_sequence(alone: bool) -> None:
    model, features = opened(), random(3, 36, 12)
    head, rest = Part((7, 8, 9), ((1, 0), (3, 1))), Part((4, 5, 6), ((1, 2),))
    plain = Part((4, 5, 6))
    prompts = [Prompt(head, rest), Prompt(head, plain), Prompt(Part(), plain)]
    if alone:
        prompts = [Prompt(Part(), one.head.then(one.rest)) for one in prompts]
    found = generate(model, prompts, features, max_new_tokens=4, stop_ids=frozenset(), batch_size=2)
    scores = choice_logprobs(model, prompts, features, [[[3, 2, 1]]] * 3, batch_size=2)
    for prompt, said, ((score, _),) in zip(prompts, found, scores, strict=True):
        ids, pictures = prompt.head.then(prompt.rest)
        whole, slots, images = list(ids), list[list[int]](), list[int]()
        for number, (place, image) in enumerate(pictures):
            whole.insert(place + number, 0)
            slots.append([0, place + number])
            images.append(image)
        given = features[images] if images else None

        assert logits_of(model, whole, said, slots, given).argmax(dim=-1)[:4].tolist() == said
        chances = logits_of(model, whole, [3, 2, 1], slots, given).log_softmax(dim=-1)
        expected = sum(float(chances[at, token]) for at, token in enumerate((3, 2, 1)))
        assert score == pytest.approx(expected, abs=1e-4)


def test_parameters_and_flops_are_those_of_the_module() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    stack = GatedStack(GATED, num_layers=4, width=32, seen_width=12)
    assert gated_parameters(GATED, 4, 32, 12) == sum(one.numel() for one in stack.parameters())
    assert model_parameters(CONFIG) == sum(one.numel() for one in VLM(CONFIG).parameters())
    of_position, of_image = gated_flops(GATED, 4, 32, 12, 5)
    image_of = torch.arange(3)[:, None].expand(-1, 6)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for index in range(4):
            stack(index, torch.zeros(3, 6, 32), shown(torch.zeros(3, 5, 12), image_of))
    assert counter.get_total_flops() == 18 * of_position + 3 * of_image


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 0}, "num_layers 0 is for gated blocks behind a resampler"),
        ({"num_layers": 0, "gated": GATED}, "num_layers 0 is for gated blocks behind a resampler"),
        ({"gated": GatedBlocks(every=5)}, "every 5th block comes to none of the decoder's 4"),
    ],
)
def test_what_fits_no_decoder_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VLMConfig(decoder=DECODER, encoder=TOWER, projector=ProjectorConfig(**changes))  # type: ignore[arg-type]
