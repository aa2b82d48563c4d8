"""The vision-language model: projected image features in the slots of a decoder's rows.

A frozen encoder is no part of it: its features arrive as an argument. One that some stage trains is
the model's own, and looks at the batch's pixels.
"""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from midstream.batch import IGNORE, Batch
from midstream.config import AnyDecoderConfig, DecoderConfig, VLMConfig
from midstream.model.attention import MaskKind, make_mask
from midstream.model.decoder import Decoder, select
from midstream.model.initialise import HasInitialisers, Initialiser
from midstream.model.loss import summed_loss
from midstream.model.pretrained import TransformersDecoder
from midstream.model.projector import Projector
from midstream.model.vision import VisionEncoder, build_encoder

# Where more of the positions than this have a target, the last block works on all of them.
_MOST = 0.8


def build_decoder(config: AnyDecoderConfig) -> Decoder | TransformersDecoder:
    """The language model of a configuration, unset (NaN) until initialised or loaded."""
    return Decoder(config) if isinstance(config, DecoderConfig) else TransformersDecoder(config)


class VLM(nn.Module):
    """Projector and decoder, and the encoder where it is the model's own; without an encoder in the
    config a plain language model."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        # Set where each block of the decoder is compiled.
        self.compiled_blocks = False
        self.decoder = build_decoder(config.decoder)
        self.encoder: VisionEncoder | None = None
        self.projector: Projector | None = None
        if config.encoder is not None:
            if config.owns_encoder:
                self.encoder = build_encoder(config.encoder)
            self.projector = Projector(
                config.projector,
                in_width=config.encoder.hidden_size,
                out_width=config.decoder.hidden_size,
            )

    def forward(
        self,
        batch: Batch,
        features: Float[Tensor, "images patches width"] | None,
        at: Int[Tensor, "asked"] | None = None,
    ) -> Float[Tensor, "*asked hidden"]:
        """The hidden states of a batch, with the features of its images in their slots.

        [rows, seq, hidden], or [asked, hidden] of the positions that `at` numbers over all rows.
        `features` are a frozen encoder's, one entry an image slot; None where the batch has none,
        and for a model that looks at the batch's pixels itself.
        Raises ValueError with both numbers if images and slots do not agree.
        """
        embeddings = self.decoder.embed(batch.input_ids)
        if features is None and self.encoder is not None:
            features = self.encoder(batch.images)
        projected = self.project(features, embeddings)
        if projected is None and len(batch.image_slots) > 0:
            raise ValueError(f"the batch has {len(batch.image_slots)} images, the model no encoder")
        if projected is not None:
            embeddings = scatter_image_features(embeddings, projected, batch.image_slots)
        attention = self.config.attention
        # TODO(flex-for-transformers): their decoders get dense masks on a GPU too; giving them the
        # BlockMask with attn_implementation="flex_attention" lifts it.
        mask = make_mask(
            batch.segment_ids,
            batch.prefix if attention == "prefix" else None,
            attention,
            kind=self._mask_kind(embeddings.device),
        )
        return cast(Tensor, self.decoder(embeddings, batch.position_ids, mask, at=at))

    def _mask_kind(self, device: torch.device) -> MaskKind:
        if isinstance(self.decoder, TransformersDecoder):
            return "dense"
        if device.type != "cpu":
            return "blocks"
        # The runs of a batch are new shapes for each block that is compiled.
        return "dense" if self.compiled_blocks else "cut"

    def losses(
        self,
        batch: Batch,
        features: Float[Tensor, "images patches width"] | None,
        z_loss: float,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """`summed_loss` of a batch: what to train on, and the sum of cross-entropies to report.

        One call from pixels or features to the loss, so that a sharded model gathers its weights
        around all that uses them.
        """
        targets = batch.targets.flatten()
        at = (targets != IGNORE).nonzero()[:, 0]
        targets = targets.index_select(0, at)
        # Not `self(...)`: a sharded model gathers its weights around this method already.
        if len(at) > _MOST * batch.targets.numel():
            hidden = select(self.forward(batch, features), at)
        else:
            hidden = self.forward(batch, features, at)
        return summed_loss(hidden, self.decoder.output.weight, targets, z_loss)

    def project(
        self,
        features: Float[Tensor, "images patches width"] | None,
        like: Float[Tensor, "rows seq hidden"],
    ) -> Float[Tensor, "images patches hidden"] | None:
        """Features at decoder width, in dtype and on the device of `like`.

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
        parts = {"decoder": self.decoder, "encoder": self.encoder, "projector": self.projector}
        return {
            f"{part}.{name}": entry
            for part, module in parts.items()
            if module is not None
            for name, entry in cast(HasInitialisers, module).initialisers().items()
        }


def scatter_image_features(
    embeddings: Float[Tensor, "rows seq hidden"],
    features: Float[Tensor, "images patches hidden"],
    image_slots: Int[Tensor, "slots 2"],
) -> Float[Tensor, "rows seq hidden"]:
    """Put projected features where the rows have image slots: `patches` columns from each start.

    `image_slots` lists (row, first column). Raises ValueError with both numbers if there are
    other images than slots, or if an image does not end within its row.
    """
    num_images, num_patches, width = features.shape
    length = embeddings.shape[1]
    if num_images != len(image_slots):
        raise ValueError(f"{num_images} images were given, the rows have {len(image_slots)} slots")
    if num_images > 0 and (last := int(image_slots[:, 1].max())) + num_patches > length:
        raise ValueError(
            f"an image of {num_patches} patches starts at column {last} of rows of {length}"
        )
    starts = image_slots[:, 0] * length + image_slots[:, 1]
    columns = starts[:, None] + torch.arange(num_patches, device=starts.device)
    flat = embeddings.reshape(-1, width)
    return flat.index_copy(0, columns.reshape(-1), features.reshape(-1, width)).view_as(embeddings)
