"""Save and load a training stage: weights, optimiser state, progress; never a pickle.

Safetensors of whole tensors, with several ranks in shards that any number of ranks loads.
"""

import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from midstream.core.storage import (
    CorruptError,
    finish_folder,
    in_threads,
    read_json,
    remove_folder,
    room_for,
    seal,
    start_folder,
    verify,
    write_json,
)
from midstream.core.tokens import TokenCount
from midstream.model.weights import (
    check,
    fill,
    joint_digest,
    put,
    read_tensors,
    tensor_digests,
    tensors_of,
)
from midstream.train.parallel import ALONE, Place, deal, gathered
from midstream.train.step import local

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: whole steps done, what they held, and the metrics file's length.

    `sources` are the counts by source; `rate` is the schedule's learning rate at `tokens_seen`,
    where a continuation starts; None where an imported checkpoint does not tell. `attended` is
    the sum over positions of how many each looks at; `parts` are seconds by part of the work.
    """

    step: int
    tokens_seen: int
    total_tokens: int
    rate: float | None
    counts: TokenCount
    sources: Mapping[str, TokenCount] = field(default_factory=dict)
    loss: float = 0.0
    image_rows: int = 0
    image_row_pad: int = 0
    num_images: int = 0
    attended: int = 0
    seconds: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    metrics_bytes: int = 0


class Saver:
    """Writes checkpoints of all ranks, one at a time; in the background training goes on.

    Every rank makes its calls at the same steps. What is written is the state at `start`. A full
    disk, or any other failure of any rank, is raised on all of them by the next call that finds it
    written; that older checkpoints could not be deleted by the next `start` or `settle`.
    """

    def __init__(self, place: Place, *, background: bool) -> None:
        self._place, self._background = place, background
        self._thread: threading.Thread | None = None
        self._finish: Callable[[], None] | None = None
        self._error: str | None = None

    def proceed(self) -> bool:
        """Give what all ranks have written its name; False while some still write."""
        if self._finish is None:
            return True
        (written,) = self._place.sum([self._thread is None or not self._thread.is_alive()])
        if written < self._place.world_size:
            return False
        self._complete()
        return True

    def start(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        progress: Progress,
        origin: Mapping[str, str] | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the state and begin to write it; once it is whole, rank 0 calls `then`, in the
        background too.

        `origin` says what the checkpoint is of; a stage that resumes from it must say the same.
        """
        self.settle()
        place = self._place
        made = str(start_folder(folder)) if place.rank == 0 else None
        temporary = Path(place.gather(made)[0])
        stems = _stems(model, optimizer)
        files = {stem: deal(tensors, place.world_size) for stem, tensors in stems.items()}
        held = {s: _held(stems[s], files[s], place, moves=self._background) for s in stems}
        arrived = _arrival(place.device)
        mine = {
            _file(stem, at, len(files[stem])): {name: held[stem][name] for name in files[stem][at]}
            for stem in stems
            for at in range(place.rank, len(files[stem]), place.world_size)
            if files[stem][at]
        }
        found: dict[str, Any] = {"entries": {}, "digests": {}}

        def put(name: str) -> dict[str, Any]:
            with room_for(folder / name):
                save_file(mine[name], temporary / name)
            return seal(temporary, [name])

        def write() -> None:
            arrived()
            for entry in in_threads(put, mine):
                found["entries"] |= entry
            found["digests"] = {s: tensor_digests(held[s].items()) for s in stems}

        def finish() -> None:
            everyone = place.gather(found | {"error": self._error})
            errors = [one["error"] for one in everyone if one["error"]]
            if place.rank == 0 and not errors:
                try:
                    _complete(temporary, folder, everyone, files, progress, origin or {})
                except OSError as error:
                    errors.append(f"{type(error).__name__}: {error}")
            errors = [text for rank in place.gather(errors) for text in rank]
            if errors:
                if place.rank == 0:
                    remove_folder(temporary)
                raise OSError(f"checkpoint {folder} could not be written: {errors[0]}")
            if place.rank == 0:
                self._run(then)

        self._finish = finish
        self._run(write)

    def settle(self) -> None:
        """Wait until what was started is whole under its name, and `then` has come back; OSError
        if it could not be."""
        self._join()
        if self._finish is not None:
            self._complete()
            self._join()
        if errors := [text for text in self._place.gather(self._error) if text]:
            raise OSError(
                f"older checkpoints could not be deleted: {errors[0]}; delete it and run the same "
                "command again"
            )

    def _complete(self) -> None:
        finish, self._finish = self._finish, None
        assert finish is not None, "something was started"
        self._join()
        finish()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = f"{type(error).__name__}: {error}"

        if self._background:
            self._thread = threading.Thread(target=run, name="checkpoint")
            self._thread.start()
        else:
            run()


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
    *,
    place: Place = ALONE,
    origin: Mapping[str, str] | None = None,
) -> None:
    """Write `folder` completely or not at all."""
    saver = Saver(place, background=False)
    saver.start(folder, model, optimizer, progress, origin)
    saver.settle()


