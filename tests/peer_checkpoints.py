"""Tiny random checkpoints of other people's vision-language models, with their processors.

Each is laid out as its family's published folders are: tokenizer, template, order of the special
tokens. Embeddings and heads are scaled up, so that answers differ from one prompt to the next.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCE = (
    "Is there a cat dog car in the image ? Yes No yes no True False A B C D red blue . Answer with "
    "using single word or phrase What colour is it : USER ASSISTANT user assistant model"
)
WORDS = SENTENCE.split()
PAIRED = [word for word in WORDS if word.isalpha()]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
VISION = SIZES | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SQUARE = {"height": 32, "width": 32}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """As GPT-2's, Qwen's and Llama 3's: a word has one token with a space and one without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*PAIRED, *(f" {word}" for word in PAIRED)] * 4, trainer)
    return tokenizer


def sentencepiece(prefix: str | None = "legacy") -> Tokenizer:
    """As Llama 2's: a mark stands for a space, and unknown characters are bytes.

    prefix: "legacy", where each text gets a mark in front, also one that begins with a space;
    "first" or "always" (`Metaspace`), where that one does not; None, as Gemma's.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix in ("first", "always"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    else:
        spaces = normalizers.Replace(" ", "▁")
        start = [normalizers.Prepend("▁")] if prefix == "legacy" else []
        tokenizer.normalizer = normalizers.Sequence([*start, spaces])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    words = WORDS if prefix else [*PAIRED, *(f" {word}" for word in WORDS)]
    tokenizer.train_from_iterator(words * 4, trainer)
    spaced, stripped = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [spaced, decoders.ByteFallback(), decoders.Fuse(), stripped]
    )
    return tokenizer


def fast(
    tokenizer: Tokenizer,
    special: Sequence[str] = (),
    *,
    adds_start: bool = False,
    named: dict[str, str] | None = None,
    **tokens: str,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder; with `adds_start` it puts its first token before each text."""
    tokenizer.add_special_tokens([*dict.fromkeys([*tokens.values(), *special])])
    if adds_start:
        start = tokens["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start} $B",
            special_tokens=[(start, tokenizer.token_to_id(start))],
        )
    more = {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", **tokens, **more
    )


def template(image: str, *, start: str = "", turn: str, text: str, end: str, asks: str) -> str:
    """A chat template: `turn` before a message's parts, `end` behind them, `asks` for a reply."""
    parts = (
        "{% for c in m.content %}{% if c.type == 'image' %}" + image + "{% elif c.type == 'text' %}"
        "" + text + "{% endif %}{% endfor %}"
    )
    return (
        f"{start}{{% for m in messages %}}{turn}{parts}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )


VICUNA = template(
    "<image>\n", turn="{{ m.role.upper() }}: ", text="{{ c.text + ' ' }}", end="", asks="ASSISTANT:"
)
CHAT_ML = template(
    "<|vision_start|><|image_pad|><|vision_end|>",
    turn="<|im_start|>{{ m.role }}\n",
    text="{{ c.text }}",
    end="<|im_end|>\n",
    asks="<|im_start|>assistant\n",
)
GEMMA = template(
    "<start_of_image>",
    start="{{ bos_token }}",
    turn="<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n",
    text="{{ c.text }}",
    end="<end_of_turn>\n",
    asks="<start_of_turn>model\n",
)
LLAMA3 = template(
    "<|image|>",
    start="{{ bos_token }}",
    turn="<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n",
    text="{{ c.text }}",
    end="<|eot_id|>",
    asks="<|start_header_id|>assistant<|end_header_id|>\n\n",
)
SMOL = template(
    "<image>",
    start="<|im_start|>",
    turn="{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}",
    text="{{ c.text }}",
    end="<end_of_utterance>\n",
    asks="Assistant:",
)
# Published PaliGemma folders have none; their processor writes the rest.
PALIGEMMA = template("<image>", turn="", text="{{ c.text }}", end="", asks="")


def save(kind: str, config: dict[str, Any], processor: Any, folder: Path, by: float = 8.0) -> None:
    """Write a new model of a kind, such as `Llava`, and its processor.

    Projections and tokens' rows are `by` times as large, but for rows that are tied (a model would
    repeat its last token); gates are open.
    """
    name = f"{kind}ForCausalLM" if kind == "Llama" else f"{kind}ForConditionalGeneration"
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**config))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    scaled = ("proj",) if tied else ("proj", "lm_head", "embed")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("_gate"):
                value.fill_(0.7)
            elif "mm_input_projection_weight" in name:
                value.normal_(0, 0.5)
            elif value.ndim > 1 and any(part in name for part in scaled):
                value.mul_(by)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def llama2() -> PreTrainedTokenizerFast:
    """Vicuna's tokenizer with LLaVA's tokens."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return fast(sentencepiece(), ["<image>"], adds_start=True, **named)


def gemma(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """Gemma's tokenizer with a family's tokens, those in `named` by their names as well."""
    marks = {f"{one}_token": f"<{one}>" for one in ("bos", "eos", "unk", "pad")}
    words = [*special, *named.values()]
    return fast(sentencepiece(None), words, adds_start=True, named=named or None, **marks)


def text_part(tokens: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """A decoder's settings for a tokenizer."""
    named = {f"{one}_token_id": getattr(tokens, f"{one}_token_id") for one in ("bos", "eos", "pad")}
    return {**TEXT, "vocab_size": len(tokens), **named, **more}


