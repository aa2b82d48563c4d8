"""The vision-language model: projector, decoder and loss as one.

A frozen encoder is no part of it: its features arrive as an argument. One that some stage trains is
the model's own, and takes the batch's pixels. `slots` are one an image: (row, first column).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from midstream.config import AnyDecoderConfig, DecoderConfig, VLMConfig
from midstream.config.model import MAX_LOGITS, MOST_TARGETS
from midstream.core.batch import IGNORE, Batch
from midstream.model import adapters
from midstream.model.attention import (
    PICTURE_RULES,
    Mask,
    MaskKind,
    make_mask,
    map_mask,
    pictures_of,
)
from midstream.model.decoder import Decoder, select
from midstream.model.pretrained import TransformersDecoder
from midstream.model.projector import GatedStack, Projector, Shown, latest_pictures, looking_at
from midstream.model.vision import VisionEncoder, build_encoder
from midstream.model.weights import Initialiser


def summed_loss(
    hidden: Float[Tensor, "num_targets hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "num_targets"],
    z_loss: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What to train on, and the sum of cross-entropies, which is what to report.

    The first adds `z_loss` times the sum of squared log-normalisers and is differentiable, once;
    the second is not. `weight` is the decoder's `output.weight`; where it is frozen no gradient of
    it is made. Both are float32, and zero without targets; products have autocast's precision,
    everything else is float32.
    """
    kind = hidden.device.type
    room = MAX_LOGITS.get(kind, MAX_LOGITS["cuda"])
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif weight.dtype != hidden.dtype:
        hidden = hidden.to(weight.dtype)
    learns = torch.is_grad_enabled()
    wanted = (learns and hidden.requires_grad, learns and weight.requires_grad)
    total, cross_entropy = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, z_loss, room, wanted
    )
    return total, cross_entropy


