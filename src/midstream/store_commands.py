"""`midstream store`: what a store holds, which studies need it, deleting, verifying."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.table import Table

from midstream.options import DEFAULT_STORE, Store


def ls(store: Store = DEFAULT_STORE) -> None:
    """List the stages: state, size, and the kept studies that need them."""
    from midstream import terminal
    from midstream.study.housekeeping import stored_stages
    from midstream.study.ledger import Ledger

    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "size", "needed by"):
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for stage in stored_stages(Ledger(store)):
        needed = ", ".join(stage.studies) or "-"
        table.add_row(stage.name, stage.state, _size(stage.num_bytes), needed)
    terminal.out().print(table)


def du(store: Store = DEFAULT_STORE) -> None:
    """Say what each kind of stage takes, what is kept beside them, and what could go."""
    from midstream import terminal
    from midstream.study.housekeeping import other_bytes, stored_stages
    from midstream.study.ledger import Ledger

    ledger = Ledger(store)
    stages = stored_stages(ledger)
    table = Table(box=None, pad_edge=False)
    for title in ("what", "stages", "size", "of these unneeded"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for kind in dict.fromkeys(stage.kind for stage in stages):
        own = [stage for stage in stages if stage.kind == kind]
        free = sum(stage.num_bytes for stage in own if not stage.studies)
        total = sum(stage.num_bytes for stage in own)
        table.add_row(kind, str(len(own)), _size(total), _size(free))
    beside = other_bytes(ledger)
    for name, size in beside.items():
        table.add_row(name, "-", _size(size), "-")
    total = sum(stage.num_bytes for stage in stages) + sum(beside.values())
    free = sum(stage.num_bytes for stage in stages if not stage.studies)
    table.add_row("all", str(len(stages)), _size(total), _size(free))
    terminal.out().print(table)


def rm(
    stages: Annotated[
        list[str] | None, typer.Argument(metavar="STAGE...", help="Names as ls prints them.")
    ] = None,
    store: Store = DEFAULT_STORE,
    unneeded: Annotated[
        bool, typer.Option("--unneeded", help="All that no kept study needs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only say what.")] = False,
) -> None:
    """Delete stages that no kept study needs; without --yes it only says which."""
    from midstream import terminal
    from midstream.study.housekeeping import remove_stages, stored_stages
    from midstream.study.housekeeping import unneeded as unneeded_stages
    from midstream.study.ledger import Ledger

    ledger = Ledger(store)
    names = list(dict.fromkeys(stages or []))
    if unneeded:
        names += [stage.name for stage in unneeded_stages(ledger) if stage.name not in names]
    if not names and not unneeded:
        raise ValueError("name stages, or give --unneeded")
    sizes = {stage.name: stage.num_bytes for stage in stored_stages(ledger)}
    if yes:
        freed = remove_stages(ledger, names)
        terminal.out().print(f"deleted {len(names):,} stages, {_size(freed)}")
        return
    for name in names:
        terminal.out().print(f"{name} {_size(sizes.get(name, 0))}", soft_wrap=True)
    terminal.out().print(f"{len(names):,} stages would go; say --yes to delete them")


def forget(
    study: Annotated[str, typer.Argument(help="A study of the store.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Stop keeping a study: its stages stay until `rm --unneeded --yes`."""
    from midstream import terminal
    from midstream.study.housekeeping import forget_study
    from midstream.study.ledger import Ledger

    forget_study(Ledger(store), study)
    terminal.out().print(f"{study} is forgotten; what it alone needed may now be removed")


def verify(store: Store = DEFAULT_STORE) -> None:
    """Read every stored file against its checksum; ends with 1 where one differs."""
    from midstream import terminal
    from midstream.study.housekeeping import check
    from midstream.study.ledger import Ledger

    found = check(Ledger(store))
    terminal.out().print(
        f"{found.num_stages:,} stages that are done, {found.num_folders:,} folders with checksums, "
        f"{_size(found.num_bytes)}: {len(found.problems):,} problems"
    )
    for stage, problem in found.problems:
        terminal.error(f"{stage}: {problem}")
    if found.problems:
        raise typer.Exit(1)


COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "du": du,
    "rm": rm,
    "forget": forget,
    "verify": verify,
}


def _size(num_bytes: int) -> str:
    for size, letter in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {letter}"
    return f"{num_bytes} B"
