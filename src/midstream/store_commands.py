"""`midstream store`: what a store holds, which studies need it, deleting, verifying."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from midstream.options import DEFAULT_STORE, Store
from midstream.quantities import counted


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
        table.add_row(escape(stage.label), stage.state, _size(stage.num_bytes), needed)
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
        list[str] | None,
        typer.Argument(
            metavar="STAGE...",
            help="As ls prints them: the digits at the end, or the folder's name.",
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
    unneeded: Annotated[
        bool, typer.Option("--unneeded", help="All that no kept study needs.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only say what.")] = False,
) -> None:
    """Delete stages that no kept study needs; without --yes it only says which."""
    from midstream import terminal
    from midstream.study.choose import stored_name
    from midstream.study.housekeeping import remove_stages, stored_stages
    from midstream.study.housekeeping import unneeded as unneeded_stages
    from midstream.study.ledger import Ledger

    ledger = Ledger(store)
    names = list(dict.fromkeys(stored_name(ledger, stage) for stage in stages or ()))
    if unneeded:
        names += [one.name for one in unneeded_stages(ledger) if one.name not in names]
    if not names and not unneeded:
        raise ValueError("name stages, or give --unneeded")
    if yes:
        freed = remove_stages(ledger, names)
        terminal.out().print(f"deleted {counted(len(names), 'stage')}, {_size(freed)}")
        return
    for one in stored_stages(ledger):
        if one.name in names:
            text = f"{one.label} {_size(one.num_bytes)}"
            terminal.out().print(text, soft_wrap=True, markup=False)
    terminal.out().print(f"{counted(len(names), 'stage')} would go; say --yes to delete them")


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
        f"{counted(found.num_stages, 'done stage')}, {counted(found.num_folders, 'folder')} with "
        f"checksums, {_size(found.num_bytes)}: {counted(len(found.problems), 'problem')}"
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