def _file(stem: str, index: int, files: int) -> str:
    if files == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{index + 1:05}-of-{files:05}.safetensors"


def _held(
    tensors: Mapping[str, Tensor], files: list[list[str]], place: Place, *, moves: bool
) -> dict[str, Tensor]:
    """In the host's memory, the whole tensors that this rank writes; from a GPU they have come once
    `_arrival` says so. `moves`: the model moves on meanwhile, and its own memory will not do."""
    held = {}
    for name, value in gathered(tensors, files, place):
        if value.device.type == "cuda":
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            held[name] = pinned.copy_(value, non_blocking=True)
        elif moves and value.data_ptr() == local(tensors[name]).data_ptr():
            held[name] = value.clone(memory_format=torch.contiguous_format)
        else:
            held[name] = value.contiguous()
    return held


def _arrival(device: torch.device) -> Callable[[], None]:
    """What waits until all that was sent from the device so far has come."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def _complete(
    temporary: Path,
    folder: Path,
    ranks: list[dict[str, Any]],
    files: Mapping[str, list[list[str]]],
    progress: Progress,
    origin: Mapping[str, str],
) -> None:
    """Rank 0: what is said about the ranks' files, then manifest and name."""
    entries = {name: entry for rank in ranks for name, entry in rank["entries"].items()}
    extra = [PROGRESS, "origin.json"]
    write_json(temporary / PROGRESS, asdict(progress))
    digests = {
        stem: joint_digest({k: v for rank in ranks for k, v in rank["digests"][stem].items()})
        for stem in files
    }
    write_json(temporary / "origin.json", {"of": dict(origin), "digests": digests})
    for stem, dealt in files.items():
        if len(dealt) > 1:
            named = [(_file(stem, at, len(dealt)), names) for at, names in enumerate(dealt)]
            weight_map = {name: file for file, names in named for name in names}
            extra.append(f"{stem}.safetensors.index.json")
            write_json(temporary / extra[-1], {"metadata": {}, "weight_map": weight_map})
    finish_folder(temporary, folder, entries | seal(temporary, extra))


