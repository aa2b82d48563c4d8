"""The recipes of the paper's Table 1 as values: stages, what they train, on what, how fast.

Stages, mixtures and schedules are the table's. What each stage trains it does not say; that is
tagged: K read in the source that is named, G generally known of the paper and not read again, U our
choice. The picture's way into the language model is Midstream's projector in all of them, whatever
their own is, and so is the encoder; what a recipe cannot have here is said by its `notes`, and
stands in the study's report.
"""

from dataclasses import dataclass
from typing import Literal

from midstream.config import Attention

ONE_PICTURE = "captions with their one picture stand in for text with pictures among it"
MULTITASK = "captions and conversations, half each, stand in for its mixture of tasks"


@dataclass(frozen=True)
class ImageText:
    """An image-text stage: shares of its tokens, what it trains beside the projector, its rate.

    `tokens` is its share of the scale's image-text tokens. Schedules: warmed up again and down to
    the end (rewarm), or to a plateau (plateau), or on from where the stage before ended (continue).
    """

    captions: float
    instruct: float = 0.0
    text: float = 0.0
    trains_encoder: bool = False
    trains_decoder: bool = True
    schedule: Literal["rewarm", "plateau", "continue"] = "rewarm"
    tokens: float = 1.0


@dataclass(frozen=True)
class Instruct:
    """Fine-tuning on conversations; the schedule is warmed up again, or goes on."""

    trains_encoder: bool = False
    schedule: Literal["rewarm", "continue"] = "rewarm"


@dataclass(frozen=True)
class Recipe:
    """A line of Table 1. `completion` of the text run comes first; None: no fine-tuning."""

    name: str
    source: str
    image_text: tuple[ImageText, ...]
    instruct: Instruct | None
    completion: float = 1.0
    attention: Attention = "segments"
    linear_projector: bool = False
    notes: tuple[str, ...] = ()


def blip3() -> Recipe:
    """BLIP3 (xGen-MM). Encoder frozen, sampler and language model trained (G)."""
    return Recipe(
        name="BLIP3",
        source="Xue et al., 2024, arXiv 2408.08872",
        image_text=(ImageText(captions=1.0),),
        instruct=Instruct(),
        notes=(ONE_PICTURE, "the projector stands in for its token sampler"),
    )


def flamingo() -> Recipe:
    """Flamingo. Encoder and language model frozen, what connects them trained (K: pages on
    arXiv 2204.14198); no fine-tuning (table).
    """
    return Recipe(
        name="Flamingo",
        source="Alayrac et al., 2022, arXiv 2204.14198",
        image_text=(ImageText(captions=1.0, trains_decoder=False),),
        instruct=None,
        notes=(
            ONE_PICTURE,
            "the projector stands in for its resampler and the layers that it adds among those of "
            "the language model",
        ),
    )


def idefics() -> Recipe:
    """IDEFICS2, the one over Mistral-7B-v0.1. New parts trained whole, encoder and language model
    by LoRA (K: its authors' post at its release); the same in fine-tuning (G).
    """
    return Recipe(
        name="IDEFICS",
        source="Laurençon et al., 2024, arXiv 2405.02246",
        image_text=(ImageText(captions=1.0, trains_encoder=True),),
        instruct=Instruct(trains_encoder=True),
        notes=(
            ONE_PICTURE,
            "the projector stands in for its resampler and the layers before it",
            "all weights are trained where it trains adapters of low rank",
        ),
    )


def mm1(image: float | int = 91, text: float | int = 9) -> Recipe:
    """MM1 at one of its ratios of image-text to text, normalised. Everything trained in both stages
    (G).
    """
    return Recipe(
        name=f"MM1 {image:g}:{text:g}",
        source="McKinzie et al., 2024, arXiv 2403.09611",
        image_text=(
            ImageText(
                captions=image / (image + text), text=text / (image + text), trains_encoder=True
            ),
        ),
        instruct=Instruct(trains_encoder=True),
        notes=(ONE_PICTURE, "the projector stands in for its convolutions and pooling"),
    )


