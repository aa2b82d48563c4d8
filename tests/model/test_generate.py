import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from answerers import about
from midstream.chat.session import ChatSettings, Conversation, choose
from midstream.config import Attention, DecoderConfig, EncoderConfig, VLMConfig
from midstream.model.generate import (
    choice_logprobs,
    generate,
    generate_and_score,
    sequence_logprobs,
)
from midstream.model.pretrained import describe
from midstream.model.read_prompts import Prompt
from midstream.model.vlm import VLM
from midstream.model.weights import generator, initialise

ENCODER = EncoderConfig(
    image_size=8, patch_size=4, hidden_size=24, num_layers=2, num_heads=2, intermediate_size=48
)
OPENLM = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=40)
PROMPTS = [[5, 6, 7], [1], list(range(1, 20)), [9, 8, 7, 6], [3] * 16, [2, 30]]
KINDS: tuple[Attention, ...] = ("segments", "prefix", "pictures")
GREEDY, DRAWN = ChatSettings(), ChatSettings(temperature=1.5, top_p=0.9, seed=3)
NO_STOP = frozenset[int]()


@cache
def vlm_of(kind: Attention, decoder: str = "openlm") -> VLM:
    config: Any = OPENLM
    if decoder == "llama":
        from transformers import LlamaConfig

        config = describe(
            LlamaConfig(
                vocab_size=40,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
            )
        )
    model = VLM(VLMConfig(decoder=config, encoder=ENCODER, attention=kind))
    initialise(model, 0)
    return model


@pytest.fixture(params=[(kind, "openlm") for kind in KINDS] + [("prefix", "llama")])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return vlm_of(*request.param)


@pytest.fixture
def plain() -> VLM:
    return vlm_of("segments")


def images(count: int) -> Tensor:
    return torch.randn(count, 4, 24, generator=torch.Generator().manual_seed(0))


def asked(
    prompts: list[list[int]], features: Tensor | None, image_of: list[int] | None = None
) -> list[Any]:
    """Each prompt behind its image, by default the one of its number."""
    if features is None:
        return prompts
    numbers = range(len(prompts)) if image_of is None else image_of
    return [about(*pair) for pair in zip(prompts, numbers, strict=True)]


def answers(
    vlm: VLM,
    prompts: list[list[int]],
    features: Tensor | None,
    new: int,
    size: int = 4,
    image_of: list[int] | None = None,
    stop_ids: frozenset[int] = NO_STOP,
) -> list[list[int]]:
    """`new` tokens an answer, in batches of `size`."""
    shown = asked(prompts, features, image_of)
    return generate(vlm, shown, features, max_new_tokens=new, batch_size=size, stop_ids=stop_ids)


@contextmanager
def shapes_read(vlm: VLM) -> Iterator[list[tuple[int, ...]]]:
    """(rows, positions) of each call of the decoder."""
    read: list[tuple[int, ...]] = []
    hook = vlm.decoder.register_forward_hook(
        lambda _module, inputs, _output: read.append(tuple(inputs[0].shape[:2]))
    )
    yield read
    hook.remove()


@torch.no_grad()
def next_logits(
    vlm: VLM, given: list[int], said: list[int], image: Tensor | None, begin: int | None = None
) -> Tensor:
    """Of the whole sequence, without cache and padding; `given` stands in the prefix, `begin`
    before the image."""
    embeddings = vlm.decoder.embed(torch.tensor([given + said]))
    if image is not None:
        projected = vlm.project(image, embeddings)
        assert projected is not None
        embeddings = torch.cat((projected, embeddings), dim=1)
        if begin is not None:
            embeddings = torch.cat((vlm.decoder.embed(torch.tensor([[begin]])), embeddings), dim=1)
    length = embeddings.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if vlm.config.attention == "prefix":
        head = length - len(said)
        mask[:head, :head] = True
    if vlm.config.attention == "pictures" and image is not None:
        shown = slice(int(begin is not None), length - len(given + said))
        mask[shown, shown] = True
    hidden = vlm.decoder(embeddings, torch.arange(length)[None], mask[None, None])
    logits: Tensor = vlm.decoder.output(hidden[:, -1])
    return logits


def plain_generate(
    vlm: VLM, given: list[int], image: Tensor | None, new: int, begin: int | None = None
) -> list[int]:
    said: list[int] = []
    for _ in range(new):
        said.append(int(next_logits(vlm, given, said, image, begin)[0].argmax()))
    return said


