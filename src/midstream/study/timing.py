"""When stages would run on a number of GPUs: list scheduling, the longest way to the end first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from midstream.study.sources import Number


@dataclass(frozen=True)
class Task:
    """A stage that is to run: hours on `gpus` GPUs, behind its parents among the tasks.

    `kept` and `running`: bytes on disk that stay when it is done, and that it takes meanwhile.
    """

    name: str
    hours: Number
    gpus: int
    parents: tuple[str, ...]
    kept: Number = 0.0
    running: Number = 0.0


@dataclass(frozen=True)
class Schedule:
    """Hours until the last stage ends; `critical_path` is the chain that takes longest by itself.

    lower_bound: no schedule is shorter than the critical path, nor than all GPU-hours over the
    GPUs. `starts` are in hours; `peak_bytes` is the most on disk at once.
    """

    hours: Number
    critical_path: tuple[str, ...]
    critical_hours: Number
    lower_bound: Number
    starts: Mapping[str, Number]
    peak_bytes: Number


def schedule(tasks: Sequence[Task], gpus: int) -> Schedule:
    """Start ready tasks as soon as their GPUs are free, those with the longest way first.

    Parents stand before their children. Raises ValueError for a task that wants more than there
    are.
    """
    for task in tasks:
        if task.gpus > gpus:
            raise ValueError(
                f"{task.name} needs {task.gpus} GPUs, there are {gpus}; raise --gpus, lower "
                "--gpus-per-stage, or choose a --gpu with more memory"
            )
    by_name = {task.name: task for task in tasks}
    way, following = _ways(tasks)
    waiting = {task.name: len(set(task.parents) & by_name.keys()) for task in tasks}
    children: dict[str, list[str]] = {name: [] for name in by_name}
    for task in tasks:
        for parent in set(task.parents) & by_name.keys():
            children[parent].append(task.name)
    ready = [(-way[name], name) for name, number in waiting.items() if not number]
    ready.sort()
    running: list[tuple[Number, str]] = []
    starts: dict[str, Number] = {}
    free, now, disk, peak = gpus, 0.0, 0.0, 0.0
    while ready or running:
        left = []
        for item in ready:
            task = by_name[item[1]]
            if task.gpus > free:
                left.append(item)
                continue
            free -= task.gpus
            disk += task.kept + task.running
            starts[task.name] = now
            heappush(running, (now + task.hours, task.name))
        ready, peak = left, max(peak, disk)
        now, name = heappop(running)
        free, disk = free + by_name[name].gpus, disk - by_name[name].running
        for child in children[name]:
            waiting[child] -= 1
            if not waiting[child]:
                ready.append((-way[child], child))
        ready.sort()
    path = _path(way, following)
    critical = way[path[0]] if path else 0.0
    work = sum(task.hours * task.gpus for task in tasks) / gpus
    bound = max(critical, work)
    # Hours summed from the other end may be less in their last digit.
    return Schedule(max(now, bound), path, critical, bound, starts, peak)


def _ways(tasks: Sequence[Task]) -> tuple[dict[str, Number], dict[str, str]]:
    """Hours from each task's start to the end of the longest chain behind it; who is next there."""
    way: dict[str, Number] = {}
    behind: dict[str, Number] = {}
    following: dict[str, str] = {}
    for task in reversed(tasks):
        way[task.name] = task.hours + behind.get(task.name, 0.0)
        for parent in task.parents:
            if way[task.name] > behind.get(parent, -1.0):
                behind[parent], following[parent] = way[task.name], task.name
    return way, following


def _path(way: Mapping[str, Number], following: Mapping[str, str]) -> tuple[str, ...]:
    if not way:
        return ()
    name = max(way, key=lambda one: way[one])
    path = [name]
    while (name := following.get(name, "")) in way:
        path.append(name)
    return tuple(path)
