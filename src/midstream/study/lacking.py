"""What a study was planned without: how each of it is had, and what can be run meanwhile."""

from midstream.study.first_stages import PLANNED, Imported, LoadDecoder
from midstream.study.stage import Evaluate, LoadModel, Stage
from midstream.study.studies import AnyStudy

# Lines and studies that a sentence names before it counts.
MOST_NAMES = 6


def is_lacking(imported: Imported) -> bool:
    """Whether a study was planned before the folder was there."""
    return imported.content.startswith(PLANNED)


def how_to_have(imported: Imported) -> str:
    """The folder, and the command that makes it where what it is made of is public."""
    folder = imported.folder
    if not imported.source:
        return f"{folder} (not public: import one of your own)"
    return f"{folder} (midstream import {imported.source} --out {folder})"


def what_can_run(study: AnyStudy) -> str | None:
    """Which lines or studies need no checkpoint that is missing; None where none is missing."""
    whole = {
        one.name: [name for name, result in one.named_results if not _lacks(result)]
        for one in study.studies
    }
    lines = {one.name: len(one.named_results) for one in study.studies}
    if all(len(whole[name]) == number for name, number in lines.items()):
        return None
    if len(whole) == 1:
        (names,) = whole.values()
        what, number = "lines and baselines", len(study.named_results)
    else:
        names = [name for name, own in whole.items() if len(own) == lines[name]]
        what, number = "studies", len(whole)
    if not names:
        return f"without the missing checkpoints none of the {number} {what} can be run"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (
        f"without the missing checkpoints {len(names)} of {number} {what} can be run: "
        f"{'; '.join(names[:MOST_NAMES])}{more}"
    )


def _lacks(result: Evaluate) -> bool:
    """Whether an evaluation rests on an imported model that is missing."""
    stages: list[Stage] = [result]
    while stages:
        stage = stages.pop()
        if isinstance(stage, LoadDecoder | LoadModel):
            return is_lacking(stage.checkpoint)
        stages += stage.parents
    return False
