from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

import tiny
from answerers import about, written
from midstream.chat.session import ChatSession, ChatSettings, TextPieces, caution, describe
from midstream.config import AnyDecoderConfig, TransformersDecoderConfig
from midstream.data.examples import TextCodec, question_ids
from midstream.data.images import decode_pixels
from midstream.eval.benchmark_records import Shown
from midstream.eval.predict import ModelAnswerer
from midstream.model.generate import generate
from midstream.study.label import label
from midstream.study.stages import Evaluate, Imported, LoadDecoder
from midstream.study.store import Ledger
from midstream.work.open_model import OpenedModel
from midstream.work.protocol import harmless

SHORT = ChatSettings(max_new_tokens=8)
QUESTIONS = ("What colour is it?", "Is it red?", "How many circles are there?")
ROW = tiny.ROWS.row_length


def answer(session: ChatSession, question: str) -> str:
    return "".join(session.ask(question))


def session_about(
    opened: OpenedModel, picture: Path | None, settings: ChatSettings = SHORT
) -> ChatSession:
    session = ChatSession(opened, settings)
    session.show(*([] if picture is None else [picture]))
    return session


def reply_ids(opened: OpenedModel, prompt: list[int], picture: Path | None) -> list[int]:
    """What comes after a prompt, made without a session."""
    features = None
    if picture is not None:
        assert opened.vlm.config.encoder is not None
        transform = opened.vlm.config.encoder.transform
        pixels = decode_pixels(picture.read_bytes(), str(picture), transform)
        features = opened.encode(torch.from_numpy(pixels)[None])
    return generate(
        opened.vlm,
        [prompt if picture is None else about(prompt, 0)],
        features,
        max_new_tokens=SHORT.max_new_tokens,
        stop_ids=opened.codec.stop_ids,
        batch_size=1,
    )[0]


class Endless(TextCodec):
    """A codec where no token ends a reply."""

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset()


