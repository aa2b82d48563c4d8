"""The sizes of the paper, with its settings.

K, I and U stand for known, inferred and unknown: whether a number is the paper's (or its records'),
follows from them, or is our choice.
"""

from pathlib import Path

from midstream.config import (
    DECODERS,
    AdamW,
    EncoderConfig,
    Evaluation,
    ExpectedSource,
    FusedEncoder,
    Mixture,
    PatchProjection,
    PublicFolder,
    Rows,
    Share,
    TokenizerFile,
    Training,
    WarmupCosine,
)
from midstream.identity import WorldFingerprint, file_sha256, world_fingerprint
from midstream.recipes.line import END_RATE
from midstream.recipes.scale import COMPLETIONS, DATACOMP_DR, Encoder, Scale
from midstream.study.imported import as_imported
from midstream.study.stage import (
    PLANNED,
    Imported,
    LoadDecoder,
    LoadEncoder,
    Prepare,
    Pretrain,
)

# K: OpenLM's batches of 512 sequences of 2,048 for text (Table 2, run records), 256 of 1,024 for
# image-text training (run names, paper 2.1.2).
_TEXT_ROWS = Rows(row_length=2048, batch_rows=512, layout="joined")
_IMAGE_ROWS = Rows(row_length=1024, batch_rows=256, layout="filled")
# K: 256 conversations a step; U: their length. Prismatic's default is 2,048 tokens at most; a
# filled row of that length holds two conversations with a picture.
_FINETUNE_ROWS = Rows(row_length=2048, batch_rows=128, layout="filled")
# K: text run of 1.4B and its peak; multiplier 150 (x 20) of 79M. I: the same for the other sizes.
_TEXT_TOKENS = {"1b": 4_319_385_600_000}
_TEXT_MULTIPLE, _IMAGE_TEXT_MULTIPLE = 3000, 20
# K: 20 x the parameters without qk gains.
_IMAGE_TEXT_TOKENS = {"1b": 28_795_904_000}
# K but for 11m: warm-up steps of a re-warmed image-text stage, at a peak of 3e-3 everywhere.
_REWARM_STEPS = {"11m": 100, "79m": 400, "154m": 1000, "411m": 2500, "1b": 5000}
_REWARM_PEAK = 3e-3
_TEXT_PEAK = {"1b": 1e-2}
_TEXT_DECAY = {"1b": 0.01}
_TEXT_WARMUP_STEPS = {"1b": 5000, "154m": 1000, "411m": 2500}
# K: rates of the records at 20, 40, 60 and 80 % of the 1.4B text run; its end.
_RATES_1B = dict(
    zip(
        COMPLETIONS,
        (
            0.009080349589287376,
            0.006499974971416897,
            0.0034466737184832607,
            0.0009788970261355868,
            END_RATE,
        ),
        strict=True,
    )
)
# K: Prismatic's siglip-vit-so400m-384px, second-to-last block; its DINOv2 partner at 384 pixels.
SIGLIP = EncoderConfig(
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    num_layers=27,
    num_heads=16,
    intermediate_size=4304,
)
DINOV2 = EncoderConfig(
    family="dinov2",
    image_size=384,
    position_size=518,
    patch_size=14,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=4096,
    num_registers=4,
    pixel_mean=(0.485, 0.456, 0.406),
    pixel_std=(0.229, 0.224, 0.225),
    hidden_act="gelu",
)
CAPTION_SETS = {
    "DataComp": "datacomp",
    DATACOMP_DR: "datacompdr",
    "CC12M": "cc12m",
    "Shutterstock": "shutterstock",
}
VISUAL_TASKS = ("vqav2", "gqa", "textvqa", "pope", "refcoco", "ocid_ref")
# The authors' scripts average these (recipe facts 8), Table 7 has BIG-bench CS for BoolQ.
TEXT_TASKS = (
    "agieval_sat_en",
    "arc_easy",
    "bigbench_conceptual_combinations_multiple_choice",
    "boolq",
    "copa",
    "hellaswag",
    "mathqa",
    "piqa",
    "pubmedqa",
)
# K: numbers of pictures (DataComp-1B and its DR, CC12M as on the hub, LLaVA's without text-only
# conversations) and of text tokens. U: caption length, 30 tokens with its separators; text of a
# conversation, the 295 positions that 729 patches leave of 1,024, 120 of them answers. Shutterstock
# is private: as many as CC12M.
_EXPECTED = (
    ExpectedSource(
        name="dclm",
        kind="text",
        num_examples=3_200_000_000,
        num_tokens=4_172_903_282_931,
        num_targets=4_172_903_282_931,
    ),
    *(
        ExpectedSource(
            name=name,
            kind="caption",
            num_examples=number,
            num_images=number,
            num_tokens=30 * number,
            num_targets=29 * number,
        )
        for name, number in (
            ("datacompdr", 1_280_000_000),
            ("datacomp", 1_280_000_000),
            ("cc12m", 10_970_000),
            ("shutterstock", 10_970_000),
        )
    ),
    ExpectedSource(
        name="llava",
        kind="instruct",
        num_examples=624_610,
        num_images=624_610,
        num_tokens=295 * 624_610,
        num_targets=120 * 624_610,
    ),
)


