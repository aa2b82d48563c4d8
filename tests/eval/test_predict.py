from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny
from answerers import MAX_NEW_TOKENS, about, answering, chosen, written
from midstream.config import VLMConfig
from midstream.data.examples import TextCodec, Turn, conversation_example, question_ids
from midstream.data.images import Encode, decode_pixels
from midstream.eval import predict
from midstream.eval.benchmark_records import Shot, Shown
from midstream.eval.predict import ModelAnswerer
from midstream.eval.tasks import Answerer, Ask
from midstream.model.generate import choice_logprobs, generate
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vlm import VLM
from midstream.model.weights import initialise, weights_digest

QUESTIONS = (
    "What colour is the circle?",
    "Is there a star?",
    "How many shapes are there in the picture, counting the ones that touch the edge?",
    "Where?",
    "Which shape is to the left of the blue square?",
    "yes or no",
)


def test_a_model_with_its_codec_is_an_answerer(answerer: ModelAnswerer) -> None:
    assert isinstance(answerer, Answerer)
    assert answerer.weights_digest == weights_digest(answerer.model)
    assert not answerer.model.training


def test_an_answer_does_not_depend_on_its_neighbours(
    answerer: ModelAnswerer, pictures: list[Path]
) -> None:
    images: list[Path | None] = [pictures[0], None, pictures[1], pictures[2], None, pictures[0]]
    together = written(answerer, QUESTIONS, images)
    alone = [
        written(answerer, [question], [image])[0]
        for question, image in zip(QUESTIONS, images, strict=True)
    ]
    backwards = written(answerer, QUESTIONS[::-1], images[::-1])[::-1]
    assert together == alone == backwards
    # Otherwise the comparison says nothing.
    assert len(set(together)) >= 4


def by_hand(answerer: ModelAnswerer, ids: list[int], picture: Path | None) -> list[int]:
    features = None
    if picture is not None:
        pixels = decode_pixels(picture.read_bytes(), str(picture), tiny.ENCODER.transform)
        assert answerer.encode is not None
        features = answerer.encode(torch.from_numpy(pixels)[None])
    stops = frozenset({answerer.codec.separator, answerer.codec.end_of_text})
    how = {"max_new_tokens": MAX_NEW_TOKENS, "stop_ids": stops, "batch_size": 4}
    (new,) = generate(
        answerer.model,
        [ids if picture is None else about(ids, 0)],
        features,
        **how,  # type: ignore[arg-type]
    )
    return new


def test_questions_stand_as_in_fine_tuning_with_and_without_a_picture(
    answerer: ModelAnswerer, codec: TextCodec, pictures: list[Path]
) -> None:
    for question, picture in zip(QUESTIONS, [None, *pictures[:5]], strict=True):
        turn = [*codec.encode(f"In: {question}\nOut:"), codec.separator]
        head = [] if picture is None else [codec.separator]
        assert question_ids(codec, question, has_image=picture is not None) == head + turn
        expected = codec.decode(by_hand(answerer, head + turn, picture)).strip()
        assert written(answerer, [question], [picture]) == [expected]


def test_a_picture_is_encoded_once_for_all_questions_about_it(
    codec: TextCodec, encode: Encode, answerer: ModelAnswerer, pictures: list[Path]
) -> None:
    seen: list[int] = []

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return encode(pixels)

    other = answering(answerer.model, codec, counting)
    images: list[Path | None] = [pictures[k] for k in (2, 0, 2, 2, 0, 2)]
    assert written(other, QUESTIONS, images) == written(answerer, QUESTIONS, images)
    assert seen == [2]
    written(other, QUESTIONS[:2], [pictures[1], pictures[0]])
    assert seen == [2, 1]


