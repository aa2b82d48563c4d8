"""What a stage costs, before anything runs: tokens, FLOPs, parameters.

Matrix multiplications are counted exactly, at two FLOPs a multiply-add; norms, activations and
the optimiser are left out. Training is three forward passes (one forward, two backward) of what
is trained, one of a frozen encoder, and two of a frozen decoder's weights.

Letters: d decoder width, h SwiGLU width, V vocabulary, T row length, P patches of an image, e
encoder width.

What is not known before the data is prepared is said so: the tokens of an `Epochs` budget are
None, and a `Mixture` is taken to be all text, each token with a loss. With a ledger in which the
stage's `Prepare` is done, the images among the tokens are known and counted. Padding is not
counted.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from midstream.config import (
    Amounts,
    AnyDecoderConfig,
    AnyEncoderConfig,
    Epochs,
    FusedEncoder,
    Mixture,
    PatchProjection,
    PocketWorld,
    ProjectorConfig,
    SmallReal,
    Training,
    VLMConfig,
)
from midstream.flops import (
    decoder_flops,
    encoder_flops,
    frozen_saving,
    head_flops,
    mean_context,
)
from midstream.study.ledger import Ledger
from midstream.study.stage import (
    Continue,
    Evaluate,
    Finetune,
    FuseEncoders,
    LoadDecoder,
    LoadEncoder,
    Prepare,
    Pretrain,
    Stage,
    TrainEncoder,
)

# Lengths for the estimate of an evaluation: a question with its prompt, a text item with a choice.
PROMPT_TOKENS = 48
TEXT_ITEM_TOKENS = 64
TEXT_ITEM_CHOICES = 2
# Width of a Transformer's feed-forward part over its own, in the caption tower of TrainEncoder.
TOWER_EXPANSION = 4


@dataclass(frozen=True)
class StageCost:
    """Tokens seen, FLOPs, trained (or evaluated) parameters; None where unknown until prepared."""

    tokens: int | None
    flops: float | None
    parameters: int


def cost(stage: Stage, ledger: Ledger | None = None) -> StageCost:
    """The cost of one stage without its parents.

    `ledger` adds what finished preparations know about their sources. Evaluations are estimates:
    PROMPT_TOKENS a question and the longest answer allowed, twice if asked blind as well.
    """
    if isinstance(stage, Prepare):
        return StageCost(tokens=0, flops=0.0, parameters=0)
    if isinstance(stage, LoadEncoder | FuseEncoders):
        return StageCost(tokens=0, flops=0.0, parameters=encoder_parameters(stage.encoder))
    if isinstance(stage, LoadDecoder):
        return StageCost(tokens=0, flops=0.0, parameters=stage.decoder.num_parameters)
    if isinstance(stage, TrainEncoder):
        return _encoder_training_cost(stage)
    if isinstance(stage, Evaluate):
        return _evaluation_cost(stage)
    return _training_cost(stage, ledger)


def encoder_parameters(config: AnyEncoderConfig) -> int:
    """Parameters that the encoder's features are made of: no block above `feature_layer`.

    Class and register tokens and DINOv2's layer scales are not counted: a few in a thousand.
    """
    if isinstance(config, FusedEncoder):
        return sum(encoder_parameters(tower) for tower in config.towers)
    e = config.hidden_size
    embed = 3 * config.patch_size**2 * e + e
    if isinstance(config, PatchProjection):
        return embed
    m = config.intermediate_size
    block = 4 * (e * e + e) + 2 * e * m + m + e + 4 * e
    blocks = config.num_layers + 1 + config.feature_layer
    return embed + config.position_patches * e + blocks * block + 2 * e * config.final_norm


def projector_parameters(
    config: ProjectorConfig, *, encoder: AnyEncoderConfig, decoder: AnyDecoderConfig
) -> int:
    """Weights and biases of the connector; its forward FLOPs are two a patch and weight."""
    widths = config.widths(encoder.hidden_size, decoder.hidden_size)
    return sum(before * after + after for before, after in pairwise(widths))


def model_parameters(model: VLMConfig) -> int:
    """The decoder, the projector, and the encoder where it is the model's own."""
    total = model.decoder.num_parameters + _connector(model)
    if model.owns_encoder and model.encoder is not None:
        total += encoder_parameters(model.encoder)
    return total


def _connector(model: VLMConfig) -> int:
    if model.encoder is None:
        return 0
    return projector_parameters(model.projector, encoder=model.encoder, decoder=model.decoder)


def trains_encoder(stage: Pretrain | Continue | Finetune) -> bool:
    """Whether gradients go through the encoder."""
    factor = stage.training.encoder_rate_factor
    return factor is not None or isinstance(stage.model.encoder, PatchProjection)


def _training_cost(stage: Pretrain | Continue | Finetune, ledger: Ledger | None) -> StageCost:
    model, training = stage.model, stage.training
    parameters = model_parameters(model)
    sources = _prepared_sources(stage.data, ledger)
    patches = model.encoder.num_patches if model.encoder is not None else 0
    counted = _tokens_and_images(training, sources, patches)
    if counted is None:
        return StageCost(tokens=None, flops=None, parameters=parameters)
    tokens, images = counted
    flops = 3 * tokens * decoder_flops(model.decoder, context=mean_context(training.rows))
    asked = tokens - images * patches
    flops += 3 * asked * head_flops(model.decoder)
    if training.freeze_decoder:
        flops -= frozen_saving(model.decoder, tokens, asked)
    if model.encoder is not None:
        looks = 3 if trains_encoder(stage) else 1
        flops += images * 3 * 2 * patches * _connector(model)
        flops += images * looks * encoder_flops(model.encoder)
    return StageCost(tokens=tokens, flops=flops, parameters=parameters)