def _stems(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What is kept of each kind: the weights, and the moments of what is trained."""
    stems: dict[str, Any] = {"model": tensors_of(model)}
    if optimizer is not None:
        stems["optimizer"] = {
            f"{key}.{name}": optimizer.state[parameter][key]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
            for key in MOMENTS
        }
    return stems


def read_progress(folder: Path) -> Progress:
    """The progress of a checkpoint, after checking its bytes (CorruptError) and no others."""
    verify(folder, only=lambda name: name == PROGRESS)
    return _progress(folder)


def _progress(folder: Path) -> Progress:
    values = read_json(folder / PROGRESS)
    sources = {name: TokenCount(**counts) for name, counts in values["sources"].items()}
    return Progress(**values | {"counts": TokenCount(**values["counts"]), "sources": sources})


def check_files(folder: Path, *, place: Place = ALONE, stems: Collection[str] = ("model",)) -> None:
    """Check what is about to be read of a folder of weights: each file's bytes once, those of
    tensors if they are of `stems` ("model", "optimizer").

    Ranks check a part each, and all of them raise the CorruptError that one finds.
    """
    unread = {"model", "optimizer"} - set(stems)
    error = None
    try:
        verify(
            folder,
            only=lambda name: re.split("[-.]", name)[0] not in unread,
            share=(place.rank, place.world_size),
            alone=True,
        )
    except CorruptError as reason:
        error = str(reason)
    if errors := [text for text in place.gather(error) if text]:
        raise CorruptError(errors[0])


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    place: Place = ALONE,
    origin: Mapping[str, str] | None = None,
) -> Progress:
    """Put a checkpoint into model and optimiser; names, shapes and types must match exactly.

    Raises CorruptError for other bytes than were written, ValueError where `origin` differs from
    that of the folder, or the tensors from the model's, before anything is changed.
    """
    stems = ("model",) if optimizer is None else ("model", "optimizer")
    check_files(folder, place=place, stems=stems)
    _same_origin(folder, origin or {})
    weights = read_tensors(folder)
    check(model, weights, path=folder)
    if optimizer is not None:
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        load_moments(folder, model, optimizer, of=trained)
    fill(model, weights, path=folder)
    return _progress(folder)


def stored_digests(folder: Path) -> dict[str, str]:
    """The digests of weights and moments as they were saved."""
    return dict(read_json(folder / "origin.json")["digests"])


def load_moments(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, of: set[str] | None = None
) -> None:
    """Put Adam's moments into the optimiser; parameters that the file lacks start fresh, and those
    that are frozen have none.

    With `of` the file must hold those of exactly these parameters. Raises FileNotFoundError
    without a file, ValueError for moments of other names or shapes; the optimiser is unchanged.
    """
    path = stored_file(folder, "optimizer")
    if path is None:
        raise FileNotFoundError(f"{folder} holds no optimiser state; choose optimizer='fresh'")
    stored = read_tensors(path)
    parameters = dict(model.named_parameters())
    trained = {name for name, value in parameters.items() if value.requires_grad}
    held = {name for name in parameters if f"exp_avg.{name}" in stored}
    held &= trained if of is None else set(parameters)
    if of is not None and (others := held ^ of):
        raise ValueError(f"{path} holds moments of other parameters: {', '.join(sorted(others))}")
    for name in sorted(held):
        shapes = [list(stored[f"{key}.{name}"].shape) for key in MOMENTS if key != "step"]
        if any(shape != list(parameters[name].shape) for shape in shapes):
            raise ValueError(
                f"{path} holds moments of {name} of shape {shapes[0]}, the model's is "
                f"{list(parameters[name].shape)}"
            )
    for name in held:
        parameter = parameters[name]
        state = {key: torch.zeros_like(parameter) for key in MOMENTS if key != "step"}
        with torch.no_grad():
            for key, value in state.items():
                put(value, stored[f"{key}.{name}"])
        # The step count stays where fused AdamW keeps it: on the parameter's device.
        optimizer.state[parameter] = state | {
            "step": stored[f"step.{name}"].clone().to(parameter.device)
        }


def digests(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, *, place: Place = ALONE
) -> dict[str, str]:
    """The digests of the weights ("model") and the moments ("optimizer"), on every rank."""
    joint = {}
    for stem, tensors in _stems(model, optimizer).items():
        whole = gathered(tensors, deal(tensors, place.world_size), place)
        mine = tensor_digests(whole)
        joint[stem] = joint_digest({k: v for part in place.gather(mine) for k, v in part.items()})
    return joint


def stored_file(folder: Path, stem: str) -> Path | None:
    """The file of these tensors, or the index of its shards; None where there is neither."""
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name
    return None


def _same_origin(folder: Path, mine: Mapping[str, str]) -> None:
    theirs = read_json(folder / "origin.json")["of"]
    differing = [key for key in mine if theirs.get(key) != mine[key]]
    if differing:
        told = "; ".join(f"{key} {theirs.get(key)!r}, now {mine[key]!r}" for key in differing)
        raise ValueError(
            f"{folder} is a checkpoint of something else: {told}. Undo the change, or move the "
            "folder away to start the stage again"
        )


def milestone(folder: Path, share: float) -> Path:
    """Where a text stage's folder keeps the weights at a share of its tokens."""
    return folder / "milestones" / f"{share * 100:g}"


def by_age(folder: Path) -> list[Path]:
    """The checkpoints in a folder, that of the highest step first, by name."""
    return sorted(folder.glob("step-*"), reverse=True)


def keep_newest(folder: Path, number: int) -> None:
    """Delete all checkpoints but the newest."""
    for path in by_age(folder)[number:]:
        remove_folder(path)
