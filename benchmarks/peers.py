"""Training steps of other systems at given sizes, for `train_step.py`.

OpenLM and nanoVLM come from checkouts that are given by path (github.com/mlfoundations/open_lm,
github.com/huggingface/nanoVLM); `transformers` builds its models from a config. Nothing of them is
copied. Each step is their own model and loss as they train: logits at every position, rows padded
to their length, a frozen encoder without gradients, fused AdamW and clipping.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from midstream.config import AdamW, DecoderConfig, EncoderConfig
from openlm_parity import theirs

IGNORED = -100
SETTINGS = AdamW()
Step = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One row for everyone: ids, targets (the next token, or IGNORED), pixels, where patches stand.

    input_ids, targets [1, length]; pixels [1, 3, size, size] or None; patches stand at
    0 ... num_patches - 1.
    """

    input_ids: Tensor
    targets: Tensor
    pixels: Tensor | None
    num_patches: int


def step_of(model: nn.Module, loss_of: Callable[[], Tensor], device: torch.device) -> Step:
    """One step of a plain loop: backward, clip, fused AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=1e-4,
        betas=(SETTINGS.beta1, SETTINGS.beta2),
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        fused=True,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS.clip_norm)
        optimizer.step()
        return float(loss.detach())

    return step


def openlm_text(checkout: Path, config: DecoderConfig, row: Row, device: torch.device) -> Step:
    """OpenLM's transformer."""
    model = theirs(checkout, config).to(device)

    def loss() -> Tensor:
        logits = model(row.input_ids)[0]
        return cross_entropy(logits.flatten(0, 1).float(), row.targets.flatten())

    return step_of(model, loss, device)


def llama_text(config: DecoderConfig, row: Row, device: torch.device) -> Step:
    """`transformers`' Llama of the same sizes, with its own loss."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(_llama(config)).to(device)

    def loss() -> Tensor:
        found: Tensor = model(row.input_ids, shift_labels=row.targets, labels=row.targets).loss
        return found

    return step_of(model, loss, device)


def nanovlm_text(checkout: Path, config: DecoderConfig, row: Row, device: torch.device) -> Step:
    """nanoVLM's language model, fed with tokens."""
    settings = _nanovlm(checkout, config, None, row)
    settings.lm_use_tokens = True
    model = importlib.import_module("models.language_model").LanguageModel(settings).to(device)

    def loss() -> Tensor:
        logits = model(row.input_ids)[0]
        return cross_entropy(logits.flatten(0, 1), row.targets.flatten())

    return step_of(model, loss, device)


def llava_image(
    config: DecoderConfig, encoder: EncoderConfig, row: Row, device: torch.device
) -> Step:
    """`transformers`' LLaVA: a SigLIP tower, an MLP, a Llama."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    tower = SiglipVisionConfig(
        hidden_size=encoder.hidden_size,
        intermediate_size=encoder.intermediate_size,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        vision_use_head=False,
    )
    image_token = config.vocab_size - 1
    whole = LlavaConfig(
        vision_config=tower,
        text_config=_llama(config),
        image_token_index=image_token,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(whole).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    input_ids = row.input_ids.clone()
    input_ids[:, : row.num_patches] = image_token

    def loss() -> Tensor:
        found: Tensor = model(
            input_ids=input_ids,
            pixel_values=row.pixels,
            shift_labels=row.targets,
            labels=row.targets,
        ).loss
        return found

    return step_of(model, loss, device)


def nanovlm_image(
    checkout: Path, config: DecoderConfig, encoder: EncoderConfig, row: Row, device: torch.device
) -> Step:
    """nanoVLM's tower, connector (one patch a token) and language model, as its forward joins them.

    Its class for the whole would fetch a tokenizer; the parts are its own.
    """
    settings = _nanovlm(checkout, config, encoder, row)
    parts = {
        "tower": importlib.import_module("models.vision_transformer").ViT(settings),
        "connector": importlib.import_module("models.modality_projector").ModalityProjector(
            settings
        ),
        "language": importlib.import_module("models.language_model").LanguageModel(settings),
    }
    model = nn.ModuleDict(parts).to(device)
    model["tower"].requires_grad_(requires_grad=False)

    def loss() -> Tensor:
        language: Any = model["language"]
        embeddings = language.token_embedding(row.input_ids).clone()
        with torch.no_grad():
            looked = model["tower"](row.pixels)
        embeddings[:, : row.num_patches] = model["connector"](looked)
        logits = language.head(language(embeddings)[0])
        return cross_entropy(logits.flatten(0, 1), row.targets.flatten(), ignore_index=IGNORED)

    return step_of(model, loss, device)


def _llama(config: DecoderConfig) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
        use_cache=False,
    )


def _nanovlm(checkout: Path, config: DecoderConfig, encoder: EncoderConfig | None, row: Row) -> Any:
    if not (checkout / "models" / "language_model.py").is_file():
        raise ValueError(f"{checkout} is no checkout of nanoVLM: it has no models/")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
        # Its whole model imports processors of images and texts that the parts do not need.
        sys.modules.setdefault("data", types.ModuleType("data"))
    settings = importlib.import_module("models.config").VLMConfig()
    settings.lm_hidden_dim, settings.lm_inter_dim = config.hidden_size, config.ffn_size
    settings.lm_n_heads = settings.lm_n_kv_heads = config.num_heads
    settings.lm_n_blocks = config.num_layers
    settings.lm_vocab_size = settings.lm_base_vocab_size = config.vocab_size
    settings.extra_token_amount = 0
    settings.lm_tie_weights = False
    if encoder is not None:
        settings.vit_hidden_dim, settings.vit_inter_dim = (
            encoder.hidden_size,
            encoder.intermediate_size,
        )
        settings.vit_patch_size, settings.vit_img_size = encoder.patch_size, encoder.image_size
        settings.vit_n_heads, settings.vit_n_blocks = encoder.num_heads, encoder.num_layers
        settings.mp_pixel_shuffle_factor = 1
        settings.mp_image_token_length = row.num_patches
    return settings
