import pytest
import torch
from torch import Tensor

from midstream.config import DecoderConfig, EncoderConfig, VLMConfig
from midstream.model.generate import generate, sequence_logprobs
from midstream.model.initialise import initialise
from midstream.model.vlm import VLM

ENCODER = EncoderConfig(
    image_size=8, patch_size=4, hidden_size=24, num_layers=2, num_heads=2, intermediate_size=48
)
DECODER = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=40)
PROMPTS = [[5, 6, 7], [1], list(range(1, 20)), [9, 8, 7, 6], [3] * 16, [2, 30]]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    model = VLM(VLMConfig(decoder=DECODER, encoder=ENCODER))
    initialise(model, 0)
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 4, 24, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_greedy(vlm: VLM, prompt: list[int], features: Tensor | None, new: int) -> list[int]:
    """One token at a time, the whole sequence each time, no cache and no padding."""
    ids = list(prompt)
    for _ in range(new):
        embeddings = vlm.decoder.embed(torch.tensor([ids]))
        if features is not None:
            projected = vlm.project(features, embeddings)
            assert projected is not None
            embeddings = torch.cat((projected, embeddings), dim=1)
        position_ids = torch.arange(embeddings.shape[1])[None]
        hidden = vlm.decoder(embeddings, position_ids, None)
        ids.append(int(vlm.decoder.output(hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sees", [True, False])
def test_greedy_equals_the_whole_sequence_recomputed_for_each_token(vlm: VLM, sees: bool) -> None:
    features = images(len(PROMPTS)) if sees else None
    found = generate(vlm, PROMPTS, features, max_new_tokens=7, stop_ids=frozenset(), batch_size=4)
    for index, prompt in enumerate(PROMPTS):
        mine = None if features is None else features[index : index + 1]
        assert found[index] == plain_greedy(vlm, prompt, mine, 7)


def test_an_image_changes_the_answer(vlm: VLM) -> None:
    answers = [
        generate(vlm, PROMPTS, given, max_new_tokens=7, stop_ids=frozenset(), batch_size=4)
        for given in (None, images(6), -images(6))
    ]
    assert answers[0] != answers[1] != answers[2]


def test_decoding_stops_at_a_stop_id_and_leaves_it_out(vlm: VLM) -> None:
    options = {"max_new_tokens": 12, "batch_size": 4}
    free = generate(vlm, PROMPTS, None, stop_ids=frozenset(), **options)  # type: ignore[arg-type]
    assert all(len(answer) == 12 for answer in free)
    stop = free[0][3]
    found = generate(vlm, PROMPTS, None, stop_ids=frozenset({stop, 39}), **options)  # type: ignore[arg-type]
    for whole, cut in zip(free, found, strict=True):
        ends = [place for place, token in enumerate(whole) if token in (stop, 39)]
        assert cut == whole[: ends[0] if ends else None]
    assert len(found[0]) <= 3


def test_decoding_ends_early_when_all_rows_are_done(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    vlm.decoder.register_forward_hook(lambda *_: steps.append(1))
    first = generate(vlm, [[5]], None, max_new_tokens=1, stop_ids=frozenset(), batch_size=2)[0][0]
    assert len(steps) == 1
    answer = generate(vlm, [[5]], None, max_new_tokens=50, stop_ids=frozenset({first}), batch_size=2)
    assert answer == [[]]
    assert len(steps) == 2


def test_logits_do_not_depend_on_neighbours_to_the_last_bit(vlm: VLM) -> None:
    seen: list[Tensor] = []
    hook = vlm.decoder.output.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.clone())
    )
    options = {"max_new_tokens": 5, "stop_ids": frozenset[int](), "batch_size": 4}
    features = images(len(PROMPTS))
    generate(vlm, [PROMPTS[0]], features[:1], **options)  # type: ignore[arg-type]
    alone, seen[:] = [logits[0] for logits in seen], []
    mixed = [2, 3, 0, 1]
    generate(vlm, [PROMPTS[i] for i in mixed], features[mixed], **options)  # type: ignore[arg-type]
    hook.remove()
    # Prompts 3, 0, 1 share the short batch; prompt 2 is longer and comes after it.
    among = [logits[1] for logits in seen[:5]]
    assert len(seen) == 10
    for one, other in zip(alone, among, strict=True):
        assert torch.equal(one, other)


def test_unusable_prompts_are_refused(vlm: VLM) -> None:
    options = {"max_new_tokens": 5, "stop_ids": frozenset[int](), "batch_size": 4}
    with pytest.raises(ValueError, match="2 images were given for 1 prompts"):
        generate(vlm, [[1]], images(2), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(vlm, [[1], []], None, **options)  # type: ignore[arg-type]
    assert generate(vlm, [], None, **options) == []  # type: ignore[arg-type]


@torch.no_grad()
def test_logprobs_are_those_of_each_sequence_alone(vlm: VLM) -> None:
    sequences = [[1, 2, 3, 4], list(range(30)), [7, 7], [4, 9, 11]]
    starts = [2, 29, 1, 1]
    found = sequence_logprobs(vlm, sequences, starts, batch_size=3)
    for (total, is_greedy), ids, start in zip(found, sequences, starts, strict=True):
        embeddings = vlm.decoder.embed(torch.tensor([ids]))
        hidden = vlm.decoder(embeddings, torch.arange(len(ids))[None], None)
        chances = vlm.decoder.output(hidden)[0].softmax(-1)
        expected = sum(float(chances[t - 1, ids[t]].log()) for t in range(start, len(ids)))
        assert total == pytest.approx(expected, rel=1e-4)
        best = [int(chances[t - 1].argmax()) for t in range(start, len(ids))]
        assert is_greedy == (best == ids[start:])


def test_a_greedy_continuation_is_recognised(vlm: VLM) -> None:
    prompt = [5, 6, 7]
    answer = generate(vlm, [prompt], None, max_new_tokens=4, stop_ids=frozenset(), batch_size=1)[0]
    other = [*answer[:-1], (answer[-1] + 1) % 40]
    found = sequence_logprobs(vlm, [prompt + answer, prompt + other], [3, 3], batch_size=2)
    assert [is_greedy for _, is_greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_logprobs_do_not_depend_on_neighbours_to_the_last_bit(vlm: VLM) -> None:
    sequences, starts = [[1, 2, 3, 4], list(range(30)), [7, 7], [4, 9, 11]], [2, 29, 1, 1]
    together = sequence_logprobs(vlm, sequences, starts, batch_size=3)
    for index in range(4):
        alone = sequence_logprobs(vlm, [sequences[index]], [starts[index]], batch_size=3)
        assert alone == [together[index]]


@pytest.mark.parametrize("start", [0, 4])
def test_a_continuation_outside_its_sequence_is_refused(vlm: VLM, start: int) -> None:
    with pytest.raises(ValueError, match=f"starts at {start} of 3 tokens"):
        sequence_logprobs(vlm, [[1, 2, 3]], [start], batch_size=1)