def plain_draw(logits: Tensor, sampling: ChatSettings, step: int) -> int:
    """Token by token from the likeliest down, until the drawn place is passed."""
    assert sampling.temperature is not None
    chances = (logits.double() / sampling.temperature).softmax(-1).tolist()
    ranked = sorted(range(len(chances)), key=lambda token: -chances[token])
    kept: list[int] = []
    for token in ranked:
        if sum(chances[before] for before in kept) < sampling.top_p:
            kept.append(token)
    source = generator(sampling.seed, f"token/0/{step}")
    place = float(torch.rand((), generator=source, dtype=torch.float64))
    place *= sum(chances[token] for token in kept)
    for token in kept:
        place -= chances[token]
        if place < 0:
            return token
    return kept[-1]


def random_prompts(count: int, seed: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=source).tolist()
    return [torch.randint(0, 40, (n,), generator=source).tolist() for n in lengths]


def test_answers_equal_the_whole_sequence_recomputed_for_each_token(vlm: VLM) -> None:
    """Of texts; those about pictures are in `test_read_prompts.py`."""
    prompts = random_prompts(9, 0)
    for prompt, found in zip(prompts, answers(vlm, prompts, None, 7), strict=True):
        assert found == plain_generate(vlm, prompt, None, 7)


def test_what_begins_a_text_is_read_before_its_image(vlm: VLM) -> None:
    prompts, features, image_of = random_prompts(6, 5), images(2), [0, 1, 1, 0, 1, 1]
    shown: list[list[int] | Prompt] = [
        about(ids, image, 39) for ids, image in zip(prompts, image_of, strict=True)
    ]
    found = generate(vlm, shown, features, max_new_tokens=6, stop_ids=NO_STOP, batch_size=2)
    for index, prompt in enumerate(prompts):
        image = features[image_of[index]][None]
        assert found[index] == plain_generate(vlm, prompt, image, 6, begin=39)
    choices = [[[7], [8, 9]]] * len(prompts)
    scored = choice_logprobs(vlm, shown, features, choices, batch_size=2)
    for index, prompt in enumerate(prompts):
        image = features[image_of[index]][None]
        for one, (found_logprob, _) in zip(choices[index], scored[index], strict=True):
            expected = sum(
                float(next_logits(vlm, prompt, one[:at], image, 39)[0].log_softmax(-1)[token])
                for at, token in enumerate(one)
            )
            assert found_logprob == pytest.approx(expected, abs=1e-4)
    talk = Conversation(vlm, features[:1], max_positions=60, settings=GREEDY, begin=39)
    assert talk.room == 60 - 4 - 1
    reply = list(talk.reply(prompts[0], max_new_tokens=6, stop_ids=NO_STOP))
    assert reply == found[0]
    # Otherwise the comparison says nothing.
    assert found != answers(vlm, prompts, features, 6, 2, image_of=image_of)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_image_is_read_once_unless_it_sees_the_prompt(kind: Attention) -> None:
    vlm = vlm_of(kind)
    # Ten prompts of one rounded length about three images, in batches of two.
    prompts, image_of = [[5, number] for number in range(10)], [0, 2, 0, 2, 0, 5, 0, 2, 0, 2]
    with shapes_read(vlm) as read:
        answers(vlm, prompts, images(6), 2, 2, image_of=image_of)
    if kind == "prefix":
        # Image and prompt (rounded to 16) together, five times; then a token each.
        assert Counter(read) == {(2, 4 + 16): 5, (2, 1): 5}
        return
    # Images 0 and 2 together, then image 5, in batches of two; nine prompts about the former.
    assert Counter(read) == {(2, 4): 2, (2, 16): 6, (2, 1): 6}
    # Once, too, though questions about it differ in length.
    with shapes_read(vlm) as read:
        answers(vlm, [[5], [6] * 20, [7] * 40, [8] * 3], images(1), 1, 2, image_of=[0] * 4)
    assert Counter(read) == {(2, 4): 1, (2, 16): 1, (2, 32): 1, (2, 48): 1}


