"""What a store holds, who needs it, and taking away what nobody does.

The studies kept in `studies/` say what is needed: a stage that none of them leads to may go.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from midstream.identity import FORMAT_VERSION
from midstream.storage import CorruptError, read_json, remove_folder, require_writable, verify
from midstream.study.graph import order
from midstream.study.label import digits_of, handle, joined, shortest, words
from midstream.study.ledger import Ledger, launch_lock
from midstream.study.stage import stage_from_json


@dataclass(frozen=True)
class StoredStage:
    """A stage's folder, what the stage is called, its state, the bytes of its files, and the kept
    studies that need it.

    `state` is "unreadable" for a folder whose stage.json this version cannot read, and "stale" for
    one that it would give another name: made before an option was added, it is not used any more.
    """

    name: str
    label: str
    kind: str
    state: str
    num_bytes: int
    studies: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """What `check` looked at, and what is wrong: (stage's label, what)."""

    num_stages: int
    num_folders: int
    num_bytes: int
    problems: tuple[tuple[str, str], ...]


def stored_stages(ledger: Ledger) -> list[StoredStage]:
    """Every stage's folder in the store, in the order of their names.

    Raises FileNotFoundError for a store that does not exist, ValueError for a kept study that
    cannot be read: what it needs is then unknown.
    """
    if not ledger.store.is_dir():
        raise FileNotFoundError(f"store {ledger.store} does not exist; give another --store")
    needs = _needs(ledger)
    found = []
    folders = [path.parent for path in sorted(ledger.store.glob("*/stage.json"))]
    length = shortest([digits_of(folder.name) for folder in folders])
    for folder in folders:
        kind: str
        state: str
        try:
            stage = stage_from_json((folder / "stage.json").read_bytes())
            kind, text = stage.kind, words(stage)
            state = ledger.state(stage) if stage.name == folder.name else "stale"
        except ValidationError:
            kind, state = folder.name.rpartition("-")[0], "unreadable"
            text = kind
        label = joined(text, handle(digits_of(folder.name), length))
        lines = needs.get(folder.name, ())
        found.append(StoredStage(folder.name, label, kind, state, _bytes(folder), lines))
    return found


def other_bytes(ledger: Ledger) -> dict[str, int]:
    """The bytes of what is no stage: features of pictures, reports, kept studies."""
    return {
        name: _bytes(ledger.store / name)
        for name in ("features", "reports", "studies")
        if (ledger.store / name).is_dir()
    }


def remove_stages(ledger: Ledger, names: Sequence[str]) -> int:
    """Delete stages by their folders' names; returns the bytes.

    No launcher may use the store meanwhile.

    Raises ValueError, with nothing deleted, for a name that is no stage here, a stage that a kept
    study needs, or one that runs.
    """
    by_name = {stage.name: stage for stage in stored_stages(ledger)}
    for name in names:
        if name not in by_name:
            raise ValueError(f"{ledger.store} has no stage {name!r}; see midstream store ls")
        stage = by_name[name]
        if stage.studies:
            raise ValueError(
                f"{stage.label} is needed by {', '.join(stage.studies)}; forget that study first "
                "(midstream store forget)"
            )
        if stage.state == "running":
            raise ValueError(f"{stage.label} is running; wait until it ends, or stop it")
    require_writable(ledger.store)
    with launch_lock(ledger.store):
        for name in names:
            remove_folder(ledger.store / name)
    return sum(by_name[name].num_bytes for name in names)


def unneeded(ledger: Ledger) -> list[StoredStage]:
    """The stages that no kept study needs and that do not run."""
    return [
        stage for stage in stored_stages(ledger) if not stage.studies and stage.state != "running"
    ]


def forget_study(ledger: Ledger, name: str) -> None:
    """Stop keeping a study; its stages stay until they are removed.

    Raises FileNotFoundError that lists the studies there are.
    """
    if name not in ledger.study_names():
        ledger.load_study(name)
    (ledger.store / "studies" / f"{name}.json").unlink()


def check(ledger: Ledger) -> Checked:
    """Read every file that a manifest lists, in every stage that is done, and its results."""
    problems: list[tuple[str, str]] = []
    num_folders, num_bytes, stages = 0, 0, stored_stages(ledger)
    done = [stage for stage in stages if stage.state == "done"]
    for stage in done:
        folder = ledger.store / stage.name
        try:
            read_json(folder / "results.json")
        except (OSError, ValueError) as error:
            problems.append((stage.label, f"results.json cannot be read: {error}"))
        for manifest in sorted(folder.rglob("manifest.json")):
            num_folders, num_bytes = num_folders + 1, num_bytes + _bytes(manifest.parent)
            try:
                verify(manifest.parent)
            except CorruptError as error:
                problems.append((stage.label, str(error)))
    problems += [
        (stage.label, "stage.json is of another version of Midstream, or broken")
        for stage in stages
        if stage.state == "unreadable"
    ]
    return Checked(len(done), num_folders, num_bytes, tuple(problems))


def older_stages(ledger: Ledger) -> str | None:
    """What is said of a store in which an earlier version has worked; None for any other.

    Up to format 4 the data of a study was one stage, whose folder no later version makes.
    """
    if next(ledger.store.glob("prepare-*/stage.json"), None) is None:
        return None
    return (
        f"store {ledger.store} holds stages of an earlier version of Midstream (format 4 or less, "
        f"this one writes {FORMAT_VERSION}), which are not used: give another --store, or delete "
        "them (midstream store rm --unneeded)"
    )


def _needs(ledger: Ledger) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in ledger.study_names():
        try:
            study = ledger.load_study(name)
        except ValueError:
            raise ValueError(
                f"study {name} in {ledger.store / 'studies'} is of another version, so that nobody "
                "knows what it needs; forget it, or use that version"
            ) from None
        for stage in order(study):
            found[stage.name] = (*found.get(stage.name, ()), name)
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
