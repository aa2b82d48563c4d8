"""Exported folders that stock classes of `transformers` read, and what all folders hold.

Of a tower the blocks above the features are left out, so that these are its last hidden states.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from midstream.config import EncoderConfig, TransformersDecoderConfig, VLMConfig
from midstream.core.storage import read_json, write_bytes, write_json
from midstream.data.examples import IMAGE_MARK, SEPARATOR, TextCodec, begins_with, question_ids
from midstream.exchange.towers import own_name, own_tensors, stock_tensors
from midstream.model.decoder import Decoder
from midstream.model.pretrained import TransformersDecoder, transformers_config
from midstream.model.vision import VisionEncoder, library_config
from midstream.model.vlm import VLM

# Texts on which a folder's tokenizer must give the codec's ids.
_PROBES = ("What colour is it?", "Wie viele  Äpfel\nliegen da: 3, 17 or 2049?", "it's \t 数える 🙂")


def image_token(codec: TextCodec) -> int:
    """The id of `<image>`: the tokenizer's own, else the first one behind all others."""
    held = codec.tokenizer.token_to_id(IMAGE_MARK)
    return codec.size if held is None else int(held)


def write_words(codec: TextCodec, folder: Path, *, sees: bool, chats: bool) -> None:
    """tokenizer.json and its settings, with the image's token where it `sees`; chat_template.jinja
    where it `chats`, which refuses pictures unless it sees.

    A text begins as the codec's texts do, and nothing is put behind it; pieces between special
    tokens are read as texts of their own, as the codec reads them.
    """
    tokenizer = Tokenizer.from_str(codec.tokenizer.to_str())
    if sees:
        tokenizer.add_special_tokens([AddedToken(IMAGE_MARK, special=True)])
        if tokenizer.token_to_id(IMAGE_MARK) != image_token(codec):
            raise ValueError(
                f"{IMAGE_MARK} got id {tokenizer.token_to_id(IMAGE_MARK)} from the tokenizer, the "
                f"first free one is {image_token(codec)}; its ids have gaps, renumber its tokens"
            )
    begin = "".join(str(codec.tokenizer.id_to_token(number)) for number in codec.begin_ids)
    if begin:
        tokenizer.post_processor = begins_with(begin, codec.begin_ids[0])
    content = json.loads(tokenizer.to_str())
    if not begin:
        content["post_processor"] = None
    for part in _parts(content["pre_tokenizer"]):
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "always"
    write_json(folder / "tokenizer.json", content)
    end_of_text = codec.tokenizer.id_to_token(codec.end_of_text)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        **({"bos_token": begin} if begin else {}),
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / "tokenizer_config.json", settings)
    if chats:
        template = _resource("chat_template.jinja")
        if not sees:
            # A tokenizer adds nothing to a chat, where a processor's adds what begins a text.
            template = template.replace('begin = ""', f"begin = {json.dumps(begin)}")
            template = template.replace(f'image_mark = "{IMAGE_MARK}"', 'image_mark = ""')
        write_bytes(folder / "chat_template.jinja", template.encode())


def write_code(folder: Path, *names: str) -> None:
    """Copies of files of `modeling/`."""
    for name in names:
        write_bytes(folder / name, _resource(f"modeling/{name}").encode())