# Image-text to text, as Table 1 prints them.
MM1_RATIOS = ((100, 0), (91, 9), (86, 14), (66, 33))


def deepseek_vl() -> Recipe:
    """DeepSeek-VL. Joint training with the encoder frozen (K: a report on arXiv 2403.05525); the
    encoder trained in fine-tuning (G, of its two towers the one).
    """
    return Recipe(
        name="DeepSeek-VL",
        source="Lu et al., 2024, arXiv 2403.05525",
        image_text=(ImageText(captions=0.15, instruct=0.15, text=0.7),),
        instruct=Instruct(trains_encoder=True),
        notes=(
            MULTITASK,
            "one encoder and the projector stand in for its two towers and their adaptor",
            "the first training of its adaptor alone is left out, as in the table",
        ),
    )


def qwen_vl() -> Recipe:
    """Qwen-VL. First the encoder and the adapter, then everything, and in fine-tuning all but the
    encoder (K: reports on arXiv 2308.12966). The tokens of its two stages are U: half each.
    """
    return Recipe(
        name="Qwen-VL",
        source="Bai et al., 2023, arXiv 2308.12966",
        image_text=(
            ImageText(captions=1.0, trains_encoder=True, trains_decoder=False, tokens=0.5),
            ImageText(captions=0.5, instruct=0.5, trains_encoder=True, tokens=0.5),
        ),
        instruct=Instruct(),
        notes=(
            MULTITASK,
            "the projector stands in for its layer of cross-attention with learned queries",
            "pictures keep their size where its second stage has larger ones",
        ),
    )


def paligemma() -> Recipe:
    """PaliGemma. Nothing frozen, a linear projector, full attention among picture and prompt (K:
    reports on arXiv 2407.07726). Where its rates end, and its tokens by stage, are U.
    """
    multitask = ImageText(captions=0.5, instruct=0.5, trains_encoder=True, tokens=0.5)
    return Recipe(
        name="PaliGemma",
        source="Beyer et al., 2024, arXiv 2407.07726",
        image_text=(
            _with(multitask, schedule="plateau"),
            _with(multitask, schedule="continue"),
        ),
        instruct=Instruct(trains_encoder=True, schedule="continue"),
        attention="prefix",
        linear_projector=True,
        notes=(
            MULTITASK,
            "pictures keep their size where its second stage has larger ones",
        ),
    )


def prismatic() -> Recipe:
    """Prismatic. One stage: conversations, the encoder frozen (K: recipe of its own code)."""
    return Recipe(
        name="Prismatic",
        source="Karamcheti et al., 2024, arXiv 2402.07865",
        image_text=(),
        instruct=Instruct(),
        notes=(
            "the projector is four times as wide between its layers as its own",
            "without an image-text stage it sees fewer tokens than the others",
        ),
    )


def ours() -> Recipe:
    """The paper's own: 80 % of the text run, then captions among text, the rate going on."""
    return Recipe(
        name="Ours",
        source="the paper, 10 % images",
        image_text=(ImageText(captions=0.1, text=0.9, schedule="continue"),),
        instruct=Instruct(),
        completion=0.8,
        notes=("the projector is that of its text; its run names say one of three layers",),
    )


def table_of_recipes() -> tuple[Recipe, ...]:
    """Table 1 in its order, MM1 once for each of its ratios."""
    return (
        blip3(),
        flamingo(),
        idefics(),
        *(mm1(*ratio) for ratio in MM1_RATIOS),
        deepseek_vl(),
        qwen_vl(),
        paligemma(),
        prismatic(),
        ours(),
    )


def _with(stage: ImageText, *, schedule: Literal["plateau", "continue"]) -> ImageText:
    return ImageText(**{**stage.__dict__, "schedule": schedule})
