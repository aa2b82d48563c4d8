"""Published files in the columns of the harness's data sets, and through the harness itself."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from answerers import Fake, ignore, kept, run_text_tasks
from midstream.config import Evaluation
from midstream.core.identity import published_files
from midstream.eval import harness_data
from midstream.eval.benchmark import evaluate
from midstream.eval.find_task import harness_task, read_choice_task, require_share
from midstream.eval.scoring import TEXT_CHANCE
from midstream.eval.tasks import HARNESS_TASKS
from midstream.eval.text import TextTask

BENCH = Path(__file__).parents[3] / "shared" / "data" / "bench_text"
needs_bench = pytest.mark.skipif(not BENCH.is_dir(), reason=f"{BENCH} is not here")


def longest() -> Fake:
    """Likes long continuations."""
    return Fake(lambda *_: "#### 2", greedy=lambda _context, tail: tail == " 3")


# What the shared files hold: records, and how they depart from the data set.
REAL = {
    "arc_easy": (2376, None),
    "copa": (100, None),
    "mathqa": (2983, "four of the five options"),
    "piqa": (1838, None),
    "pubmedqa": (500, None),
    "hellaswag": (1000, "contexts as the text file writes them"),
    "agieval_lsat_ar": (230, None),
    "bigbench_conceptual_combinations_multiple_choice": (103, "the wording of llm-foundry's file"),
    "bigbench_cs_algorithms": (1320, None),
}


@needs_bench
@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(name: str) -> None:
    num_docs, departs = REAL[name]
    task = harness_task(name, BENCH)
    assert task.docs is not None
    assert len(task.docs) == num_docs
    assert task.departs == departs
    assert task.chance == (0.25 if name == "mathqa" else TEXT_CHANCE[name][0])
    part = read_choice_task(BENCH, name, limit=7)
    whole = read_choice_task(BENCH, name)
    assert part.docs == (whole.docs or ())[:7]


@needs_bench
@pytest.mark.slow
def test_a_likelihood_task_counts_what_greedy_decoding_gives() -> None:
    task = harness_task("bigbench_cs_algorithms", BENCH)
    docs = [doc for doc in task.docs or () if doc["continuation"] in (" 3", " 4")][:20]
    cut = type(task)(**{**vars(task), "docs": tuple(docs)})
    found = run_text_tasks(longest(), [cut])[task.name]
    expected = sum(doc["continuation"] == " 3" for doc in docs) / len(docs)
    assert 0 < expected < 1
    assert found.metrics["acc"] == pytest.approx(expected)


# Of each task a file and a record of it, then prompt, choices and the right one as the harness puts
# them. WinoGrande: the likelihood of the end behind each beginning; COPA: the harness's two spaces.
OFFICIAL = """
arc_challenge arc_challenge.jsonl {"query": "Question: Why?\\n", "choices": ["a", "b", "c"], "gold": 1}
["Question: Why?\\nAnswer:", [" a", " b", " c"], 1]
openbookqa openbook_qa.jsonl {"query": "Predators eat", "choices": ["lions", "bunnies"], "gold": 1}
["Predators eat", [" lions", " bunnies"], 1]
winogrande winogrande.jsonl {"context_options": ["So Sue", "So Ann"], "continuation": "was g_d.", "gold": 1}
["... was g_d.", ["So Sue", "So Ann"], 1]
arc_easy ARC-Easy-Test.jsonl {"answerKey": "2", "question": {"stem": "Why?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]}}
["Question: Why?\\nAnswer:", [" a", " b"], 1]
boolq dev.jsonl {"passage": "P.", "question": "is it", "answer": true, "title": "t"}
["t -- P.\\nQuestion: is it?\\nAnswer:", [" no", " yes"], 1]
copa val.jsonl {"premise": "It fell.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1}
["It fell because", ["  a.", "  b."], 1]
hellaswag hellaswag_val.jsonl {"ctx_a": "A man", "ctx_b": "he", "activity_label": "Run", "endings": ["a", "b", "c", "d"], "label": 2}
["Run: A man He", [" a", " b", " c", " d"], 2]
agieval_sat_en sat-en.jsonl {"passage": "P.", "question": "Q?", "options": ["(A)a", "(B)b"], "label": "B"}
["P.Q: Q? Answer Choices: (A)a (B)b\\nA: Among A through B, the answer is", [" (A)a", " (B)b"], 1]
"""  # noqa: E501


@pytest.mark.slow
def test_published_forms_reach_the_model_in_the_harness_words(tmp_path: Path) -> None:
    tasks, rows = [], OFFICIAL.strip().splitlines()
    for name, file, record in (row.split(" ", 2) for row in rows[::2]):
        folder = tmp_path / name / ("COPA" if name == "copa" else "boolq")
        folder.mkdir(parents=True)
        (folder / file).write_text(record + "\n")
        assert published_files(tmp_path / name, name)[0].parent == folder
        tasks.append(harness_task(name, tmp_path / name))
        assert tasks[-1].departs == f"1 of {HARNESS_TASKS[name].num_docs:,} records"
    found = run_text_tasks(longest(), tasks)
    for task, expected in zip(tasks, rows[1::2], strict=True):
        (answer,) = found[task.name].answers
        assert [answer.prompt, [*answer.choices], answer.gold] == json.loads(expected)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("piqa", "valid.jsonl", '{"goal": "g", "sol1": "a", "sol2": "b"}', "valid-labels"),
        ("copa", "copa.jsonl", '{"query": "It fell", "choices": ["a"], "gold": 0}', "ends with"),
        (
            "arc_easy",
            "arc_easy.jsonl",
            '{"query": "q", "choices": ["a"], "gold": 1}',
            "gold 1 is none of 1",
        ),
        ("boolq", "boolq.jsonl", '{"passage": "p", "question": "q", "label": 1}', "neither true"),
        ("boolq", "boolq.jsonl", '{"query": "p", "choices": ["no", "yes"], "gold": 1}', "no line"),
        (
            "winogrande",
            "winogrande.jsonl",
            '{"context_options": ["a"], "continuation": "c", "gold": 0}',
            "1 context_options",
        ),
        ("hellaswag", "hellaswag_val_x.txt", "a: b\n7\nx\ny\nz\nw\n", "line 1: a task is"),
        ("hellaswag", "hellaswag_val_x.txt", "a: b\n1\nx\n", "no multiple of six"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, name: str, file: str, text: str, message: str
) -> None:
    (tmp_path / file).write_text(text + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        harness_task(name, tmp_path)


BOOLQ = {
    "query": "Passage: A pie.\nQuestion: not this\nQuestion: is a pie food?\n",
    "choices": ["no", "yes"],
    "gold": 1,
}
SENTENCE = {"sentence": "Sue helped Ann so _ was glad.", "option1": "Sue", "option2": "Ann"}


def test_llm_foundrys_boolq_is_taken_apart_and_departs_in_its_titles(tmp_path: Path) -> None:
    for end in ("\n", ""):
        record = BOOLQ | {"query": BOOLQ["query"].rstrip("\n") + end}  # type: ignore[attr-defined]
        (tmp_path / "boolq.jsonl").write_text(json.dumps(record) + "\n")
        task = harness_task("boolq", tmp_path)
        assert task.docs == (
            {"passage": "A pie.\nQuestion: not this", "question": "is a pie food", "label": 1},
        )
        assert task.departs is not None
        assert "titles" in task.departs


@pytest.mark.slow
def test_any_task_is_read_from_its_data_sets_own_files(tmp_path: Path) -> None:
    """As a hub has them: parts of a parquet split, a folder a configuration, JSON lines."""
    asked = SENTENCE | {"answer": "2"}
    folder = tmp_path / "text_tasks" / "winogrande" / "winogrande_xl"
    folder.mkdir(parents=True)
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist([asked]), folder / f"validation-0000{part}-of-2.parquet"
        )
    pq.write_table(pa.Table.from_pylist([asked] * 9), folder / "train-00000-of-1.parquet")
    (tmp_path / "text_tasks/winogrande/README.md").write_text("About.")
    other = {"subject": "s", "choices": ["a", "b", "c", "d"], "answer": 3}
    five = [json.dumps({**other, "question": f"How {number}?"}) for number in range(1, 6)]
    (tmp_path / "mmlu_anatomy").mkdir()
    (tmp_path / "mmlu_anatomy/test.jsonl").write_text("\n".join(five))
    sums = {"question": "1+1?", "answer": "It is. #### 2"}
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text(json.dumps(sums) + "\n")
    names = ("winogrande", "mmlu_anatomy", "gsm8k")

    evaluation = Evaluation(text_tasks=names, blind=False)
    answers = kept(longest())
    rows = evaluate(answers, evaluation, tmp_path, tmp_path / "out", ignore)["tasks"]
    found = {
        name: (row["num_examples"], row["chance"], row["metric"]) for name, row in rows.items()
    }
    assert found == {
        "winogrande": (2, 0.5, "accuracy"),
        "mmlu_anatomy": (5, 0.25, "accuracy"),
        "gsm8k": (1, 0.0, "exact_match"),
    }
    assert rows["gsm8k"]["score"] == 1.0
    shortened = {name: row["shortened"] for name, row in rows.items()}
    without = "without the 5 examples in its prompts"
    assert shortened == {"winogrande": None, "mmlu_anatomy": None, "gsm8k": without}
    before = rows["mmlu_anatomy"]["key"]
    evaluation = Evaluation(text_tasks=("mmlu_anatomy",), blind=False, limit=3)
    rows = evaluate(answers, evaluation, tmp_path, tmp_path / "out", ignore)["tasks"]
    assert rows["mmlu_anatomy"]["shortened"] == "3 of 5 examples"
    assert rows["mmlu_anatomy"]["key"] != before
    # Those of a part are called as in the whole, so that the two can be compared.
    table = pq.read_table(tmp_path / "out/predictions/mmlu_anatomy.parquet").to_pylist()
    assert [row["example_id"] for row in table] != ["1", "2", "3"]
    assert all(f"How {row['example_id']}?" in row["prompt"] for row in table)


def test_a_split_that_a_folder_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "winogrande").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"winogrande/{split}.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"no file of the split 'validation', only test"):
        harness_task("winogrande", tmp_path)
    # One file is taken for whatever it is, but not where it says that it is of another split.
    (tmp_path / "winogrande/test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of the split 'validation', only train"):
        harness_task("winogrande", tmp_path)
    for name in ("dev.jsonl.gz", "records.jsonl"):
        (tmp_path / "winogrande/train.jsonl").unlink(missing_ok=True)
        path = tmp_path / "winogrande" / name
        path.write_bytes(gzip.compress(b"{}\n") if path.suffix == ".gz" else b"{}\n")
        task = harness_task("winogrande", tmp_path)
        assert (task.files, task.settings["dataset_path"]) == ((path,), "json")
        path.unlink()
    for configuration in ("winogrande_l", "winogrande_s"):
        (tmp_path / "winogrande" / configuration).mkdir()
        (tmp_path / "winogrande" / configuration / "validation.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"winogrande_l, winogrande_s and no folder winogrande_xl"):
        harness_task("winogrande", tmp_path)


def test_tasks_that_share_a_data_set_find_their_own_in_its_folder(tmp_path: Path) -> None:
    for configuration in ("ARC-Easy", "ARC-Challenge"):
        folder = tmp_path / "ai2_arc" / configuration
        folder.mkdir(parents=True)
        (folder / "test-00000-of-00001.jsonl").write_text("{}\n")
    for task, configuration in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
        (path,) = harness_task(task, tmp_path).files
        assert path == tmp_path / "ai2_arc" / configuration / "test-00000-of-00001.jsonl"
    # Another configuration alone is not taken for a task's own.
    (tmp_path / "mmlu_anatomy/all").mkdir(parents=True)
    (tmp_path / "mmlu_anatomy/all/test.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds 'test' in all and no folder anatomy"):
        harness_task("mmlu_anatomy", tmp_path)


def test_tasks_that_no_folder_is_read_of_are_told_what_else_helps(tmp_path: Path) -> None:
    (tmp_path / "squadv2").mkdir()
    with pytest.raises(FileNotFoundError, match="squadv2: the cache of data sets lacks") as alone:
        harness_task("squadv2", tmp_path)
    assert "put the files there" not in str(alone.value)


def test_a_hub_that_does_not_answer_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    harness_data._hub_problem.cache_clear()
    try:
        with pytest.raises(FileNotFoundError) as error:
            harness_task("lambada_openai", tmp_path)
    finally:
        harness_data._hub_problem.cache_clear()
    assert "the hub does not answer (Connect" in str(error.value)
    assert "\n" not in str(error.value)


def cached(cache: Path, path: str, configuration: str, docs: list[dict[str, Any]] | None) -> Path:
    """A data set as `datasets` has it in its cache after a download."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, name = path.split("/")
    name = camelcase_to_snakecase(name)
    folder = cache / f"{owner}___{name}" / configuration / "0.0.0" / "0123456789abcdef"
    if docs is None:
        folder.mkdir(parents=True)
        return folder
    made = datasets.Dataset.from_list(docs)
    made.info.update(datasets.DatasetInfo(config_name=configuration, dataset_name=name))
    made.info.splits = datasets.SplitDict.from_split_dict(
        {"test": datasets.SplitInfo("test", num_examples=len(docs))}, name
    )
    made.save_to_disk(str(folder.parent / "made"))
    folder.mkdir()
    (folder.parent / "made/data-00000-of-00001.arrow").rename(folder / f"{name}-test.arrow")
    shutil.rmtree(folder.parent / "made")
    made.info.write_to_directory(str(folder))
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub, and an empty cache of data sets."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ai2_arc", ValueError, r"ai2_arc is a tag .*; name its tasks: arc_challenge"),
        ("winogrand", ValueError, "did you mean winogrande"),
        ("piqa", FileNotFoundError, r"lacks valid\.jsonl and .*, published by PIQA"),
        (
            "mmlu",
            FileNotFoundError,
            r"mmlu \(.*\) and 46 more; ask its tasks one by one, .*, or set HF_H",
        ),
    ],
)
def test_what_is_not_here_is_said_in_a_line(
    offline: Path, tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    cached(offline, "cais/mmlu", "abstract_algebra", None)
    with pytest.raises(error, match=message) as raised:
        harness_task(name, tmp_path)
    assert "\n" not in str(raised.value)
    assert "abstract_algebra" not in str(raised.value)


@pytest.mark.parametrize("name", ["colours", "my_questions", "./colours.yaml"])
def test_a_task_of_ones_own_outside_a_world_is_told_how_it_is_listed(
    offline: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text_tasks").mkdir()
    (tmp_path / "text_tasks/colours.jsonl").touch()
    (tmp_path / "my_questions").mkdir()
    with pytest.raises(ValueError, match=r"is called .*text_tasks/<name>\.jsonl .* world\.json li"):
        harness_task(name, tmp_path)
    with pytest.raises(ValueError, match="is called") as raised:
        harness_task("no_task_at_all", tmp_path)
    assert "world.json" not in str(raised.value)


def test_a_data_set_that_was_downloaded_before_needs_no_hub(offline: Path, tmp_path: Path) -> None:
    other = cached(offline, "openai/gsm8k", "socratic", None)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE=0"):
        harness_task("gsm8k", tmp_path)
    other.parents[1].rename(other.parents[2] / "main")
    assert harness_task("gsm8k", tmp_path).fetched
    with pytest.raises(FileNotFoundError, match="lambada_openai"):
        harness_task("lambada_openai", tmp_path)


STATEMENT = {
    "region": "Nile Valley",
    "first_statement": "s",
    "options": {
        "text": ["one", "two", "three"],
        "arabic_keys": ["\u0623", "\u0628", "\u062c"],
        "english_keys": ["A", "B", "C"],
    },
    "answer_key": {"arabic_answer_key": "\u0628", "english_answer_key": "B"},
}


@pytest.mark.slow
def test_a_group_whose_data_sets_were_downloaded_before_needs_no_hub(
    offline: Path, tmp_path: Path
) -> None:
    name = "arab_culture_nile_valley"
    for at, country in enumerate(("Egypt", "Sudan"), start=1):
        with pytest.raises(FileNotFoundError) as error:
            harness_task(name, tmp_path)
        assert ("(Egypt), " in str(error.value)) == (at == 1)
        assert "lacks MBZUAI/ArabCulture (" in str(error.value)
        assert "(Sudan); ask its tasks one by one" in str(error.value)
        cached(offline, "MBZUAI/ArabCulture", country, [{**STATEMENT, "country": country}] * 2 * at)
    fake, evaluation = longest(), Evaluation(text_tasks=(name,), blind=False)
    row = evaluate(kept(fake), evaluation, tmp_path, tmp_path / "out", ignore)["tasks"][name]
    assert row["num_examples"] == 6
    assert set(row["splits"]) == {"arab_culture_egypt", "arab_culture_sudan"}
    assert {tail for _, tail in fake.asked} == {"A", "B", "C"}
    require_share(harness_task(name, tmp_path))


@pytest.mark.parametrize(("name", "metric"), [("wikitext", "word_perplexity"), ("mmlu", None)])
def test_a_study_asks_for_shares_of_right_answers(name: str, metric: str | None) -> None:
    task = TextTask(name, None, {}, None)
    if metric is None:
        require_share(task)
        return
    with pytest.raises(ValueError, match=rf"{name} has the metrics {metric}.*midstream eval"):
        require_share(task)
