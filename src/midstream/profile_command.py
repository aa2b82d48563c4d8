"""`midstream profile`: its options, and the process that works."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from midstream.options import DEFAULT_STORE, ScaleName, Settings, Store, StudyName


def profile(
    study: StudyName,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_KIND",
            help="pretrain, continue, finetune, or how a stage's name begins; without it the "
            "first continue.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured.")] = 10,
    out: Annotated[Path, typer.Option(help="Where trace and page go.")] = Path("profile"),
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the process.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    others: Annotated[
        list[str] | None,
        typer.Option("--machine", metavar="NAME=VALUE", help="Any other choice of the machine."),
    ] = None,
) -> None:
    """Take some steps of a stage: a trace, and a page of speed, memory and shares of time."""
    from midstream import terminal
    from midstream.catalogue import find_study, read_settings, with_scale
    from midstream.config import Machine
    from midstream.study.choose import training_stage
    from midstream.study.ledger import Ledger
    from midstream.study.workers import worker_environment

    chosen: dict[str, Any] = {"threads": threads, "device": device, "features": "live"}
    machine = Machine.model_validate(chosen | read_settings("--machine", others or []))
    found = training_stage(find_study(study, with_scale(settings, scale), Ledger(store)), stage)
    request = {
        "store": str(store.absolute()),
        "stage": found.model_dump(mode="json"),
        "machine": machine.alone().model_dump(mode="json"),
        "steps": steps,
        "out": str(out.absolute()),
    }
    with tempfile.TemporaryDirectory(prefix="midstream-profile-") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        # A process of its own, as the launcher's workers are: the commands import no torch.
        ended = subprocess.run(
            [sys.executable, "-m", "midstream.profile_stage", str(file)],
            env=worker_environment(machine),
            stdout=subprocess.PIPE,
        )
    if ended.returncode:
        raise typer.Exit(ended.returncode)
    for line in _lines(json.loads(ended.stdout.splitlines()[-1])):
        terminal.out().print(line, markup=False, highlight=False)
    typer.echo(f"page: {out / 'summary.html'}\ntrace: {out / 'trace.json'}")


def _lines(found: dict[str, Any]) -> list[str]:
    """The meters as a person reads them."""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in found["time_shares"].items())
    utilisation = found["model_flops_utilisation"] or 0.0
    return [
        f"{found['tokens_per_second']:,.0f} tokens/s, {found['useful_tokens_per_second']:,.0f} "
        f"of them useful, {found['images_per_second']:,.2f} images/s",
        f"{found['model_flops_per_second'] / 1e9:,.1f} GFLOP/s, {utilisation:.0%} of what a matrix "
        f"product reaches; peak memory {found['peak_memory_bytes'] / 2**20:,.0f} MiB",
        f"time: {shares}",
    ]
