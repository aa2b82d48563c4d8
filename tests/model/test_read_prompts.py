"""Prompts with any number of pictures, against the whole sequence read at once."""

from collections import Counter

import pytest
import torch
from test_generate import ENCODER, NO_STOP, OPENLM, images, shapes_read, vlm_of
from torch import Tensor

from midstream.config import Attention, ProjectorConfig, VLMConfig
from midstream.config.connectors import AveragePool
from midstream.model import read_prompts
from midstream.model.generate import choice_logprobs, generate, generate_and_score
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vlm import VLM
from midstream.model.weights import initialise

KINDS: tuple[Attention, ...] = ("segments", "prefix", "pictures", "latest")
FEATURES = images(5)
WIDTH = 4
# The mean of each picture's four patches.
POOLED = VLM(
    VLMConfig(
        decoder=OPENLM, encoder=ENCODER, projector=ProjectorConfig(reduction=AveragePool(window=2))
    )
)
initialise(POOLED, 0)
# Two shots with a picture each (the first reply begins at the token 31), as a head.
SHOTS = Part((30, 5, 6, 31, 32, 30, 7, 8, 31, 33, 30), ((0, 0), (5, 3)))
PROMPTS = [
    Prompt(Part(), Part((30, 1, 2, 30, 30, 3), ((0, 0), (3, 1), (4, 2)))),
    Prompt(Part(), Part((30, 30, 9), ((0, 2), (1, 2)))),
    Prompt(Part(), Part(tuple(range(1, 20)))),
    Prompt(Part((39,), ((1, 4),)), Part((30, 8, 8))),
    Prompt(Part((39,), ((1, 4),)), Part((30, 8, 30, 7), ((2, 1),))),
    Prompt(SHOTS, Part((30, 9, 31), ((0, 4),)), 3),
    Prompt(SHOTS, Part((30, 4, 4, 30, 2, 31), ((0, 1), (3, 2))), 3),
    Prompt(SHOTS, Part((9, 31)), 3),
    Prompt(Part(), SHOTS.then(Part((30, 9, 31), ((0, 4),))), 3),
]


@torch.no_grad()
def next_logits(vlm: VLM, prompt: Prompt, said: list[int]) -> Tensor:
    """Of the whole sequence, without cache and padding."""
    ids, pictures = prompt.head.then(prompt.rest)
    pieces, done, ends = list[Tensor](), 0, len(ids) if prompt.prefix is None else prompt.prefix
    starts = [place + WIDTH * number for number, (place, _) in enumerate(pictures)]
    for place, image in [*pictures, (len(ids), -1)]:
        pieces.append(vlm.decoder.embed(torch.tensor([list(ids[done:place])], dtype=torch.long)))
        if image >= 0:
            shown = vlm.project(FEATURES[image][None], pieces[0])
            assert shown is not None
            pieces.append(shown)
        done = place
    pieces.append(vlm.decoder.embed(torch.tensor([said], dtype=torch.long)))
    embeddings = torch.cat(pieces, dim=1)
    length = embeddings.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    if vlm.config.attention == "prefix":
        ends += vlm.config.image_tokens * sum(place < ends for place, _ in pictures)
        mask[:ends, :ends] = True
    for start, later in zip(starts, [*starts[1:], length], strict=False):
        if vlm.config.attention == "pictures":
            mask[start : start + WIDTH, start : start + WIDTH] = True
        if vlm.config.attention == "latest":
            mask[later:, start : start + WIDTH] = False
    hidden = vlm.decoder(embeddings, torch.arange(length)[None], mask[None, None])
    logits: Tensor = vlm.decoder.output(hidden[0, -1])
    return logits


@pytest.fixture(params=[*((kind, "openlm") for kind in KINDS), ("prefix", "llama"), None])
def vlm(request: pytest.FixtureRequest) -> VLM:
    return POOLED if request.param is None else vlm_of(*request.param)


