"""The pocket scale: the paper's questions in minutes on two CPU cores. Our choice throughout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from midstream.config import (
    AdamW,
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Evaluation,
    Mixture,
    PatchProjection,
    PocketWorld,
    Rows,
    Share,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.recipes.lines import (
    DATACOMP_DR,
    END_RATE,
    CaptionSet,
    Scale,
    TextMixture,
    arrival_of,
    expected_sources,
)
from midstream.study.stages import FuseEncoders, Prepare, Pretrain, TrainEncoder
from midstream.study.studies import Study

VOCAB_SIZE = 640
# So few that words of captions and conversations are learnt for themselves.
TOKENIZER = TrainedTokenizer(vocab_size=VOCAB_SIZE, sources=("web", "pictures", "talks"))
DECODER = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, vocab_size=VOCAB_SIZE)
ENCODER = EncoderConfig(
    image_size=72,
    patch_size=24,
    hidden_size=64,
    num_layers=3,
    num_heads=2,
    intermediate_size=256,
    feature_layer=-3,
)
DINOV2 = ENCODER.model_copy(update={"family": "dinov2"})
# Small steps: at this size many of them teach more than large ones over the same tokens, above all
# in fine-tuning, where reading a picture is learnt at a stroke or not at all. A higher rate there
# forgets the text and learns less.
TEXT_ROWS = Rows(row_length=128, batch_rows=4, layout="filled")
IMAGE_ROWS = Rows(row_length=128, batch_rows=8, layout="filled")
TALK_ROWS = Rows(row_length=128, batch_rows=1, layout="filled")
FINETUNE_RATE = 3.5e-4
# After 700 a patch's features tell 92 % of shapes, after this many all.
ENCODER_STEPS = 2_500
# The demo ends within five minutes on two free cores.
DEMO_ENCODER_STEPS = 1_200
DEMO_COMPLETIONS = (0.0, 0.4, 0.8, 1.0)
# Kept along every text run, so that studies of other completions share it.
MILESTONES = (0.2, 0.4, 0.6, 0.8, 1.0)
VISUAL_TASKS = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref")
TEXT_TASKS = ("pocket_reading", "pocket_facts")
# Of several pictures, where a world has albums.
SEVERAL_TASKS = ("nlvr2", "pocket_albums")


ASKED = Evaluation(
    visual_tasks=VISUAL_TASKS,
    text_tasks=TEXT_TASKS,
    prompts="short",
    # Its conversations say "yes" and "no"; the official answers begin with a capital.
    fixed_answers="text",
    batch_size=128,
)


def encoder_stage(
    data: Prepare, *, num_steps: int, encoder: EncoderConfig = ENCODER, max_text_tokens: int = 80
) -> TrainEncoder:
    """The tiny SigLIP encoder, or another tower, trained on the world's captions.

    These have 24 tokens at most; the scale's studies keep the 80 that they were run with.
    """
    return TrainEncoder(
        data=data,
        encoder=encoder,
        training=ContrastiveTraining(
            source="pictures",
            text_hidden_size=64,
            text_num_layers=1,
            max_text_tokens=max_text_tokens,
            batch_images=64,
            num_steps=num_steps,
            schedule=WarmupCosine(peak_rate=1e-3, end_rate=1e-5, warmup_fraction=0.1),
        ),
    )


def text_stage(
    data: Prepare,
    *,
    total_tokens: int,
    rate: float = 2e-3,
    source: str = "web",
    milestones: Sequence[float] = MILESTONES,
) -> Pretrain:
    """The text run on one source, with checkpoints along the way."""
    return Pretrain(
        data=data,
        decoder=DECODER,
        milestones=tuple(milestones),
        training=Training(
            budget=Mixture(total_tokens=total_tokens, shares=(Share(source=source, share=1.0),)),
            rows=TEXT_ROWS,
            schedule=WarmupCosine(peak_rate=rate, end_rate=END_RATE, warmup_fraction=0.05),
        ),
    )


def when_images_arrive(
    completions: Sequence[float] = DEMO_COMPLETIONS,
    seeds: Sequence[int] = (7, 365),
    image_share: float = 0.8,
    text_tokens: int = 1_200_000,
    continue_tokens: int = 250_000,
    epochs: int = 1,
    text_rate: float = 2e-3,
    rewarm_rate: float = 1e-3,
    finetune_rate: float = FINETUNE_RATE,
    encoder_steps: int = DEMO_ENCODER_STEPS,
) -> Study:
    """Figure 4 of the paper: how much text should come before the first image?

    One text run with checkpoints along the way; each of them (and the initialiser, 0 %) is
    continued on captions and text, fine-tuned on conversations and evaluated, once a seed. The
    seed draws the order of captions and conversations, and the projector.
    """
    data = Prepare(world=PocketWorld(), tokenizer=TOKENIZER)
    # Nothing else can run until it is done.
    encoder = encoder_stage(data, num_steps=encoder_steps, max_text_tokens=24)
    # A start of one's own is kept beside those that all such studies share.
    kept = sorted({*MILESTONES, *completions} - {0.0})
    text = text_stage(data, total_tokens=text_tokens, rate=text_rate, milestones=kept)
    pictures = Mixture(
        total_tokens=continue_tokens,
        shares=(
            Share(source="pictures", share=image_share),
            Share(source="web", share=1.0 - image_share),
        ),
    )
    fields = arrival_of(
        text,
        encoder,
        completions,
        seeds,
        pictures=pictures,
        talks=Epochs(sources=("talks",), epochs=epochs),
        rows=IMAGE_ROWS,
        rewarm_rate=rewarm_rate,
        finetune_rate=finetune_rate,
        finetune_rows=TALK_ROWS,
        asked=ASKED,
    )
    return Study(name="pocket.when_images_arrive", **fields)


# Of the pocket world.
_CONVERSATIONS = 2_000
_ALT_TEXTS = 20_000
_PAGES, _ALBUMS = 12_000, 1_500


def pocket_scale(
    shrink: float = 1.0,
    rows: Literal["filled", "paper"] = "filled",
    text_mixture: TextMixture | None = None,
) -> Scale:
    """Our choice throughout (U): what two cores do in minutes, at the paper's shares."""
    image_rows, talk_rows = IMAGE_ROWS, TALK_ROWS
    if rows == "paper":
        image_rows = image_rows.model_copy(update={"layout": "padded"})
        talk_rows = talk_rows.model_copy(update={"layout": "padded"})

    def few(number: int, least: int) -> int:
        return max(least, round(number * shrink))

    def world(alt_texts: int = 0, pages: int = 0, albums: int = 0) -> Prepare:
        expected = _POCKET_EXPECTED + (_SEVERAL_EXPECTED if pages else ())
        return Prepare(
            world=PocketWorld(
                num_documents=few(30_000, 2_000),
                num_captions=few(20_000, 400),
                num_alt_texts=alt_texts,
                num_conversations=few(_CONVERSATIONS, 100),
                num_pages=pages,
                num_albums=albums,
                num_questions=few(2_000, 20),
                num_text_items=few(2_000, 20),
            ),
            tokenizer=TOKENIZER,
            expected=expected if shrink == 1.0 and not alt_texts else (),
        )

    def scale(data: Prepare, captions: dict[str, CaptionSet]) -> Scale:
        encoder, dinov2 = (
            encoder_stage(data, num_steps=few(ENCODER_STEPS, 20), encoder=tower)
            for tower in (ENCODER, DINOV2)
        )
        return Scale(
            name="pocket",
            decoder=DECODER,
            data=data,
            text=text_stage(data, total_tokens=few(1_200_000, 60_000)),
            encoders={
                "SigLIP": encoder,
                "SigLIP + DINOv2": FuseEncoders(towers=(encoder, dinov2)),
                "patch projection": PatchProjection(
                    image_size=ENCODER.image_size,
                    patch_size=ENCODER.patch_size,
                    hidden_size=DECODER.hidden_size,
                ),
            },
            captions=captions,
            text_sources=text_mixture or (("web", 1.0),),
            instruct_source="talks",
            image_text_tokens=few(2_100_000, 10_000),
            rewarm=WarmupCosine(peak_rate=1e-3, end_rate=END_RATE, warmup_fraction=0.05),
            rows=image_rows,
            finetune_rows=talk_rows,
            optimizer=AdamW(),
            finetune_rate=FINETUNE_RATE,
            asked=ASKED,
            seeds=(7, 365, 124),
            by="sequences" if rows == "paper" else "tokens",
            max_epochs=6,
            notes=(
                "Pocket scale: a generated world and models of some 200,000 parameters. It shows "
                "how the study works and which way its curves run there; it says nothing about the "
                "paper's models.",
            ),
        )

    pictures = CaptionSet("pictures")
    main = scale(world(), {DATACOMP_DR: pictures})
    captioned = scale(
        world(few(_ALT_TEXTS, 400)), {DATACOMP_DR: pictures, "DataComp": CaptionSet("alt_texts")}
    )
    several = scale(world(pages=few(_PAGES, 200), albums=few(_ALBUMS, 40)), {DATACOMP_DR: pictures})
    asked = several.asked.model_copy(update={"visual_tasks": (*VISUAL_TASKS, *SEVERAL_TASKS)})
    several = replace(several, interleaved="pages", talks=("albums",), most_pictures=4, asked=asked)
    return replace(main, others={"captions": captioned, "interleaved": several})


# What the generated world holds at its full size, as prepared.
_POCKET_EXPECTED = expected_sources(
    ("web", "text", 30_000, 0, 2_164_910, 2_134_910),
    ("pictures", "caption", 20_000, 20_000, 226_584, 206_584),
    ("talks", "instruct", _CONVERSATIONS, _CONVERSATIONS, 84_215, 18_502),
)
_SEVERAL_EXPECTED = expected_sources(
    ("pages", "interleaved", _PAGES, 34_536, 384_699, 350_163),
    ("albums", "instruct", _ALBUMS, 3_936, 50_716, 7_249),
)
