"""Table 1's recipes as values: how others train a model that sees (docs/published.md).

What is trained: K read in the named source, G generally known and not read again, I inferred from
that, U our choice.
"""

from dataclasses import dataclass, replace
from typing import Literal

from midstream.config import Attention, LoRA

MULTITASK = "captions and conversations, half each, stand in for its mixture of tasks"
# Of the rate of the rest where a recipe trains the encoder and its own is not known (U).
A_TENTH = 0.1
Rates = Literal["rewarm", "plateau", "continue"]


@dataclass(frozen=True)
class ImageText:
    """An image-text stage: shares of its tokens, what it trains beside the projector, its rate.

    `encoder_rate` is the encoder's over that of the rest; None: frozen. `tokens` is its share of
    the scale's image-text tokens, `side` that of its pictures over those of the stage before, or
    over the encoder's own. Schedules: warmed up again and down to the end (rewarm), or to a plateau
    (plateau), or on from where the stage before ended (continue).
    """

    captions: float
    instruct: float = 0.0
    text: float = 0.0
    interleaved: float = 0.0
    encoder_rate: float | None = None
    trains_decoder: bool = True
    schedule: Rates = "rewarm"
    tokens: float = 1.0
    side: float = 1.0


@dataclass(frozen=True)
class Connector:
    """What connects the encoder: layers over all patches (mlp, linear), learned queries that look
    at them (resampler), or the means of windows (pool); the last two leave `left` of the patches.

    `gated_every`: what is left goes into gated blocks before every so many blocks of the decoder,
    not into the row.
    """

    kind: Literal["mlp", "linear", "resampler", "pool"] = "mlp"
    left: float = 1.0
    num_layers: int = 1
    gated_every: int | None = None


@dataclass(frozen=True)
class Instruct:
    """Fine-tuning on conversations, on pictures as large as those of the stage before; the schedule
    is warmed up again, or goes on."""

    encoder_rate: float | None = None
    schedule: Literal["rewarm", "continue"] = "rewarm"


@dataclass(frozen=True)
class Recipe:
    """A line of Table 1. `completion` of the text run comes first; no `instruct`: no fine-tuning.

    `lora`: adapters of the language model that learn in its place, in all of these stages.
    """

    name: str
    source: str
    image_text: tuple[ImageText, ...]
    instruct: Instruct | None
    completion: float = 1.0
    attention: Attention = "segments"
    connector: Connector = Connector()
    encoder: str = "SigLIP"
    lora: LoRA | None = None
    notes: tuple[str, ...] = ()


def _mm1(image: int, text: int) -> Recipe:
    # Everything is trained in both stages (G). Captions and interleaved documents are equal shares
    # (K: 45:45:10, reports on arXiv 2403.09611); 144 tokens a picture (K), of 729 patches here.
    seen, rest = image / (image + text) / 2, text / (image + text)
    return Recipe(
        name=f"MM1 {image}:{text}",
        source="McKinzie et al., 2024, arXiv 2403.09611",
        image_text=(ImageText(captions=seen, interleaved=seen, text=rest, encoder_rate=A_TENTH),),
        instruct=Instruct(encoder_rate=A_TENTH),
        connector=Connector("pool", left=144 / 729),
        notes=(
            "means of windows stand in for its convolutions and pooling, and are left out where a "
            "picture has too few patches for them",
        ),
    )


WHOLE_WEIGHTS = "all weights are trained where it trains adapters of low rank"


def with_adapters(recipe: Recipe, rank: int) -> Recipe:
    """A recipe whose language model learns by adapters; their scale is alpha = rank (U)."""
    notes = tuple(note for note in recipe.notes if note != WHOLE_WEIGHTS)
    more = "all of the encoder's weights are trained where it trains adapters of low rank"
    return replace(recipe, lora=LoRA(rank=rank, alpha=rank), notes=(*notes, more))