def test_pictures_anywhere_give_what_the_whole_sequence_gives(vlm: VLM) -> None:
    choices = [[[7], [8, 9, 3]]] * len(PROMPTS)
    found = generate_and_score(
        vlm, PROMPTS, FEATURES, choices, max_new_tokens=4, stop_ids=NO_STOP, batch_size=2
    )
    for prompt, (tokens, scores) in zip(PROMPTS, found, strict=True):
        said: list[int] = []
        for _ in range(4):
            said.append(int(next_logits(vlm, prompt, said).argmax()))
        assert tokens == said
        for one, (logprob, _) in zip(choices[0], scores, strict=True):
            steps = (
                next_logits(vlm, prompt, one[:at]).log_softmax(-1)[token]
                for at, token in enumerate(one)
            )
            assert logprob == pytest.approx(float(sum(steps)), abs=1e-4)


def test_places_and_order_of_pictures_tell(vlm: VLM) -> None:
    asked = [
        Prompt(Part(), Part((30, 30, 9), pictures))
        for pictures in (((0, 0), (1, 1)), ((0, 1), (1, 0)), ((0, 0), (2, 1)))
    ]
    found = choice_logprobs(vlm, asked, FEATURES, [[[7]]] * 3, batch_size=4)
    assert len({round(score, 5) for ((score, _),) in found}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_to_the_last_bit_whatever_stands_beside_it(kind: Attention) -> None:
    vlm = vlm_of(kind)
    together = choice_logprobs(vlm, PROMPTS, FEATURES, [[[7], [8, 9]]] * 9, batch_size=3)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = choice_logprobs(vlm, [prompt], FEATURES, [[[7], [8, 9]]], batch_size=3)
        assert alone == expected


@pytest.mark.parametrize("kind", KINDS)
def test_shots_are_read_once_for_all_questions_behind_them(kind: Attention) -> None:
    vlm = vlm_of(kind)
    asked = [Prompt(SHOTS, Part((30, number, 31), ((0, 4),)), 3) for number in range(5)]
    with shapes_read(vlm) as read:
        generate(vlm, asked, FEATURES, max_new_tokens=1, stop_ids=NO_STOP, batch_size=2)
    # Once in a full batch, then three batches of questions with a picture each.
    assert Counter(read) == {(2, 11 + 2 * WIDTH): 1, (2, 16 + WIDTH): 3}


def test_long_prompts_are_read_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = vlm_of("segments")
    how = {"max_new_tokens": 2, "stop_ids": NO_STOP, "batch_size": 4}
    asked = [Prompt(Part(), SHOTS.then(Part((30, n, 31), ((0, 4),))), 3) for n in range(5)]
    short = [Prompt(Part(), Part((30, n))) for n in range(5)]
    whole = generate_and_score(vlm, asked + short, FEATURES, [[[7, 8]]] * 10, **how)  # type: ignore[arg-type]
    # Room for two of 16 tokens, three pictures and what follows, or for four of 16 tokens.
    monkeypatch.setattr(read_prompts, "_BATCH_POSITIONS", 3 * (16 + 3 * WIDTH + 4) - 1)
    with shapes_read(vlm) as read:
        found = generate_and_score(vlm, asked + short, FEATURES, [[[7, 8]]] * 10, **how)  # type: ignore[arg-type]
    assert {shape for shape in read if shape[1] > 4} == {(2, 16 + 3 * WIDTH), (4, 16)}
    for (said, told), (tokens, scores) in zip(whole, found, strict=True):
        assert tokens == said
        assert scores[0][0] == pytest.approx(told[0][0], abs=1e-4)


def test_prompts_that_cannot_be_laid_out_are_refused() -> None:
    vlm = vlm_of("segments")
    for prompt, told in (
        (Prompt(SHOTS, Part()), "prompt is empty"),
        ([], "prompt is empty"),
        (Prompt(Part(), Part((1, 2), ((1, 5),))), "shows image 5, 5 images were given"),
        (Prompt(Part(), Part((1, 2), ((1, 0), (0, 1)))), r"stand at \[1, 0\] of 2 tokens"),
        (Prompt(Part(), Part((1, 2), ((3, 0),))), r"stand at \[3\] of 2 tokens"),
        (Prompt(Part(), Part((1, 2), ((2, 0),))), "ends with a picture"),
    ):
        with pytest.raises(ValueError, match=told):
            generate(vlm, [prompt], FEATURES, max_new_tokens=1, stop_ids=NO_STOP, batch_size=1)
