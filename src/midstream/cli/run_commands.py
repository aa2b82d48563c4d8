"""Running and following: `midstream run`, `midstream status`, `midstream logs`."""

import json
import time
import tomllib
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from midstream.cli import DEFAULT_STORE, ScaleName, Settings, Store, StudyName, Verify
from midstream.core.tokens import counted

if TYPE_CHECKING:
    from midstream.config import Machine, SlurmSettings
    from midstream.launch.overview import Board, Overview
    from midstream.study.stages import Stage
    from midstream.study.store import Ledger
    from midstream.study.studies import AnyStudy


Retry = Annotated[bool, typer.Option("--retry", help="Also run stages that failed before.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes that run stages side by side (2).")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of each process (1).")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
DataWorkers = Annotated[
    int | None, typer.Option(min=0, help="Processes that load rows ahead of each training process.")
]
Features = Annotated[
    str | None,
    typer.Option(help="Frozen encoders' outputs: stored, live, or auto where storing pays."),
]
FeatureGib = Annotated[
    float | None, typer.Option(min=0.0, help="auto stores no more than this (64).")
]
Ranks = Annotated[
    int | None, typer.Option(min=1, help="Processes that train one stage together on this machine.")
]
Nodes = Annotated[int | None, typer.Option(min=1, help="Machines that train one stage together.")]
Node = Annotated[int | None, typer.Option(min=0, help="Which of them this is; 0 launches.")]
Master = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where node 0 is reached by the others.")
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--machine",
        metavar="NAME=VALUE",
        help="Any other choice of the machine (docs/training.md); may be repeated.",
    ),
]
OnSlurm = Annotated[
    bool, typer.Option("--slurm", help="Run every stage as a job of a Slurm cluster.")
]
SlurmFile = Annotated[
    Path | None, typer.Option(metavar="FILE.toml", help="What jobs are given (docs/cluster.md).")
]
SlurmSets = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm-set",
        metavar="[KIND.]NAME=VALUE",
        help="One of these values, for all stages or one kind of them; may be repeated.",
    ),
]
SkipChecks = Annotated[
    bool, typer.Option("--skip-checks", help="Start at once, whatever is wrong with study or data.")
]
Decide = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        metavar="POINTS",
        help="Run the study's seeds, then as many more as make its intervals so narrow.",
    ),
]
MaxSeeds = Annotated[
    int, typer.Option(min=2, help="With --decide: no more seeds than this at any place.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="With --slurm: leave once all jobs are submitted.")
]


def run(
    study: StudyName,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    retry: Retry = False,
    scale: ScaleName = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = None,
    data_workers: DataWorkers = None,
    features: Features = None,
    max_feature_gib: FeatureGib = None,
    ranks: Ranks = None,
    nodes: Nodes = None,
    node: Node = None,
    master: Master = None,
    others: Others = None,
    slurm: OnSlurm = False,
    slurm_file: SlurmFile = None,
    slurm_sets: SlurmSets = None,
    skip_checks: SkipChecks = False,
    verify: Verify = False,
    detach: Detach = False,
    decide: Decide = None,
    max_seeds: MaxSeeds = 32,
) -> None:
    """Run the stages of a study that are not done; continue those that were stopped."""
    given = locals()
    from midstream.cli.catalogue import find_study, read_settings, with_scale
    from midstream.launch.local import machine_for
    from midstream.report.power import decide as decided
    from midstream.report.power import pilot_of
    from midstream.study.store import Ledger
    from midstream.study.studies import Study, Suite

    cluster = slurm_settings(slurm, slurm_file, slurm_sets or [], detach)
    if cluster is not None and (nodes or node or master):
        raise ValueError(
            "--nodes, --node and --master are for machines without Slurm; with it, "
            "--slurm-set nodes=N"
        )
    asked = "threads device data_workers features max_feature_gib ranks nodes node master"
    chosen: dict[str, Any] = {name: given[name] for name in asked.split()}
    chosen |= {"workers": workers if cluster is None else 1}
    ledger = Ledger(store)
    found = find_study(study, with_scale(settings, scale), ledger, verify=verify)
    machine = machine_for(found, chosen | read_settings("--machine", others or []))
    if machine.node:
        from midstream.launch.workers import join

        raise typer.Exit(join(ledger.store, machine, typer.echo))
    options = {"retry": retry, "skip_checks": skip_checks}
    if decide is None:
        run_and_tell(found, ledger, machine, options, asked=study, slurm=cluster, detach=detach)
        return
    if detach:
        raise ValueError("--decide follows one study to its end; run it without --detach")
    if isinstance(found, Suite):
        names = ", ".join(one.name for one in found.studies)
        raise ValueError(
            f"--decide follows one study to its end, and {found.name} is several: {names}; give "
            "one of them"
        )

    def run_all(this: "AnyStudy") -> None:
        run_and_tell(this, ledger, machine, options, asked=study, slurm=cluster)

    sets = [one for one in with_scale(settings, scale) if not one.startswith("seeds=")]
    # A recipe that takes no seeds is refused before anything runs.
    find_study(study, [*sets, f"seeds={json.dumps(pilot_of(found, max_seeds))}"], ledger)
    run_all(found)
    more = decided(found, ledger, decide / 100, max_seeds)
    typer.echo(f"{found.name}: {more.sentence(decide)}")
    if len(more.seeds) > len(more.pilot):
        seeds = f"seeds={json.dumps(more.seeds)}"
        whole = find_study(study, [*sets, seeds], ledger, verify=verify)
        assert isinstance(whole, Study), "found as one before"
        run_all(more.study(whole))
        typer.echo(f"all {len(more.seeds)} seeds: midstream report {study} (without --set)")


def run_and_tell(
    study: "AnyStudy",
    ledger: "Ledger",
    machine: "Machine",
    options: Mapping[str, Any],
    *,
    asked: str | None = None,
    slurm: "SlurmSettings | None" = None,
    detach: bool = False,
) -> int:
    """Run, with `run_study`'s options, and tell; returns the sum over the workers of the most
    memory that a stage took, in bytes. Leaves with the outcome's code if not 0.

    `asked`: the name under which `status` and `report` find the study again.
    """
    from midstream.cli.catalogue import keep_asked
    from midstream.core.storage import can_write
    from midstream.cost.graph import order
    from midstream.launch import local, terminal
    from midstream.launch.slurm import run_on_slurm
    from midstream.study.label import labels
    from midstream.study.results import StageResult

    terminal.tell_older(ledger)
    console, stages = terminal.out(), {stage.name: stage for stage in order(study)}
    ran_by: dict[int, list[Stage]] = defaultdict(list)
    with terminal.progress(console, labels(list(stages.values()))) as show:

        def on_event(event: dict[str, Any]) -> None:
            """Keep what the launcher tells, and show it."""
            if event["event"] == "plan" and asked is not None:
                keep_asked(ledger, asked, study)
            elif event["event"] == "finished" and event["state"] == "done":
                ran_by[event["worker"]].append(stages[event["stage"]])
            show(event)

        if slurm is None:
            outcome = local.run(study, ledger, machine, on_event, **options)
        else:
            outcome = run_on_slurm(
                study, ledger, machine, slurm, on_event, detach=detach, **options
            )
    if outcome.refused:
        started = "the data is prepared, nothing else" if outcome.num_done else "nothing"
        terminal.error(
            f"error: {started} was started; put right what is listed, or add --skip-checks"
        )
        terminal.print_problems(outcome.refused, terminal.errors())
        raise typer.Exit(outcome.exit_code)
    counts = (outcome.num_done, outcome.num_failed, outcome.num_stopped, outcome.num_skipped)
    if not any(counts) and not outcome.num_queued:
        # What others have run for it is needed by this study too, from now on.
        if can_write(ledger.store) and can_write(ledger.store / "studies"):
            ledger.save_study(study)
            if asked is not None:
                keep_asked(ledger, asked, study)
        done = f"nothing to do: all {outcome.num_before} stages of {study.name} are done"
        console.print(f"{done} ({ledger.store})", markup=False, soft_wrap=True)
        return 0
    now, failed, stopped, skipped = counts
    queued = f", {outcome.num_queued} in Slurm's queue" if outcome.num_queued else ""
    told = f"{study.name}: {counted(now, 'stage')} done now, {outcome.num_before} before, "
    told += f"{failed} failed, {stopped} stopped, {skipped} not started{queued}"
    console.print(told, markup=False, soft_wrap=True)
    for message in outcome.messages:
        terminal.error(message)
    if outcome.exit_code:
        if outcome.interrupted:
            terminal.error("stopped; the same command continues where it was")
        raise typer.Exit(outcome.exit_code)
    peaks = (
        max(ledger.result(stage, StageResult).peak_memory_bytes for stage in own)
        for own in ran_by.values()
    )
    return sum(peaks)


def slurm_settings(
    asked: bool, file: Path | None, settings: list[str], detach: bool = False
) -> "SlurmSettings | None":
    """What jobs are given: the file's values, those of the command line over them."""
    from midstream.cli.catalogue import read_settings
    from midstream.config import SlurmSettings, StageKind

    if not asked:
        if file is not None or settings or detach:
            raise ValueError("--slurm-file, --slurm-set and --detach go with --slurm")
        return None
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{file} is not TOML: {error}") from None
    stages = _tables(values.pop("stages", {}))
    for name, value in read_settings("--slurm-set", settings).items():
        kind, dot, own = name.partition(".")
        if dot and kind not in get_args(StageKind):
            kinds = ", ".join(get_args(StageKind))
            raise ValueError(f"--slurm-set {name}: no stage is of kind {kind!r}; kinds are {kinds}")
        if dot:
            stages.setdefault(kind, {})[own] = value
        elif name == "stages":
            stages |= _tables(value)
        else:
            values[name] = value
    return SlurmSettings.model_validate({**values, "stages": stages})


def _tables(stages: Any) -> dict[str, dict[str, Any]]:
    """What is said of jobs by the kind of their stage, copied; ValueError for anything else."""
    if not isinstance(stages, dict) or not all(isinstance(own, dict) for own in stages.values()):
        raise ValueError(
            "stages says what jobs of a kind of stage are given, such as [stages.pretrain] with "
            f"values of its own, or --slurm-set pretrain.NAME=VALUE; it is {stages!r}"
        )
    return {kind: dict(own) for kind, own in stages.items()}


# Lines of metrics.jsonl that `logs` shows.
METRICS_LINES = 5
FOLLOW_SECONDS = 1.0


def status(
    study: Annotated[
        str | None, typer.Argument(help="All studies of the store without it.")
    ] = None,
    store: Store = DEFAULT_STORE,
    settings: Settings = None,
    scale: ScaleName = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again and again, until nothing runs any more.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every stage as JSON, a line a look.")
    ] = False,
) -> None:
    """Show how far the studies of a store are: every stage that runs, and the time that is left."""
    from midstream.cli.catalogue import last_study, with_scale
    from midstream.launch import terminal
    from midstream.launch.overview import Board, overview_table
    from midstream.study.store import Ledger

    ledger = Ledger(store)
    terminal.tell_older(ledger)
    names = ledger.study_names() if study is None else [study]
    if not names:
        raise FileNotFoundError(f"store {store} holds no study; run one, or give another --store")
    boards: list[Board] = []
    for name in names:
        try:
            found, note = last_study(name, ledger, with_scale(settings, scale))
        except ValueError as reason:
            # One of several that another version wrote hides none of the others.
            if study is not None or (name == names[-1] and not boards):
                raise
            typer.echo(f"left out: {reason}", err=True)
            continue
        if note is not None:
            typer.echo(note, err=True)
        boards.append(Board(found, ledger))
    if watch:
        try:
            _watch(boards, every, as_json, time.sleep)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
    elif as_json:
        _print_json([board.look() for board in boards])
    else:
        console = terminal.out()
        for board in boards:
            seen = board.look()
            console.print(overview_table(seen, console.width))
            for view in seen.stages:
                if view.state in ("failed", "stopped", "running"):
                    told = f"{view.label}: {ledger.folder(board.stages[view.name])} is {view.state}"
                    told += f" since {view.since}" + (f": {view.error}" if view.error else "")
                    console.print(told, markup=False, highlight=False, soft_wrap=True)


