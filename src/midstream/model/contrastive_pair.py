"""A SigLIP vision tower and a text tower that are trained as a pair.

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
from midstream.model.vision import initialisers_of, unset
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
        self.vision = build_siglip(config)
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
        images = normalize(self.vision(pixel_values).pooler_output, dim=-1)
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

    def save_vision(self, path: Path) -> None:
        """Write the vision tower; `load_encoder` reads it."""
        save_weights(self.vision, path)

    def initialisers(self) -> dict[str, Initialiser]:
        """One entry for each parameter."""
        return initialisers_of(self) | {
            "logit_scale": Initialiser("constant", math.log(10.0)),
            "logit_bias": Initialiser("constant", -10.0),
        }