def test_decoding_stops_at_any_stop_id_and_leaves_it_out(vlm: VLM) -> None:
    free = answers(vlm, PROMPTS, None, 12)
    assert all(len(answer) == 12 for answer in free)
    stops = frozenset({free[0][3], free[2][5], free[4][1]})
    found = answers(vlm, PROMPTS, None, 12, stop_ids=stops)
    for whole, cut in zip(free, found, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert cut == whole[: ends[0] if ends else None]


def test_decoding_ends_early_when_all_rows_are_done(plain: VLM) -> None:
    with shapes_read(plain) as read:
        first = answers(plain, [[5]], None, 1, 2)[0][0]
        assert len(read) == 1
        assert answers(plain, [[5]], None, 50, 2, stop_ids=frozenset({first})) == [[]]
        assert len(read) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_logits_do_not_depend_on_neighbours_to_the_last_bit(kind: Attention) -> None:
    vlm, seen = vlm_of(kind), list[Tensor]()
    hook = vlm.decoder.output.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.clone())
    )
    features = images(len(PROMPTS))
    answers(vlm, [PROMPTS[0]], features[:1], 5)
    alone, seen[:] = [logits[0] for logits in seen], []
    mixed = [2, 3, 0, 1]
    # Prompts 3, 0, 1 share the short batch; prompt 2 is longer and comes after it. Prompt 1 is
    # about the image of prompt 0.
    answers(vlm, [PROMPTS[i] for i in mixed], features, 5, image_of=[2, 3, 0, 0])
    hook.remove()
    rows = [seen[step] for step in range(5)]
    assert len(seen) == 10
    order = [0, 1, 2] if kind == "prefix" else [1, 2, 0]
    row = order.index(1)
    for one, other in zip(alone, [logits[row] for logits in rows], strict=True):
        assert torch.equal(one, other)


