"""The three stages on small real data (`docs/real-data.md`): novels, photographs, questions."""

from collections.abc import Sequence
from pathlib import Path

from midstream.config import (
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Evaluation,
    Mixture,
    Rows,
    Share,
    SmallReal,
    TokenizerFile,
    Training,
    WarmupCosine,
)
from midstream.core.identity import folder_fingerprint
from midstream.recipes.lines import END_RATE, arrival_of
from midstream.study.stages import Prepare, Pretrain, TrainEncoder
from midstream.study.studies import Study

TOKENIZER = "gpt_neox_tokenizer/20B_tokenizer.json"
TEXT_SHARES = {"novels": 0.6, "wikitext2": 0.1, "web_wiki": 0.3}
CAPTION_SHARES = {"flickr8k": 0.8, "emoji": 0.2}
INSTRUCT_SHARES = {"vqa_easy": 0.45, "daquar": 0.2, "flickr_match": 0.35}
ROWS = Rows(row_length=256, batch_rows=2, layout="filled")
ENCODER = EncoderConfig(
    image_size=64, patch_size=16, hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512
)
VISUAL_TASKS = ("vqa_easy", "daquar", "flickr_match")
TEXT_TASKS = ("arc_easy", "piqa", "copa")
# DAQUAR's longest answer, several things joined by commas, has 23 tokens; most have one.
MAX_NEW_TOKENS = 24
NOTE = (
    "Chance of vqa_easy and daquar is the score of answering without the picture, from the "
    "training answers to like questions."
)


def when_images_arrive(
    data: str = "../shared/data",
    completions: Sequence[float] = (0.0, 0.8, 1.0),
    seeds: Sequence[int] = (0,),
    image_share: float = 0.5,
    text_tokens: int = 200_000,
    continue_tokens: int = 80_000,
    finetune_tokens: int = 1_000_000,
    max_epochs: int = 4,
    text_rate: float = 2e-3,
    rewarm_rate: float = 1e-3,
    finetune_rate: float = 1e-3,
    hidden_size: int = 128,
    num_layers: int = 2,
    encoder_steps: int = 500,
    num_questions: int = 400,
    limit: int = 200,
) -> Study:
    """Figure 4 of the paper on real data: how much text before the first image?

    `data` is the folder of `docs/real-data.md`; its bytes are read for their fingerprint. The
    seed draws the order of captions and conversations, and the projector. Raises
    FileNotFoundError for a missing folder or tokenizer.
    """
    world = _prepare(Path(data).resolve(), num_questions)
    decoder = DecoderConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 64,
        vocab_size=50432,
    )
    text = Pretrain(
        data=world,
        decoder=decoder,
        milestones=tuple(sorted({*completions, 1.0} - {0.0})),
        training=Training(
            budget=_mixture(text_tokens, max_epochs, (TEXT_SHARES, 1.0)),
            rows=ROWS.model_copy(update={"layout": "joined"}),
            schedule=WarmupCosine(peak_rate=text_rate, end_rate=END_RATE, warmup_fraction=0.05),
        ),
    )
    encoder = TrainEncoder(
        data=world,
        encoder=ENCODER,
        training=ContrastiveTraining(
            source="flickr8k",
            text_hidden_size=ENCODER.hidden_size,
            text_num_layers=2,
            batch_images=64,
            num_steps=encoder_steps,
            schedule=WarmupCosine(peak_rate=1e-3, end_rate=1e-5, warmup_fraction=0.1),
        ),
    )
    shares = (CAPTION_SHARES, image_share), (TEXT_SHARES, 1.0 - image_share)
    fields = arrival_of(
        text,
        encoder,
        completions,
        seeds,
        pictures=_mixture(continue_tokens, max_epochs, *shares),
        talks=_mixture(finetune_tokens, max_epochs, (INSTRUCT_SHARES, 1.0)),
        rows=ROWS,
        rewarm_rate=rewarm_rate,
        finetune_rate=finetune_rate,
        asked=Evaluation(
            visual_tasks=VISUAL_TASKS,
            text_tasks=TEXT_TASKS,
            limit=limit,
            max_new_tokens=MAX_NEW_TOKENS,
        ),
    )
    return Study(name="real_small.when_images_arrive", notes=(NOTE,), **fields)


def _prepare(root: Path, num_questions: int) -> Prepare:
    path = root / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {path} does not exist; give the folder of docs/real-data.md as `data`"
        )
    return Prepare(
        world=SmallReal(
            root=root,
            fingerprint=folder_fingerprint(root, SmallReal.FILES),
            num_questions=num_questions,
        ),
        tokenizer=TokenizerFile.read(path),
    )


def _mixture(tokens: int, max_epochs: int, *groups: tuple[dict[str, float], float]) -> Mixture:
    """A budget of groups of sources, each with its share of the whole; empty ones are left out."""
    shares = tuple(
        Share(source=name, share=part * share)
        for parts, share in groups
        if share
        for name, part in parts.items()
    )
    return Mixture(total_tokens=tokens, shares=shares, max_epochs=max_epochs)