# Tokens, schedule and pictures of its three stages.
_PALIGEMMA: tuple[tuple[float, Rates, float], ...] = (
    (0.76, "plateau", 1.0),
    (0.15, "continue", 2.0),
    (0.09, "continue", 2.0),
)
# Table 1 in its order, MM1 once for each of its ratios of image-text to text.
RECIPES = (
    # xGen-MM. Encoder frozen, sampler and language model trained (G). A perceiver's resampler (K:
    # reports on arXiv 2408.08872) of 128 latents of 729 patches, six layers (G). Halves of captions
    # and interleaved documents are U.
    Recipe(
        name="BLIP3",
        source="Xue et al., 2024, arXiv 2408.08872",
        image_text=(ImageText(captions=0.5, interleaved=0.5),),
        instruct=Instruct(),
        connector=Connector("resampler", left=128 / 729, num_layers=6),
        notes=("pictures are not cut into tiles in fine-tuning",),
    ),
    # Encoder and language model frozen, what connects them trained (K: pages on arXiv 2204.14198);
    # no fine-tuning (table). A resampler of 64 latents and six layers (K: the same); gated blocks
    # look at the latest picture alone (K). Halves of captions and interleaved documents are U.
    Recipe(
        name="Flamingo",
        source="Alayrac et al., 2022, arXiv 2204.14198",
        image_text=(ImageText(captions=0.5, interleaved=0.5, trains_decoder=False),),
        instruct=None,
        # Before every seventh block in the largest model, every one in the smallest (K: the same).
        connector=Connector("resampler", left=64 / 729, num_layers=6, gated_every=1),
        notes=("it has no videos, and one rate for documents and captions alike",),
    ),
    # IDEFICS2, the one over Mistral-7B-v0.1. New parts trained whole, encoder and language model by
    # LoRA (K: its authors' post at its release); the same in fine-tuning (G). 64 tokens a picture
    # (K: the same) by a resampler of three layers (G). Interleaved documents (table), beside
    # captions (K); that they are seven tenths is U.
    Recipe(
        name="IDEFICS",
        source="Laurençon et al., 2024, arXiv 2405.02246",
        image_text=(ImageText(captions=0.3, interleaved=0.7, encoder_rate=A_TENTH),),
        instruct=Instruct(encoder_rate=A_TENTH),
        connector=Connector("resampler", left=64 / 729, num_layers=3),
        notes=("its layers before the resampler are left out", WHOLE_WEIGHTS),
    ),
    *(_mm1(*ratio) for ratio in ((100, 0), (91, 9), (86, 14), (66, 33))),
    # Two towers; first what connects them alone, then joint training with the towers frozen, in
    # fine-tuning all but one tower (K: reports on arXiv 2403.05525). The first stage's tokens are
    # U: it is short, since more of it did not help them (K).
    Recipe(
        name="DeepSeek-VL",
        source="Lu et al., 2024, arXiv 2403.05525",
        image_text=(
            ImageText(captions=1.0, trains_decoder=False, tokens=0.1),
            ImageText(captions=0.15, instruct=0.15, text=0.7, tokens=0.9),
        ),
        instruct=Instruct(encoder_rate=A_TENTH),
        encoder="SigLIP + DINOv2",
        notes=(
            MULTITASK,
            "DINOv2 stands in for SAM, and sees pictures as large as SigLIP's where SAM has larger "
            "ones",
            "one projector stands in for its adaptor of layers for each tower and for both",
            "fine-tuning trains both towers where it keeps SAM as it is",
        ),
    ),
    # First the encoder and the adapter, then everything on pictures of twice the side (224, then
    # 448 pixels), and in fine-tuning all but the encoder (K: reports on arXiv 2308.12966). Its
    # encoder's rate falls by 5 % a layer from the last down (G), over its 48 layers to .38 of it on
    # average (I). The tokens of its two stages are U: half each.
    Recipe(
        name="Qwen-VL",
        source="Bai et al., 2023, arXiv 2308.12966",
        image_text=(
            ImageText(captions=1.0, encoder_rate=0.38, trains_decoder=False, tokens=0.5),
            ImageText(captions=0.5, instruct=0.5, encoder_rate=0.38, tokens=0.5, side=2.0),
        ),
        instruct=Instruct(),
        # One layer of cross-attention with 256 queries (K: the same), of 1,024 patches of 448
        # pixels and as many of 256 before.
        connector=Connector("resampler", left=1.0, num_layers=1),
        notes=(
            MULTITASK,
            "its queries look at each other as well, without places of their own",
            "one rate for the encoder stands in for one a layer",
        ),
    ),
    # Nothing frozen, a linear projector, full attention among picture and prompt; a billion
    # examples of 224 pixels, then 50 million of 448 and 10 million of 896 (K: reports on arXiv
    # 2407.07726). A picture has 256, 1,024 or 4,096 tokens (K); with 128, 512 and 512 of text (G)
    # the stages have .76, .15 and .09 of all tokens (I). One rate for all (G). Where its rates end
    # is U.
    Recipe(
        name="PaliGemma",
        source="Beyer et al., 2024, arXiv 2407.07726",
        image_text=tuple(
            ImageText(
                captions=0.5, instruct=0.5, encoder_rate=1.0, tokens=tokens, schedule=how, side=side
            )
            for tokens, how, side in _PALIGEMMA
        ),
        instruct=Instruct(encoder_rate=1.0, schedule="continue"),
        attention="prefix",
        connector=Connector("linear"),
        notes=(MULTITASK, "the encoder's rate is not warmed up more slowly than that of the rest"),
    ),
    # One stage: conversations, the encoder frozen (K: recipe of its own code).
    Recipe(
        name="Prismatic",
        source="Karamcheti et al., 2024, arXiv 2402.07865",
        image_text=(),
        instruct=Instruct(),
        notes=(
            "the projector is four times as wide between its layers as its own",
            "without an image-text stage it sees fewer tokens than the others",
        ),
    ),
    # The paper's own: 80 % of the text run, then captions among text, the rate going on.
    Recipe(
        name="Ours",
        source="the paper, 10 % images",
        image_text=(ImageText(captions=0.1, text=0.9, schedule="continue"),),
        instruct=Instruct(),
        completion=0.8,
        notes=("the projector is that of its text; its run names say one of three layers",),
    ),
)
