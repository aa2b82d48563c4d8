import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from midstream.config import DecoderConfig
from midstream.model.attention import Mask, make_mask
from midstream.model.decoder import Cache, Decoder, FeedForward
from midstream.model.weights import generator, initialise

TINY = DecoderConfig(hidden_size=32, num_layers=3, num_heads=2, vocab_size=50)


def decoder_of(config: DecoderConfig = TINY, seed: int = 0) -> Decoder:
    decoder = Decoder(config)
    initialise(decoder, seed)
    return decoder


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions(rows: int, length: int) -> Tensor:
    return torch.arange(length).expand(rows, length)


def segment_mask(segment_ids: Tensor) -> Mask:
    return make_mask(segment_ids, None, "segments", kind="dense")


def cache_of(decoder: Decoder, *, rows: int, columns: int) -> Cache:
    device = torch.device("cpu")
    return decoder.new_cache(rows=rows, columns=columns, dtype=torch.float32, device=device)


def logits_of(decoder: Decoder, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    mask = None if segment_ids is None else segment_mask(segment_ids)
    hidden = decoder(decoder.embed(input_ids), positions(*input_ids.shape), mask)
    return decoder.output(hidden)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "total", "body"),
    [
        (512, 8, 4, 78_922_240, 27_279_872),
        (576, 24, 8, 153_705_024, 95_607_360),
        (1024, 24, 8, 411_665_408, 308_380_672),
        (2048, 24, 16, 1_439_893_504, 1_233_324_032),
        # DCLM's, without qk-norm.
        (2048, 24, 16, 1_439_795_200, 1_233_225_728),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(
    width: int, layers: int, heads: int, total: int, body: int
) -> None:
    qk_norm = total != 1_439_795_200
    config = DecoderConfig(hidden_size=width, num_layers=layers, num_heads=heads, qk_norm=qk_norm)
    with torch.device("meta"):
        decoder = Decoder(config)
    counts = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    assert sum(counts.values()) == config.num_parameters == total
    assert total - counts["tok_embeddings.weight"] - counts["output.weight"] == body


def test_parameter_names_are_openlms() -> None:
    names = {name for name, _ in Decoder(TINY).named_parameters()}
    inner = {f"layers.{index}.{name}.weight" for index in range(3) for name in LAYER_NAMES}
    assert names == inner | {"tok_embeddings.weight", "norm.weight", "output.weight"}


def plain_norm(value: Tensor, gain: Tensor) -> Tensor:
    centred = value - value.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def plain_turn(head: Tensor) -> Tensor:
    """Turn pairs (c, c + C/2) of [positions, channels] as complex numbers."""
    half = head.shape[1] // 2
    pairs = torch.complex(head[:, :half].double(), head[:, half:].double())
    for position in range(head.shape[0]):
        for channel in range(half):
            angle = position * 10000.0 ** (-2 * channel / head.shape[1])
            pairs[position, channel] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat((pairs.real, pairs.imag), dim=1).float()


def plain_decoder(weights: dict[str, Tensor], config: DecoderConfig, input_ids: Tensor) -> Tensor:
    """Logits of one row, head by head and position by position."""
    width, per_head = config.hidden_size, config.head_dim
    stream = weights["tok_embeddings.weight"][input_ids]
    for index in range(config.num_layers):
        mine = {name: weights[f"layers.{index}.{name}.weight"] for name in LAYER_NAMES}
        normed = plain_norm(stream, mine["attention_norm"])
        q, k, v = (normed @ part.T for part in mine["attention.in_proj"].split(width))
        q, k = plain_norm(q, mine["attention.q_norm"]), plain_norm(k, mine["attention.k_norm"])
        mixed = torch.zeros_like(stream)
        for head in range(config.num_heads):
            span = slice(head * per_head, (head + 1) * per_head)
            turned_q, turned_k = plain_turn(q[:, span]), plain_turn(k[:, span])
            for t in range(len(input_ids)):
                score = turned_k[: t + 1] @ turned_q[t] / math.sqrt(per_head)
                mixed[t, span] = score.softmax(0) @ v[: t + 1, span]
        stream = stream + mixed @ mine["attention.out_proj"].T
        normed = plain_norm(stream, mine["ffn_norm"])
        gate, up = (normed @ part.T for part in mine["feed_forward.w12"].split(config.ffn_size))
        stream = stream + (gate * gate.sigmoid() * up) @ mine["feed_forward.w3"].T
    return plain_norm(stream, weights["norm.weight"]) @ weights["output.weight"].T


LAYER_NAMES = (
    "attention_norm",
    "attention.in_proj",
    "attention.q_norm",
    "attention.k_norm",
    "attention.out_proj",
    "ffn_norm",
    "feed_forward.w12",
    "feed_forward.w3",
)


@torch.no_grad()
def test_decoder_equals_a_plain_one_written_head_by_head() -> None:
    decoder = decoder_of()
    for name, parameter in decoder.named_parameters():
        if "norm" in name:  # gains other than one, so that a forgotten gain shows
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    input_ids = random_ids(1, 9)
    expected = plain_decoder(dict(decoder.named_parameters()), TINY, input_ids[0])
    torch.testing.assert_close(logits_of(decoder, input_ids)[0], expected, atol=1e-5, rtol=1e-5)


def test_segments_do_not_touch_each_other() -> None:
    decoder, length, cut = decoder_of(), 12, 4
    segment_ids = torch.zeros(1, length, dtype=torch.int64)
    segment_ids[:, cut:] = 1
    input_ids = random_ids(1, length)
    other = input_ids.clone()
    other[:, :cut] = (other[:, :cut] + 7) % 50
    before, after = (logits_of(decoder, ids, segment_ids) for ids in (input_ids, other))
    assert torch.equal(before[:, cut:], after[:, cut:])
    assert not torch.allclose(before[:, :cut], after[:, :cut])
    embeddings = decoder.embed(input_ids).detach().requires_grad_()
    hidden = decoder(embeddings, positions(1, length), segment_mask(segment_ids))
    hidden[:, cut:].square().sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[:, :cut].abs().max() == 0
    assert embeddings.grad[:, cut:].abs().min() > 0


def test_padding_gives_no_nan_and_no_gradient() -> None:
    decoder = decoder_of()
    segment_ids = torch.tensor([[0, 0, 1, 1, -1, -1], [-1] * 6])
    input_ids = random_ids(2, 6)
    embeddings = decoder.embed(input_ids).detach().requires_grad_()
    hidden = decoder(embeddings, positions(2, 6), segment_mask(segment_ids))
    assert hidden.isfinite().all()
    hidden[segment_ids >= 0].square().sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad[segment_ids < 0].abs().max() == 0
    grads = [p.grad for name, p in decoder.named_parameters() if "layers" in name]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


@torch.no_grad()
def test_a_full_cache_and_a_missing_mask_are_refused() -> None:
    decoder = decoder_of()
    cache = cache_of(decoder, rows=1, columns=4)
    embeddings = decoder.embed(random_ids(1, 4))
    decoder(embeddings, positions(1, 4), None, cache)
    with pytest.raises(ValueError, match="holds 4 positions"):
        decoder(embeddings, positions(1, 4), None, cache)
    mask = torch.ones(1, 1, 4, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="room for 4 positions, 8"):
        decoder(embeddings, positions(1, 4), mask, cache)


@torch.no_grad()
def test_autocast_computes_norms_in_low_precision_and_stays_near() -> None:
    decoder = decoder_of()
    input_ids = random_ids(1, 8)
    seen: list[Any] = []
    decoder.layers[0].get_submodule("attention.q_norm").register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.dtype)
    )
    exact = logits_of(decoder, input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logits_of(decoder, input_ids)
    assert seen == [torch.float32, torch.bfloat16]
    assert (exact - low).abs().max() < 0.05 * exact.abs().max()


def test_the_gated_product_keeps_half_and_has_the_gradients_of_its_parts_to_the_last_bit() -> None:
    config = DecoderConfig(hidden_size=32, num_layers=1, num_heads=2, vocab_size=64)
    block = FeedForward(config)
    for name, parameter in block.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator(0, name))
    hidden = torch.randn((2, 5, 32), generator=generator(0, "hidden"))

    def grads(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = hidden.clone().requires_grad_()
        block.zero_grad()
        run(given).square().sum().backward()
        assert given.grad is not None
        return [given.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)]

    def parts(given: Tensor) -> Tensor:
        gate, up = block.w12(given).chunk(2, dim=-1)
        return cast(Tensor, block.w3(silu(gate) * up))

    with torch.no_grad():
        assert torch.equal(block(hidden), parts(hidden))
    for mine, theirs in zip(grads(block), grads(parts), strict=True):
        assert torch.equal(mine, theirs)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t,  # type: ignore[func-returns-value]
        lambda t: t,
    ):
        block(hidden.clone().requires_grad_())
    # The input and the weight of w12, gate and up in one, the weight of w3.
    assert len(set(kept)) == 4