def _check_tokenizer(folder: Path, codec: TextCodec, config: Any, *, chats: bool) -> None:
    """ValueError if transformers, whose class follows the model's, reads it otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    # Tokens from all over the vocabulary: where texts are cut otherwise, some come out otherwise.
    some = range(0, codec.size, max(1, codec.size // 512))
    for text in (*_PROBES, " ".join(codec.decode([one]) for one in some)):
        expected = {text: [*codec.begin_ids, *codec.encode(text)]}
        if chats:
            asked = f"In: {text}\nOut:{SEPARATOR}"
            expected[asked] = question_ids(codec, text, has_image=False)
        for written, ids in expected.items():
            found = tokenizer(written)["input_ids"]
            if found != ids:
                raise ValueError(
                    f"{type(tokenizer).__name__}, by which transformers reads {config.model_type} "
                    f"models, makes {found[:20]} of {written[:40]!r}, the model was trained on "
                    f"{ids[:20]}; this tokenizer cannot be exported with this family"
                )


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield content
        for part in content.get("pretokenizers", []):
            yield from _parts(part)


def _resource(name: str) -> str:
    return files("midstream.exchange").joinpath(name).read_text(encoding="utf-8")


OPENLM_CODE = ("modeling_openlm.py",)


def text_config(decoder: Decoder | TransformersDecoder, codec: TextCodec) -> Any:
    """The decoder's configuration as `transformers` has it, with the codec's special ids."""
    if isinstance(decoder, TransformersDecoder):
        config = transformers_config(decoder.config)
        # Whoever runs a part of a whole model by itself asks which class it has.
        config.architectures = [type(decoder.model).__name__]
    else:
        from midstream.exchange.modeling.modeling_openlm import OpenLMConfig

        ours = decoder.config
        config = OpenLMConfig(
            vocab_size=ours.vocab_size,
            hidden_size=ours.hidden_size,
            intermediate_size=ours.ffn_size,
            num_hidden_layers=ours.num_layers,
            num_attention_heads=ours.num_heads,
            qk_norm=ours.qk_norm,
            norm_eps=ours.norm_eps,
            rope_base=ours.rope_base,
        )
    config.bos_token_id = codec.begin_of_text
    config.eos_token_id = config.pad_token_id = codec.end_of_text
    return config


def text_weights(decoder: Decoder | TransformersDecoder) -> dict[str, Tensor]:
    """The decoder's tensors under the names of the exported class."""
    state = cast(nn.Module, decoder).state_dict()
    if isinstance(decoder, TransformersDecoder):
        return {name.removeprefix("model."): value for name, value in state.items()}
    return {f"model.{name}": value for name, value in state.items()}


def write_text(
    decoder: Decoder | TransformersDecoder, codec: TextCodec, folder: Path, *, chats: bool
) -> nn.Module:
    """Write the folder and return the model as read back from it.

    With `chats` it stops at the separator, too, and has a chat template.
    """
    from transformers import AutoModelForCausalLM

    config = text_config(decoder, codec)
    if isinstance(decoder, TransformersDecoder):
        build: Any = AutoModelForCausalLM.from_config
    else:
        from midstream.exchange.modeling.modeling_openlm import OpenLMForCausalLM

        build = OpenLMForCausalLM
        config.auto_map = {
            "AutoConfig": "modeling_openlm.OpenLMConfig",
            "AutoModelForCausalLM": "modeling_openlm.OpenLMForCausalLM",
        }
        write_code(folder, *OPENLM_CODE)
    weights = text_weights(decoder)
    return finish(build, config, weights, codec, folder, sees=False, chats=chats)


def finish(
    build: Any,
    config: Any,
    weights: Mapping[str, Tensor],
    codec: TextCodec,
    folder: Path,
    *,
    sees: bool,
    chats: bool,
    suppressed: tuple[int, ...] = (),
) -> nn.Module:
    """Write the words of `write_words`, and a model of `transformers` that holds exactly these
    tensors; returns it as read back, in float32 and in evaluation mode.

    It is greedy and stops where Midstream does: at end of text and, where it chats, at the
    separator. Nothing is drawn or copied: the model shares the tensors' memory. Raises ValueError
    if transformers reads the tokenizer otherwise than the codec.
    """
    from transformers import GenerationConfig

    write_words(codec, folder, sees=sees, chats=chats)
    with torch.device("meta"):
        model = build(config)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=sorted(codec.stop_ids) if chats else [codec.end_of_text],
        pad_token_id=codec.end_of_text,
        **({"suppress_tokens": list(suppressed)} if suppressed else {}),
    )
    model.save_pretrained(folder, state_dict=_with_older_names(model.state_dict(), config))
    _add_older_names(folder / "config.json")
    for weights_file in folder.glob("*.safetensors"):
        # They are written for their owner's eyes only.
        weights_file.chmod((folder / "config.json").stat().st_mode)
    _check_tokenizer(folder, codec, config, chats=chats)
    again: nn.Module = type(model).from_pretrained(folder, dtype=torch.float32)
    return again.eval()


