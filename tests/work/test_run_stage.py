import json
import re
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import tiny
from midstream.config import Evaluation
from midstream.core.identity import file_sha256
from midstream.model.vlm import VLM
from midstream.model.weights import (
    initialise,
    joint_digest,
    load_weights,
    tensor_digest,
    weights_digest,
)
from midstream.study.stages import Continue, ContinueFrom, Evaluate, Finetune, FromScratch, Stage
from midstream.study.store import Ledger, Stopped
from midstream.train import checkpoint
from midstream.train.parallel import Place
from tiny import CHAT, RESULT, SEEN, TEXT

STORE_DOC = Path(__file__).parents[2] / "docs" / "store.md"


def words(text: str) -> set[str]:
    return set(text.split())


ALL = {"seconds", "peak_memory_bytes", "memory_of"}
TRAINED = """tokens_seen steps first_rate last_rate final_loss tokens sources pad_fraction
    image_row_pad_fraction weights_digest meters held_out"""
# What the results of each kind of stage say, as docs/store.md names it.
FIELDS = {
    "prepare_world": "holds",
    "prepare_tokenizer": "vocab_size tokenizer_sha256",
    "prepare_source": """source kind num_examples num_tokens num_targets num_images distinct_images
        lengths longest validation records rejects dropped_turns unread captions seen
        fingerprint""",
    "train_encoder": """steps first_loss final_loss num_parameters retrieval retrieval_chance
        weights_digest""",
    "pretrain": TRAINED,
    "continue": TRAINED,
    "finetune": TRAINED,
    "evaluate": "tasks stable suites weights_digest",
}
SOURCE = """kind planned_tokens planned_sequences realised_tokens examples epochs
    largest_example_tokens cut seen pictures unreduced"""
TASK = """splits kind metric score stderr chance blind num_examples unparsable key low high
    shortened details continuous"""
SOURCE_FIELDS, TASK_FIELDS = words(SOURCE), words(TASK)
VISUAL_FIELDS = {"format", "wording", "answered", "note"}
TEXT_FIELDS = {"higher_is_better", "note"}


def contents(folder: Path) -> dict[str, str]:
    """By path: the sha256 of each file's bytes; locks, which hold nothing, are left out."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock" and path.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def ledger(tiny_line: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A whole line, evaluated, and the text run's own evaluation."""
    mine = tiny.begun(tiny_line, tmp_path_factory.mktemp("line"), SEEN, CHAT, RESULT)
    tiny.run_missing(mine, ASKED_TEXT)
    return mine


ASKED_TEXT = Evaluate(
    of=TEXT, completion=0.4, evaluation=Evaluation(text_tasks=("pocket_facts",), limit=6)
)
LINE: tuple[Stage, ...] = (*tiny.PREPARED, tiny.ENCODER_STAGE, TEXT, SEEN, CHAT, RESULT)


@pytest.fixture
def own(tiny_ledger: Ledger, tmp_path: Path) -> Ledger:
    """A store to change: world, encoder and text run are done in it."""
    return tiny.begun(tiny_ledger, tmp_path)


@pytest.mark.parametrize("stage", LINE, ids=lambda stage: stage.kind)
def test_results_have_the_fields_that_the_store_documents(ledger: Ledger, stage: Stage) -> None:
    results, names = ledger.results(stage), ALL | words(FIELDS[stage.kind])
    assert results.keys() == names
    page = STORE_DOC.read_text()
    if stage.kind in ("pretrain", "continue", "finetune"):
        assert results["tokens"].keys() == vars(checkpoint.TokenCount()).keys()
        names |= {*SOURCE_FIELDS, *results["tokens"]}
        for source in results["sources"].values():
            assert source.keys() == SOURCE_FIELDS
            if source["pictures"] is not None:
                names |= source["pictures"].keys()
                assert source["pictures"]["views"] <= source["examples"]
    if isinstance(stage, Evaluate):
        names |= TASK_FIELDS | VISUAL_FIELDS | TEXT_FIELDS | set(results["stable"])
        for task in results["tasks"].values():
            own = VISUAL_FIELDS if task["kind"] == "vision" else TEXT_FIELDS
            assert task.keys() == TASK_FIELDS | own
    assert names <= set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", page))))
    assert ledger.state(stage) == "done"


def test_metrics_lines_have_the_fields_that_the_store_documents(ledger: Ledger) -> None:
    fields = {"step", "tokens_seen", "loss", "rate", "grad_norm", "num_targets", "seconds"}
    for stage in (tiny.ENCODER_STAGE, TEXT, SEEN, CHAT):
        lines = ledger.metrics(stage)
        assert len(lines) == ledger.results(stage)["steps"]
        assert all(line.keys() == fields for line in lines)


