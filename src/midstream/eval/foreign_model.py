"""Opening a model of `transformers` as it was published, or refusing it; its digest."""

import hashlib
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from midstream.core.digests import is_hidden, is_note
from midstream.core.identity import file_sha256
from midstream.model.weights import some
from midstream.study.imported import RECORD

# What a model may lack: no answer depends on it, or it is computed.
_SPARE = re.compile(r"vis.*\.head\.|(^|\.)(pooler|position_ids|inv_freq)(\.|$)")
# One answer a prompt, the likeliest token each time, whatever a folder's generation_config.json
# says; its end tokens and penalties stay.
_GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "max_time": None,
}
_THOUGHTS, _THOUGHTS_END = "<think>", "</think>"
LLAVAS_OWN = (
    "is of LLaVA's own code (mm_vision_tower), whose files have other names and no tower; name the "
    "same model as transformers has it (llava-hf/...)"
)


def open_config(name: str, trusted: dict[str, bool]) -> Any:
    """The configuration of a folder, or of a name on the hub.

    Raises FileNotFoundError where there is none, ValueError for an adapter, an imported folder, a
    model that wants its own code, or that this `transformers` does not know.
    """
    from transformers import AutoConfig

    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} is an adapter without its model; merge the two (peft: merge_and_unload, "
            "save_pretrained) and name the folder that this writes"
        )
    if (folder / RECORD).is_file():
        raise ValueError(
            f"{name} was imported for recipes, which evaluate it; to ask it here name the "
            "folder or the hub's name that it came from"
        )
    try:
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError("a folder without one")
        config = AutoConfig.from_pretrained(name, **trusted)
    except OSError as error:
        told = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"{name} does not exist or holds no config.json ({told}); give a model's whole folder, "
            "or its name on the hub"
        ) from None
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} brings code of its own, to be read first; then say --trust-remote-code"
            ) from None
        told = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(
            f"{name}: transformers {_version('transformers')} cannot read its config.json "
            f"({told}); a newer transformers may"
        ) from None

    if hasattr(config, "mm_vision_tower") and not hasattr(config, "auto_map"):
        raise ValueError(f"{name} {LLAVAS_OWN}")
    return config


def amend(config: Any, device: str) -> None:
    """Take back what a config.json asks for and cannot be had: FlashAttention on a machine without
    it (`transformers` then chooses), a pad token without a row (it makes no model with that)."""
    from transformers.utils import is_flash_attn_2_available

    stated = str(getattr(config, "_attn_implementation", None))
    has_flash = device == "cuda" and is_flash_attn_2_available()
    if stated.startswith("flash_attention") and not has_flash:
        config._attn_implementation = None
    for one in (config, getattr(config, "text_config", None) or config):
        rows = getattr(one, "vocab_size", None)
        if rows is not None and not _has_row(getattr(one, "pad_token_id", None), rows):
            one.pad_token_id = None


def _has_row(token: int | None, rows: int) -> bool:
    return token is None or 0 <= token < rows


def _complete(processor: Any, config: Any) -> None:
    """What Llavas' processors count a picture's tokens by, from the model where they say nothing.

    Older folders have none of it, as the model counted them itself.
    """
    tower = getattr(config, "vision_config", None)
    if not hasattr(processor, "num_additional_image_tokens") or tower is None:
        return
    if processor.patch_size is None:
        processor.patch_size = getattr(tower, "patch_size", None)
    if processor.vision_feature_select_strategy is None:
        told = getattr(config, "vision_feature_select_strategy", "default")
        processor.vision_feature_select_strategy = told
    if tower.model_type == "clip_vision_model":
        processor.num_additional_image_tokens = 1  # its class token


