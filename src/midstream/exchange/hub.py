"""Folders of Hugging Face, brought here and seen to be whole."""

import codecs
import filecmp
import fnmatch
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midstream.config import AnyDecoderConfig, TransformersDecoderConfig
from midstream.core.storage import read_json
from midstream.model.pretrained import PREFIX, TransformersDecoder, describe
from midstream.model.weights import check, read_tensors
from midstream.study.imported import Position

# What a model's folder needs, and no more: repositories hold other formats and optimiser states.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "adapter_model.safetensors")
_TORCH = ("pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin")
_WEIGHTS = re.compile(r".*\.safetensors|.*model[^/]*\.bin|(.*/)?epoch_\d+\.pt")
# Names that downloads have while they are under way.
_UNFINISHED = ("*.incomplete", "*.part", "*.aria2", "*.crdownload")
_LFS = b"version https://git-lfs"
# What data parallelism, torch.compile, FSDP, activation checkpointing and Lightning's strategies
# put into names.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
TABLES = tomllib.loads(files("midstream.exchange").joinpath("families.toml").read_text("utf-8"))
# What a folder may hold in place of weights that are read: what it is, and what helps.
_OTHERS: dict[str, list[str]] = TABLES["others"]
# Names that quantised weights have, and adapters that were not merged.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|absmax|SCB|weight_packed|weight_scale(_inv)?|quant_state\..*)$"
)
_UNMERGED = re.compile(r"\.(lora_[AB]|base_layer|lora_embedding_[AB])\b")
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LanguageModel:
    """A decoder as it was found: tensors under its module's names, and what its files tell.

    `dropped` names stored tensors that were left out, `notes` are sentences. `moments` are named as
    in train/checkpoint.py (`exp_avg.<name>`). `tokenizer_folder` is where a tokenizer may lie
    besides the source, `picture_token` one without a row, which stands for pictures.
    """

    config: AnyDecoderConfig
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    moments: dict[str, Tensor] | None = None
    step: int = 0
    position: Position = field(default_factory=Position)
    tokenizer_folder: Path | None = None
    picture_token: int | None = None

    @property
    def family(self) -> str:
        """Its `model_type`; `openlm` for OpenLM's own."""
        stated = self.config
        return stated.model_type if isinstance(stated, TransformersDecoderConfig) else "openlm"


# -------------------------------------------------------------------------------------- the hub


def fetch(name: str, revision: str | None) -> Path:
    """The local folder of a hub model at a revision, downloaded where the cache lacks it.

    Safetensors where there are any, else torch files. Raises ValueError if the hub has no such
    model or revision, FileNotFoundError if the hub cannot be reached and the cache lacks it; both
    name the model, the revision and the way out.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    def download(weights: tuple[str, ...]) -> Path:
        wanted = [*_SMALL, *weights]
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
        )

    page = f"https://huggingface.co/{name}"
    try:
        folder = download(_SAFETENSORS)
        if not any(folder.glob("*model*.safetensors*")):
            folder = download(_TORCH)
            if not any(folder.glob("*model*.bin*")):
                _refuse_others(name, revision)
        return folder
    except errors.RevisionNotFoundError:
        raise ValueError(
            f"{name} has no revision {revision!r}; {page}/tree/main lists them"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no file or folder here, and the hub has no public model of this name; "
            f"check the spelling, or accept its terms at {page} and log in with: hf auth login"
        ) from None
    except errors.HFValidationError:
        raise FileNotFoundError(
            f"{name} is no file or folder, nor the name of a hub model"
        ) from None
    except OSError as error:
        why = f"the hub did not answer ({(str(error).splitlines() or [''])[0]})"
        option = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name} at revision {revision or 'main'} is no file or folder here and not in the "
            f"cache ({HF_HUB_CACHE}), and {'HF_HUB_OFFLINE is set' if HF_HUB_OFFLINE else why}; "
            f"download it with: hf download {name}{option}"
        ) from None


def _refuse_others(name: str, revision: str | None) -> None:
    """ValueError that says what a hub model holds in place of weights that are read, where the hub
    tells."""
    from huggingface_hub import HfApi, errors

    try:
        held = HfApi().list_repo_files(name, revision=revision)
    except (errors.HfHubHTTPError, OSError):
        return
    for pattern, (what, remedy) in _OTHERS.items():
        of_a_folder = pattern.endswith("config.json")
        for file in fnmatch.filter(held, pattern)[:1] if not of_a_folder else ():
            raise ValueError(f"{name} holds {what} ({file}) and no weights that are read; {remedy}")
    for file in filter(_WEIGHTS.fullmatch, sorted(held)):
        folder, slash, _ = file.rpartition("/")
        inside = f"the folder {folder}" if slash else f"the file {file}"
        option = f"--include '{folder}/*'" if slash else file
        raise ValueError(
            f"{name} has weights as {file}, which its name does not stand for; download {inside} "
            f"with: hf download {name} {option} --local-dir DIR, and give {inside}"
        )


def same_weights(name: str, revision: str, folder: Path, *, ask_hub: bool) -> tuple[str, ...]:
    """Other revisions of a hub model whose weight files are the very same: of those in the cache,
    and with `ask_hub` of `main` as the hub describes it, where it answers.

    `folder` is the local snapshot of `revision`.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    def digests(which: str) -> dict[str, str]:
        try:
            info = HfApi().model_info(name, revision=which, files_metadata=True)
        except (errors.HfHubHTTPError, OSError):
            return {}
        return {item.rfilename: item.lfs.sha256 for item in info.siblings or [] if item.lfs}

    def is_same(one: Path, other: Path) -> bool:
        # The cache keeps one copy of equal files.
        return other.is_file() and (
            one.resolve() == other.resolve() or filecmp.cmp(one, other, shallow=False)
        )

    weights = sorted(item for pattern in (*_SAFETENSORS, *_TORCH) for item in folder.glob(pattern))
    if not weights:
        return ()
    refs = folder.parent.parent / "refs"
    commits = {item.name: item.read_text().strip() for item in refs.glob("*") if item.is_file()}
    same = []
    for other, commit in sorted(commits.items()):
        there = folder.parent / commit
        if other != revision and there != folder:
            same += [other] * all(is_same(item, there / item.name) for item in weights)
    if ask_hub and "main" not in commits and not HF_HUB_OFFLINE:
        mine, main = digests(revision), digests("main")
        same += ["main"] * all(mine.get(item.name, "") == main.get(item.name) for item in weights)
    return tuple(same)


