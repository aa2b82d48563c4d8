"""Folders of Hugging Face, brought here and seen to be whole; LoRA adapters with their base.

Code that a checkpoint brings along is never run.
"""

import filecmp
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midstream.config import TransformersDecoderConfig
from midstream.core.storage import read_json
from midstream.model.pretrained import PREFIX, TransformersDecoder, describe
from midstream.model.weights import check, read_tensors

# What a model's folder needs, and no more: repositories hold other formats and optimiser states.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "adapter_model.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model-*.bin")
# Names that downloads have while they are under way.
_UNFINISHED = ("*.incomplete", "*.part", "*.aria2", "*.crdownload")
_LFS = b"version https://git-lfs"
# What data parallelism, torch.compile, FSDP, activation checkpointing and Lightning's strategies
# put into names.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
ADAPTER = "adapter_config.json"

# -------------------------------------------------------------------------------------- the hub


def fetch(name: str, revision: str | None) -> Path:
    """The local folder of a hub model at a revision, downloaded where the cache lacks it.

    Safetensors where there are any, else torch files. Raises ValueError if the hub has no such
    model or revision, FileNotFoundError if the hub cannot be reached and the cache lacks it; both
    name the model, the revision and the way out.
    """
    from huggingface_hub import snapshot_download

    def download(patterns: tuple[str, ...]) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )

    folder = _from_hub(lambda: download(_SMALL + _SAFETENSORS), name, revision)
    if not any(folder.glob("*model*.safetensors*")):
        folder = _from_hub(lambda: download(_SMALL + _TORCH), name, revision)
    return folder


def _from_hub(download: Callable[[], Path], name: str, revision: str | None) -> Path:
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    at = f"{name} at revision {revision or 'main'}"
    page = f"https://huggingface.co/{name}"
    try:
        return download()
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"{name} has no revision {revision!r}; {page}/tree/main lists them"
        ) from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is given to those alone who accept its terms; do so at {page}, then log in "
            "with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no file or folder here, and the hub has no public model of this name; "
            "check the spelling, or log in with: hf auth login"
        ) from None
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"{name} is no file or folder, nor the name of a hub model"
        ) from None
    except OSError as error:
        why = (
            "HF_HUB_OFFLINE is set"
            if HF_HUB_OFFLINE
            else f"the hub did not answer ({(str(error).splitlines() or [''])[0]})"
        )
        raise FileNotFoundError(
            f"{at} is no file or folder here and not in the cache ({HF_HUB_CACHE}), and {why}; "
            f"download it with: hf download {name}"
            + (f" --revision {revision}" if revision else "")
        ) from None


def same_weights(name: str, revision: str, folder: Path, *, ask_hub: bool) -> tuple[str, ...]:
    """Other revisions of a hub model whose weight files are the very same: of those in the cache,
    and with `ask_hub` of `main` as the hub describes it, where it answers.

    `folder` is the local snapshot of `revision`.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    weights = sorted(item for pattern in (*_SAFETENSORS, *_TORCH) for item in folder.glob(pattern))
    refs = folder.parent.parent / "refs"
    commits = {item.name: item.read_text().strip() for item in refs.glob("*") if item.is_file()}
    same = []
    for other, commit in sorted(commits.items()):
        there = folder.parent / commit
        if other == revision or there == folder or not there.is_dir() or not weights:
            continue
        if all(_is_same(item, there / item.name) for item in weights):
            same.append(other)
    if ask_hub and weights and "main" not in commits and not HF_HUB_OFFLINE:
        mine, main = _digests(name, revision), _digests(name, "main")
        if all(mine.get(item.name, "") == main.get(item.name) for item in weights):
            same.append("main")
    return tuple(same)


def _is_same(one: Path, other: Path) -> bool:
    # The cache keeps one copy of equal files.
    if not other.is_file():
        return False
    return one.resolve() == other.resolve() or filecmp.cmp(one, other, shallow=False)


def _digests(name: str, revision: str) -> dict[str, str]:
    """The sha256 of a revision's large files, as the hub tells it; nothing if it does not."""
    from huggingface_hub import HfApi, errors

    try:
        files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    except (errors.HfHubHTTPError, OSError):
        return {}
    return {item.rfilename: item.lfs.sha256 for item in files if item.lfs is not None}


# ----------------------------------------------------------------------------------- the folder


def check_downloaded(folder: Path, *, needed: tuple[str, ...] = ("config.json",)) -> None:
    """Raises FileNotFoundError that names what a half-downloaded folder lacks or has unfinished.

    Whether each shard is there and whole is seen when they are read.
    """
    unfinished = sorted(
        str(item.relative_to(folder)) for pattern in _UNFINISHED for item in folder.rglob(pattern)
    )
    if unfinished:
        raise FileNotFoundError(
            f"{folder} is half downloaded: {', '.join(unfinished)}; finish the download"
        )
    pointers = sorted(item.name for item in folder.iterdir() if _is_pointer(item))
    if pointers:
        raise FileNotFoundError(
            f"{folder} holds pointers of Git LFS in place of {', '.join(pointers)}; "
            "get the files with: git lfs pull"
        )
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        held = ", ".join(sorted(os.listdir(folder))) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no {missing[0]}, only {held}; download the model to its end, or give an "
            "OpenLM epoch_N.pt (or, for OpenLM's safetensors alone, --num-heads)"
        )


