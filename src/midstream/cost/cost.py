"""What a stage costs before it runs: tokens, FLOPs by part of the model, parameters."""

from dataclasses import dataclass
from types import MappingProxyType

from midstream.config import (
    Amounts,
    AnyDecoderConfig,
    AnyEncoderConfig,
    FusedEncoder,
    Mixture,
    PatchProjection,
    ShareUnit,
    Training,
    VLMConfig,
)
from midstream.config.connectors import connector_parameters as projector_parameters
from midstream.config.connectors import gated_parameters
from midstream.config.flops import connecting_flops, looking_flops, model_flops
from midstream.config.model import (
    attention_flops,
    encoder_flops,
    feed_forward_parameters,
    head_flops,
    last_block_flops,
    patch_flops,
    weight_flops,
)
from midstream.cost.known import Basis, Number, facts_of_text, sources_of
from midstream.cost.questions import Sizes, asked_of
from midstream.cost.workload import Device, Workload, taken, workload
from midstream.study.stages import (
    DataStage,
    Evaluate,
    FuseEncoders,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    Pretrain,
    Stage,
    Trained,
    TrainEncoder,
)
from midstream.study.store import Ledger

# Width of a Transformer's feed-forward part over its own, in the caption tower of TrainEncoder.
TOWER_EXPANSION = 4


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part of the model."""

    decoder: Number = 0.0
    head: Number = 0.0
    encoder: Number = 0.0
    projector: Number = 0.0

    @property
    def total(self) -> Number:
        """All of them."""
        return self.decoder + self.head + self.encoder + self.projector

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(**{name: own + getattr(other, name) for name, own in vars(self).items()})


@dataclass(frozen=True)
class StageCost:
    """Tokens seen, FLOPs by part, trained (or evaluated) parameters; None where unknown.

    `basis`: whether the sources were counted, or are what the recipe expects. `work` is what a
    training stage computes on, and `needed` its model FLOPs (`config/flops.py`).
    """

    tokens: int | None
    parts: Flops | None
    parameters: int
    basis: Basis = "counted"
    needed: Number | None = None
    work: Workload | None = None

    @property
    def flops(self) -> Number | None:
        """All FLOPs that the stage computes."""
        return None if self.parts is None else self.parts.total

    @property
    def model_flops(self) -> Number | None:
        """What a utilisation is a share of; all FLOPs where no `needed` is counted, as of training
        an encoder."""
        return self.flops if self.needed is None else self.needed


def cost(
    stage: Stage,
    ledger: Ledger | None = None,
    device: Device = "cuda",
    sizes: Sizes = MappingProxyType({}),
) -> StageCost:
    """The cost of one stage without its parents, as `device` computes it.

    Matrix products are counted as torch's own counter counts them, at two FLOPs a multiply-add and
    a causal mask for none; norms, activations and the optimiser are left out. Training is one
    forward and two backward passes of what is trained; through what is frozen but stands behind
    something trained goes one backward pass; a frozen encoder has none.

    Sources are those of preparations that `ledger` has finished, else what the recipe expects of
    them; without either, FLOPs of a stage that sees and tokens of passes are unknown. A frozen
    encoder is taken to look anew at every picture (`pictures.py` says what storing saves).
    An evaluation asks the questions of `sizes`, or of the store's note of what was read, in each
    pass: as they are, blind, with several pictures in another order; pictures are seen anew, shots
    and theirs before each question, or once a batch where all have the same. What was not read is
    estimated: as many questions as the world or the published task has, of PROMPT_TOKENS each.
    Written answers have the longest length that is allowed.
    """
    if isinstance(stage, DataStage):
        return StageCost(0, Flops(), 0)
    if isinstance(stage, LoadEncoder | FuseEncoders):
        return StageCost(0, Flops(), encoder_parameters(stage.encoder))
    if isinstance(stage, LoadDecoder):
        return StageCost(0, Flops(), stage.decoder.num_parameters)
    if isinstance(stage, LoadModel):
        return StageCost(0, Flops(), model_parameters(stage.model))
    if isinstance(stage, TrainEncoder):
        return _encoder_training_cost(stage)
    if isinstance(stage, Evaluate):
        return _evaluation_cost(stage, ledger, sizes)
    parameters = model_parameters(stage.model)
    work = work_of(stage, ledger, device)
    if work is None:
        return StageCost(_stated_tokens(stage.training), None, parameters)
    needed = model_flops(
        stage.model,
        positions=work.tokens,
        texts=work.tokens - work.images * stage.model.image_tokens,
        attended=work.attended,
        images=work.images,
        encoded=work.images,
        trains_encoder=trains_encoder(stage),
        trains_decoder=not stage.training.keeps_decoder,
    )
    parts = training_flops(stage, work)
    return StageCost(work.tokens, parts, parameters, work.basis, needed, work)


def work_of(stage: Trained, ledger: Ledger | None, device: Device = "cuda") -> Workload | None:
    """The positions, pictures and steps of a training stage; None where they are unknown."""
    sources = sources_of(stage.data, stage.training.budget.captions, ledger)
    stated = _stated_tokens(stage.training)
    if sources is None and isinstance(stage, Pretrain) and stated:
        # Texts of any length, all of which is learnt.
        sources = dict.fromkeys(stage.training.budget.source_names, facts_of_text(stated))
    return None if sources is None else workload(stage.model, stage.training, sources, device)


def images_seen(
    stage: Trained, ledger: Ledger | None, by: ShareUnit | None = None
) -> Number | None:
    """Pictures that a stage sees, or would if its mixture's shares were of another unit.

    None where its sources are unknown; with `by`, where its budget has no shares.
    """
    training, model = stage.training, stage.model
    sources = sources_of(stage.data, training.budget.captions, ledger)
    if sources is None or (by is not None and not isinstance(training.budget, Mixture)):
        return None
    if by is not None:
        mixed = training.budget.model_copy(update={"by": by})
        training = training.model_copy(update={"budget": mixed})
    return sum(part.images for part in taken(training, sources, model).values())


def encoder_parameters(config: AnyEncoderConfig) -> int:
    """Parameters that the encoder's features are made of: no block above `feature_layer`.

    DINOv2's layer scales are not counted: a few in ten thousand.
    """
    if isinstance(config, FusedEncoder):
        return sum(encoder_parameters(tower) for tower in config.towers)
    e = config.hidden_size
    embed = 3 * config.patch_size**2 * e + e
    if isinstance(config, PatchProjection):
        return embed
    m = config.intermediate_size
    block = 4 * (e * e + e) + feed_forward_parameters(config) + m + e + 4 * e
    blocks = config.num_layers + 1 + config.feature_layer
    positions = config.position_patches + 2 * config.num_prefix
    return embed + positions * e + blocks * block + 2 * e * config.final_norm


def model_parameters(model: VLMConfig) -> int:
    """The decoder, the projector, and the encoder where it is the model's own."""
    total = model.decoder.num_parameters + connector_parameters(model)
    if model.owns_encoder and model.encoder is not None:
        total += encoder_parameters(model.encoder)
    return total


