import pytest

from midstream.cli.catalogue import find_study
from midstream.config import Budget, Epochs, Training
from midstream.cost.graph import order
from midstream.study.label import MARK, label, labels, shortest
from midstream.study.stages import (
    Continue,
    Evaluate,
    Finetune,
    FromScratch,
    InitFrom,
    Stage,
    StartText,
)
from tiny import (
    CHAT,
    DATA,
    ENCODER_STAGE,
    EVALUATION,
    ROWS,
    SEEN,
    TEXT,
    TOKENIZER,
    WORLD,
    image_run,
    mixture,
    warm,
)


def tuned(start: Continue | StartText, budget: Budget | None = None) -> Finetune:
    training = Training(
        budget=budget or Epochs(sources=("talks",), epochs=2), rows=ROWS, schedule=warm(), seed=7
    )
    return Finetune(start=start, training=training)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (WORLD, "pocket world laid out"),
        (TOKENIZER, "tokenizer of 400 tokens"),
        (DATA.source("web"), "source web"),
        (ENCODER_STAGE, "encoder siglip, pictures, seed 0"),
        (TEXT, "text, 16 k tokens, seed 0"),
        (SEEN, "image-text, text 40 %, seed 0"),
        (image_run(FromScratch(), seed=3), "image-text, text 0 %, seed 3"),
        (image_run(InitFrom(stage=SEEN), schedule=warm()), "image-text, part 2, text 40 %, seed 0"),
        (CHAT, "fine-tuning, text 40 %, 1 epoch, seed 0"),
        (tuned(SEEN), "fine-tuning, text 40 %, 2 epochs, seed 7"),
        (
            tuned(StartText(stage=TEXT, encoder=ENCODER_STAGE)),
            "fine-tuning, no image-text, text 100 %, 2 epochs, seed 7",
        ),
        (tuned(SEEN, mixture(5_000, talks=1.0)), "fine-tuning, text 40 %, 5 k tokens, seed 7"),
        (
            Evaluate(of=tuned(SEEN), evaluation=EVALUATION),
            "evaluation, text 40 %, 2 epochs, seed 7",
        ),
        (
            Evaluate(of=SEEN, evaluation=EVALUATION),
            "evaluation before fine-tuning, text 40 %, seed 0",
        ),
        (
            Evaluate(of=TEXT, completion=0.6, evaluation=EVALUATION),
            "evaluation of text at 60 %, seed 0",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stage_is_called_by_what_it_is_and_its_first_digits(stage: Stage, words: str) -> None:
    assert label(stage) == f"{words}{MARK}{stage.identity[:7]}"


def test_stages_of_the_same_words_are_told_apart_by_the_shares_that_differ() -> None:
    few, many = (
        image_run(budget=mixture(8_000, pictures=share, web=1 - share)) for share in (0.05, 0.1)
    )
    other = image_run(FromScratch())

    found = labels([few, many, other])

    assert found[few.name].startswith("image-text, text 40 %, pictures 5 %, seed 0" + MARK)
    assert found[many.name].startswith("image-text, text 40 %, pictures 10 %, seed 0" + MARK)
    assert found[other.name] == label(other)


def test_stages_are_told_apart_by_their_pools_and_one_without_the_source_sees_none_of_it() -> None:
    whole = mixture(8_000, pictures=0.5, web=0.5)
    pictures, web = whole.shares
    small, large = (
        whole.model_copy(update={"shares": (pictures.model_copy(update={"pool": n}), web)})
        for n in (1_250, 2_500)
    )
    without = mixture(8_000, talks=0.5, web=0.5)
    for budgets, said in (
        ((whole, small), ("all of", "1,250 of")),
        ((small, large, without), ("1,250 of", "2,500 of", "no")),
    ):
        found = labels([image_run(budget=budget) for budget in budgets])
        assert [text.rpartition(MARK)[0] for text in found.values()] == [
            f"image-text, text 40 %, {one} pictures, seed 0" for one in said
        ]


def test_what_a_stage_descends_from_tells_it_apart_where_it_is_itself_the_same() -> None:
    starts = [image_run(total_tokens=tokens) for tokens in (8_000, 16_000)]

    found = labels([tuned(start) for start in starts])

    assert [text.rpartition(MARK)[0] for text in found.values()] == [
        "fine-tuning, text 40 %, 2 epochs, 8 k tokens, seed 7",
        "fine-tuning, text 40 %, 2 epochs, 16 k tokens, seed 7",
    ]


@pytest.mark.parametrize("name", ["paper.figures", "published.table1", "paper.table_6"])
def test_no_two_stages_of_a_study_have_one_label(name: str) -> None:
    stages = order(find_study(name, []))

    found = labels(stages)

    assert list(found) == [stage.name for stage in stages]
    assert len(set(found.values())) == len(stages)
    handles = {text.rpartition(MARK)[2] for text in found.values()}
    assert len(handles) == len(stages)


def test_a_handle_grows_until_it_is_no_other_stages() -> None:
    assert shortest(["0123456aa", "0123456ab", "fff"]) == 9
    assert shortest(["0123456aa", "f"]) == 7
    assert shortest([]) == 7
