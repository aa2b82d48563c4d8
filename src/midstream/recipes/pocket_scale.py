"""The pocket scale: generated, and run in minutes on two cores. Our choice throughout."""

from dataclasses import replace
from typing import Literal

from midstream.config import (
    AdamW,
    ExpectedSource,
    PatchProjection,
    PocketWorld,
    WarmupCosine,
)
from midstream.recipes import pocket
from midstream.recipes.line import END_RATE
from midstream.recipes.scale import DATACOMP_DR, CaptionSet, Scale, TextMixture
from midstream.study.stage import (
    FuseEncoders,
    Prepare,
)

# Of the pocket world: four epochs of these are what one epoch of the demo's is.
_CONVERSATIONS = 2_500
_ALT_TEXTS = 6_000


def pocket_scale(
    shrink: float = 1.0,
    rows: Literal["filled", "paper"] = "filled",
    text_mixture: TextMixture | None = None,
) -> Scale:
    """Our choice throughout (U): what two cores do in minutes, at the paper's shares."""
    image_rows = pocket.IMAGE_ROWS
    if rows == "paper":
        image_rows = image_rows.model_copy(update={"layout": "padded"})

    def few(number: int, least: int) -> int:
        return max(least, round(number * shrink))

    def world(alt_texts: int) -> Prepare:
        return Prepare(
            world=PocketWorld(
                num_documents=few(14_000, 2_000),
                num_captions=few(6_000, 400),
                num_alt_texts=alt_texts,
                num_conversations=few(_CONVERSATIONS, 100),
                num_questions=few(200, 20),
                num_text_items=few(200, 20),
            ),
            tokenizer=pocket.TOKENIZER,
            expected=_POCKET_EXPECTED if shrink == 1.0 and not alt_texts else (),
        )

    def scale(data: Prepare, captions: dict[str, CaptionSet]) -> Scale:
        encoder, dinov2 = (
            pocket.encoder_stage(data, num_steps=few(700, 20), encoder=tower)
            for tower in (pocket.ENCODER, pocket.DINOV2)
        )
        return Scale(
            name="pocket",
            decoder=pocket.DECODER,
            data=data,
            text=pocket.text_stage(data, total_tokens=few(1_200_000, 60_000)),
            encoders={
                "SigLIP": encoder,
                "SigLIP + DINOv2": FuseEncoders(towers=(encoder, dinov2)),
                "patch projection": PatchProjection(
                    image_size=pocket.ENCODER.image_size,
                    patch_size=pocket.ENCODER.patch_size,
                    hidden_size=pocket.DECODER.hidden_size,
                ),
            },
            captions=captions,
            text_sources=text_mixture or (("web", 1.0),),
            instruct_source="talks",
            image_text_tokens=few(200_000, 10_000),
            rewarm=WarmupCosine(peak_rate=1e-3, end_rate=END_RATE, warmup_fraction=0.05),
            rows=image_rows,
            finetune_rows=image_rows,
            optimizer=AdamW(),
            finetune_rate=1e-3,
            asked=pocket.ASKED,
            seeds=(7, 365, 124),
            by="sequences" if rows == "paper" else "tokens",
            max_epochs=4,
            notes=(
                "Pocket scale: a generated world and models of some 200,000 parameters. It shows "
                "how the study works and which way its curves run there; it says nothing about the "
                "paper's models.",
            ),
        )

    pictures = CaptionSet("pictures")
    main = scale(world(0), {DATACOMP_DR: pictures})
    captioned = scale(
        world(few(_ALT_TEXTS, 400)),
        {DATACOMP_DR: pictures, "DataComp": CaptionSet("alt_texts")},
    )
    return replace(main, others={"captions": captioned})


# What the generated world holds at its full size, as prepared.
_POCKET_EXPECTED = (
    ExpectedSource(
        name="web",
        kind="text",
        num_examples=14_000,
        num_tokens=1_466_404,
        num_targets=1_452_404,
    ),
    ExpectedSource(
        name="pictures",
        kind="caption",
        num_examples=6_000,
        num_images=6_000,
        num_tokens=178_578,
        num_targets=172_578,
    ),
    ExpectedSource(
        name="talks",
        kind="instruct",
        num_examples=_CONVERSATIONS,
        num_images=_CONVERSATIONS,
        num_tokens=208_260,
        num_targets=40_512,
    ),
)
