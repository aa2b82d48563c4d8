"""The paper's questions asked of your own checkpoint, encoder and data (`docs/import.md`)."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from midstream.config import (
    Attention,
    ContinuedCosine,
    EncoderConfig,
    Epochs,
    Evaluation,
    FeatureType,
    FusedEncoder,
    Mixture,
    PatchProjection,
    ProjectorConfig,
    PublicFolder,
    Rows,
    Share,
    TokenizerFile,
    Training,
    WarmupCosine,
)
from midstream.config.training import pool_of
from midstream.core.digests import is_hidden, is_note
from midstream.core.identity import (
    SECTIONS,
    listed_tasks,
    no_source,
    source_folders,
    world_fingerprint,
)
from midstream.recipes.lines import END_RATE, finetuned_line, finetuning, text_only
from midstream.study.imported import ImportRecord, as_imported, load_model, read_import
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    LoadDecoder,
    LoadEncoder,
    Prepare,
)
from midstream.study.studies import Figure, Line, Study


def image_shares(
    checkpoint: str,
    data: str,
    encoders: Sequence[str] = (),
    shares: Sequence[float] = (0.1,),
    seeds: Sequence[int] = (0,),
    continue_tokens: int = 28_800_000_000,
    max_epochs: int = 1,
    rewarm_rate: float = 0.0,
    finetune_rate: float = 3e-4,
    finetune_epochs: int = 2,
    encoder_rate_factor: float = 0.0,
    image_size: int = 0,
    patch_size: int = 14,
    resize: Literal["letterbox", "square", "crop"] = "letterbox",
    feature_layer: int = -2,
    final_norm: bool = False,
    feature_dtype: FeatureType = "float32",
    projector_layers: Literal[1, 2, 3] = 2,
    projector_hidden: Literal["encoder_4x", "decoder"] = "decoder",
    attention: Attention = "segments",
    row_length: int = 1024,
    batch_rows: int = 256,
    begin_of_text: str = "rule",
    max_new_tokens: int = 32,
    limit: int = 0,
    documents: float = 0.0,
) -> Study:
    """What share of images should an imported language model see, and what becomes of its text?

    `checkpoint` and each of `encoders` are folders of `midstream import` (several encoders are
    fused; none is a linear map of patches, trained along), `data` is a world (`docs/data.md`).
    Sources of a kind have even shares; of the images' share `documents` is interleaved documents.
    The image-text stage goes on at the checkpoint's rate, or warms up again to `rewarm_rate`. The
    encoder is frozen, or trained at `encoder_rate_factor` times the rate in both stages. Pictures
    are letterboxed, whatever the encoder's files say; 0 is its own `image_size`. `begin_of_text`
    begins each example: a token, "none", or the tokenizer's "rule". `limit` 0 asks all questions.
    Projector and features are such that the result exports as LLaVA to the last digit.
    """
    root, folder = Path(data).resolve(), Path(checkpoint).resolve()
    record = _checkpoint(folder, rewarm_rate)
    world = _prepare(root, folder, begin_of_text)
    text = LoadDecoder(data=world, checkpoint=as_imported(folder), decoder=record.config)
    looks = {"resize": resize, "feature_layer": feature_layer, "final_norm": final_norm}
    encoder: LoadEncoder | PatchProjection
    if encoders:
        encoder = _encoder(encoders, image_size, feature_dtype, looks)
    else:
        encoder = _patches(image_size, patch_size, record.config.hidden_size, resize)
    asked = _asked(root, limit, max_new_tokens)
    hidden = projector_hidden if projector_layers == 2 else "encoder_4x"
    before = {"as imported": Evaluate(of=text, evaluation=text_only(asked))}
    talks = Epochs(sources=_sources(root, "instruct"), epochs=finetune_epochs)
    lines = []
    for share, seed in product(shares, seeds):
        continued = Continue(
            data=world,
            encoder=encoder,
            decoder=record.config,
            projector=ProjectorConfig(num_layers=projector_layers, hidden=hidden),
            attention=attention,
            start=ContinueFrom(stage=text),
            training=Training(
                budget=_mixture(root, share, documents, continue_tokens, max_epochs),
                rows=Rows(row_length=row_length, batch_rows=batch_rows),
                schedule=_schedule(rewarm_rate),
                encoder_rate_factor=encoder_rate_factor or None,
                seed=seed,
            ),
        )
        line = finetuned_line(continued, talks, finetune_rate, asked, 1.0)
        axes = {"image_share": share * 100, "seed": seed}
        name = f"{share * 100:g}% images, seed {seed}"
        lines.append(line.model_copy(update={"name": name, "axes": axes}))
    return Study(
        name="own_model.image_shares",
        question="What share of images should this language model see?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label="images in the image-text stage (% of tokens)"),
        baselines=before if asked.text_tasks else {},
    )


def fine_tuning(
    model: str,
    data: str,
    seeds: Sequence[int] = (0,),
    finetune_rate: float = 2e-5,
    finetune_epochs: int = 1,
    encoder_rate_factor: float = 0.0,
    row_length: int = 2048,
    batch_rows: int = 64,
    max_new_tokens: int = 32,
    limit: int = 0,
) -> Study:
    """What does fine-tuning on your conversations make of an imported vision-language model?

    `model` is a folder of `midstream import --part model`, `data` a world (`docs/data.md`). All of
    it is trained but the encoder, which is trained at `encoder_rate_factor` times the rate where
    that is not 0. `limit` 0 asks all questions, of the model as imported too.
    """
    root, folder = Path(data).resolve(), Path(model).resolve()
    whole = load_model(folder, _prepare(root, folder, "rule"))
    asked = _asked(root, limit, max_new_tokens)
    lines = []
    for seed in seeds:
        training = finetuning(
            Epochs(sources=_sources(root, "instruct"), epochs=finetune_epochs),
            Rows(row_length=row_length, batch_rows=batch_rows),
            rate=finetune_rate,
            seed=seed,
            encoder_rate_factor=encoder_rate_factor or None,
        )
        result = Evaluate(of=Finetune(start=whole, training=training), evaluation=asked)
        lines.append(Line(name=f"seed {seed}", axes={"seed": seed}, result=result))
    return Study(
        name="own_model.fine_tuning",
        question="What does fine-tuning make of this vision-language model?",
        lines=tuple(lines),
        figure=Figure(x="seed", x_label="seed"),
        baselines={"as imported": Evaluate(of=whole, evaluation=asked)},
    )


def _checkpoint(folder: Path, rewarm_rate: float) -> ImportRecord:
    """A language model that can go on at its own rate, or is warmed up again."""
    record = read_import(folder)
    if record.config.kind == "tower":
        raise ValueError(f"{folder} holds a vision encoder; give it as one of `encoders`")
    if record.model is not None:
        raise ValueError(
            f"{folder} holds a whole vision-language model; import its language model alone "
            "(--part decoder), or fine-tune all of it (own_model.fine_tuning)"
        )
    if not rewarm_rate and (record.position is None or record.position.rate is None):
        raise ValueError(
            f"{folder} does not say the learning rate at its checkpoint; import it again with "
            "--rate, or warm up again with rewarm_rate"
        )
    rate = None if record.position is None else record.position.rate
    if not rewarm_rate and rate is not None and rate <= END_RATE:
        raise ValueError(
            f"the learning rate at {folder} is {rate:g}, not above the end rate {END_RATE:g}; warm "
            "up again with rewarm_rate"
        )
    return record


def _schedule(rewarm_rate: float) -> WarmupCosine | ContinuedCosine:
    if rewarm_rate:
        return WarmupCosine(peak_rate=rewarm_rate, end_rate=END_RATE, warmup_fraction=0.05)
    return ContinuedCosine(end_rate=END_RATE)


def _asked(root: Path, limit: int, max_new_tokens: int) -> Evaluation:
    """All tasks of a world, but for those that shots of others are drawn from."""
    visual, texts = (listed_tasks(root, kind) for kind in ("visual_tasks", "text_tasks"))
    if not (visual or texts):
        raise ValueError(f"{root / 'world.json'} lists no task to ask; see docs/data.md")
    pools = set(map(pool_of, visual))
    return Evaluation(
        visual_tasks=tuple(task for task in visual if task not in pools),
        text_tasks=tuple(texts),
        limit=limit or None,
        max_new_tokens=max_new_tokens,
    )


def _prepare(root: Path, checkpoint: Path, begin_of_text: str) -> Prepare:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        # A folder that is none is told first.
        read_import(checkpoint)
        raise FileNotFoundError(
            f"{checkpoint} has no tokenizer.json; import it again with --tokenizer"
        )
    return Prepare(
        world=PublicFolder(root=root, fingerprint=world_fingerprint(root)),
        tokenizer=TokenizerFile.read(path, begin_of_text),
    )


def _encoder(
    encoders: Sequence[str], image_size: int, feature_dtype: FeatureType, looks: dict[str, Any]
) -> LoadEncoder:
    folders, towers = [Path(one).resolve() for one in encoders], []
    for folder in folders:
        config = read_import(folder).config
        if not isinstance(config, EncoderConfig):
            raise ValueError(f"{folder} holds a language model; encoders are vision towers")
        changes = {
            "image_size": image_size or config.image_size,
            "position_size": config.position_size or config.image_size,
            "feature_dtype": feature_dtype,
        }
        towers.append(EncoderConfig.model_validate(config.model_dump() | changes | looks))
    return LoadEncoder(
        towers=tuple(as_imported(folder) for folder in folders),
        encoder=towers[0]
        if len(towers) == 1
        else FusedEncoder(towers=tuple(towers), feature_dtype=feature_dtype),
    )


def _patches(image_size: int, patch_size: int, hidden_size: int, resize: Any) -> PatchProjection:
    if not image_size:
        raise ValueError("without encoders patches are projected; give their image_size")
    return PatchProjection(
        image_size=image_size, patch_size=patch_size, hidden_size=hidden_size, resize=resize
    )


def _mixture(
    root: Path, image_share: float, documents: float, total_tokens: int, max_epochs: int
) -> Mixture:
    if not 0 <= documents <= 1:
        raise ValueError(f"documents is {documents:g}; give a part of the images' share, 0 to 1")
    groups = {
        "captions": image_share * (1 - documents),
        "documents": image_share * documents,
        "text": 1.0 - image_share,
    }
    shares = []
    for section, share in groups.items():
        names = _sources(root, section) if share else ()
        shares += [Share(source=name, share=share / len(names)) for name in names]
    return Mixture(total_tokens=total_tokens, shares=tuple(shares), max_epochs=max_epochs)


def _sources(root: Path, section: str) -> tuple[str, ...]:
    kind, listed = SECTIONS[section], source_folders(root)
    for path in sorted(root.glob(f"{section}/*")):
        # A link to nowhere too, such as to a disk that is not mounted.
        if not (path.is_dir() or is_hidden(path.name) or is_note(path.name)):
            raise ValueError(
                f"{path} is no source, which is a folder; put it into one, such as {section}/mine, "
                "or take it away"
            )
    names = tuple(name for name, (found, _) in sorted(listed.items()) if found == kind)
    if not names:
        raise FileNotFoundError(no_source(root, section))
    return names