def test_an_answer_ends_at_any_stop_id_of_the_codec(
    answerer: ModelAnswerer, codec: TextCodec, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = question_ids(codec, QUESTIONS[0], has_image=True)
    whole = by_hand(answerer, ids, pictures[0])
    stop = whole[2]
    monkeypatch.setattr(TextCodec, "stop_ids", property(lambda _codec: frozenset({stop})))
    expected = codec.decode(whole[: whole.index(stop)]).strip()
    assert written(answerer, QUESTIONS[:1], pictures[:1]) == [expected]
    assert expected != codec.decode(whole).strip()


def test_a_picture_for_a_model_without_an_encoder_is_refused(
    codec: TextCodec, pictures: list[Path]
) -> None:
    model = VLM(VLMConfig(decoder=tiny.DECODER))
    initialise(model, 0)
    blind = answering(model, codec, None)
    assert len(written(blind, ["Where?"], [None])) == 1
    with pytest.raises(ValueError, match=rf"no encoder and cannot see .*{pictures[0].name}"):
        written(blind, ["Where?", "Who?"], [None, pictures[0]])


def test_a_picture_that_cannot_be_decoded_is_named(answerer: ModelAnswerer, tmp_path: Path) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"torn\.jpg: the picture cannot be decoded"):
        written(answerer, ["Where?"], [tmp_path / "torn.jpg"])


PAIRS = (
    ("The circle is", " red"),
    ("The circle is", " blue and it is on the left of the star"),
    ("In the picture there are two shapes and the larger one is", " a"),
    ("", "word"),
    ("What?", " no"),
)


def logprob(answerer: ModelAnswerer, head: list[int], tail: list[int]) -> float:
    """Sum of log-probabilities of `tail` behind `head`, position by position."""
    decoder = answerer.model.decoder
    ids = torch.tensor([head + tail])
    places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        chances = decoder.output(decoder(decoder.embed(ids), places, None)).double().log_softmax(-1)
    return sum(
        float(chances[0, at - 1, ids[0, at]]) for at in range(len(head), len(head) + len(tail))
    )


def test_a_log_likelihood_is_that_of_the_continuation_alone(
    answerer: ModelAnswerer, codec: TextCodec
) -> None:
    found = answerer.loglikelihood(PAIRS)
    for (context, continuation), (total, _) in zip(PAIRS, found, strict=True):
        head = codec.encode(context) or [codec.end_of_text]
        expected = logprob(answerer, head, codec.encode(continuation))
        assert total == pytest.approx(expected, rel=1e-5)
    # Of a whole text every token counts behind end-of-text.
    texts = ("The circle is red.", "a")
    for text, total in zip(texts, answerer.loglikelihood_rolling(texts), strict=True):
        expected = logprob(answerer, [codec.end_of_text], codec.encode(text))
        assert total == pytest.approx(expected, rel=1e-5)


def test_a_log_likelihood_does_not_depend_on_its_neighbours(answerer: ModelAnswerer) -> None:
    together = answerer.loglikelihood(PAIRS)
    assert together == [answerer.loglikelihood([pair])[0] for pair in PAIRS]
    assert together == answerer.loglikelihood(PAIRS[::-1])[::-1]
    assert len({total for total, _ in together}) == len(PAIRS)


def test_spaces_behind_the_context_belong_to_the_continuation(answerer: ModelAnswerer) -> None:
    ((moved, _),) = answerer.loglikelihood([("The circle is ", "red")])
    ((plain, _),) = answerer.loglikelihood([("The circle is", " red")])
    assert moved == plain


def test_features_of_no_more_pictures_are_kept_than_there_is_room_for(
    answerer: ModelAnswerer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (30, 20), (40 * number, 90, 10)).save(paths[-1])
    whole = answerer._look(paths)
    monkeypatch.setattr(predict, "_KEPT_BYTES", 3 * whole[0].numpy().nbytes)
    for first in range(0, 6, 2):
        assert torch.equal(answerer._look(paths[first : first + 2]), whole[first : first + 2])
        assert len(answerer._features) <= 3
    assert paths[5] in answerer._features
    assert paths[0] not in answerer._features