class _SummedLoss(torch.autograd.Function):
    """Loss and gradients in one go, a piece of the logits at a time; the backward pass only scales
    them. torch's `linear_cross_entropy` (2.13) has no z-loss and takes two to four times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        room: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """The sums of loss and z-loss, their gradients kept."""
        with torch.autocast(hidden.device.type, enabled=False):
            rows = max(1, room // weight.shape[0])
            # float64 stays what it is, for checks of the gradient.
            exact = torch.promote_types(hidden.dtype, torch.float32)
            sums = torch.zeros(2, dtype=exact, device=hidden.device)
            of_hidden = torch.empty_like(hidden) if wanted[0] else None
            of_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
            for low in range(0, len(targets), rows):
                piece, theirs = hidden[low : low + rows], targets[low : low + rows, None]
                logits = linear(piece, weight).to(exact)
                at_target = logits.gather(1, theirs)
                largest, where = logits.max(dim=1, keepdim=True)
                share = torch.softmax(logits, dim=1)
                # The largest share is at least one in the vocabulary: its logarithm is exact.
                normaliser = largest - share.gather(1, where).log()
                sums[0] += (normaliser - at_target).sum()
                sums[1] += z_loss * normaliser.square().sum()
                if not any(wanted):
                    continue
                # d(total)/d(logits) = scale * (share - one-hot / scale), row by row; the scale
                # goes into the smaller factors of the two products.
                scale = 1 + 2 * z_loss * normaliser
                index = torch.arange(len(piece), device=piece.device)
                share[index, theirs[:, 0]] -= 1 / scale[:, 0]
                share = share.to(weight.dtype)
                if of_hidden is not None:
                    of_hidden[low : low + rows] = (share @ weight) * scale
                if of_weight is not None:
                    _add_product(of_weight, share, (piece * scale).to(weight.dtype))
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.weight_dtype = weight.dtype
        cross_entropy = sums[0].clone()
        ctx.mark_non_differentiable(cross_entropy)
        return sums.sum(), cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that `forward` kept, scaled."""
        of_hidden, of_weight = ctx.saved_tensors
        return (
            of_hidden * of_total.to(of_hidden.dtype) if ctx.needs_input_grad[0] else None,
            # In place: these are as many numbers as the head has, and nobody else reads them.
            of_weight.mul_(of_total).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None,
            *[None] * 4,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T @ right; sums of low-precision pieces are kept in `total`'s."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def build_decoder(config: AnyDecoderConfig) -> Decoder | TransformersDecoder:
    """The language model of a configuration, unset (NaN) until initialised or loaded."""
    return Decoder(config) if isinstance(config, DecoderConfig) else TransformersDecoder(config)


@dataclass(frozen=True)
class Ahead:
    """What of a batch decides shapes and kernels: `VLM.ahead` finds it on the host, so that nobody
    waits for a device within a micro-batch.

    `at` numbers the positions with a target over all rows, `targets` are theirs; `pictures` numbers
    those of each picture; `looking` is `Shown.positions`, None without gated blocks.
    """

    at: Int[Tensor, "num_targets"]
    targets: Int[Tensor, "num_targets"]
    pictures: Int[Tensor, "images positions"]
    mask: Mask
    looking: Int[Tensor, "images longest"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Ahead":
        """Every tensor changed alike."""
        return Ahead(
            at=change(self.at),
            targets=change(self.targets),
            pictures=change(self.pictures),
            mask=map_mask(self.mask, change),
            looking=None if self.looking is None else change(self.looking),
        )


class VLM(nn.Module):
    """Projector and decoder, and the encoder where it is the model's own; without an encoder in the
    config a plain language model."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        # Set where each block of the decoder is compiled.
        self.compiled_blocks = False
        # Set where products want all positions of a row, as in float8.
        self.whole_blocks = False
        self.decoder = build_decoder(config.decoder)
        self.encoder: VisionEncoder | None = None
        self.projector: Projector | None = None
        self.gated: GatedStack | None = None
        if config.encoder is not None:
            if config.owns_encoder:
                self.encoder = build_encoder(config.encoder)
            self.projector = Projector(
                config.projector,
                in_width=config.encoder.hidden_size,
                out_width=config.decoder.hidden_size,
            )
            if config.projector.gated is not None:
                widths = config.projector.widths(
                    config.encoder.hidden_size, config.decoder.hidden_size
                )
                self.gated = GatedStack(
                    config.projector.gated,
                    num_layers=config.decoder.num_layers,
                    width=config.decoder.hidden_size,
                    seen_width=widths[-1],
                )

    def ahead(self, batch: Batch, device: torch.device | None = None) -> Ahead:
        """What the model needs to know of a batch before it computes on `device`, where the batch
        lies if None. Of a batch on the CPU no device hears.

        Raises ValueError for a picture that does not end within its row.
        """
        device = device or batch.input_ids.device
        targets = batch.targets.flatten()
        at = (targets != IGNORE).nonzero()[:, 0]
        rows, length = batch.input_ids.shape
        slots, width = batch.image_slots, self.config.image_tokens
        positions = slot_positions(slots, width, length)
        looking = None
        if self.gated is not None:
            looking = looking_at(latest_pictures(slots, batch.segment_ids), len(slots))
        # The runs of a batch are new shapes for each block that is compiled, and unknown to others.
        whole = self.compiled_blocks or isinstance(self.decoder, TransformersDecoder)
        on_cpu: MaskKind = "dense" if whole else "cut"
        kind = on_cpu if device.type == "cpu" else "blocks"
        rule = self.config.attention
        prefix = batch.prefix if rule == "prefix" else None
        pictures = pictures_of(slots, width, (rows, length)) if rule in PICTURE_RULES else None
        return Ahead(
            at=at,
            targets=targets.index_select(0, at),
            pictures=positions,
            mask=make_mask(batch.segment_ids, prefix, rule, kind=kind, pictures=pictures),
            looking=looking,
        )

    def forward(
        self,
        batch: Batch,
        features: Float[Tensor, "images patches width"] | None,
        at: Int[Tensor, "asked"] | None = None,
        ahead: Ahead | None = None,
    ) -> Float[Tensor, "*asked hidden"]:
        """The hidden states of a batch, with the features of its images in their slots.

        [rows, seq, hidden], or [asked, hidden] of the positions that `at` numbers over all rows.
        `features` are a frozen encoder's, one entry an image slot; None where the batch has none,
        and for a model that looks at the batch's pixels itself. `ahead` is that of the batch, found
        here where it is not given.
        Raises ValueError with both numbers if images and slots do not agree.
        """
        ahead = ahead or self.ahead(batch)
        embeddings = self.decoder.embed(batch.input_ids)
        if features is None and self.encoder is not None:
            features = self.encoder(batch.images)
        projected, seen = self.project(features, embeddings), None
        if projected is None and len(batch.image_slots) > 0:
            raise ValueError(f"the batch has {len(batch.image_slots)} images, the model no encoder")
        if projected is not None:
            embeddings = self.put_images(embeddings, projected, ahead.pictures)
            if ahead.looking is not None:
                seen = Shown(projected, ahead.looking)
        return self.decode(embeddings, batch.position_ids, ahead.mask, at=at, seen=seen)

    def decode(
        self,
        embeddings: Float[Tensor, "rows seq hidden"],
        position_ids: Int[Tensor, "rows seq"],
        mask: Any,
        cache: Any = None,
        at: Int[Tensor, "asked"] | None = None,
        *,
        seen: Shown | None = None,
    ) -> Float[Tensor, "*asked hidden"]:
        """What the decoder makes of embeddings, with the gated blocks of a model that has some;
        `seen` is what these look at, None without a picture."""
        if self.gated is None:
            return cast(Tensor, self.decoder(embeddings, position_ids, mask, cache, at))
        between = partial(self.gated, seen=seen)
        return cast(Tensor, self.decoder(embeddings, position_ids, mask, cache, at, between))

    def put_images(
        self,
        embeddings: Float[Tensor, "rows seq hidden"],
        projected: Float[Tensor, "images left width"],
        positions: Int[Tensor, "slots positions"],
    ) -> Float[Tensor, "rows seq hidden"]:
        """Put what `project` gives into its positions (`slot_positions`), or, of a model with gated
        blocks, the embedding of a picture's; raises as `scatter_image_features` does."""
        if self.gated is not None:
            own = self.gated.picture.to(embeddings.dtype)
            projected = own.expand(len(projected), 1, -1)
        return scatter_image_features(embeddings, projected, positions)

    def losses(
        self,
        batch: Batch,
        features: Float[Tensor, "images patches width"] | None,
        z_loss: float,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """`summed_loss` of a batch: what to train on, and the sum of cross-entropies to report.

        One call from pixels or features to the loss, so that a sharded model gathers its weights
        around all that uses them. `ahead` is as for `forward`.
        """
        ahead = ahead or self.ahead(batch)
        # Not `self(...)`: a sharded model gathers its weights around this method already.
        if self.whole_blocks or len(ahead.at) > MOST_TARGETS * batch.targets.numel():
            hidden = select(self.forward(batch, features, ahead=ahead), ahead.at)
        else:
            hidden = self.forward(batch, features, ahead.at, ahead)
        return summed_loss(hidden, self.decoder.output.weight, ahead.targets, z_loss)

    def project(
        self,
        features: Float[Tensor, "images patches width"] | None,
        like: Float[Tensor, "rows seq hidden"],
    ) -> Float[Tensor, "images left out"] | None:
        """What the connector makes of features, at decoder width (before gated blocks at the
        projector's last), in dtype and on the device of `like`.

        Without features the projector runs on zero images, so that every rank runs every module
        and its gradients are zero rather than absent. None if the model has no projector.
        """
        if self.projector is None or self.config.encoder is None:
            if features is not None and len(features) > 0:
                raise ValueError(f"{len(features)} images were given to a model without an encoder")
            return None
        expected = (self.config.encoder.num_patches, self.config.encoder.hidden_size)
        if features is None:
            features = like.new_zeros((0, *expected))
        if tuple(features.shape[1:]) != expected:
            raise ValueError(
                f"features have (patches, width) {tuple(features.shape[1:])}, the encoder of this "
                f"model gives {expected}; compute them with its own encoder"
            )
        projected = self.projector(features.to(device=like.device, dtype=like.dtype))
        return cast(Tensor, projected.to(like.dtype))

    def initialisers(self) -> dict[str, Initialiser]:
        """Those of its parts."""
        parts = {
            "decoder": self.decoder,
            "encoder": self.encoder,
            "projector": self.projector,
            "gated": self.gated,
        }
        tables = {
            part: cast(Any, module).initialisers()
            for part, module in parts.items()
            if module is not None
        }
        tables["decoder"] = adapters.initialisers(self.decoder, tables["decoder"])
        return {
            f"{part}.{name}": entry for part, one in tables.items() for name, entry in one.items()
        }


def slot_positions(
    image_slots: Int[Tensor, "slots 2"], num_positions: int, length: int
) -> Int[Tensor, "slots positions"]:
    """The positions of each picture, numbered over all rows of so many: `num_positions` from its
    slot (row, first column) on.

    Raises ValueError for one that does not end within its row.
    """
    if len(image_slots) and (last := int(image_slots[:, 1].max())) + num_positions > length:
        raise ValueError(
            f"an image of {num_positions} positions starts at column {last} of rows of {length}"
        )
    starts = image_slots[:, 0] * length + image_slots[:, 1]
    return starts[:, None] + torch.arange(num_positions, device=starts.device)


def scatter_image_features(
    embeddings: Float[Tensor, "rows seq hidden"],
    features: Float[Tensor, "images patches hidden"],
    positions: Int[Tensor, "slots patches"],
) -> Float[Tensor, "rows seq hidden"]:
    """Put projected features where `slot_positions` says.

    Raises ValueError with both numbers if there are other images than slots.
    """
    if len(features) != len(positions):
        have, slots = len(features), len(positions)
        raise ValueError(f"{have} images were given, the rows have {slots} slots")
    flat = embeddings.reshape(-1, embeddings.shape[2])
    given = features.reshape(-1, embeddings.shape[2])
    return flat.index_copy(0, positions.reshape(-1), given).view_as(embeddings)
