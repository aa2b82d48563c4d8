import json
from pathlib import Path

import pytest
import torch

import tiny
from midstream.exchange.export import ExportRequest, export, serve
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.work.open_model import open_model
from midstream.work.protocol import Channel

CPU = torch.device("cpu")
MILESTONE = tiny.TEXT.name, "milestones", "40"


@pytest.fixture(scope="session")
def text_card(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text run's milestone at 40 %, exported; nothing has evaluated it."""
    out = tmp_path_factory.mktemp("export") / "text"
    export(open_model(tiny_ledger.store.joinpath(*MILESTONE), CPU), out, text_only=False)
    return out


def test_the_card_tells_what_the_ledger_knows_and_names_what_is_missing(
    tiny_ledger: Ledger, text_card: Path
) -> None:
    card = (text_card / "README.md").read_text()
    results = tiny_ledger.results(tiny.TEXT)
    assert f"# {tiny.TEXT.name} at 40 %" in card
    assert f"Tokens seen: {results['tokens_seen']:,} in {results['steps']:,} steps" in card
    assert f"text {results['tokens']['text']:,}" in card
    assert f"| web | text | {results['sources']['web']['realised_tokens']:,} |" in card
    assert "the weights at 40 % of its tokens were used" in card
    assert f"peak_rate {tiny.RATE}, end_rate {tiny.END_RATE}, warmup_fraction 0.1" in card
    assert tiny_ledger.results(tiny.TOKENIZER)["tokenizer_sha256"] in card
    assert "Missing: the store holds no finished evaluation of this model." in card
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in card
    assert "Encoder" not in card


def test_the_same_store_gives_the_same_bytes_without_a_date_or_a_path(
    tiny_ledger: Ledger, text_card: Path, tmp_path: Path
) -> None:
    opened = open_model(tiny_ledger.store.joinpath(*MILESTONE), CPU)
    export(opened, tmp_path / "again", text_only=False)
    for file in sorted(text_card.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
        if file.suffix in (".md", ".json"):
            assert str(tiny_ledger.store) not in file.read_text()
    assert "20" + "26" not in (text_card / "README.md").read_text().replace(tiny.TEXT.name, "")


def test_an_export_replaces_an_older_one_and_leaves_other_folders_alone(
    tiny_ledger: Ledger, text_card: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = {
        "checkpoint": str(tiny_ledger.store.joinpath(*MILESTONE)),
        "out": str(tmp_path / "out"),
        "text_only": False,
    }
    (tmp_path / "out").mkdir()
    serve(ExportRequest(**request), Channel(None))
    assert "OpenLMForCausalLM" in capsys.readouterr().out
    mark = json.loads((tmp_path / "out" / "midstream_export.json").read_text())
    assert mark["stage"] == f"{tiny.TEXT.name} at 40 %"
    (tmp_path / "out" / "README.md").unlink()
    serve(ExportRequest(**request), Channel(None))
    assert (tmp_path / "out" / "README.md").is_file()
    other = {**request, "out": str(tiny_ledger.folder(tiny.TEXT))}
    with pytest.raises(ValueError, match="exists and is no exported folder"):
        serve(ExportRequest(**other), Channel(None))
    new = request | {"out": tmp_path / "new", "text_only": True}
    with pytest.raises(ValueError, match="sees nothing and is exported as text"):
        serve(ExportRequest(**new), Channel(None))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out"]


def test_a_store_that_has_lost_its_tokenizer_exports_nothing(
    tiny_ledger: Ledger, tmp_path: Path
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA, tiny.TEXT)
    next(ledger.folder(tiny.TOKENIZER).rglob("tokenizer.json")).unlink()
    request = {"checkpoint": str(ledger.folder(tiny.TEXT)), "out": str(tmp_path / "out")}
    with pytest.raises((ValueError, FileNotFoundError), match=r"tokenizer\.json"):
        serve(ExportRequest(**request, text_only=False), Channel(None))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_scores_of_this_very_model_stand_in_the_card_with_chance_and_limit(
    tiny_line: Ledger, tmp_path: Path
) -> None:
    ledger = tiny.begun(tiny_line, tmp_path / "store", tiny.SEEN, tiny.CHAT, tiny.RESULT)
    text_only = tiny.EVALUATION.model_copy(
        update={"visual_tasks": (), "text_tasks": ("pocket_facts",)}
    )
    other = Evaluate(of=tiny.TEXT, completion=0.4, evaluation=text_only)
    tiny.run_missing(ledger, other)
    out = tmp_path / "out"
    report = export(open_model(ledger.folder(tiny.CHAT), CPU), out, text_only=False)
    assert report.kind == "own"
    card = (out / "README.md").read_text()
    results = ledger.results(tiny.RESULT)
    assert tiny.RESULT.name in card
    assert other.name not in card
    assert "at most 6 examples a task, prompts short" in card
    for task, found in results["tasks"].items():
        line = next(line for line in card.splitlines() if line.startswith(f"| {task} |"))
        assert f"| {100 * found['score']:.1f} % |" in line
        assert f"| {100 * found['chance']:.1f} % |" in line
        assert line.rstrip(" |").split(" | ")[-2] == str(found["num_examples"])
    order = [card.index(f"`{stage.name}`") for stage in (tiny.TEXT, tiny.SEEN)]
    assert order == sorted(order)
    assert order[-1] < card.index(f": `{tiny.CHAT.name}`")
    assert "caption" in card
    assert "Encoder: frozen" in card
    # Without what it sees with, the same model has the same scores.
    text = export(open_model(ledger.folder(tiny.CHAT), CPU), tmp_path / "text", text_only=True)
    assert text.kind == "text"
    assert "Projector" not in (tmp_path / "text" / "README.md").read_text()