def paper_scale(name: str, inputs: Path | None, given: bool) -> Scale:
    decoder = DECODERS[name]
    data = _world(inputs)
    tokens = _IMAGE_TEXT_TOKENS.get(name, _IMAGE_TEXT_MULTIPLE * decoder.num_parameters)
    steps = tokens / (_IMAGE_ROWS.row_length * _IMAGE_ROWS.batch_rows)
    encoders: dict[str, Encoder] = {
        "SigLIP": LoadEncoder(towers=(_tower(inputs, "siglip"),), encoder=SIGLIP),
        "SigLIP + DINOv2": LoadEncoder(
            towers=(_tower(inputs, "siglip"), _tower(inputs, "dinov2")),
            encoder=FusedEncoder(towers=(SIGLIP, DINOV2)),
        ),
        "patch projection": PatchProjection(
            image_size=384, patch_size=14, hidden_size=decoder.hidden_size
        ),
    }
    return Scale(
        name=name,
        decoder=decoder,
        data=data,
        text=_checkpoints(name, data, inputs) if given else _text_run(name, data),
        encoders=encoders,
        captions=CAPTION_SETS,
        text_source="dclm",
        instruct_source="llava",
        image_text_tokens=tokens,
        rewarm=WarmupCosine(
            peak_rate=_REWARM_PEAK, end_rate=END_RATE, warmup_fraction=_REWARM_STEPS[name] / steps
        ),
        rows=_IMAGE_ROWS,
        finetune_rows=_FINETUNE_ROWS,
        # K: weight decay. I: z-loss, clipping, beta2, as in DCLM's 1b_1x_fast.json.
        optimizer=AdamW(weight_decay=0.033, z_loss=1e-4),
        finetune_rate=3e-4,
        asked=Evaluation(visual_tasks=VISUAL_TASKS, text_tasks=TEXT_TASKS, max_new_tokens=128),
        seeds=(7,),
        image_text_seed=124,
        sampling="replacement",
    )


def _world(inputs: Path | None) -> Prepare:
    root = Path("data") if inputs is None else inputs / "data"
    path = root / "tokenizer.json"
    fingerprint: WorldFingerprint | None = None
    sha256 = PLANNED
    if inputs is not None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; `inputs` is the folder of recipes/scales.py, its world "
                "has the tokenizer's file beside its sources"
            )
        fingerprint, sha256 = world_fingerprint(root), file_sha256(path)
    return Prepare(
        world=PublicFolder(root=root, fingerprint=fingerprint),
        tokenizer=TokenizerFile(path=path, sha256=sha256),
        expected=_EXPECTED,
    )


def _imported(inputs: Path | None, part: str, name: str) -> Imported:
    if inputs is None:
        return Imported(folder=Path(part) / name, content=f"{PLANNED} {part}/{name}")
    return as_imported(inputs / part / name)


def _tower(inputs: Path | None, name: str) -> Imported:
    # A study that does not use an encoder can be run without its folder.
    if inputs is not None and not (inputs / "encoders" / name).is_dir():
        return _imported(None, "encoders", name)
    return _imported(inputs, "encoders", name)


def _checkpoints(name: str, data: Prepare, inputs: Path | None) -> dict[float, LoadDecoder]:
    return {
        share: LoadDecoder(
            data=data,
            checkpoint=_imported(inputs, "checkpoints", f"{share * 100:.0f}"),
            decoder=DECODERS[name],
            planned_rate=_RATES_1B[share] if name == "1b" else None,
        )
        for share in COMPLETIONS
    }


def _text_run(name: str, data: Prepare) -> Pretrain:
    decoder = DECODERS[name]
    tokens = _TEXT_TOKENS.get(name, _TEXT_MULTIPLE * decoder.num_parameters)
    steps = tokens / (_TEXT_ROWS.row_length * _TEXT_ROWS.batch_rows)
    return Pretrain(
        data=data,
        decoder=decoder,
        milestones=COMPLETIONS,
        training=Training(
            budget=Mixture(
                total_tokens=tokens, shares=(Share(source="dclm", share=1.0),), max_epochs=2
            ),
            rows=_TEXT_ROWS,
            optimizer=AdamW(weight_decay=_TEXT_DECAY.get(name, 0.033)),
            schedule=WarmupCosine(
                peak_rate=_TEXT_PEAK.get(name, 3e-3),
                end_rate=END_RATE,
                warmup_fraction=_TEXT_WARMUP_STEPS.get(name, 400) / steps,
            ),
        ),
    )