def llava(folder: Path, *, kind: str = "Llava", chat_template: str | None = VICUNA) -> None:
    """LLaVA 1.5; or 1.6 (`LlavaNext`), where a picture is a grid of crops, as many tokens as its
    shape asks for."""
    tokens, grid, pictures = llama2(), {}, "CLIPImageProcessorPil"
    if kind == "LlavaNext":
        grid = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
        pictures = "LlavaNextImageProcessorPil"
    config = {
        "vision_config": transformers.CLIPVisionConfig(**VISION),
        "text_config": transformers.LlamaConfig(**text_part(tokens)),
        "image_token_index": tokens.convert_tokens_to_ids("<image>"),
        "image_seq_length": 16,
        **grid,
    }
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=getattr(transformers, pictures)(
            size={"shortest_edge": 32}, crop_size=SQUARE, **grid
        ),
        tokenizer=tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
    save(kind, config, processor, folder)


def gemma3(folder: Path) -> None:
    """Gemma 3: the template writes the start token, picture tokens see each other."""
    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokens = gemma("<start_of_turn>", "<end_of_turn>", **named)
    config = {
        "vision_config": transformers.SiglipVisionConfig(**VISION),
        "text_config": transformers.Gemma3TextConfig(
            **text_part(tokens, head_dim=8, sliding_window=64)
        ),
        "mm_tokens_per_image": 4,
        **{f"{key}_index": tokens.convert_tokens_to_ids(name) for key, name in named.items()},
    }
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size=SQUARE),
        tokenizer=tokens,
        chat_template=GEMMA,
        image_seq_length=4,
    )
    save("Gemma3", config, processor, folder, by=12.0)


def paligemma(folder: Path) -> None:
    """PaliGemma: the question is a prefix that sees itself whole."""
    tokens = gemma("<image>")
    pictures = transformers.SiglipImageProcessorPil(size=SQUARE)
    pictures.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(
        image_processor=pictures, tokenizer=tokens, chat_template=PALIGEMMA
    )
    config = {
        "vision_config": transformers.SiglipVisionConfig(**VISION, projection_dim=32),
        "text_config": transformers.GemmaConfig(**text_part(tokens, head_dim=8)),
        "image_token_index": tokens.convert_tokens_to_ids("<image>"),
        "projection_dim": 32,
        "hidden_size": 32,
    }
    save("PaliGemma", config, processor, folder)