def test_no_more_pictures_are_looked_at_together_than_there_is_room_for(
    answerer: ModelAnswerer, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [Shown((one, other), shared=False) for one in pictures[:5] for other in pictures[:2]]
    asked = [f"Which {number}?" for number in range(len(seen))]
    whole = written(answerer, asked, seen)
    looked, look = list[int](), answerer._look

    def counted(paths: list[Path]) -> torch.Tensor:
        looked.append(len(paths))
        return look(paths)

    monkeypatch.setattr(answerer, "_look", counted)
    monkeypatch.setattr(predict, "_PICTURES_OF_ROW", 1)
    assert written(answerer, asked, seen) == whole
    assert len(looked) > 1
    assert max(looked) == 4


def test_shots_in_a_document_stand_as_pages_have_them(
    answerer: ModelAnswerer, codec: TextCodec, pictures: list[Path]
) -> None:
    one, two = pictures[:2]
    shown = Shown((one,), (Shot("Which?", "both", (two, one)),), document=True)
    prompt = answerer._prompt(Ask("What is it?", shown), {one: 0, two: 1})
    assert prompt.head == Part()
    texts = ["In: Which?\nOut:", " both\n", "In: What is it?\nOut:"]
    first, reply, last = map(codec.encode, texts)
    begin, mark = codec.begin_ids, codec.separator
    assert list(prompt.rest.ids) == [*begin, mark, mark, *first, *reply, mark, *last]
    start = len(begin)
    behind = start + 2 + len(first) + len(reply)
    assert prompt.rest.pictures == ((start, 1), (start + 1, 0), (behind, 0))


def test_several_pictures_and_shots_stand_as_in_fine_tuning(
    answerer: ModelAnswerer, codec: TextCodec, pictures: list[Path]
) -> None:
    """Likelihoods of a reply are those behind the whole conversation as training lays it out."""
    one, two, three = pictures[:3]
    shots = (Shot("Where is <image>?", "here", (one,)), Shot("Which?", "both", (two, three)))
    shown = [Shown((two, one)), Shown((three,), shots), Shown((one, two), shots, False), one]
    asked = ["Is <image> like <image>?", "What is it?", "<image> or <image>", "Where?"]
    turns = [
        [Turn("Is  like ?", "", pictures=(3, 9))],
        [Turn("Where is ?", "here", pictures=(9,)), Turn("Which?", "both", pictures=(0, 0))],
        [],
        [Turn("Where?", "", pictures=(0,))],
    ]
    turns[2] = [*turns[1], Turn("or", "", pictures=(0, 2))]
    turns[1] = [*turns[1], Turn("What is it?", "", pictures=(0,))]
    order = [(two, one), (one, two, three, three), (one, two, three, one, two), (one,)]
    choices = [["yes", "no it is"]] * 4
    features = answerer._look(pictures[:3])
    expected = []
    for own, images in zip(turns, order, strict=True):
        whole = conversation_example(codec, own)
        end = len(whole.input_ids) - int(whole.supervised[::-1].argmin())
        numbers = [pictures.index(path) for path in images]
        ids = tuple(whole.input_ids[:end].tolist())
        part = Part(ids, tuple(zip(whole.pictures, numbers, strict=True)))
        tokens = [codec.encode(f" {text}") for text in choices[0]]
        (found,) = choice_logprobs(
            answerer.model, [Prompt(Part(), part)], features, [tokens], batch_size=4
        )
        expected.append([value for value, _ in found])
    assert len({tuple(tokens[0][:1]), tuple(tokens[1][:1])}) == 2
    numbers = {path: number for number, path in enumerate(pictures)}
    # Shots that no other question has are read with it.
    heads = [
        answerer._prompt(Ask(*pair), numbers).head.ids != ()
        for pair in zip(asked, shown, strict=True)
    ]
    assert heads[1:3] == [True, False]
    firsts = chosen(answerer, asked, shown, choices)
    golds = answerer.reply(
        [Ask(*pair, (), "no it is", False) for pair in zip(asked, shown, strict=True)]
    )
    for row, (likely, reply) in enumerate(zip(firsts, golds, strict=True)):
        assert reply.gold == pytest.approx(expected[row][1], abs=1e-4)
        assert len(likely) == 2
