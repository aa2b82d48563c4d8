"""Training of a SigLIP or DINOv2 tower on captions by the sigmoid image-text loss.

For studies without a public encoder. A run that is stopped starts again; equal seeds, equal bits.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from midstream.config import HELD_APART, ContrastiveTraining, EncoderConfig, check_held_apart
from midstream.config.training import rate_at
from midstream.core.storage import new_folder
from midstream.data.examples import TextCodec
from midstream.data.images import load_raster, normalised
from midstream.data.lengths import SourceLengths
from midstream.data.sources import Source
from midstream.model.vision import Tower, initialisers_of, unset
from midstream.model.weights import Initialiser, initialise, save_weights, weights_digest
from midstream.order.stream import draws, permuted
from midstream.study.lease import progress_event
from midstream.train.loop import Interrupted
from midstream.train.metrics import MetricsLog, Tracking
from midstream.train.parallel import autocast
from midstream.train.step import NonFiniteError, set_rate

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

    The vision tower is whole, whatever its configuration's `feature_layer` and `final_norm`. A
    picture is SigLIP's pooling head over its patches, or the mean of DINOv2's.

    Starts initialised, by the training's seed; the text tower's heads have 64 channels. Texts are
    `max_text_tokens` ids, padded behind by the caller with any one id; as in SigLIP nothing masks
    the padding and the last position is pooled.
    """

    def __init__(
        self, config: EncoderConfig, vocab_size: int, training: ContrastiveTraining
    ) -> None:
        super().__init__()
        from transformers import SiglipTextConfig, SiglipTextModel

        hidden_size = training.text_hidden_size
        text = SiglipTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=training.text_num_layers,
            num_attention_heads=max(1, hidden_size // _TEXT_HEAD_DIM),
            max_position_embeddings=training.max_text_tokens,
            projection_size=config.hidden_size,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
        self.max_text_tokens = training.max_text_tokens
        self.vision: nn.Module
        if config.family == "siglip":
            self.vision = build_siglip(config)
        else:
            self.vision = Tower(config.model_copy(update={"feature_layer": -1, "final_norm": True}))
        with torch.random.fork_rng(devices=[]):
            self.text = unset(SiglipTextModel(text))
        self.logit_scale = nn.Parameter(torch.full((1,), float("nan")))
        self.logit_bias = nn.Parameter(torch.full((1,), float("nan")))
        initialise(self, training.seed)

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

    def _looks(self, pixel_values: Tensor) -> Tensor:
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


def train_encoder(
    config: EncoderConfig,
    training: ContrastiveTraining,
    source: Source,
    codec: TextCodec,
    folder: Path,
    device: torch.device,
    *,
    report: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool] = lambda: False,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Train, write `weights/` (vision tower only), return the stage's `results.json`.

    Raises ValueError if the source lacks the asked captions or is too small for one batch beside
    those held apart, or a caption is longer than `max_text_tokens`; Interrupted where `should_stop`
    says so between steps.
    """
    started = time.monotonic()
    source.check_caption(training.caption)
    captions = Captions(source, codec, training)
    check_held_apart(source.name, len(source), training.batch_images)
    usable = len(source) - HELD_APART
    pair = SiglipPair(config, codec.size, training).to(device).train()
    pixels = PixelCache(source, config)
    optimizer = torch.optim.AdamW(
        pair.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=training.weight_decay, fused=True
    )
    log = MetricsLog(folder / "metrics.jsonl", 0, tracking)
    losses, shown = [], 0.0
    tokens_a_step = training.batch_images * config.num_patches
    for step in range(training.num_steps):
        if should_stop():
            log.close()
            raise Interrupted(
                f"stopped after step {step} of {training.num_steps}; this kind of stage keeps no "
                "checkpoint and begins again"
            )
        before, tokens_seen = time.monotonic(), (step + 1) * tokens_a_step
        drawn = np.arange(step * training.batch_images, (step + 1) * training.batch_images)
        chosen = HELD_APART + _shuffled(drawn, usable, training.seed)
        rate = rate_at(training.schedule, step, training.num_steps, step_tokens=1)
        set_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            loss = pair(pixels.batch(chosen).to(device), captions.seen(chosen, drawn).to(device))
        loss = loss / training.batch_images
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0))
        losses.append(float(loss.detach()))
        if not np.isfinite([losses[-1], norm]).all():
            raise NonFiniteError(f"step {step}: loss {losses[-1]}, gradient norm {norm}")
        optimizer.step()
        log.write(
            step=step + 1,
            tokens_seen=tokens_seen,
            loss=losses[-1],
            rate=rate,
            grad_norm=norm,
            num_targets=training.batch_images,
            seconds=round(time.monotonic() - before, 6),
        )
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            total = tokens_a_step * training.num_steps
            report(progress_event(tokens_seen, total, losses[-1], shown - started))
    log.close()
    with new_folder(folder / "weights") as temporary:
        save_weights(pair.tower, temporary / "model.safetensors")
    return {
        "steps": training.num_steps,
        "first_loss": losses[0],
        "final_loss": losses[-1],
        "num_parameters": sum(parameter.numel() for parameter in pair.parameters()),
        "retrieval": _retrieval(pair, pixels, captions, device),
        "retrieval_chance": 1 / HELD_APART,
        "weights_digest": weights_digest(pair.tower),
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def _retrieval(
    pair: SiglipPair, pixels: "PixelCache", captions: "Captions", device: torch.device
) -> float:
    """Share of the captions held apart whose picture is ranked first among theirs."""
    held = np.arange(HELD_APART)
    ranked = pair.logits(pixels.batch(held).to(device), captions.first(held).to(device))
    return float((ranked.argmax(dim=0).cpu() == torch.arange(HELD_APART)).float().mean())


class PixelCache:
    """Decoded pictures of a source; keeps what was read, a byte a value, up to a bound."""

    MAX_BYTES = 2**29

    def __init__(self, source: Source, config: EncoderConfig) -> None:
        self.source, self.config = source, config
        self._kept: dict[int, np.ndarray] = {}
        self._room = self.MAX_BYTES // (3 * config.image_size**2)

    def batch(self, examples: np.ndarray) -> torch.Tensor:
        """float32 [examples, 3, size, size]."""
        found = []
        for example in examples.tolist():
            raster = self._kept.get(example)
            if raster is None:
                raster = load_raster(self.source, example, self.config)
                if len(self._kept) < self._room:
                    self._kept[example] = raster
            found.append(raster)
        return torch.from_numpy(normalised(np.stack(found), self.config.transform))


class Captions:
    """The captions that a source's pictures may be seen with, as the text tower takes them."""

    def __init__(self, source: Source, codec: TextCodec, training: ContrastiveTraining) -> None:
        lengths = SourceLengths(source, 0, training.caption)
        self.drawn, self.key = lengths.drawn, f"{training.seed}/{source.name}/captions"
        self.numbers = source.num_synthetic(np.arange(len(source)))
        tables = [
            _table(source, codec, training.max_text_tokens, caption) for caption in lengths.numbers
        ]
        # [captions, examples, length], as `_table` makes them.
        self._tables = torch.stack(tables)

    def first(self, examples: np.ndarray) -> Int[Tensor, "examples length"]:
        """The asked caption of each; of several the first."""
        return self._tables[0, examples]

    def seen(self, examples: np.ndarray, views: np.ndarray) -> Int[Tensor, "examples length"]:
        """The asked caption of each, drawn for each view where there are several."""
        if not self.drawn:
            return self.first(examples)
        chosen = draws(views, self.key) % self.numbers[examples].astype(np.uint64)
        return self._tables[chosen.astype(np.int64), examples]


def _table(
    source: Source, codec: TextCodec, length: int, caption: int
) -> Int[Tensor, "examples length"]:
    """Each picture's caption alone, with end-of-text after it."""
    head = 1 if source.begin_of_text is None else 2
    found = torch.full((len(source), length), codec.end_of_text, dtype=torch.int64)
    # A picture may have fewer synthetic captions than another.
    numbers = source.num_synthetic(np.arange(len(source)))
    for example in np.flatnonzero(numbers >= caption).tolist():
        tokens = source.input_ids(example, caption)[head:].astype(np.int64)
        if len(tokens) > length:
            raise ValueError(
                f"{source.describe(example, caption)}: the caption has {len(tokens)} tokens, the "
                f"text tower takes {length}; raise max_text_tokens"
            )
        found[example, : len(tokens)] = torch.from_numpy(tokens)
    return found


def _shuffled(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    found = np.empty_like(positions)
    for epoch in np.unique(positions // size):
        mine = positions // size == epoch
        found[mine] = permuted(positions[mine] % size, size, f"{seed}/captions/epoch {epoch}")
    return found