def open_processor(name: str, config: Any, trusted: dict[str, bool]) -> Any:
    """A model's processor; ValueError, with what to do, where there is none that opens."""
    import transformers

    lacks = "that can be opened"
    try:
        processor = transformers.AutoProcessor.from_pretrained(name, **trusted)
        if isinstance(processor, transformers.ProcessorMixin):
            _complete(processor, config)
            return processor
        lacks = f"but a {type(processor).__name__}"
    except Exception as error:  # whatever a processor's own code raises
        told = " ".join(str(error).split())
        lacks += f" ({told})"
        absent = not transformers.utils.is_torchvision_available()
        if absent and any(word in told.lower() for word in ("torchvision", "video")):
            raise ValueError(
                f"{name}: its processor needs torchvision; pip install torchvision"
            ) from None
    raise ValueError(
        f"{name} has weights and no processor {lacks}; put its processor_config.json or "
        "preprocessor_config.json beside the weights"
    )


def open_weights(name: str, config: Any, kind: str, options: dict[str, Any]) -> Any:
    """The model by an auto class, with all its tensors from the files; it decodes greedily.

    Raises ValueError for a configuration that the class has no model for, for a broken file, and
    for files that lack tensors, which `transformers` would draw at random and say so in a log
    alone, or have them in another shape.
    """
    import transformers
    from safetensors import SafetensorError

    auto = getattr(transformers, kind)
    known, own = type(config) in auto._model_mapping, getattr(config, "auto_map", None) or {}
    if not known and kind not in own:
        offers = f" (its own code offers {', '.join(own)}, not {kind})" if own else ""
        raise ValueError(
            f"{name} is a {config.model_type}, of which transformers {_version('transformers')} "
            f"has no model that writes text{offers}; name a model that has one"
        )
    logging = transformers.logging
    verbosity = logging.get_verbosity()
    # What it would say of missing tensors in a table is said below.
    logging.set_verbosity_error()
    try:
        model, told = auto.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise ValueError(
            f"{name}: a weight file is broken ({error}); was it downloaded to its end?"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    wrong = [
        f"{key} is {list(file)}, not {list(own)}" for key, file, own in told["mismatched_keys"]
    ]
    if wrong:
        raise ValueError(
            f"{name}: its weight files do not fit its config.json: {some(wrong)}; put the "
            "sizes that they were saved with into config.json"
        )
    lacking = [one for one in told["missing_keys"] if not _SPARE.search(one)]
    if lacking:
        foreign = told["unexpected_keys"]
        held = f" and hold {some(foreign)} in their place" if foreign else ""
        raise ValueError(
            f"{name}: its weight files lack {some(lacking)} of a {type(model).__name__}{held}; "
            "nothing is drawn at random: give the whole folder that save_pretrained wrote (an "
            "adapter merged, names without what a trainer put before them)"
        )
    settings = getattr(model, "generation_config", None)
    for key, value in _GREEDY.items() if settings is not None else ():
        setattr(settings, key, value)
    rows = len(model.get_input_embeddings().weight)
    if settings is not None and not _has_row(settings.pad_token_id, rows):
        settings.pad_token_id = None  # an answer that ended is filled up with its end
    return model


def without_thoughts(text: str) -> str:
    """An answer without the thoughts (`<think>...</think>`) that stand before it; empty where they
    did not come to their end."""
    _, end, answer = text.rpartition(_THOUGHTS_END)
    return "" if not end and answer.lstrip().startswith(_THOUGHTS) else answer.strip()


def digest_of(folder: Path, config: Any, dtype: Any) -> str:
    """Stands for what answers depend on: all files of a folder, or the commit on the hub."""
    # torch is left out: its versions differ in last bits alone.
    found = [f"{name} {_version(name)}" for name in ("transformers", "tokenizers", "torchvision")]
    found += [f"pillow {_version('pillow')}", str(dtype)]
    if any("--" in str(place) for place in (getattr(config, "auto_map", None) or {}).values()):
        found.append(type(config).__module__)  # code of another repository, with its commit
    if folder.is_dir():
        below = [*folder.glob("*"), *folder.rglob("*.py"), *folder.glob("*/*.jinja")]
        for path in sorted({path for path in below if path.is_file()}):
            name = path.relative_to(folder)
            if not any(map(is_hidden, name.parts)) and not is_note(path.name):
                found.append(f"{name.as_posix()} {file_sha256(path)}")
    else:
        # Where no commit is known, nothing that was asked before is known to be the same.
        found.append(f"hub {getattr(config, '_commit_hash', None) or os.urandom(16).hex()}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