# ----------------------------------------------------------------------------------- the folder


def check_downloaded(folder: Path, *, needed: str | None) -> None:
    """Raises FileNotFoundError that names what a half-downloaded folder lacks or has unfinished.

    Whether each shard is there and whole is seen when they are read.
    """
    unfinished = sorted(
        str(item.relative_to(folder)) for pattern in _UNFINISHED for item in folder.rglob(pattern)
    )
    if unfinished:
        raise FileNotFoundError(
            f"{folder} is half downloaded: {', '.join(unfinished)}; finish the "
            "download, or delete these where it is finished"
        )
    for item in sorted(one for one in folder.iterdir() if one.is_file()):
        with item.open("rb") as stream:
            if stream.read(len(_LFS)) == _LFS:
                raise FileNotFoundError(
                    f"{folder} has a pointer of Git LFS in place of {item.name}; get the "
                    "files with: git lfs pull"
                )
    weights = any(folder.glob("*model*.safetensors*")) or any(folder.glob("*model*.bin*"))
    if needed is not None and not ((folder / needed).is_file() and weights):
        for pattern, (what, remedy) in _OTHERS.items():
            for other in sorted(folder.glob(pattern))[-1:]:
                shown = other.parent if other.name.endswith("config.json") else other
                raise FileNotFoundError(
                    f"{folder} holds {what} ({shown.relative_to(folder)}) and no weights that are "
                    f"read; {remedy}"
                )
    kinds = (".json", ".safetensors", ".bin")
    broken = sorted(
        one.name
        for one in folder.iterdir()
        if one.suffix in kinds and one.is_symlink() and not one.exists()
    )
    if broken:
        raise FileNotFoundError(
            f"{folder} is half downloaded: {', '.join(broken)} point to files that are not there"
        )
    if needed is not None and not (folder / needed).is_file():
        held = ", ".join(sorted(os.listdir(folder))) or "nothing"
        raise FileNotFoundError(
            f"{folder} has no {needed}, only {held}; download the model to its end, or give an "
            "OpenLM epoch_N.pt (or, for OpenLM's safetensors alone, --num-heads)"
        )


def model_type(folder: Path) -> Any:
    """What a folder's config.json says it holds; None where there is none."""
    path = folder / "config.json"
    content = read_json(path) if path.is_file() else None
    return content.get("model_type") if isinstance(content, dict) else None


def read_config(folder: Path) -> Any:
    """The configuration in a folder, as `transformers` reads it; ValueError if it cannot."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if path.is_file() and path.read_bytes().startswith(codecs.BOM_UTF8):
        raise ValueError(
            f"{path} begins with a byte order mark, which transformers does not read; save it as "
            "UTF-8 without one"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"transformers cannot read {path}: {error}") from None


def described(stated: Any, folder: Path) -> TransformersDecoderConfig:
    """Our configuration of one of the library's; ValueError names the file where it cannot be."""
    told = folder / "config.json"
    try:
        return describe(stated)
    except ValueError as error:
        raise ValueError(f"{told}: {error}") from None
    except Exception as error:  # whatever the library's own code raises
        raise ValueError(
            f"{told}: transformers can make no model of it ({type(error).__name__}: {error})"
        ) from None


