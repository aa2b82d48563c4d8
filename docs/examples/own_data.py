"""Your own text, captions and conversations: when should a model of your own first see images?

`data` is a world (docs/data.md) with text/<name>, captions/<name>, instruct/<name>, bench/ and
world.json. A tokenizer and a small encoder are trained on it, so that nothing else is needed.

    midstream plan docs/examples/own_data.py:study --set data=DIR
    midstream run  docs/examples/own_data.py:study --set data=DIR
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

from midstream.config import Evaluation, PublicFolder, TrainedTokenizer
from midstream.core.identity import world_fingerprint
from midstream.core.storage import read_json
from midstream.recipes import pocket
from midstream.recipes.lines import CaptionSet
from midstream.recipes.scales import DATACOMP_DR, Model, find_scale, line, text_baselines
from midstream.study.axes import with_field
from midstream.study.stages import Prepare
from midstream.study.studies import Figure, Study

VOCAB_SIZE = 8_000
# Captions and conversations here are longer than the pocket world's.
ROW_LENGTH = 512


def study(
    data: str,
    text_tokens: int = 50_000_000,
    image_text_tokens: int = 5_000_000,
    completions: tuple[float, ...] = (0.0, 0.4, 0.8, 1.0),
    shares: tuple[float, ...] = (0.1, 0.3),
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 2,
    encoder_steps: int = 700,
    vocab_size: int = VOCAB_SIZE,
    limit: int = 0,
) -> Study:
    """Start x share of captions x seed, on the sources of one folder."""
    root = Path(data).resolve()
    text, captions, talks = (
        next(path.name for path in sorted((root / kind).iterdir()) if path.is_dir())
        for kind in ("text", "captions", "instruct")
    )
    prepared = Prepare(
        world=PublicFolder(root=root, fingerprint=world_fingerprint(root)),
        tokenizer=TrainedTokenizer(vocab_size=vocab_size),
    )
    decoder = pocket.DECODER.model_copy(update={"vocab_size": vocab_size})
    tasks = read_json(root / "world.json")
    encoder = pocket.encoder_stage(prepared, num_steps=encoder_steps)
    encoder = encoder.model_copy(
        update={"training": encoder.training.model_copy(update={"source": captions})}
    )
    run = pocket.text_stage(prepared, total_tokens=text_tokens, source=text)
    rows = pocket.IMAGE_ROWS.model_copy(update={"row_length": ROW_LENGTH})
    # A scale is a value: the pocket's, but for what is yours.
    mine = replace(
        find_scale("pocket"),
        name="mine",
        data=prepared,
        decoder=decoder,
        text=run.model_copy(update={"decoder": decoder}),
        encoders={"SigLIP": encoder},
        captions={DATACOMP_DR: CaptionSet(captions)},
        text_sources=((text, 1.0),),
        instruct_source=talks,
        image_text_tokens=image_text_tokens,
        rows=rows,
        finetune_rows=rows,
        asked=Evaluation(
            visual_tasks=tuple(tasks["visual_tasks"]),
            text_tasks=tuple(tasks["text_tasks"]),
            limit=limit or None,
        ),
    )
    lines = [
        line(
            mine,
            Model(completion=completion, captions=share, epochs=epochs, seed=seed),
            text_completion=100 * completion,
            image_share=100 * share,
        )
        for completion, share, seed in product(completions, shares, seeds)
    ]
    # Anything else that differs from the pocket's is a field of some stage.
    lines = [
        one.model_copy(
            update={"result": with_field(one.result, "continue.training.budget.max_epochs", 8)}
        )
        for one in lines
    ]
    return Study(
        name="own_data.when_images_arrive",
        question="After what share of our text training should our model first see images?",
        lines=tuple(lines),
        figure=Figure(
            x="text_completion",
            x_label="text training done before the first image (%)",
            by="image_share",
            hollow=(0.0, 100.0),
        ),
        baselines=text_baselines(mine, (1.0,)),
    )