def test_first_answers_equal_those_of_an_evaluation(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    answerer = ModelAnswerer(
        opened.vlm,
        opened.codec,
        encode=opened.encode,
        encoder=opened.vlm.config.encoder,
        max_new_tokens=SHORT.max_new_tokens,
        batch_size=1,
    )
    found = set()
    for picture in (*pictures, None):
        for question in QUESTIONS:
            said = answer(session_about(opened, picture), question)
            assert [said] == written(answerer, [question], [picture])
            found.add(said)
    assert len(found) > 1


@pytest.mark.parametrize("shown", [True, False])
def test_later_turns_are_laid_out_as_in_fine_tuning(
    opened: OpenedModel, pictures: list[Path], shown: bool
) -> None:
    picture = pictures[2] if shown else None
    session, codec = session_about(opened, picture), opened.codec
    prompt: list[int] = [codec.separator] if shown else []
    for question in QUESTIONS:
        prompt += question_ids(codec, question, has_image=False)
        reply = reply_ids(opened, prompt, picture)
        assert answer(session, question) == codec.decode(reply).strip()
        prompt += [*reply, codec.separator]
    assert [question for question, _ in session.turns] == list(QUESTIONS)


def test_reset_keeps_the_picture_and_a_new_one_starts_a_new_conversation(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    session = session_about(opened, pictures[0])
    for picture in (pictures[0], *pictures[1:], None):
        answer(session, QUESTIONS[0])
        own = () if picture is None else (picture,)
        if own == session.pictures:
            session.reset()
        else:
            session.show(*own)
        assert (session.turns, session.pictures) == ([], own)
        expected = answer(session_about(opened, picture), QUESTIONS[1])
        assert answer(session, QUESTIONS[1]) == expected


def test_draws_are_a_matter_of_the_seed(opened: OpenedModel) -> None:
    def drawn(seed: int) -> str:
        settings = ChatSettings(max_new_tokens=12, temperature=1.0, seed=seed)
        return answer(ChatSession(opened, settings), QUESTIONS[0])

    said = [drawn(seed) for seed in range(6)]
    assert [drawn(seed) for seed in range(6)] == said
    assert len(set(said)) > 2


def test_a_conversation_ends_at_the_positions_the_model_was_trained_on(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    endless = replace(opened, codec=Endless(opened.codec.tokenizer))
    session = session_about(endless, pictures[0], ChatSettings(max_new_tokens=500))
    answer(session, QUESTIONS[0])
    assert session.cut is not None
    assert f"all {ROW} positions" in session.cut
    before = list(session.turns)
    with pytest.raises(ValueError, match=rf"holds {ROW} positions.* {ROW} at most: start a new"):
        session.ask(QUESTIONS[1])
    assert session.turns == before
    session.reset()
    assert answer(session, QUESTIONS[1])


def test_the_longest_question_that_leaves_room_is_answered_and_the_next_one_refused(
    opened: OpenedModel,
) -> None:
    questions = ["x " * number + last for number in range(ROW) for last in ("x", "xx")]
    sizes = {len(question_ids(opened.codec, q, has_image=False)): q for q in questions}
    session = ChatSession(opened, SHORT)
    list(session.ask(sizes[ROW - 1]))
    assert session.cut is not None
    assert "fills" in session.cut
    with pytest.raises(ValueError, match=rf"needs {ROW} tokens.* {ROW} at most: ask a shorter"):
        ChatSession(opened, SHORT).ask(sizes[ROW])


def test_an_answer_left_in_its_middle_is_a_turn(opened: OpenedModel) -> None:
    session = ChatSession(opened, ChatSettings(max_new_tokens=60))
    pieces = session.ask(QUESTIONS[0])
    begun = next(pieces)
    answer(session, QUESTIONS[1])
    assert session.turns[0] == (QUESTIONS[0], begun)
    assert len(session.turns) == 2


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("", "the question is empty"),
        (" \n\t ", "the question is empty"),
        (b"caf\xe9".decode(errors="surrogateescape"), "not UTF-8"),
    ],
)
def test_a_question_without_words_or_of_broken_bytes_is_refused(
    opened: OpenedModel, question: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        ChatSession(opened, SHORT).ask(question)


def test_a_model_without_an_encoder_refuses_pictures_and_talks(
    opened_text: OpenedModel, pictures: list[Path]
) -> None:
    session = ChatSession(opened_text, SHORT)
    with pytest.raises(ValueError, match=rf"without an encoder, it cannot see {pictures[0]}"):
        session.show(pictures[0])
    assert answer(session, QUESTIONS[0])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_p": 0.5}, "give a temperature above 0"),
        ({"top_p": 0.5, "temperature": 0.0}, "give a temperature"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ChatSettings(**values)


def test_the_description_tells_training_and_scores(
    chat_ledger: Ledger, opened: OpenedModel, tmp_path: Path
) -> None:
    own = tiny.store_with(
        chat_ledger, tmp_path, tiny.DATA, tiny.ENCODER_STAGE, tiny.SEEN, tiny.CHAT
    )
    for stage in (tiny.RESULT, Evaluate(of=tiny.SEEN, evaluation=tiny.EVALUATION)):
        with own.open_stage(stage) as work:
            score = 0.625 if stage is tiny.RESULT else 0.875
            row = {"kind": "vision", "metric": "accuracy", "num_examples": 8}
            tasks = {"pope": row | {"score": score, "chance": 0.5}}
            work.finish({"seconds": 1.0, "tasks": tasks, "stable": {}})
    lines = describe(replace(opened, ledger=own))
    sizes = [sum(value.numel() for value in opened.vlm.parameters())]
    assert opened.encoder is not None
    sizes += [value.numel() for value in opened.encoder.parameters()]
    assert lines[0] == f"{tiny.CHAT.name}: {sum(sizes):,} parameters, sees pictures"
    seen = own.results(tiny.SEEN)["tokens_seen"]
    assert lines[1] == (
        "trained on text: unknown, the stage is not in this store, 40 % of " + tiny.TEXT.name
    )
    assert lines[2].startswith(f"trained on images and text: {seen:,} tokens (text ")
    assert lines[3].startswith("trained on conversations: ")
    assert lines[4] == f"scores: pope 62.5% (chance 50.0%) ({label(tiny.RESULT)})"
    assert len(lines) == 5


def test_a_model_that_learnt_no_conversations_says_so(
    opened: OpenedModel, opened_text: OpenedModel
) -> None:
    assert caution(opened) is None
    assert "not fine-tuned on conversations" in (caution(opened_text) or "")
    first, training = describe(opened_text)
    assert first.startswith(f"{tiny.TEXT.name} at 40 %: ")
    assert first.endswith("text only")
    assert training.endswith(f", 40 % of {tiny.TEXT.name}")


LLAMA = TransformersDecoderConfig(
    model_type="llama",
    settings={"max_position_embeddings": 77},
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    vocab_size=tiny.VOCAB_SIZE,
    num_parameters=1000,
    tied_embeddings=False,
)


@pytest.mark.parametrize(("decoder", "positions"), [(tiny.DECODER, 2048), (LLAMA, 77)])
def test_an_imported_model_may_use_the_positions_of_its_family(
    opened_text: OpenedModel, decoder: AnyDecoderConfig, positions: int
) -> None:
    imported = Imported(folder=Path("elsewhere"), content="0" * 16)
    stage = LoadDecoder(data=tiny.DATA, checkpoint=imported, decoder=decoder)
    assert ChatSession(replace(opened_text, stage=stage), SHORT).max_positions == positions


def byte_level_codec() -> TextCodec:
    """Every byte is a token."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return TextCodec(tokenizer)


def byte_fallback_codec() -> TextCodec:
    """Letters, and all bytes for what they do not spell, as sentencepiece has it."""
    words = [*"abcdefgh é", *(f"<0x{value:02X}>" for value in range(256))]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])
    return TextCodec(tokenizer)


CODECS = {"byte level": byte_level_codec(), "byte fallback": byte_fallback_codec()}
TEXTS = st.text(st.sampled_from("ab \n€é🎈\ufffd"), max_size=12)


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_pieces_add_up_to_the_decoded_answer(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    tokens = st.integers(0, codec.tokenizer.get_vocab_size(with_added_tokens=False) - 1)
    # Texts, and between them bytes at random: most of those are no UTF-8.
    parts = data.draw(st.lists(TEXTS | st.lists(tokens, max_size=4), max_size=5))
    ids = [id for part in parts for id in (codec.encode(part) if isinstance(part, str) else part)]
    pieces = TextPieces(codec)
    found = [pieces.push(token) for token in ids]
    found.append(pieces.finish())
    assert "".join(found) == codec.decode(ids).strip() == pieces.text


def test_every_letter_is_a_piece_as_soon_as_it_is_there() -> None:
    pieces = TextPieces(CODECS["byte level"])
    found = [pieces.push(token) for token in CODECS["byte level"].encode("a€ b")]
    assert found == ["a", "", "", "€", "", " b"]


def test_control_characters_are_written_out_and_text_is_left_alone() -> None:
    assert harmless("\x1b[2J\r\x07\x7f\x9b\u202e\u2066") == (r"\x1b[2J\r\x07\x7f\x9b\u202e\u2066")
    plain = "two\nlines\tand a tab, é, 日本, 👩\u200d🚀, שלום, [bold]"
    assert harmless(plain) == plain


def test_pictures_stand_where_the_first_question_has_marks_as_in_fine_tuning(
    opened: OpenedModel, pictures: list[Path]
) -> None:
    assert opened.encoder is not None
    answerer = ModelAnswerer(
        opened.vlm,
        opened.codec,
        encode=opened.encode,
        encoder=opened.vlm.config.encoder,
        max_new_tokens=SHORT.max_new_tokens,
        batch_size=2,
    )
    session = ChatSession(opened, SHORT)
    for question in ("Is <image> like <image>?", "Which is red?"):
        session.show(*pictures[:2])
        said = answer(session, question)
        assert session.turns == [(question, said)]
        assert [said] == written(answerer, [question], [Shown(tuple(pictures[:2]))])
    session.show(*pictures[1::-1])
    with pytest.raises(ValueError, match="3 <image> marks and 2 pictures"):
        session.ask("<image><image><image>")
    assert (session.turns, session.pictures) == ([], (pictures[1], pictures[0]))
    answer(session, "Which is red?")
    for turns in (1, 0):
        with pytest.raises(ValueError, match="the question has an <image> mark"):
            session.ask("And <image>?")
        assert len(session.turns) == turns
        session.show()