def trained_parameters(stage: Trained) -> int:
    """Those of the model's parameters that learn, and so have gradients and moments."""
    model = stage.model
    total = connector_parameters(model)
    if not stage.training.keeps_decoder:
        total += model.decoder.num_parameters
    if stage.training.lora is not None:
        total += adapter_parameters(model.decoder, stage.training.lora.rank)
    if trains_encoder(stage) and model.encoder is not None:
        total += encoder_parameters(model.encoder)
    return total


def adapter_parameters(decoder: AnyDecoderConfig, rank: int) -> int:
    """Those of adapters beside an OpenLM decoder's matrices; about those of another decoder."""
    width, inside = decoder.hidden_size, decoder.linear_parameters // decoder.num_layers
    # A block's matrices: width to three widths, width to width, and SwiGLU's three.
    ffn: int = (inside - 4 * width**2) // (3 * width)
    return decoder.num_layers * rank * (8 * width + 3 * ffn)


def connector_parameters(model: VLMConfig) -> int:
    """The connector's parameters, gated blocks among them; 0 for a model that does not see."""
    if model.encoder is None:
        return 0
    sizes = (model.encoder.hidden_size, model.decoder.hidden_size)
    total = projector_parameters(model.projector, *sizes)
    if (gated := model.projector.gated) is not None:
        seen = model.projector.widths(*sizes)[-1]
        total += gated_parameters(gated, model.decoder.num_layers, sizes[1], seen)
    return total