def _is_pointer(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS


def read_decoder(
    folder: Path,
) -> tuple[TransformersDecoderConfig, dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """A causal language model: its configuration, its tensors under the names of
    `TransformersDecoder`, the names of those that it computes itself, and sentences about names.

    Tensors keep the file's dtype. Raises FileNotFoundError or ValueError as `describe` and
    `read_tensors` do, and naming tensors that are missing, unexpected or of another shape.
    """
    config = describe(read_config(folder))
    with torch.device("meta"):
        decoder = TransformersDecoder(config)
    known = decoder.state_dict().keys()
    stored, notes = unwrapped(
        read_tensors(folder), lambda name: decoder.parameter_name(name) in known, path=folder
    )
    tensors: dict[str, Tensor] = {}
    dropped = []
    for name, value in stored.items():
        ours = decoder.parameter_name(name)
        if ours is None:
            dropped.append(name)
        elif ours in tensors:
            raise ValueError(f"{folder} holds {ours} twice, the second time as {name}")
        else:
            tensors[ours] = value
    # Under the library's names, which are the file's.
    check(
        decoder.model,
        {name.removeprefix(PREFIX): value for name, value in tensors.items()},
        path=folder,
    )
    return config, tensors, tuple(sorted(dropped)), notes


def decoder_tensors(
    config: TransformersDecoderConfig, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a model of `transformers` under the names of `TransformersDecoder`, without those
    that it computes itself."""
    with torch.device("meta"):
        decoder = TransformersDecoder(config)
    named = {decoder.parameter_name(name): value for name, value in state.items()}
    return {name: value for name, value in named.items() if name is not None}


def unwrapped(
    tensors: Mapping[str, Tensor], fits: Callable[[str], bool], *, path: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under their model's own names, and a sentence if these were wrapped.

    What training wrappers put into names comes off, and so does a beginning that all share while
    not one `fits`. Raises ValueError if two names become one.
    """
    names = {name: _WRAPPERS.sub("", name) for name in tensors}
    taken = {found[0] for name in names for found in _WRAPPERS.finditer(name)}
    while not any(fits(name) for name in names.values()):
        starts = {name.partition(".")[0] for name in names.values()}
        if len(starts) != 1 or not all("." in name for name in names.values()):
            break
        start = f"{starts.pop()}."
        names = {name: short.removeprefix(start) for name, short in names.items()}
        taken.add(start)
    found: dict[str, Tensor] = {}
    for name, short in names.items():
        if short in found:
            raise ValueError(f"{path} holds {short} twice, the second time as {name}")
        found[short] = tensors[name]
    if not taken:
        return found, ()
    num = sum(name != short for name, short in names.items())
    return found, (f"took {' and '.join(sorted(taken))} off the names of {num} tensors",)


def read_config(folder: Path) -> Any:
    """The configuration in a folder, as `transformers` reads it; ValueError if it cannot."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"transformers cannot read {folder / 'config.json'}: {error}") from None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a whole model."""
    whole = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]
    return (folder / ADAPTER).is_file() and not whole


def base_name(folder: Path) -> str:
    """The model that an adapter was trained on; ValueError if its file does not tell."""
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder / ADAPTER} names no base model; merge the adapter with its own first"
        )
    return str(base)


def merged(
    folder: Path,
) -> tuple[TransformersDecoderConfig, dict[str, Tensor], Path, tuple[str, ...]]:
    """The base model with the adapter merged into it by `peft`, in float32, under the names of
    `TransformersDecoder`; the base model's folder; sentences.

    Raises ValueError with the way to merge if peft is not installed.
    """
    base = base_name(folder)
    try:
        from peft import PeftModel
    except ImportError:
        raise ValueError(
            f"{folder} is a LoRA adapter of {base}; install peft, which merges the two here, or "
            f"merge them yourself (PeftModel.from_pretrained(base, {str(folder)!r})"
            ".merge_and_unload().save_pretrained(...)) and import what that writes"
        ) from None
    from transformers import AutoModelForCausalLM

    here = Path(base).expanduser()
    if not here.is_dir():
        here = fetch(base, read_json(folder / ADAPTER).get("revision"))
    whole = AutoModelForCausalLM.from_pretrained(
        here, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    model = PeftModel.from_pretrained(whole, folder).merge_and_unload()
    config = describe(model.config)
    return (
        config,
        decoder_tensors(config, model.state_dict()),
        here,
        (f"merged with {base} by peft",),
    )