def read_decoder(folder: Path) -> LanguageModel:
    """A causal language model of `transformers`; tensors keep the file's dtype.

    Raises FileNotFoundError or ValueError as `describe` and `read_tensors` do, and naming tensors
    that are missing, unexpected, packed or of another shape.
    """
    stated = read_config(folder)
    rows = getattr(stated, "vocab_size", None)
    if rows is not None and (getattr(stated, "pad_token_id", None) or 0) >= rows:
        # A pad token that the tokenizer alone was given; transformers makes no model with it.
        stated.pad_token_id = None
    config = described(stated, folder)
    with torch.device("meta"):
        decoder = TransformersDecoder(config)
    known = decoder.state_dict().keys()
    stored, notes = unwrapped(
        read_tensors(folder), lambda name: decoder.parameter_name(name) in known, path=folder
    )
    check_plain(stored, stated, folder)
    tensors = decoder_tensors(config, stored, folder)
    # Under the library's names, which are the file's.
    theirs = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    again = _check_kept(decoder, theirs, folder)
    check(decoder.model, theirs, path=folder)
    tensors = {name: one for name, one in tensors.items() if name.removeprefix(PREFIX) != again}
    dropped = sorted(name for name in stored if decoder.parameter_name(name) is None)
    if getattr(stated, "auto_map", None):
        own = f"config.json names code of its own, which is not run: {config.model_type} is read"
        notes = (*notes, f"{own} as transformers has it")
    return LanguageModel(config, tensors, tuple(dropped), notes)


def check_plain(tensors: Mapping[str, Tensor], config: Any, folder: Path) -> None:
    """ValueError, with what to do, for weights that are quantised, or have an adapter beside them.

    `config` is the library's.
    """
    method = getattr(config, "quantization_config", None)
    remedy = "import the checkpoint in float32, bfloat16 or float16, not quantised"
    if method is not None:
        raise ValueError(f"{folder / 'config.json'} has quantization_config {method}; {remedy}")
    for name, value in tensors.items():
        if _UNMERGED.search(name):
            raise ValueError(
                f"{folder} holds an adapter that is not merged with its weights ({name}); "
                "save what peft's merge_and_unload() gives, and import that"
            )
        plain = value.dtype in _WIDENED or not name.endswith(".weight")
        if _QUANTISED.search(name) or not plain:
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{folder} holds {name} as {kind}; {remedy}")


def _check_kept(
    decoder: TransformersDecoder, tensors: Mapping[str, Tensor], folder: Path
) -> str | None:
    """The name of an output layer that is the embeddings once more, if one is stored.

    Raises ValueError, with what to do, for what is often amiss with a folder that was saved
    otherwise than whole; names are the library's.
    """
    names = {id(module): f"{name}.weight" for name, module in decoder.model.named_modules()}
    head, embedding = names[id(decoder.output)], names[id(decoder.model.get_input_embeddings())]
    config, told = decoder.config, folder / "config.json"
    if embedding not in tensors:
        return None
    rows = len(tensors[embedding])
    if rows != config.vocab_size:
        raise ValueError(
            f"{folder} has rows for {rows:,} tokens, its config.json says vocab_size "
            f"{config.vocab_size:,}; set vocab_size to {rows} in {told}"
        )
    if head not in tensors and not config.tied_embeddings:
        raise ValueError(
            f"{folder} has no output layer ({head}); where the embeddings serve as it, set "
            f"tie_word_embeddings to true in {told}, else this is a part of a language model: "
            "import the whole one"
        )
    if head not in tensors or not config.tied_embeddings:
        return None
    one, other = (tensors[name].to(torch.float32) for name in (head, embedding))
    if not torch.equal(one, other):
        raise ValueError(
            f"{folder} ties {head} to {embedding}, and its files hold two that differ; set "
            f"tie_word_embeddings to false in {told}"
        )
    return head


def decoder_tensors(
    config: TransformersDecoderConfig, state: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Tensors of a model of `transformers` under the names of `TransformersDecoder`, without those
    that it computes itself. Raises ValueError if two have one name."""
    with torch.device("meta"):
        decoder = TransformersDecoder(config)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = decoder.parameter_name(name)
        if ours in tensors:
            raise ValueError(f"{path} holds {ours} twice, the second time as {name}")
        if ours is not None:
            tensors[ours] = value
    return tensors


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
    num = sum(name != short for name, short in names.items())
    note = f"took {' and '.join(sorted(taken))} off the names of {num} tensors"
    return found, (note,) if taken else ()
