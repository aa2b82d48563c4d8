"""A slice of a study by one worker, by two, and with --slurm as jobs: stages a second, same bits.

Every way runs the command `midstream run` into a store of its own. Printed are seconds, stages a
second and the ratio of two workers to one; any difference between the stores but times and memory
ends with an error. With --slurm a Slurm of this machine is started, the slice runs through it, and
once more while its controller and a running job are killed in the middle.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from midstream.cli.catalogue import find_study
from midstream.core.identity import file_sha256
from midstream.core.storage import read_json
from midstream.cost.graph import order
from midstream.study.stages import Stage
from midstream.study.store import Ledger

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from one_node_slurm import OneNodeSlurm, clean

# What two runs of a stage do not share.
TIMED = ("seconds", "meters", "peak_memory_bytes")
# The share of stages after which things are killed, and how long the controller stays away.
MIDDLE, AWAY_SECONDS = 1 / 3, 5.0


def bits(ledger: Ledger, stage: Stage) -> dict[str, Any]:
    """What is the same where two runs are equal bit for bit."""
    folder = ledger.folder(stage)
    results = {name: value for name, value in ledger.results(stage).items() if name not in TIMED}
    lines = [
        {name: value for name, value in line.items() if name not in TIMED}
        for line in ledger.metrics(stage)
    ]
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*.safetensors"))
    }
    return {"results": results, "metrics": lines, "weights": files}


def differences(stages: Sequence[Stage], first: Ledger, second: Ledger) -> list[str]:
    """Where two stores differ, by stage and part."""
    found = []
    for stage in stages:
        one, other = bits(first, stage), bits(second, stage)
        found += [f"{stage.name}: {part}" for part in one if one[part] != other[part]]
    return found


def run(
    command: Sequence[str],
    store: Path,
    options: Sequence[str],
    environment: Mapping[str, str],
    meanwhile: Callable[["subprocess.Popen[bytes]"], None] = lambda process: None,
) -> float:
    """Run the command into a store; its seconds. `meanwhile` is called once it has started."""
    store.mkdir(parents=True)
    start = time.monotonic()
    with (store.parent / f"{store.name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--store", str(store), *options], stdout=log, stderr=log, env=environment
        )
        meanwhile(process)
        if code := process.wait():
            raise SystemExit(f"exit code {code}; see {store.parent / f'{store.name}.log'}")
    return time.monotonic() - start


def disturber(
    slurm: OneNodeSlurm, ledger: Ledger, stages: Sequence[Stage]
) -> Callable[["subprocess.Popen[bytes]"], None]:
    """Kills the controller and the processes of a training job, once a third is done."""

    def running() -> list[str]:
        path = ledger.store / "slurm.json"
        jobs = read_json(path)["jobs"] if path.is_file() else {}
        return [
            jobs[stage.name]["job"]
            for stage in stages
            if stage.name in jobs
            and stage.kind in ("pretrain", "continue", "finetune")
            and ledger.state(stage) == "running"
        ]

    def disturb(process: "subprocess.Popen[bytes]") -> None:
        wanted = MIDDLE * len(stages)
        while not (sum(ledger.is_done(stage) for stage in stages) >= wanted and running()):
            if process.poll() is not None:
                raise SystemExit("it ended before anything was killed")
            time.sleep(0.2)
        job = running()[0]
        slurm.kill_controller()
        killed = slurm.job_processes(job)
        for pid, words in killed.items():
            if "midstream.work.worker" in words or "submitit" in words:
                os.kill(pid, signal.SIGKILL)
        print(f"killed: the controller, and job {job} after {wanted:.0f} stages", flush=True)
        time.sleep(AWAY_SECONDS)
        slurm.start_controller()

    return disturb


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", default="paper.slice_of_four_axes")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--folder", type=Path, help="where the stores go; it is kept")
    parser.add_argument("--slurm", action="store_true")
    given = parser.parse_args()

    study = find_study(given.study, given.settings)
    stages = order(study)
    print(f"{study.name}: {len(study.lines)} lines, {len(stages)} stages", flush=True)
    command = [sys.executable, "-m", "midstream.cli.app", "run", given.study, "--device", "cpu"]
    command += [part for setting in given.settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="midstream-slice-") as temporary:
        folder = given.folder or Path(temporary)
        seconds: dict[str, float] = {}

        def measure(name: str, options: Sequence[str], **more: Any) -> None:
            environment = more.pop("environment", dict(os.environ))
            seconds[name] = run(command, folder / name, options, environment, **more)
            rate = len(stages) / seconds[name]
            print(f"{name}: {seconds[name]:,.1f} s, {rate:.3f} stages/s", flush=True)
            if name != "one":
                found = differences(stages, Ledger(folder / "one"), Ledger(folder / name))
                if found:
                    raise SystemExit(f"{name} differs from one:\n" + "\n".join(found))
                print(f"{name}: the same bits as one", flush=True)

        measure("one", ["--workers", "1"])
        measure("two", ["--workers", "2"])
        print(f"two workers: {seconds['one'] / seconds['two']:.2f} times the throughput of one")
        if given.slurm:
            with closing(OneNodeSlurm(folder / "cluster")) as slurm:
                environment = clean(os.environ) | slurm.environment
                jobs = ["--slurm"]
                for setting in ("poll_seconds=1", "time_minutes=30", "restarts=2"):
                    jobs += ["--slurm-set", setting]
                measure("slurm", jobs, environment=environment)
                disturb = disturber(slurm, Ledger(folder / "disturbed"), stages)
                measure("disturbed", jobs, environment=environment, meanwhile=disturb)


if __name__ == "__main__":
    main()
