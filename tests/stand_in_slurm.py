"""A stand-in for Slurm: its commands as one script, jobs as processes, the state in a folder.

There is no daemon: every command first settles what has ended and starts what may. It knows what
Midstream asks for: dependencies, arrays, requeueing, a controller that is away or forgets.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel", "sacct")
MINUTES = {"ci*": "1:00:00", "high": "1:00:00"}
MAX_RUNNING = 2

Jobs = dict[str, dict[str, Any]]


class StandInSlurm:
    """The commands in `folder/bin`, which `environment` puts on the PATH, and ways to disturb."""

    def __init__(self, folder: Path) -> None:
        self.folder, place = folder, folder / "bin"
        place.mkdir(parents=True)
        for name in COMMANDS:
            script, words = place / name, f"{sys.executable} -S -E {__file__} {folder} {name}"
            script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
            script.chmod(0o755)
        self.environment = {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        environment = os.environ | self.environment
        return subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        ).stdout

    def kill_controller(self) -> None:
        """It answers no command; jobs go on."""
        (self.folder / "away").touch()

    def start_controller(self) -> None:
        """It answers again."""
        (self.folder / "away").unlink()

    def forget(self, job: str) -> None:
        """The controller has lost its memory of a job, which goes on or not."""
        with _state(self.folder) as jobs:
            jobs.pop(job)

    def job_processes(self, job: str) -> dict[int, str]:
        """Command lines by process id of everything that belongs to a job."""
        return _processes(self.folder, job)

    def end(self, job: str, state: str) -> None:
        """Kill a running job; Slurm says that it ended in this state."""
        with _state(self.folder) as jobs:
            jobs[job]["end_state"] = state
            _signal(self.folder, job, signal.SIGKILL)

    def close(self) -> None:
        """End all that runs."""
        with _state(self.folder) as jobs:
            for job in jobs:
                _signal(self.folder, job, signal.SIGKILL)
            jobs.clear()


@contextmanager
def _state(folder: Path) -> Iterator[Jobs]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "jobs.json"
        jobs: Jobs = json.loads(path.read_text()) if path.is_file() else {}
        try:
            yield jobs
        finally:
            path.write_text(json.dumps(jobs))


def _tick(folder: Path, jobs: Jobs) -> None:
    """Settle what has ended and start what may."""
    for job, told in jobs.items():
        if told["pid"] and (code := _code(folder, job, told["pid"])) is not None:
            _settle(told, code)
    for job, told in jobs.items():
        if told["state"] != "PENDING":
            continue
        before = [(kind, one) for kind, job in told["after"] for one in _members(jobs, job)]
        good = [one for kind, one in before if kind == "afterok"]
        if any(_ended(one) and one["state"] != "COMPLETED" for one in good):
            told |= {"state": "CANCELLED", "reason": "DependencyNeverSatisfied"}
        elif not all(_ended(one) for _, one in before):
            told["reason"] = "Dependency"
        elif sum(bool(one["pid"]) for one in jobs.values()) >= MAX_RUNNING:
            told["reason"] = "Resources"
        else:
            told |= {"state": "RUNNING", "reason": "None", "pid": _start(folder, job, told)}


def _members(jobs: Jobs, asked: str) -> list[dict[str, Any]]:
    """The job of this id, or all jobs of this array."""
    return [told for job, told in jobs.items() if asked in (job, job.partition("_")[0])]


def _code(folder: Path, job: str, pid: int) -> int | None:
    """What a job's shell ended with; None while it runs."""
    with suppress(FileNotFoundError):
        return int((folder / f"{job}.code").read_text() or -1)
    with suppress(FileNotFoundError):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
            return None
    return -9


def _settle(told: dict[str, Any], code: int) -> None:
    told |= {"pid": 0, "exit": f"{max(code, 0)}:{max(-code, 0)}"}
    if told.pop("is_requeued", False):
        told |= {"state": "PENDING", "reason": "BeginTime"}
    elif told["state"] == "COMPLETING":
        told["state"] = "CANCELLED"
    else:
        told["state"] = told.pop("end_state", None) or ("FAILED" if code else "COMPLETED")


def _start(folder: Path, job: str, told: Mapping[str, Any]) -> int:
    array, _, task = job.partition("_")
    place = {"SLURM_JOB_ID": job, "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    place |= {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here"}
    place |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": task} if task else {}
    code = folder / f"{job}.code"
    code.unlink(missing_ok=True)
    output = told["output"].replace("%j", job).replace("%A_%a", job)
    # The shell notes the code also where all processes of the job are asked to stop.
    keep = f"trap : TERM; . {told['script']}; echo $? > {code}.new; mv {code}.new {code}"
    with open(output, "ab") as log:
        return subprocess.Popen(
            ["bash", "-c", keep],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=told["environment"] | place | {"STAND_IN": str(folder)},
            start_new_session=True,
        ).pid