def _with_older_names(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A Llava's tensors as those of all published ones are named: transformers from 5.6 on has no
    `vision_model` inside a CLIP's or SigLIP's tower any more, and older ones, and programs that
    read its files, find no tower without."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        return state
    start = "model.vision_tower."
    return {name.replace(start, f"{start}vision_model.", 1): one for name, one in state.items()}


def _add_older_names(path: Path) -> None:
    """Say the rotary settings in a config.json by the names of transformers 4 as well: it, and
    programs built on it, silently turn by base 10,000 where they find `rope_parameters` alone."""
    content = read_json(path)
    for settings in (content, content.get("text_config", {})):
        rope = dict(settings.get("rope_parameters") or {})
        is_neox = settings.get("model_type") == "gpt_neox"
        base, part = (
            ("rotary_emb_base", "rotary_pct")
            if is_neox
            else ("rope_theta", "partial_rotary_factor")
        )
        for name, older in (("rope_theta", base), ("partial_rotary_factor", part)):
            if name in rope:
                settings[older] = rope.pop(name)
        if rope.get("rope_type", "default") != "default":
            settings["rope_scaling"] = rope
    write_json(path, content)


def no_llava(config: VLMConfig) -> str | None:
    """Why stock Llava classes cannot compute this model; None if they do."""
    encoder, projector = config.encoder, config.projector
    if not isinstance(config.decoder, TransformersDecoderConfig):
        return "the decoder is OpenLM's"
    if config.decoder.tied_embeddings and config.decoder.model_type == "gpt_neox":
        return "Llava does not know where a GPT-NeoX model has its tied embeddings"
    if config.attention == "prefix":
        return "image and question see each other"
    if config.attention == "pictures":
        return "the positions of a picture see each other"
    if config.attention == "latest":
        return "a text sees the latest picture alone"
    if not isinstance(encoder, EncoderConfig):
        return f"the encoder is not one tower but {getattr(encoder, 'kind', None)}"
    if encoder.family == "siglip2":
        return "Llava does not cut pictures into siglip2's patches"
    if encoder.family == "dinov3" or encoder.num_registers:
        named = {"dinov2": "DINOv2", "dinov3": "DINOv3"}[encoder.family]
        return f"Llava does not leave {named}'s registers out"
    if encoder.final_norm:
        return "Llava takes hidden states before the tower's final norm"
    if encoder.position_size not in (None, encoder.image_size):
        return f"positions are interpolated from {encoder.position_size} pixels"
    if projector.reduction is not None:
        return f"Llava has no {projector.reduction.kind} connector"
    if projector.num_layers == 2 and projector.hidden != "decoder":
        return "the projector's inner width is not the decoder's"
    if projector.num_layers == 3:
        return "the projector has three layers"
    return None


def write_llava(
    vlm: VLM, codec: TextCodec, encoder: VisionEncoder, folder: Path
) -> tuple[nn.Module, tuple[str, ...]]:
    """Write the folder; the model as read back from it, and notes on what differs."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tower = vlm.config.encoder
    assert isinstance(tower, EncoderConfig)
    rows, token = vlm.config.decoder.vocab_size, image_token(codec)
    text = text_config(vlm.decoder, codec)
    text.vocab_size = max(rows, token + 1)
    config = LlavaConfig(
        vision_config=library_config(tower),
        text_config=text,
        image_token_index=token,
        image_seq_length=tower.num_patches,
        projector_hidden_act="linear" if vlm.config.projector.num_layers == 1 else "gelu",
        vision_feature_select_strategy="default" if tower.num_prefix else "full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(config).state_dict()
    names = {name: value for name, value in empty.items() if "vision_tower." in name}
    weights = _vision_weights(encoder, names)
    weights |= _projector_weights(vlm) | _decoder_weights(vlm, text.vocab_size)
    suppressed = (token,) if token >= rows else ()
    _write_processor(tower, folder)
    model = finish(
        LlavaForConditionalGeneration,
        config,
        weights,
        codec,
        folder,
        sees=True,
        chats=True,
        suppressed=suppressed,
    )
    notes: tuple[str, ...] = (
        "Pictures are resized by the stock image processor; one that has the encoder's size keeps "
        "its pixels, others come out a little differently.",
    )
    if suppressed:
        notes += (
            f"The vocabulary has one more row, {token}, for {IMAGE_MARK}; its logit is 0 and "
            "generation never takes it.",
        )
    return model, notes


def _vision_weights(encoder: VisionEncoder, names: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the stock model; what no feature depends on is at its neutral value."""
    start = "model.vision_tower."
    theirs = {name.removeprefix(start): value for name, value in names.items()}
    unused = {name for name in theirs if own_name(name).startswith("norm.")}
    found = stock_tensors(own_tensors(encoder.state_dict()), theirs.keys() - unused)
    for name in unused:
        fill = torch.zeros_like if name.endswith("bias") else torch.ones_like
        found[name] = fill(theirs[name], device="cpu")
    return {start + name: value for name, value in found.items()}


def _projector_weights(vlm: VLM) -> dict[str, Tensor]:
    """A single layer is Llava's two with an identity behind and no activation between."""
    assert vlm.projector is not None
    width = vlm.config.decoder.hidden_size
    first, *others = (layer for layer in vlm.projector if isinstance(layer, nn.Linear))
    second = {"weight": torch.eye(width), "bias": torch.zeros(width)}
    layers = [first.state_dict(), others[0].state_dict() if others else second]
    return {
        f"model.multi_modal_projector.linear_{number}.{name}": value
        for number, layer in enumerate(layers, start=1)
        for name, value in layer.items()
    }


def _decoder_weights(vlm: VLM, vocab_size: int) -> dict[str, Tensor]:
    """By the names of the stock model, the vocabulary filled up with rows of zeros."""
    decoder = vlm.decoder
    assert isinstance(decoder, TransformersDecoder)
    base = f"{decoder.model.base_model_prefix}."
    vocabulary = (decoder.model.get_input_embeddings().weight, decoder.output.weight)
    rows = {part.data_ptr() for part in vocabulary}
    found = {}
    for name, value in text_weights(decoder).items():
        if value.data_ptr() in rows and vocab_size > len(value):
            value = nn.functional.pad(value, (0, 0, 0, vocab_size - len(value)))
        inner = name.startswith(base)
        found[f"model.language_model.{name.removeprefix(base)}" if inner else name] = value
    return found


def _write_processor(tower: EncoderConfig, folder: Path) -> None:
    """The picture's way to pixels: as near to `data/images.py` as stock settings come."""
    side = {"height": tower.image_size, "width": tower.image_size}
    crops = tower.resize == "crop"
    pictures = {
        "image_processor_type": "LlavaImageProcessor",
        "do_convert_rgb": True,
        "do_pad": tower.resize == "letterbox",
        "do_resize": True,
        "size": {"shortest_edge": tower.image_size} if crops else side,
        "resample": 3,
        "do_center_crop": crops,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(tower.pixel_mean),
        "image_std": list(tower.pixel_std),
        "processor_class": "LlavaProcessor",
    }
    has_class_token = tower.num_prefix > 0
    words = {
        "processor_class": "LlavaProcessor",
        "patch_size": tower.patch_size,
        "vision_feature_select_strategy": "default" if has_class_token else "full",
        "num_additional_image_tokens": int(has_class_token),
        "image_token": IMAGE_MARK,
    }
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "processor_config.json", words)