def mllama(folder: Path) -> None:
    """Llama 3.2 Vision: pictures stand beside the text, and the picture's token has no logit."""
    tokens = fast(
        byte_level(),
        ["<|image|>", "<|start_header_id|>", "<|end_header_id|>"],
        adds_start=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )
    vision = {key: value for key, value in VISION.items() if key != "num_attention_heads"}
    config = {
        "vision_config": {
            **vision,
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
        "text_config": text_part(
            tokens,
            num_hidden_layers=3,
            cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "image_token_index": tokens.convert_tokens_to_ids("<|image|>"),
    }
    processor = transformers.MllamaProcessor(
        image_processor=transformers.MllamaImageProcessorPil(size=SQUARE, max_image_tiles=2),
        tokenizer=tokens,
        chat_template=LLAMA3,
    )
    save("Mllama", config, processor, folder)


def idefics3(folder: Path, *, smol: bool = False) -> None:
    """Idefics 3, or SmolVLM, whose processor wants torchvision and num2words."""
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokens = fast(
        byte_level(),
        [*named.values(), *rows],
        named=named,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
    )
    kind = "SmolVLM" if smol else "Idefics3"
    config = {
        "vision_config": VISION,
        "text_config": transformers.LlamaConfig(**text_part(tokens)),
        "scale_factor": 2,
        "image_token_id": tokens.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokens.pad_token_id,
    }
    pictures = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    parts = {"image_processor": pictures, "tokenizer": tokens}
    processor = put_together(f"{kind}Processor", parts, SMOL, {"image_seq_len": 4})
    save(kind, config, processor, folder)


def qwen(folder: Path, *, version: str = "2") -> None:
    """Qwen2-VL, or Qwen2.5-VL; their processor wants torchvision for videos."""
    named = {
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
    }
    tokens = fast(
        byte_level(),
        ["<|im_start|>", *named.values()],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    sizes: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    if version == "2":
        sizes |= {"embed_dim": 32, "mlp_ratio": 2}
    else:
        sizes |= {"out_hidden_size": 32, "intermediate_size": 64, "window_size": 32}
        sizes["fullatt_block_indexes"] = [1]
    kind = "Qwen2VL" if version == "2" else "Qwen2_5_VL"
    config = {
        "vision_config": sizes,
        "text_config": {
            **TEXT,
            "vocab_size": len(tokens),
            "bos_token_id": None,
            "eos_token_id": tokens.eos_token_id,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        **{f"{key}_token_id": tokens.convert_tokens_to_ids(one) for key, one in named.items()},
    }
    pictures = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, min_pixels=16 * 16, max_pixels=64 * 64
    )
    parts = {"image_processor": pictures, "tokenizer": tokens}
    processor = put_together(f"{kind}Processor", parts, CHAT_ML, {})
    save(kind, config, processor, folder)


def put_together(name: str, parts: dict[str, Any], text: str, more: dict[str, Any]) -> Any:
    """A processor of the library's class from its parts, videos left out where they are missing."""
    whole = getattr(transformers, name)
    if "video_processor" not in whole.get_attributes():
        return whole(**parts, **more, chat_template=text)
    blind = type(name, (whole,), {"get_attributes": classmethod(lambda _cls: list(parts))})
    made = blind.__new__(blind)
    tokens = parts["tokenizer"]
    transformers.ProcessorMixin.__init__(made, **parts, chat_template=text)
    if name.startswith("Qwen"):
        for kind in ("image", "video"):
            setattr(made, f"{kind}_token", f"<|{kind}_pad|>")
            setattr(made, f"{kind}_token_id", tokens.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    else:
        for key in ("fake_image", "image", "end_of_utterance", "global_image"):
            setattr(made, f"{key}_token", getattr(tokens, f"{key}_token"))
        made.image_token_id = tokens.convert_tokens_to_ids("<image>")
    for key, value in more.items():
        setattr(made, key, value)
    return made


def language_model(folder: Path) -> None:
    """A Llama without eyes, with a chat template."""
    tokens = llama2()
    tokens.chat_template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    save("Llama", text_part(tokens), tokens, folder)


BUILD: dict[str, Callable[[Path], None]] = {
    "LLaVA 1.5": llava,
    "LLaVA-NeXT": lambda folder: llava(folder, kind="LlavaNext"),
    "Qwen2-VL": qwen,
    "Qwen2.5-VL": lambda folder: qwen(folder, version="2.5"),
    "Gemma 3": gemma3,
    "Llama 3.2 Vision": mllama,
    "Idefics 3": idefics3,
    "SmolVLM": lambda folder: idefics3(folder, smol=True),
    "PaliGemma": paligemma,
}


def build(family: str, folder: Path, *, seed: int = 0) -> None:
    """Write a family's folder; equal seeds give equal weights, the global generator is left."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BUILD[family](folder)
