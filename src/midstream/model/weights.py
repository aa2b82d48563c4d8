"""Weights: how they start, and how they are read and written.

A tensor that a module holds under several names (tied embeddings) is stored once, under the first
of them, and may be read from any. Other people's pickles are read as tensors alone.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from threading import Semaphore
from typing import Any, Literal, cast

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.serialization import safe_globals

from midstream.core.storage import THREADS, read_json, write_bytes
from midstream.core.tokens import name_some

WEIGHTS = "model.safetensors"
_INDEX = ".index.json"
# A file that may be a whole model under another name, and none of a trainer's others.
_WHOLE = re.compile(r"(?!optim|sched|rng|training|scaler)\w.*\.(safetensors|bin|pth?|ckpt)", re.I)
# Of tensors that do not fit, an error names so many of each kind.
_SHOWN = 3

# Reading the first as the second changes no value.
_EXACT = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}

# numpy's plain numbers, which other trainers leave in their metrics, under the names of numpy 1
# and 2. Making one runs nothing that the file brings along.
_SCALAR = numpy.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    numpy.dtype,
    *(type(numpy.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")),
]


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's tensors as a safetensors file, completely or not at all."""
    write_bytes(path, save({name: _plain(value) for name, value in tensors_of(module).items()}))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from weights that `read_tensors` reads, of exactly its names and shapes.

    Raises FileNotFoundError, or ValueError as `check` does; the module is then unchanged.
    """
    fill(module, read_tensors(path), path=path)


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, path: Path) -> None:
    """Put tensors into a module that `check` finds to fit; half precision is widened, exactly."""
    check(module, tensors, path=path)
    held = tensors_of(module)
    for name, aliases in _aliases(module).items():
        put(held[name], tensors[next(one for one in aliases if one in tensors)])


def whole(value: Tensor) -> Tensor:
    """A tensor with all its parts: a collective over the ranks where it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def put(mine: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `mine`, or a sharded one's own part of it."""
    if isinstance(mine, DTensor):
        # No rank sends anything, and of a file that is mapped each reads its own rows alone.
        value = value[shard_rows(mine.shape[0], *shard_of(mine))]
        mine = mine.to_local()
    mine.copy_(value)


def shard_of(value: DTensor) -> tuple[int, int]:
    """How many ranks hold a copy of a tensor between them, rows by rows, and which is this one."""
    *copies, rows = value.placements
    assert rows.is_shard(0), value.placements
    assert all(one.is_replicate() for one in copies), value.placements
    coordinate = value.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank is on the mesh"
    return value.device_mesh.size(len(copies)), coordinate[-1]


def shard_rows(rows: int, parts: int, index: int) -> slice:
    """Which rows of a tensor its part is: as many in each, but the last ones (`torch.chunk`)."""
    most = -(-rows // parts)
    return slice(min(index * most, rows), min((index + 1) * most, rows))


def check(module: nn.Module, tensors: Mapping[str, Tensor], *, path: Path) -> None:
    """Whether tensors, read from `path`, are a module's, each in its dtype or one that widens to
    it exactly; the module may be on the meta device.

    Raises ValueError with the first of the missing, unexpected and mismatched names and the number
    of the others, and for a missing one the nearest that were not expected.
    """
    held, names = tensors_of(module), _aliases(module)
    foreign = sorted(tensors.keys() - {one for aliases in names.values() for one in aliases})
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "mismatched": []}
    wrong["unexpected"] = [_shown(name, tensors) for name in foreign]
    for name, aliases in sorted(names.items()):
        mine = held[name]
        found = {one: tensors[one] for one in aliases if one in tensors}
        if not found:
            near = ""
            if len(wrong["missing"]) < _SHOWN:
                alike = [one for one in foreign if tensors[one].shape == mine.shape]
                nearest = get_close_matches(name, alike) or get_close_matches(name, foreign)
                near = ", ".join(_shown(one, tensors) for one in nearest)
            more = f"; nearest unexpected: {near}" if near else ""
            wrong["missing"].append(f"{_shown(name, held)}{more}")
        wrong["mismatched"] += [
            f"{one} is {value.dtype} {list(value.shape)} in the file, {mine.dtype} "
            f"{list(mine.shape)} in the model"
            for one, value in found.items()
            if value.shape != mine.shape
            or (value.dtype != mine.dtype and (value.dtype, mine.dtype) not in _EXACT)
        ]
        first = next(iter(found), "")
        wrong["mismatched"] += [
            f"{one} differs from {first}, which the model ties it to"
            for one, value in found.items()
            if one != first and not torch.equal(value.to(mine.dtype), found[first].to(mine.dtype))
        ]
    if any(wrong.values()):
        lines = []
        for kind, each in wrong.items():
            shown = each if len(each) <= _SHOWN + 1 else each[:_SHOWN]
            lines += [f"  {kind}: {line}" for line in shown]
            lines += [f"  {kind}: {len(each) - len(shown)} more"] * (len(each) > len(shown))
        raise ValueError(
            f"{path} does not fit this {type(module).__name__}; build the model from the config "
            "that the file was written with:\n" + "\n".join(lines)
        )


def weights_digest(module: nn.Module) -> str:
    """The sha256 that stands for a module's tensors: their names, dtypes, shapes and bytes."""
    return joint_digest(tensor_digests(tensors_of(module).items()))


def tensor_digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The digest of each tensor; several are hashed at a time, and few of them wait."""
    begun: dict[str, Future[str]] = {}
    room = Semaphore(2 * THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        for name, value in tensors:
            room.acquire()
            begun[name] = pool.submit(tensor_digest, value)
            begun[name].add_done_callback(lambda _: room.release())
    return {name: one.result() for name, one in begun.items()}


def tensor_digest(value: Tensor) -> str:
    """The sha256 of one tensor's dtype, shape and bytes."""
    state = hashlib.sha256(f"{value.dtype} {list(value.shape)}\n".encode())
    state.update(_plain(value).reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def joint_digest(digests: Mapping[str, str]) -> str:
    """The sha256 that stands for tensors by name, of each one's own: several processes may share
    the work."""
    text = "".join(f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def _aliases(module: nn.Module) -> dict[str, list[str]]:
    """All names of each tensor of a module, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors, each under the first of its names."""
    state = module.state_dict()
    return {name: state[name] for name in _aliases(module)}


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def _shown(name: str, tensors: Mapping[str, Tensor]) -> str:
    return f"{name} {list(tensors[name].shape)}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, of an index with its shards beside it
    (`*.index.json`), or of a folder with one of these under its usual name or with all shards and
    no index; all on the CPU.

    Of a training checkpoint (`{"model": {...}, "step": 5}`) those of its one dict of tensors,
    under names that start with its key ("model.").

    Of shards all tensors are read; an index may name more or fewer than they hold. Raises
    FileNotFoundError if a file is missing (naming every missing shard), ValueError if one is broken
    or the index is of other shards.
    """
    if path.is_dir():
        shards = _unlisted(path)
        if shards:
            return _joined((one, read_tensors(one)) for one in shards)
        path = _in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give a .safetensors file")
    if path.suffix == ".json":
        return _read_shards(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return _one_set(read_pickle(path), path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, containers and plain values.

    Nothing else is unpickled. Raises FileNotFoundError, or ValueError if the file is broken or
    wants to run code, naming what it wants to call.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give a file that torch.save wrote")
    try:
        with safe_globals(_NUMBERS):
            # Mapped, not read: an optimiser's file is often larger than memory.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} is no readable checkpoint: {error}") from None
        raise ValueError(
            f"{path} wants to run code when it is read: {wanted[1]}; get it as safetensors"
        ) from None
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is no readable checkpoint; was it copied to its end? ({reason})"
        ) from None


def only_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """`content`, if it is a dict of tensors by name; else ValueError names what it is."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        held = ", ".join(other) or "nothing"
        raise ValueError(f"{path} is no dict of tensors by name; not tensors: {held}")
    return dict(content)


def _one_set(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by name, or those of the one dict of tensors that `content` holds among other things
    (a training checkpoint); their names then start with its key."""
    sets = {
        key: value
        for key, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(value, dict)
        and value
        and all(isinstance(one, Tensor) for one in value.values())
    }
    if not sets or any(isinstance(one, Tensor) for one in content.values()):
        return only_tensors(content, path)
    if len(sets) > 1:
        raise ValueError(
            f"{path} holds several sets of tensors, {', '.join(map(str, sets))}; save the one meant"
        )
    ((key, tensors),) = sets.items()
    return {f"{key}.{name}": value for name, value in tensors.items()}


def _unlisted(folder: Path) -> list[Path]:
    """The shards of a folder that has neither a whole file nor an index.

    Raises FileNotFoundError that names the missing ones.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        whole = folder / f"{stem}{suffix}"
        if whole.is_file() or Path(f"{whole}.index.json").is_file():
            return []
        held = {one.name for one in folder.glob(f"{stem}-[0-9]*-of-[0-9]*{suffix}")}
        totals = {name.removesuffix(suffix).rpartition("-")[2] for name in held}
        for total in sorted(one for one in totals if one.isdigit()):
            parts = (f"{stem}-{n:0{len(total)}}-of-{total}" for n in range(1, int(total) + 1))
            names = [f"{part}{suffix}" for part in parts]
            missing = [name for name in names if name not in held]
            if missing or len(totals) > 1:
                raise FileNotFoundError(
                    f"{folder} is half downloaded: {whole.name}.index.json is missing"
                    + (f", and of {total} shards {', '.join(missing)}" if missing else "")
                )
            return [folder / name for name in names]
    return []


def _joined(parts: Iterable[tuple[Path, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The tensors of several files; ValueError if two have one name."""
    tensors: dict[str, Tensor] = {}
    for path, held in parts:
        twice = sorted(tensors.keys() & held.keys())
        if twice:
            raise ValueError(f"{path} holds {twice[0]}, which another shard holds as well")
        tensors |= held
    return tensors


def _in_folder(folder: Path) -> Path:
    names = [f"{name}{end}" for name in (WEIGHTS, "pytorch_model.bin") for end in ("", _INDEX)]
    kept = [folder / name for name in names if (folder / name).is_file()]
    if len(kept) > 1 and kept[0].name == WEIGHTS + _INDEX and not any(folder.glob("model-*")):
        # A hub's small files came without its safetensors, beside whole files of torch.
        kept = kept[1:]
    if kept:
        return kept[0]
    held = sorted(item.name for item in folder.iterdir())
    others = [name for name in held if _WHOLE.fullmatch(name)]
    remedy = "was it downloaded to its end?"
    if len(others) == 1:
        usual = WEIGHTS if others[0].endswith(".safetensors") else "pytorch_model.bin"
        remedy = f"if {others[0]} is the whole model, call it {usual}"
    raise FileNotFoundError(
        f"{folder} holds neither {WEIGHTS} nor pytorch_model.bin, nor an index of shards of "
        f"them, only {', '.join(held) or 'nothing'}; {remedy}"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no 'weight_map' that says which shard holds which tensor")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index} puts {name} into {shard!r}, which is no file beside it")
    shards = sorted(set(where.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} is half downloaded: of the {len(shards)} shards that {index.name} "
            f"names, {len(missing)} are missing: {', '.join(missing)}"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        held = read_tensors(index.parent / shard)
        tensors |= {name: one for name, one in held.items() if where.get(name, shard) == shard}
    lacks, unasked = where.keys() - tensors.keys(), tensors.keys() - where.keys()
    # Converters leave rotary tables and tied weights in the one and not in the other.
    if lacks and unasked:
        raise ValueError(
            f"{index} is not of the shards beside it: these lack {some(lacks)} and hold "
            f"{some(unasked)} unasked; download both again"
        )
    return tensors


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    return name_some(sorted(set(names)), _SHOWN) or "nothing"


@dataclass(frozen=True)
class Initialiser:
    """How a parameter starts: `scale` is sigma (cut at three), the half width, or the value."""

    kind: Literal["truncated_normal", "uniform", "constant"]
    scale: float

    def draw(self, shape: torch.Size, source: torch.Generator) -> Tensor:
        """A float32 CPU tensor of these values."""
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        if self.kind == "constant":
            return value.fill_(self.scale)
        if self.kind == "uniform":
            return value.uniform_(-self.scale, self.scale, generator=source)
        bound = 3 * self.scale
        return nn.init.trunc_normal_(value, std=self.scale, a=-bound, b=bound, generator=source)


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose alone."""
    number = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a module that has `initialisers`.

    A value is a function of the seed and the parameter's name in `module` alone; it is drawn on
    the CPU in float32, so that device, precision and order of parameters change nothing.
    """
    table: dict[str, Initialiser] = cast(Any, module).initialisers()
    parameters = dict(module.named_parameters())
    assert table.keys() == parameters.keys(), table.keys() ^ parameters.keys()
    for name, parameter in parameters.items():
        put(parameter, table[name].draw(parameter.shape, generator(seed, name)))


class _Unset(nn.Module):
    def reset_parameters(self) -> None:
        """Draw nothing: NaN until initialised or loaded, so that forgetting shows."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))


class Linear(_Unset, nn.Linear):
    """A linear layer that is unset (NaN) until initialised or loaded."""


class Embedding(_Unset, nn.Embedding):
    """An embedding that is unset (NaN) until initialised or loaded."""
