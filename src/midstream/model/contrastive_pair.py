"""A vision tower, SigLIP or DINOv2, and SigLIP's text tower that are trained as a pair.

A picture is SigLIP's pooling head over its patches; of DINOv2, which has none, their mean.

Parameters start by the rule of `vision.initialisers_of`; scale and bias of the loss as SigLIP
starts them.
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from midstream.config import EncoderConfig
from midstream.model.initialise import Initialiser, initialise
from midstream.model.vision import Tower, initialisers_of, unset
from midstream.model.weights import save_weights

# Channels of a head of the text tower.
_TEXT_HEAD_DIM = 64


def build_siglip(config: EncoderConfig) -> nn.Module:
    """A `transformers.SiglipVisionModel` with its pooling head, unset (NaN) until initialised or
    loaded."""
    # Imported here: transformers takes seconds that text-only work need not wait for.
    from transformers import SiglipVisionConfig, SiglipVisionModel

    siglip = SiglipVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        attn_implementation="sdpa",
    )
    # transformers draws weights from the global generator, which stays untouched here.
    with torch.random.fork_rng(devices=[]):
        return unset(SiglipVisionModel(siglip))


class SiglipPair(nn.Module):
    """A vision and a text tower trained by the sigmoid loss over all pairs (SigLIP).

    The vision tower is whole, whatever its configuration's `feature_layer` and `final_norm`.

    Starts initialised, by `seed`. `hidden_size` and `num_layers` are the text tower's; its heads
    have 64 channels. Texts are `max_text_tokens` ids, padded behind by the caller with any one
    id; as in SigLIP nothing masks the padding and the last position is pooled.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        max_text_tokens: int,
        seed: int,
    ) -> None:
        super().__init__()
        from transformers import SiglipTextConfig, SiglipTextModel

        text = SiglipTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=max(1, hidden_size // _TEXT_HEAD_DIM),
            max_position_embeddings=max_text_tokens,
            projection_size=config.hidden_size,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.max_text_tokens = max_text_tokens
        self.vision: nn.Module
        if config.family == "siglip":
            self.vision = build_siglip(config)
        else:
            self.vision = Tower(config.model_copy(update={"feature_layer": -1, "final_norm": True}))
        with torch.random.fork_rng(devices=[]):
            self.text = unset(SiglipTextModel(text))
        self.logit_scale = nn.Parameter(torch.full((1,), float("nan")))
        self.logit_bias = nn.Parameter(torch.full((1,), float("nan")))
        initialise(self, seed)

    def logits(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "texts tokens"],
    ) -> Float[Tensor, "images texts"]:
        """The logit of each image and text belonging together."""
        if input_ids.shape[1] != self.max_text_tokens:
            raise ValueError(
                f"texts are {input_ids.shape[1]} ids long, the text tower takes exactly "
                f"{self.max_text_tokens}; pad them to that length"
            )
        images = normalize(self._looks(pixel_values), dim=-1)
        texts = normalize(self.text(input_ids).pooler_output, dim=-1)
        # In float32 also under autocast: differences between pairs are small beside the scale.
        with torch.autocast(pixel_values.device.type, enabled=False):
            return images.float() @ texts.float().T * self.logit_scale.exp() + self.logit_bias

    def forward(
        self,
        pixel_values: Float[Tensor, "pairs 3 height width"],
        input_ids: Int[Tensor, "pairs tokens"],
    ) -> Float[Tensor, ""]:
        """The sigmoid loss summed over all pairs; SigLIP divides it by the number of images."""
        logits = self.logits(pixel_values, input_ids)
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -logsigmoid(sign * logits).sum()

    @property
    def tower(self) -> nn.Module:
        """The vision tower of transformers, as it is kept."""
        return self.vision.tower if isinstance(self.vision, Tower) else self.vision

    def save_vision(self, path: Path) -> None:
        """Write the vision tower; `load_encoder` reads it."""
        save_weights(self.tower, path)

    def _looks(self, pixel_values: Tensor) -> Tensor:
        """Pictures as vectors [images, width]."""
        if isinstance(self.vision, Tower):
            features: Tensor = self.vision(pixel_values)
            return features.mean(dim=1)
        pooled: Tensor = self.vision(pixel_values).pooler_output
        return pooled

    def initialisers(self) -> dict[str, Initialiser]:
        """One entry for each parameter."""
        return initialisers_of(self) | {
            "logit_scale": Initialiser("constant", math.log(10.0)),
            "logit_bias": Initialiser("constant", -10.0),
        }