CHANCES = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.1, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (ChatSettings(temperature=1), CHANCES.tolist()),
        (ChatSettings(temperature=0.5), (CHANCES**2 / (CHANCES**2).sum()).tolist()),
        # 0.4 + 0.25 fall short of 0.7, the third one reaches beyond it.
        (ChatSettings(temperature=1, top_p=0.7), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0, 0.2 / 0.85]),
        (ChatSettings(temperature=1, top_p=1e-9), [0, 1, 0, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_distribution_says(
    sampling: ChatSettings, expected: list[float]
) -> None:
    num = 2000
    logits = CHANCES.log().float()
    counts = Counter(choose(logits, sampling, step) for step in range(num))
    square = 0.0
    for token, chance in enumerate(expected):
        if chance == 0:
            assert counts[token] == 0
        else:
            square += (counts[token] - num * chance) ** 2 / (num * chance)
    # Chi-square of up to four degrees of freedom passes 20 once in two thousand times.
    assert square < 20


@pytest.mark.parametrize(
    ("sees", "sampling"), [(True, DRAWN), (False, GREEDY)], ids=["drawn", "greedy"]
)
def test_a_conversation_goes_on_as_if_it_were_read_anew_at_each_token(
    vlm: VLM, sees: bool, sampling: ChatSettings
) -> None:
    image = images(1) if sees else None
    turns = [[5, 6, 7], [11], [3] * 9]
    talk = Conversation(vlm, image, max_positions=100, settings=sampling)
    first, said, drawn = turns[0], list[int](), itertools.count()
    for number, turn in enumerate(turns):
        if number:
            said += turn
        reply = list(talk.reply(turn, max_new_tokens=5, stop_ids=NO_STOP))
        for token in reply:
            logits = next_logits(vlm, first, said, image)[0]
            step = next(drawn)
            drawn_here = sampling is DRAWN
            assert token == (plain_draw(logits, DRAWN, step) if drawn_here else logits.argmax())
            said.append(token)
        assert len(reply) == 5
    assert talk.ids == first + said


def test_a_reply_that_is_left_early_or_stopped_keeps_what_was_said(plain: VLM) -> None:
    options: Any = {"max_new_tokens": 8, "stop_ids": NO_STOP}
    whole = list(
        Conversation(plain, None, max_positions=60, settings=GREEDY).reply([5, 6], **options)
    )
    left = Conversation(plain, None, max_positions=60, settings=GREEDY)
    assert list(itertools.islice(left.reply([5, 6], **options), 3)) == whole[:3]
    stopped = Conversation(plain, None, max_positions=60, settings=GREEDY)
    stop = next(token for token in whole if token not in whole[:3])
    until = whole.index(stop)
    first = stopped.reply([5, 6], max_new_tokens=8, stop_ids=frozenset({stop}))
    assert list(first) == whole[:until]
    for talk, kept in ((left, whole[:3]), (stopped, whole[:until])):
        assert talk.ids == [5, 6, *kept]
        expected = plain_generate(plain, [5, 6, *kept, 9], None, 4)
        assert list(talk.reply([9], max_new_tokens=4, stop_ids=NO_STOP)) == expected


def test_a_conversation_reads_every_token_once(plain: VLM) -> None:
    with shapes_read(plain) as read:
        talk = Conversation(plain, images(1), max_positions=60, settings=GREEDY)
        for turn in ([5, 6, 7], [8, 9]):
            list(talk.reply(turn, max_new_tokens=3, stop_ids=NO_STOP))
    # The image and the first turn; the reply's last token comes with the next turn.
    assert [positions for _, positions in read] == [4 + 3, 1, 1, 1 + 2, 1, 1]


def test_a_conversation_ends_where_its_room_does(plain: VLM) -> None:
    talk = Conversation(plain, images(1), max_positions=12, settings=GREEDY)
    assert talk.room == 8
    reply = list(talk.reply([1] * 5, max_new_tokens=50, stop_ids=NO_STOP))
    assert reply == plain_generate(plain, [1] * 5, images(1), 3)
    assert talk.room == 0


@torch.no_grad()
def test_logprobs_are_those_of_each_sequence_alone(plain: VLM) -> None:
    sequences = [[1, 2, 3, 4], list(range(30)), [7, 7], [4, 9, 11]]
    starts = [2, 29, 1, 1]
    found = sequence_logprobs(plain, sequences, starts, batch_size=3)
    for (total, is_greedy), ids, start in zip(found, sequences, starts, strict=True):
        embeddings = plain.decoder.embed(torch.tensor([ids]))
        hidden = plain.decoder(embeddings, torch.arange(len(ids))[None], None)
        chances = plain.decoder.output(hidden)[0].softmax(-1)
        expected = sum(float(chances[t - 1, ids[t]].log()) for t in range(start, len(ids)))
        assert total == pytest.approx(expected, rel=1e-4)
        best = [int(chances[t - 1].argmax()) for t in range(start, len(ids))]
        assert is_greedy == (best == ids[start:])


def test_logprobs_do_not_depend_on_neighbours_to_the_last_bit(plain: VLM) -> None:
    sequences, starts = [[1, 2, 3, 4], list(range(30)), [7, 7], [4, 9, 11]], [2, 29, 1, 1]
    together = sequence_logprobs(plain, sequences, starts, batch_size=3)
    for index in range(4):
        alone = sequence_logprobs(plain, [sequences[index]], [starts[index]], batch_size=3)
        assert alone == [together[index]]


@pytest.mark.parametrize("start", [0, 4])
def test_a_continuation_outside_its_sequence_is_refused(plain: VLM, start: int) -> None:
    with pytest.raises(ValueError, match=f"starts at {start} of 3 tokens"):
        sequence_logprobs(plain, [[1, 2, 3]], [start], batch_size=1)


CHOICES = [
    [[5], [6, 7, 8], [9, 9]],
    [[1, 2]],
    [[30], [31], [32], [33]],
    [[7, 6, 5, 4, 3, 2, 1], [2]],
    [],
    [[8, 8], [8, 8, 8, 8, 8]],
]


@pytest.mark.parametrize("decoder", ["openlm", "llama"])
def test_choices_behind_a_shared_context_are_as_likely_as_alone(decoder: str) -> None:
    vlm = vlm_of("causal", decoder)
    found = choice_logprobs(vlm, PROMPTS, None, CHOICES, batch_size=4, plain=True)
    for prompt, own, values in zip(PROMPTS, CHOICES, found, strict=True):
        alone = sequence_logprobs(
            vlm, [prompt + ids for ids in own], [len(prompt)] * len(own), batch_size=2
        )
        assert [greedy for _, greedy in values] == [greedy for _, greedy in alone]
        for (value, _), (expected, _) in zip(values, alone, strict=True):
            assert value == pytest.approx(expected, abs=2e-5)


def test_one_reading_gives_what_decoding_and_scoring_give_alone(vlm: VLM) -> None:
    shown = asked(PROMPTS, images(3), [0, 1, 2, 0, 0, 1])
    # One continuation is longer than what may be written.
    writes: Any = {"max_new_tokens": 3, "stop_ids": NO_STOP, "batch_size": 4}
    together = generate_and_score(vlm, shown, images(3), CHOICES, **writes)
    texts = generate(vlm, shown, images(3), **writes)
    scores = choice_logprobs(vlm, shown, images(3), CHOICES, batch_size=4)
    assert together == list(zip(texts, scores, strict=True))


def test_an_empty_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="a continuation is empty"):
        choice_logprobs(vlm_of("causal"), [[1]], None, [[[]]], batch_size=1)