def trains_encoder(stage: Trained) -> bool:
    """Whether gradients go through the encoder."""
    factor = stage.training.encoder_rate_factor
    return factor is not None or isinstance(stage.model.encoder, PatchProjection)


def training_flops(stage: Trained, work: Workload) -> Flops:
    """Forward and backward passes over all that a stage computes on."""
    model, decoder = stage.model, stage.model.decoder
    # One forward pass, one to the activations, one to the weights that learn.
    passes = 2 if stage.training.keeps_decoder else 3
    matrices = weight_flops(decoder) * work.positions
    matrices -= last_block_flops(decoder) * (work.positions - work.asked)
    blocks = passes * matrices + 3 * attention_flops(decoder) * work.squares
    head = passes * head_flops(decoder) * work.targets
    if model.encoder is None:
        return Flops(decoder=blocks, head=head)
    looks, learns = encoder_flops(model.encoder), trains_encoder(stage)
    through, untaken = connecting_flops(model, work.images)
    connector = 3 * (through + looking_flops(model, work.positions, work.images))
    if learns:
        # Nothing stands before the pixels.
        seeing = work.images * (3 * looks - patch_flops(model.encoder))
    else:
        seeing = looks * (work.images if model.owns_encoder else work.encoded)
        connector -= untaken
    return Flops(decoder=blocks, head=head, encoder=seeing, projector=connector)


def _stated_tokens(training: Training) -> int | None:
    """Tokens of a budget that says so itself."""
    budget = training.budget
    if isinstance(budget, Mixture):
        return budget.total_tokens
    if isinstance(budget, Amounts) and all(amount.tokens for amount in budget.amounts):
        return sum(amount.tokens or 0 for amount in budget.amounts)
    return None


def _encoder_training_cost(stage: TrainEncoder) -> StageCost:
    """Both towers, the vision tower to its last layer and the caption tower at full length."""
    training, encoder = stage.training, stage.encoder
    pairs = training.num_steps * training.batch_images
    d, length = training.text_hidden_size, training.max_text_tokens
    layer = 2 * (4 + 2 * TOWER_EXPANSION) * d * d + 2 * 2 * d * length
    caption = training.text_num_layers * length * layer
    # The pair trains all of the tower.
    whole = encoder.model_copy(update={"feature_layer": -1, "final_norm": True})
    image = 3 * encoder_flops(whole) - patch_flops(whole)
    return StageCost(
        tokens=pairs * (encoder.num_patches + length),
        parts=Flops(encoder=pairs * (image + 3 * caption)),
        parameters=encoder_parameters(whole),
        basis="expected",
    )


def _evaluation_cost(stage: Evaluate, ledger: Ledger | None, sizes: Sizes) -> StageCost:
    model, tasks = stage.of.model, asked_of(stage, ledger, sizes)
    tokens, pictures = sum(one.positions for one in tasks), sum(one.pictures for one in tasks)
    looking = attention_flops(model.decoder) * sum(one.squares for one in tasks)
    seeing = connecting = 0.0
    if model.encoder is not None:
        seeing = pictures * encoder_flops(model.encoder)
        connecting = connecting_flops(model, pictures)[0] + looking_flops(model, tokens, pictures)
    parts = Flops(
        decoder=tokens * weight_flops(model.decoder) + looking,
        head=sum(one.written for one in tasks) * head_flops(model.decoder),
        encoder=seeing,
        projector=connecting,
    )
    return StageCost(
        tokens=round(tokens),
        parts=parts,
        parameters=model_parameters(model),
        basis="counted" if all(one.counted for one in tasks) else "expected",
        needed=parts.total - looking / 2,
    )