def test_the_store_holds_what_its_page_says(ledger: Ledger) -> None:
    def there(stage: Stage) -> set[str]:
        folder = ledger.folder(stage)
        return {path.name for path in folder.iterdir()}

    common = {"stage.json", "status.json", "lock", "results.json", "SUCCESS"}
    assert there(tiny.WORLD) == common | {"world"}
    assert there(tiny.TOKENIZER) == common | {"tokenizer.json"}
    assert {*map(frozenset, map(there, tiny.PREPARED[2:]))} == {frozenset(common | {"source"})}
    assert there(tiny.ENCODER_STAGE) == common | {"metrics.jsonl", "weights"}
    trained = common | {"metrics.jsonl", "starts.jsonl"}
    assert there(TEXT) == trained | {"milestones"}
    assert there(SEEN) == there(CHAT) == trained | {"weights"}
    assert there(RESULT) == common | {"predictions"}
    files = {path.name for path in (ledger.folder(SEEN) / "weights").iterdir()}
    assert files == {"model.safetensors", "progress.json", "origin.json", "manifest.json"}


def test_training_through_an_encoder_leaves_it_as_it_was(
    ledger: Ledger, tiny_ledger: Ledger
) -> None:
    after = contents(ledger.folder(tiny.ENCODER_STAGE))
    assert after == contents(tiny_ledger.folder(tiny.ENCODER_STAGE))
    names = load_file(ledger.folder(SEEN) / "weights" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"decoder", "projector"}


def first_step(ledger: Ledger, stage: Continue | Finetune) -> Path:
    """Run one step and stop; its checkpoint."""
    with pytest.raises(Stopped):
        tiny.runner(ledger, should_stop=lambda: True).run(stage)
    (folder,) = checkpoint.by_age(ledger.folder(stage) / "checkpoints")
    assert folder.name == "step-00000001"
    return folder


def starting_digest(ledger: Ledger, stage: Continue | Finetune) -> str:
    """What stood for the weights before the first step."""
    lines = (ledger.folder(stage) / "starts.jsonl").read_text().splitlines()
    return str(json.loads(lines[0])["weights_digest"])


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    return joint_digest({name: tensor_digest(value) for name, value in tensors.items()})


def fresh(stage: Continue | Finetune) -> VLM:
    model = VLM(stage.model)
    initialise(model, stage.training.seed)
    return model


@pytest.mark.parametrize("completion", [0.2, 1.0])
def test_a_continuation_starts_from_the_milestones_decoder_and_a_fresh_projector(
    own: Ledger, completion: float
) -> None:
    stage = tiny.image_run(ContinueFrom(stage=TEXT, completion=completion), schedule=tiny.warm())
    first_step(own, stage)
    milestone = checkpoint.milestone(own.folder(TEXT), completion)
    parent = load_file(milestone / "model.safetensors")
    projector = fresh(stage).projector
    assert projector is not None
    drawn = {f"projector.{name}": value for name, value in projector.state_dict().items()}
    assert starting_digest(own, stage) == digest_of(parent | drawn)


def test_training_from_scratch_starts_from_the_initialiser(own: Ledger) -> None:
    stage = tiny.image_run(FromScratch(), schedule=tiny.warm(), seed=3)
    first_step(own, stage)
    assert starting_digest(own, stage) == digest_of(fresh(stage).state_dict())
    other = fresh(tiny.image_run(FromScratch(), schedule=tiny.warm(), seed=4)).state_dict()
    assert starting_digest(own, stage) != digest_of(other)


def test_fine_tuning_starts_from_the_image_runs_weights(ledger: Ledger, tmp_path: Path) -> None:
    own = tiny.store_with(ledger, tmp_path, tiny.DATA, tiny.ENCODER_STAGE, SEEN)
    folder = first_step(own, CHAT)
    parent = load_file(own.folder(SEEN) / "weights" / "model.safetensors")
    assert starting_digest(own, CHAT) == digest_of(parent)
    moments = load_file(folder / "optimizer.safetensors")
    assert {value.item() for key, value in moments.items() if key.startswith("step.")} == {1.0}


def test_moments_come_along_or_start_at_zero_as_the_start_says(own: Ledger) -> None:
    beta1, beta2 = 0.9, 0.95
    found = {}
    for choice in ("carry", "fresh"):
        start = ContinueFrom(stage=TEXT, completion=0.4, optimizer=choice)
        stage = tiny.image_run(start, schedule=tiny.warm())
        found[choice] = load_file(first_step(own, stage) / "optimizer.safetensors")
    milestone = checkpoint.milestone(own.folder(TEXT), 0.4)
    parent = load_file(milestone / "optimizer.safetensors")
    num_steps = checkpoint.read_progress(milestone).step
    carried, zero = found["carry"], found["fresh"]
    assert carried.keys() == zero.keys()
    for key in parent:
        if key.startswith("step."):
            assert (carried[key].item(), zero[key].item()) == (num_steps + 1, 1)
        else:
            # One step adds the same new part to both; the rest is the parent's, decayed once.
            beta = beta2 if key.startswith("exp_avg_sq.") else beta1
            rest = carried[key] - zero[key]
            assert torch.allclose(rest, beta * parent[key], rtol=1e-4, atol=1e-7), key
    new = [key for key in carried if ".projector." in key]
    assert new
    assert all(torch.equal(carried[key], zero[key]) for key in new)


