"""Somebody's checkpoint and encoder, through every stage and out again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.parquet import read_table

import tiny
from checkpoints import save_checkpoint
from midstream.config import ContinuedCosine, FusedEncoder, PatchProjection
from midstream.cost.graph import order_of, plan
from midstream.exchange.export import export
from midstream.exchange.import_model import import_model
from midstream.exchange.import_source import ImportRequest
from midstream.launch.checks import problems
from midstream.model.weights import read_tensors
from midstream.recipes.own_model import fine_tuning, image_shares
from midstream.study.imported import read_import
from midstream.study.label import label
from midstream.study.results import StableScores
from midstream.study.stages import Continue, Finetune, LoadDecoder, Stage
from midstream.study.store import Ledger
from midstream.study.studies import Study
from midstream.work.open_model import open_model
from vision_checkpoints import save_tower

RATE = 2e-3


def imported(source: Path, out: Path, **given: Any) -> str:
    import_model(ImportRequest.model_validate({"source": str(source), "out": str(out)} | given))
    return str(out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A language model at 5,000 tokens and two encoders, as `midstream import` writes them."""
    base = tmp_path_factory.mktemp("imported")
    llama = save_checkpoint("llama", base / "hub" / "llama")
    position = {"tokens_seen": 5_000, "rate": RATE}
    found = {"llama": imported(llama, base / "llama", **position)}
    found["no rate"] = imported(llama, base / "unknown")
    found["low rate"] = imported(llama, base / "low", rate=3e-5)
    for kind in ("siglip", "dinov2 with registers"):
        found[kind] = imported(save_tower(kind, base / "hub" / kind), base / kind)
    return found