def _processes(folder: Path, job: str) -> dict[int, str]:
    wanted, found = {f"SLURM_JOB_ID={job}", f"STAND_IN={folder}"}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                words = (process / "cmdline").read_text(errors="replace")
                found[int(process.name)] = words.replace("\0", " ")
    return found


def _signal(folder: Path, job: str, number: int) -> None:
    for pid in _processes(folder, job):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _sbatch(folder: Path, jobs: Jobs, words: list[str]) -> str:
    script = words[-1]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", Path(script).read_text(), re.M))
    if asked.get("mem", "").strip("'") == "900G":
        raise SystemExit("sbatch: error: Memory specification can not be satisfied")
    waits = [part.split(":") for part in asked.get("dependency", "").strip("'").split(",")]
    after = [(kind, one) for kind, *ids in waits for one in ids]
    if not all(_members(jobs, one) for _, one in after):
        raise SystemExit("sbatch: error: Batch job submission failed: Job dependency problem")
    number = folder / "number"
    job = str(int(number.read_text()) + 1 if number.is_file() else 1)
    number.write_text(job)
    count = re.match(r"'?0-(\d+)", asked.get("array", ""))
    tasks = [job] if count is None else [f"{job}_{task}" for task in range(int(count[1]) + 1)]
    kept = Path(f"{script}.{job}")
    kept.write_text(Path(script).read_text())
    for task in tasks:
        jobs[task] = {
            "name": asked["job-name"],
            "state": "PENDING",
            "reason": "None",
            "after": after,
            "script": str(kept),
            "output": asked["output"].strip("'"),
            "environment": dict(os.environ),
            "pid": 0,
            "exit": "0:0",
        }
    return f"Submitted batch job {job}"


def _scancel(folder: Path, jobs: Jobs, words: list[str]) -> str:
    names = [word.partition("=")[2] for word in words if word.startswith("--name=")]
    for job, told in jobs.items():
        is_named = job in words or job.partition("_")[0] in words
        if (is_named or told["name"] in names or "--user" in words) and not _ended(told):
            told["state"] = "COMPLETING" if told["pid"] else "CANCELLED"
            _signal(folder, job, signal.SIGTERM)
    return ""


def _squeue(folder: Path, jobs: Jobs, words: list[str]) -> str:
    shape = next(word for word in words if word.startswith("--format=")).partition("=")[2]
    lines = []
    for job, told in jobs.items():
        if "--states=all" in words or not _ended(told):
            line = shape.replace("%i", job).replace("%j", told["name"])
            lines.append(line.replace("%T", told["state"]).replace("%r", told["reason"]))
    return "\n".join(lines)


def _ended(told: Mapping[str, Any]) -> bool:
    return told["state"] not in ("PENDING", "RUNNING", "COMPLETING")


def _scontrol(folder: Path, jobs: Jobs, words: list[str]) -> str:
    if words[-1] not in jobs:
        raise SystemExit("slurm_load_jobs error: Invalid job id specified")
    told = jobs[words[-1]]
    if "requeue" in words:
        told["is_requeued"] = True
        return ""
    values = {"JobId": words[-1], "JobName": told["name"], "JobState": told["state"]}
    values |= {"Reason": told["reason"], "ExitCode": told["exit"]}
    return " ".join(f"{name}={value}" for name, value in values.items())


def main() -> None:
    """A command of Slurm."""
    folder, name, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    if name == "srun":
        # The one task of a job, in its place; what stands before is for Slurm.
        command = words[next(k for k, word in enumerate(words) if "cpus-per-task" in word) + 1 :]
        os.execvp(command[0], command)
    if (folder / "away").exists():
        raise SystemExit("slurm_load error: Unable to contact slurm controller (connect failure)")
    if name == "sinfo":
        print("\n".join(f"{partition}|{limit}" for partition, limit in MINUTES.items()))
        return
    if name == "sacct":
        raise SystemExit("Slurm accounting storage is disabled")
    run: dict[str, Callable[[Path, Jobs, list[str]], str]] = {
        "sbatch": _sbatch,
        "scancel": _scancel,
        "scontrol": _scontrol,
        "squeue": _squeue,
    }
    with _state(folder) as jobs:
        _tick(folder, jobs)
        said = run[name](folder, jobs, words)
        if name == "sbatch":
            _tick(folder, jobs)
    print(said, end="\n" if said else "")


if __name__ == "__main__":
    main()