def test_a_continued_rate_goes_on_where_the_text_run_had_it(own: Ledger) -> None:
    text = own.metrics(TEXT)
    for completion in (0.2, 0.8):
        stage = tiny.image_run(ContinueFrom(stage=TEXT, completion=completion), total_tokens=2_000)
        tiny.runner(own).run(stage)
        progress = checkpoint.read_progress(checkpoint.milestone(own.folder(TEXT), completion))
        first = own.metrics(stage)[0]["rate"]
        # The rate the text run itself took its next step with.
        assert first == text[progress.step]["rate"] == progress.rate
        assert own.results(stage)["first_rate"] == first
        assert own.results(stage)["last_rate"] == tiny.END_RATE


def test_a_milestone_that_was_not_kept_is_refused_with_those_there_are(own: Ledger) -> None:
    stage = tiny.image_run(ContinueFrom(stage=TEXT, completion=0.5))
    with pytest.raises(ValueError, match="kept no weights at 50 %; it has 20 %, 40 %, 60 %"):
        tiny.runner(own).run(stage)
    near = tiny.image_run(ContinueFrom(stage=TEXT, completion=0.401))
    with pytest.raises(ValueError, match=r"kept no weights at 40\.1 %"):
        tiny.runner(own).run(near)


def test_a_stage_whose_parent_is_not_done_is_refused_and_leaves_no_folder(own: Ledger) -> None:
    before = contents(own.store)
    with pytest.raises(FileNotFoundError, match=f"{SEEN.identity[:7]} is new, not done"):
        tiny.runner(own).run(CHAT)
    assert contents(own.store) == before
    assert not own.folder(CHAT).exists()


def test_a_damaged_parent_stops_a_stage_before_its_first_step(own: Ledger) -> None:
    path = checkpoint.milestone(own.folder(TEXT), 0.4) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"milestones/40/model\.safetensors differs"):
        tiny.runner(own).run(SEEN)
    assert own.metrics(SEEN) == []
    assert own.state(SEEN) == "failed"


def test_an_evaluation_uses_the_final_weights_and_keeps_every_answer(ledger: Ledger) -> None:
    results = ledger.results(RESULT)
    assert results["weights_digest"] == ledger.results(CHAT)["weights_digest"]
    assert set(results["tasks"]) == {"vqav2", "pope", "pocket_facts"}
    for name, task in results["tasks"].items():
        rows = pq.read_table(ledger.predictions(RESULT, name)).to_pylist()
        assert len(rows) == task["num_examples"] == 6
        assert 0 <= task["score"] <= 1


def test_a_text_run_is_evaluated_at_the_milestone_asked_for(ledger: Ledger) -> None:
    model = VLM(TEXT.model)
    load_weights(model, checkpoint.milestone(ledger.folder(TEXT), 0.4) / "model.safetensors")
    results = ledger.results(ASKED_TEXT)
    assert results["weights_digest"] == weights_digest(model)
    assert results["weights_digest"] != ledger.results(TEXT)["weights_digest"]
    assert results["stable"]["vision"] is None


def test_a_text_model_asked_about_pictures_fails_with_the_reason(own: Ledger) -> None:
    stage = Evaluate(of=TEXT, evaluation=Evaluation(visual_tasks=("vqav2",), limit=2))
    with pytest.raises(ValueError, match="no encoder and cannot see"):
        tiny.runner(own).run(stage)
    assert own.state(stage) == "failed"


def test_stored_features_are_shared_and_train_the_same_weights_as_live_ones(
    ledger: Ledger, tmp_path: Path
) -> None:
    own = tiny.begun(ledger, tmp_path)
    storing = tiny.MACHINE.model_copy(update={"features": "stored"})
    returned = tiny.runner(own, machine=storing).run(SEEN)
    assert json.loads(json.dumps(returned)) == own.results(SEEN)
    assert tiny.bits(own, SEEN) == tiny.bits(ledger, SEEN)
    assert not (ledger.store / "features").exists()
    (folder,) = (own.store / "features").iterdir()
    before = contents(folder)
    assert any(name.endswith("features.bin") for name in before)
    # The same pictures in another stage: nothing is computed again.
    tiny.runner(own, machine=storing).run(tiny.image_run(total_tokens=2_000))
    assert contents(folder) == before


def test_ranks_meet_before_any_of_them_stores_features(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny.begun(ledger, tmp_path)
    storing = tiny.MACHINE.model_copy(update={"features": "stored"})
    runner, said = tiny.runner(own, machine=storing), list[str]()

    class Meeting(Place):
        def barrier(self) -> None:
            said.append("met")

    runner.place = Meeting(runner.device)
    monkeypatch.setattr(runner.watch, "at", said.append)
    runner.job(SEEN, own.folder(SEEN))
    assert said[:2] == ["met", "storing features"]
