"""What a study of the paper is made of at each size: models, data, budgets, rates.

`pocket` is generated and runs in minutes. The others are the paper's: OpenLM decoders, SigLIP and
DINOv2 as public, DCLM text, four caption sets, LLaVA's conversations. Their folders are named once,
by `inputs`; without it a study can be planned and priced, and says so when it is to run:

    INPUTS/data/            a world (docs/data.md): text/dclm, captions/{datacompdr,datacomp,cc12m,
                            shutterstock}, instruct/llava, bench/, tokenizer.json
    INPUTS/encoders/        siglip/ and dinov2/, folders of `midstream import`
    INPUTS/checkpoints/     20/, 40/, 60/, 80/, 100/: the text run's checkpoints, imported

K, I and U stand for known, inferred and unknown: whether a number is the paper's (or its records'),
follows from them, or is our choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from midstream.config import (
    DECODERS,
    AdamW,
    DecoderConfig,
    EncoderConfig,
    Evaluation,
    ExpectedSource,
    FusedEncoder,
    Mixture,
    PatchProjection,
    PocketWorld,
    PublicFolder,
    Rows,
    Share,
    TokenizerFile,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.identity import file_sha256, world_fingerprint
from midstream.recipes import pocket
from midstream.recipes.line import END_RATE
from midstream.study.imported import as_imported
from midstream.study.stage import (
    PLANNED,
    Continue,
    ContinueFrom,
    EncoderStage,
    FromScratch,
    FuseEncoders,
    Imported,
    LoadDecoder,
    LoadEncoder,
    Prepare,
    Pretrain,
)

Encoder = EncoderStage | PatchProjection
SIZES = ("pocket", *(size for size in DECODERS if size != "7b"))
COMPLETIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
DATACOMP_DR = "DataComp-DR"


@dataclass(frozen=True)
class Scale:
    """One size of the whole study.

    `text` is the text run, or the imported checkpoints along one by their completion. `captions`
    maps the paper's names of caption sets to sources, `encoders` its names of encoders.
    `image_text_seed` fixes the image-text stage where repetitions differ in fine-tuning alone, as
    the paper's do; None: the whole line has the repetition's seed.
    """

    name: str
    decoder: DecoderConfig
    data: Prepare
    text: Pretrain | Mapping[float, LoadDecoder]
    encoders: Mapping[str, Encoder]
    captions: Mapping[str, str]
    text_source: str
    instruct_source: str
    image_text_tokens: int
    rewarm: WarmupCosine
    rows: Rows
    finetune_rows: Rows
    optimizer: AdamW
    finetune_rate: float
    asked: Evaluation
    seeds: tuple[int, ...] = (7,)
    image_text_seed: int | None = None
    sampling: str = "permutation"
    max_epochs: int = 1
    others: Mapping[str, "Scale"] = field(default_factory=dict)

    def start(self, completion: float) -> FromScratch | ContinueFrom:
        """The initialiser at 0, else the text run at that share of its tokens."""
        if not completion:
            return FromScratch()
        return ContinueFrom(**self.text_at(completion))

    def text_at(self, completion: float) -> dict[str, Pretrain | LoadDecoder | float]:
        """The stage whose weights stand at `completion`, and where in it, for `ContinueFrom`."""
        if isinstance(self.text, Pretrain):
            return {"stage": self.text, "completion": completion}
        if completion not in self.text:
            known = ", ".join(f"{share:.0%}" for share in self.text)
            raise ValueError(
                f"scale {self.name} has checkpoints at {known}, none at {completion:.0%}; give "
                "text='trained' for a text run of your own"
            )
        return {"stage": self.text[completion], "completion": 1.0}


def find_scale(name: str, inputs: str = "", text: str = "", shrink: float = 1.0) -> Scale:
    """The scale of that name, over the folder `inputs` where one is given.

    `text`: "trained" runs the text stage here, "given" imports its checkpoints; by default
    trained, but at 1b, whose text run is public and costs 4.3T tokens (paper, 2.1.1). `shrink`
    multiplies the pocket scale's budgets, for tests and timings. Raises ValueError for a name that
    is none, FileNotFoundError for what `inputs` lacks.
    """
    if name not in SIZES:
        raise ValueError(f"no scale {name!r}; there are {', '.join(SIZES)}")
    if text not in ("", "given", "trained"):
        raise ValueError(f"text is 'given' or 'trained', not {text!r}")
    if name != "pocket":
        if shrink != 1.0:
            raise ValueError(f"shrink is for the pocket scale, this is {name}")
        given = text == "given" or (not text and name == "1b")
        return _paper_scale(name, Path(inputs).resolve() if inputs else None, given)
    if inputs or text == "given":
        raise ValueError("the pocket scale is generated and trains its own text; see own_model")
    return _pocket_scale(shrink)


# ----------------------------------------------------------------------------------- the pocket

# Of the pocket world: four epochs of these are what one epoch of the demo's is.
_CONVERSATIONS = 2_500
_ALT_TEXTS = 6_000


def _pocket_scale(shrink: float) -> Scale:
    """Our choice throughout (U): what two cores do in minutes, at the paper's shares."""

    def few(number: int, least: int) -> int:
        return max(least, round(number * shrink))

    def world(alt_texts: int) -> Prepare:
        return Prepare(
            world=PocketWorld(
                num_documents=few(14_000, 2_000),
                num_captions=few(6_000, 300),
                num_alt_texts=alt_texts,
                num_conversations=few(_CONVERSATIONS, 100),
                num_questions=few(200, 20),
                num_text_items=few(200, 20),
            ),
            tokenizer=TrainedTokenizer(vocab_size=pocket.VOCAB_SIZE),
            expected=_POCKET_EXPECTED if shrink == 1.0 and not alt_texts else (),
        )

    def scale(data: Prepare, captions: dict[str, str]) -> Scale:
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
            text_source="web",
            instruct_source="talks",
            image_text_tokens=few(200_000, 10_000),
            rewarm=WarmupCosine(peak_rate=1e-3, end_rate=END_RATE, warmup_fraction=0.05),
            rows=pocket.IMAGE_ROWS,
            finetune_rows=pocket.IMAGE_ROWS,
            optimizer=AdamW(),
            finetune_rate=1e-3,
            asked=pocket.ASKED,
            seeds=(7, 365, 124),
            max_epochs=4,
        )

    main = scale(world(0), {DATACOMP_DR: "pictures"})
    captioned = scale(
        world(few(_ALT_TEXTS, 300)), {DATACOMP_DR: "pictures", "DataComp": "alt_texts"}
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

# ------------------------------------------------------------------------------- the paper's own

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


def _paper_scale(name: str, inputs: Path | None, given: bool) -> Scale:
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
    fingerprint, sha256 = PLANNED, PLANNED
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


__all__ = ["COMPLETIONS", "DATACOMP_DR", "SIZES", "Continue", "Encoder", "Scale", "find_scale"]
