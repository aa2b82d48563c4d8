"""What every exported folder holds beside its weights: tokenizer, chat template, stop ids, code."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from midstream.data.examples import (
    IMAGE_MARK,
    SEPARATOR,
    TextCodec,
    begins_with,
    question_ids,
)
from midstream.storage import write_bytes, write_json

# Texts on which a folder's tokenizer must give the codec's ids.
_PROBES = ("What colour is it?", "Wie viele  Äpfel\nliegen da: 3, 17 or 2049?", "it's \t 数える 🙂")


def image_token(codec: TextCodec) -> int:
    """The id of `<image>`: the tokenizer's own, else the first one behind all others."""
    held = codec.tokenizer.token_to_id(IMAGE_MARK)
    return codec.size if held is None else int(held)


def write_tokenizer(codec: TextCodec, folder: Path, *, sees: bool) -> None:
    """tokenizer.json and its settings; with `sees` it has the image's token.

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
    begin = begin_token(codec)
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


def begin_token(codec: TextCodec) -> str:
    """What begins each text; "" where nothing does."""
    return "".join(str(codec.tokenizer.id_to_token(number)) for number in codec.begin_ids)


def write_chat_template(codec: TextCodec, folder: Path, *, sees: bool) -> None:
    """chat_template.jinja; without `sees` it refuses pictures.

    What begins a text is written by the template of a tokenizer, which adds nothing to a chat, and
    not by that of a processor, whose tokenizer does.
    """
    template = _resource("chat_template.jinja")
    if not sees:
        template = template.replace('begin = ""', f"begin = {json.dumps(begin_token(codec))}")
        template = template.replace(f'image_mark = "{IMAGE_MARK}"', 'image_mark = ""')
    write_bytes(folder / "chat_template.jinja", template.encode())


def write_code(folder: Path, *names: str) -> None:
    """Copies of files of `modeling/`."""
    for name in names:
        write_bytes(folder / name, _resource(f"modeling/{name}").encode())


def generation_config(codec: TextCodec, *, chats: bool, suppressed: tuple[int, ...] = ()) -> Any:
    """Greedy; stops where Midstream does: at end of text and, where it chats, at the separator."""
    from transformers import GenerationConfig

    stops = sorted(codec.stop_ids) if chats else [codec.end_of_text]
    more = {"suppress_tokens": list(suppressed)} if suppressed else {}
    return GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=codec.end_of_text, **more
    )


def check_tokenizer(folder: Path, codec: TextCodec, config: Any, *, chats: bool) -> None:
    """Raises ValueError if transformers reads the folder's tokenizer otherwise than the codec.

    `config` is the model's, on which the tokenizer's class depends.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, config=config)
    # Tokens from all over the vocabulary: where texts are cut otherwise, some come out otherwise.
    some = range(0, codec.size, max(1, codec.size // 512))
    for text in (*_PROBES, " ".join(codec.decode([one]) for one in some)):
        pairs = [(text, [*codec.begin_ids, *codec.encode(text)])]
        if chats:
            pairs.append(
                (f"In: {text}\nOut:{SEPARATOR}", question_ids(codec, text, has_image=False))
            )
        for written, expected in pairs:
            found = tokenizer(written)["input_ids"]
            if found != expected:
                raise ValueError(
                    f"{type(tokenizer).__name__}, by which transformers reads tokenizers of "
                    f"{config.model_type} models, makes {found[:20]} of {written[:40]!r}, the "
                    f"model was trained on {expected[:20]}; this tokenizer cannot be exported with "
                    "this family"
                )


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        yield content
        for part in content.get("pretokenizers", []):
            yield from _parts(part)


def _resource(name: str) -> str:
    return files("midstream.exchange").joinpath(name).read_text(encoding="utf-8")