@pytest.fixture(scope="module")
def world(tiny_ledger: Ledger) -> str:
    return str(tiny_ledger.folder(tiny.WORLD) / "world")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A store for the data of all studies here, which is prepared once."""
    return Ledger(tmp_path_factory.mktemp("prepared"))


def run_in(folder: Path, prepared: Ledger, *results: Stage) -> Ledger:
    """A store in which these are done."""
    parents = {stage.name: stage for result in results for stage in order_of(result)}
    data = [stage for stage in parents.values() if stage.kind.startswith("prepare_")]
    ledger = tiny.store_with(prepared, folder, *data)
    tiny.run_missing(ledger, *results)
    return ledger


def study(folders: dict[str, str], world: str, **changes: Any) -> Study:
    small: dict[str, Any] = {
        "checkpoint": folders["llama"],
        "data": world,
        "encoders": (folders["siglip"],),
        "shares": (0.5,),
        "continue_tokens": 4_000,
        "max_epochs": 4,
        "finetune_epochs": 1,
        "row_length": 320,
        "batch_rows": 4,
        "max_new_tokens": 3,
        "limit": 3,
    }
    return image_shares(**small | changes)


def stages(made: Study) -> tuple[Finetune, Continue, LoadDecoder]:
    finetuned = made.lines[0].result.of
    start = finetuned.start.start
    assert start.kind == "continue_from"
    return finetuned, finetuned.start, start.stage


@pytest.fixture(scope="module")
def ran(
    folders: dict[str, str], world: str, prepared: Ledger, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Study, Ledger]:
    """The study, all of it done in a store of its own."""
    made = study(folders, world)
    return made, run_in(tmp_path_factory.mktemp("own") / "store", prepared, *made.results)


def test_an_imported_model_learns_to_see_and_leaves_as_llava(
    folders: dict[str, str], ran: tuple[Study, Ledger], tmp_path: Path
) -> None:
    made, ledger = ran
    kinds = {"prepare_tokenizer", "prepare_source", "load_decoder", "load_encoder", "continue"}
    assert {row.stage.kind for row in plan(made, ledger).rows} == kinds | {"finetune", "evaluate"}
    finetuned, continued, loaded = stages(made)
    # The very weights, at the very rate, under the data's own tokens.
    record = read_import(Path(folders["llama"]))
    assert ledger.results(loaded)["weights_digest"] == record.weights_digest
    assert ledger.results(continued)["first_rate"] == RATE
    assert ledger.results(continued)["tokens"]["image"] > 0
    scores = ledger.results(made.lines[0].result)
    assert set(scores["stable"]) == set(StableScores.model_fields)
    assert "text" in ledger.results(made.baselines["as imported"])["stable"]
    opened = open_model(ledger.folder(finetuned), torch.device("cpu"))
    report = export(opened, tmp_path / "out", text_only=False)
    assert report.architecture == "LlavaForConditionalGeneration"
    assert report.largest_difference <= 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert finetuned.name in card
    assert "5,000" in card


def predicted(ledger: Ledger, result: Stage) -> dict[str, list[Any]]:
    """By task, what a model said, chose and how likely that was."""
    return {
        path.name: read_table(path).to_pylist()
        for path in sorted(ledger.folder(result).glob("predictions/*"))
    }


@pytest.mark.slow
def test_what_left_comes_back_whole_answers_the_same_and_is_fine_tuned(
    ran: tuple[Study, Ledger], world: str, tmp_path: Path
) -> None:
    before, ledger = ran
    finetuned, _, _ = stages(before)
    opened = open_model(ledger.folder(finetuned), torch.device("cpu"))
    export(opened, tmp_path / "out", text_only=False)
    whole = imported(tmp_path / "out", tmp_path / "whole", part="model")
    with pytest.raises(ValueError, match=r"whole vision-language model; .*--part decoder"):
        image_shares(checkpoint=whole, data=world)
    small = {"row_length": 320, "batch_rows": 4, "max_new_tokens": 3, "limit": 3}
    made = fine_tuning(model=whole, data=world, encoder_rate_factor=0.1, **small)
    assert not problems(plan(made, ledger), ledger)
    tiny.run_missing(ledger, *made.results)
    as_imported = made.baselines["as imported"]
    said = predicted(ledger, before.lines[0].result)
    assert said
    assert predicted(ledger, as_imported) == said
    result = made.lines[0].result
    assert ledger.results(result.of)["steps"] > 0
    # It started from these weights, and trains the encoder that came with them.
    loaded = result.of.start
    assert ledger.results(loaded)["weights_digest"] == read_import(Path(whole)).weights_digest
    assert open_model(ledger.folder(result.of), torch.device("cpu")).vlm.encoder is not None
    assert "vision" in ledger.results(result)["stable"]
    assert "imported model whole" in label(result)
    assert "imported model whole" in label(loaded)


VARIANTS: dict[str, dict[str, Any]] = {
    "trained encoder": {"encoder_rate_factor": 0.1},
    "patches": {"encoders": (), "image_size": 24, "patch_size": 8},
    "fused, three layers, other resolution": {"projector_layers": 3, "image_size": 48},
    "prefix": {"attention": "prefix"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *list(VARIANTS)[::2],
        *(pytest.param(name, marks=pytest.mark.faults) for name in list(VARIANTS)[1::2]),
    ],
)
def test_every_way_to_see_goes_through_every_stage(
    variant: str, folders: dict[str, str], world: str, prepared: Ledger, tmp_path: Path
) -> None:
    changes = dict(VARIANTS[variant])
    if "fused" in variant:
        changes["encoders"] = (folders["siglip"], folders["dinov2 with registers"])
    made = study(folders, world, **changes)
    ledger = run_in(tmp_path / "store", prepared, made.lines[0].result)
    finetuned, continued, _ = stages(made)
    opened = open_model(ledger.folder(finetuned), torch.device("cpu"))
    config = finetuned.model.encoder
    owned = variant in ("trained encoder", "patches")
    assert (opened.vlm.encoder is not None) == owned == finetuned.model.owns_encoder
    assert isinstance(config, FusedEncoder) == ("fused" in variant)
    assert isinstance(config, PatchProjection) == (variant == "patches")
    pixels = torch.zeros(2, 3, config.image_size, config.image_size)
    assert opened.encode(pixels).shape == (2, config.num_patches, config.hidden_size)
    if variant == "trained encoder":
        before = read_tensors(Path(folders["siglip"]) / "model.safetensors")
        name = "encoder.layers.0.mlp.fc1.weight"
        weights = [
            read_tensors(ledger.folder(stage) / "weights" / "model.safetensors")
            for stage in (continued, finetuned)
        ]
        moved = [before[name], *(one[f"encoder.tower.{name}"] for one in weights)]
        assert not torch.equal(moved[0], moved[1])
        assert not torch.equal(moved[1], moved[2])


def test_what_does_not_fit_is_refused_by_name(folders: dict[str, str], world: str) -> None:
    with pytest.raises(ValueError, match="does not say the learning rate at its checkpoint"):
        study(folders, world, checkpoint=folders["no rate"])
    assert study(folders, world, checkpoint=folders["no rate"], rewarm_rate=1e-3)
    with pytest.raises(ValueError, match="is 3e-05, not above the end rate 3e-05; warm up again"):
        study(folders, world, checkpoint=folders["low rate"])
    with pytest.raises(ValueError, match="give it as one of `encoders`"):
        study(folders, world, checkpoint=folders["siglip"])
    with pytest.raises(ValueError, match="holds a language model; encoders are vision towers"):
        study(folders, world, encoders=(folders["llama"],))
    with pytest.raises(FileNotFoundError, match=r"no imported folder .*midstream import SRC"):
        study(folders, world, checkpoint=world)
    with pytest.raises(FileNotFoundError, match=r"nowhere is no imported folder"):
        fine_tuning(model="nowhere", data=world)
    with pytest.raises(ValueError, match="without encoders patches are projected"):
        study(folders, world, encoders=())
    with pytest.raises(FileNotFoundError, match="holds no source under documents; a source"):
        study(folders, world, documents=0.5)
    with pytest.raises(ValueError, match="documents is 2; give a part of the images' share"):
        study(folders, world, documents=2.0)


def test_a_stage_that_cannot_start_encodes_no_picture(
    folders: dict[str, str], world: str, prepared: Ledger, tmp_path: Path
) -> None:
    made = study(folders, world)
    _, continued, loaded = stages(made)
    ledger = run_in(tmp_path / "store", prepared, loaded)
    end = ContinuedCosine(end_rate=2 * RATE)
    for changes, refusal in (
        (
            {"training": continued.training.model_copy(update={"schedule": end})},
            "not above the end",
        ),
        ({"start": continued.start.model_copy(update={"optimizer": "carry"})}, "to carry; choose"),
    ):
        stage = continued.model_copy(update=changes)
        with pytest.raises((ValueError, FileNotFoundError), match=refusal):
            tiny.run_missing(ledger, stage)
    assert not (ledger.store / "features").exists()
    assert ledger.results(loaded)["tokens_seen_before"] == 5_000


def test_another_import_under_the_same_name_is_noticed(
    folders: dict[str, str], world: str, tmp_path: Path
) -> None:
    copied = tmp_path / "llama"
    imported(save_checkpoint("llama", tmp_path / "hub", seed=1), copied, rate=RATE, tokens_seen=1)
    made, ledger = study(folders, world, checkpoint=str(copied)), Ledger(tmp_path / "store")
    imported(save_checkpoint("llama", tmp_path / "hub2", seed=2), copied, rate=RATE, tokens_seen=1)
    _, _, loaded = stages(made)
    with pytest.raises(ValueError, match="the plan was made with"):
        tiny.run_missing(ledger, loaded)
    assert json.loads((ledger.folder(loaded) / "status.json").read_text())["state"] == "failed"


def test_a_world_may_lack_a_kind_of_task_and_what_is_no_source_is_told(
    folders: dict[str, str], world: str, tmp_path: Path
) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    about = json.loads((root / "world.json").read_text())
    (root / "world.json").write_text(json.dumps({"visual_tasks": about["visual_tasks"]}))
    (root / "text/.ipynb_checkpoints").mkdir()
    (root / "captions/@eaDir").mkdir()
    (root / "text/README.md").write_text("mine")
    made = study(folders, str(root))
    assert made.lines[0].result.evaluation.text_tasks == ()
    assert not made.baselines
    _, continued, _ = stages(made)
    assert {share.source for share in continued.training.budget.shares} == {"pictures", "web"}
    (root / "world.json").write_text('{"visual_tasks": ["pope"]}')
    with pytest.raises(ValueError, match=r"world\.json: 'visual_tasks' is no object of tasks"):
        study(folders, str(root))
    (root / "world.json").unlink()
    with pytest.raises(ValueError, match=r"world\.json lists no task to ask"):
        study(folders, str(root))
    (root / "world.json").write_text(json.dumps(about))
    for name in ("text/part.jsonl", "instruct/more"):
        (root / name).symlink_to("nowhere")
        with pytest.raises(ValueError, match=rf"{name} is no source, which is a folder; put it"):
            study(folders, str(root))
        (root / name).unlink()
    shutil.move(root / "instruct", root / "conversations")
    with pytest.raises(
        FileNotFoundError, match=r"no source under instruct; .* are .*conversations"
    ):
        study(folders, str(root))