def _print_json(seen: Sequence["Overview"]) -> None:
    from midstream.launch.overview import overview_json

    typer.echo(json.dumps({"studies": [overview_json(one) for one in seen]}))


def _watch(
    boards: Sequence["Board"], every: float, as_json: bool, sleep: Callable[[float], None]
) -> None:
    """Show the boards until all is settled, or until what ran when it was looked at has ended."""
    from rich.console import Group
    from rich.live import Live

    from midstream.launch import terminal
    from midstream.launch.overview import overview_table, totals

    console = terminal.out()
    live = Live(console=console, auto_refresh=False)
    lively = console.is_terminal and not as_json
    if lively:
        live.start()
    said: list[str] = []
    was_active = False
    try:
        while True:
            seen = [board.look() for board in boards]
            if as_json:
                _print_json(seen)
            elif lively:
                room = max(console.height // len(seen), 1)
                tables = (overview_table(one, console.width, room) for one in seen)
                live.update(Group(*tables), refresh=True)
            elif (lines := [f"{one.study}: {totals(one)}" for one in seen]) != said:
                said = lines
                for line in lines:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
            active = any(one.active for one in seen)
            if not active and (was_active or all(one.settled for one in seen)):
                break
            was_active = active
            sleep(every)
    finally:
        live.stop()
    if not as_json and not all(one.settled for one in seen):
        terminal.out().print("nothing runs any more; midstream run goes on where it was")


def logs(
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help="Its first digits, or how its folder's name begins."),
    ],
    store: Store = DEFAULT_STORE,
    lines: Annotated[int, typer.Option(min=1, help="How many of the log's last lines.")] = 40,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what is added, until the stage ends.")
    ] = False,
) -> None:
    """Show a stage's state and error, its last steps, and what its process printed."""
    from midstream.cli.catalogue import stored_stage
    from midstream.study.label import label
    from midstream.study.lease import metrics_tail
    from midstream.study.store import Ledger, StageLog

    ledger = Ledger(store)
    found = stored_stage(ledger, stage)
    seen = ledger.status(found)
    typer.echo(f"{label(found)}: {ledger.folder(found)} is {seen['state']}")
    for key in ("error", "started", "ended", "host", "pid"):
        if seen.get(key) is not None:
            typer.echo(f"{key}: {seen[key]}")
    for line in metrics_tail(ledger.folder(found), METRICS_LINES):
        typer.echo(json.dumps(line))
    log = StageLog(ledger, found)
    typer.echo(log.describe())
    for text in deque(log.more(), maxlen=lines):
        typer.echo(text)
    if not follow:
        return
    try:
        while ledger.state(found) == "running":
            time.sleep(FOLLOW_SECONDS)
            for text in log.more():
                typer.echo(text)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None
    for text in log.more():
        typer.echo(text)
    end = ledger.status(found)
    typer.echo(f"{end['state']}" + (f": {end['error']}" if end.get("error") else ""))


COMMANDS: dict[str, Callable[..., None]] = {"status": status, "logs": logs}
