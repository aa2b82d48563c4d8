"""Text tasks, loaded and asked at once."""

from collections.abc import Sequence

from midstream.eval.tasks import Answerer
from midstream.eval.text import TextResult, TextTask, loaded_tasks


def run_text_tasks(
    answerer: Answerer, tasks: Sequence[TextTask], limit: int | None = None
) -> dict[str, TextResult]:
    """The results of tasks by name; see `loaded_tasks`."""
    with loaded_tasks(tasks, limit) as ask:
        return ask(answerer)