def _prepared_sources(data: Prepare, ledger: Ledger | None) -> dict[str, Any] | None:
    if ledger is None or not ledger.is_done(data):
        return None
    sources: dict[str, Any] = ledger.results(data)["sources"]
    return sources


def budget_of_sources(
    training: Training, sources: dict[str, Any], patches: int
) -> dict[str, tuple[int, float]]:
    """By source: tokens (patches included) and images that a budget takes of prepared sources."""
    budget = training.budget
    found: dict[str, tuple[int, float]] = {}
    match budget:
        case Mixture(by="sequences"):
            sequences = budget.total_tokens // training.rows.row_length
            for share in budget.shares:
                source, number = _source(sources, share.source), sequences * share.share
                if source["kind"] == "text":
                    found[share.source] = int(number * training.rows.row_length), 0.0
                else:
                    size = _size(source, patches) / max(source["num_examples"], 1)
                    found[share.source] = int(number * size), number * _images_each(source)
        case Mixture():
            for share in budget.shares:
                source = _source(sources, share.source)
                found[share.source] = _of_tokens(budget.total_tokens * share.share, source, patches)
        case Amounts():
            for amount in budget.amounts:
                source = _source(sources, amount.source)
                tokens = amount.tokens or (amount.epochs or 0) * _size(source, patches)
                found[amount.source] = _of_tokens(tokens, source, patches)
        case Epochs():
            for name in budget.sources:
                source = _source(sources, name)
                found[name] = _of_tokens(budget.epochs * _size(source, patches), source, patches)
    return found


def _size(source: dict[str, Any], patches: int) -> int:
    return int(source["num_tokens"] + source["num_images"] * patches)


def _images_each(source: dict[str, Any]) -> float:
    return float(source["num_images"] / max(source["num_examples"], 1))


def _of_tokens(tokens: float | int, source: dict[str, Any], patches: int) -> tuple[int, float]:
    size = _size(source, patches)
    return int(tokens), tokens * source["num_images"] / size if size else 0.0


def _tokens_and_images(
    training: Training, sources: dict[str, Any] | None, patches: int
) -> tuple[int, float] | None:
    """Tokens (patches included) and images of a budget; None if nobody knows yet."""
    budget = training.budget
    if sources is not None:
        parts = budget_of_sources(training, sources, patches).values()
        images = sum(images for _, images in parts)
        if isinstance(budget, Mixture) and budget.by == "tokens":
            return budget.total_tokens, images
        return sum(tokens for tokens, _ in parts), images
    if isinstance(budget, Mixture):
        return budget.total_tokens, 0.0
    if isinstance(budget, Amounts) and all(amount.tokens for amount in budget.amounts):
        return sum(amount.tokens or 0 for amount in budget.amounts), 0.0
    return None


def _source(sources: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in sources:
        raise ValueError(
            f"the budget names source {name!r}; the prepared world has {', '.join(sorted(sources))}"
        )
    source: dict[str, Any] = sources[name]
    return source


def _encoder_training_cost(stage: TrainEncoder) -> StageCost:
    """Both towers, the vision tower to its last layer and the caption tower at full length."""
    training, encoder = stage.training, stage.encoder
    pairs = training.num_steps * training.batch_images
    d, length = training.text_hidden_size, training.max_text_tokens
    layer = 2 * (4 + 2 * TOWER_EXPANSION) * d * d + 2 * 2 * d * length
    caption = training.text_num_layers * length * layer
    # The pair trains all of the tower.
    whole = encoder.model_copy(update={"feature_layer": -1, "final_norm": True})
    image = encoder_flops(whole)
    return StageCost(
        tokens=pairs * (encoder.num_patches + length),
        flops=3.0 * pairs * (image + caption),
        parameters=encoder_parameters(whole),
    )


def _evaluation_cost(stage: Evaluate) -> StageCost:
    model, evaluation, world = stage.of.model, stage.evaluation, stage.of.data.world
    parameters = model_parameters(model)
    questions = texts = evaluation.limit
    if isinstance(world, PocketWorld):
        questions = min(world.num_questions, questions or world.num_questions)
        texts = min(world.num_text_items, texts or world.num_text_items)
    elif isinstance(world, SmallReal):
        questions = min(world.num_questions, questions or world.num_questions)
        texts = questions
    if questions is None or texts is None:
        return StageCost(tokens=None, flops=None, parameters=parameters)
    images = len(evaluation.visual_tasks) * questions
    items = len(evaluation.text_tasks) * texts * TEXT_ITEM_CHOICES
    rounds = 2 if evaluation.blind else 1
    answer_tokens = PROMPT_TOKENS + evaluation.max_new_tokens
    patches = model.encoder.num_patches if model.encoder is not None else 0
    text_tokens = images * rounds * answer_tokens + items * TEXT_ITEM_TOKENS
    tokens = images * patches + text_tokens
    context = float(patches + answer_tokens)
    flops = tokens * decoder_flops(model.decoder, context=context)
    flops += text_tokens * head_flops(model.decoder)
    if model.encoder is not None:
        flops += images * (2 * patches * _connector(model) + encoder_flops(model.encoder))
    return StageCost(tokens=tokens, flops=flops, parameters=parameters)
