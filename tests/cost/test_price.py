"""What a plan costs on GPUs: hours, memory that fits, disk."""

from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, models

from midstream.config import (
    DECODERS,
    Attention,
    ExpectedSource,
    Machine,
    Mixture,
    Rows,
    Share,
    TokenizerFile,
)
from midstream.cost import DEVICES, GPUS, UTILISATION, find_gpu, gpu_of_device
from midstream.cost.cost import model_parameters, work_of
from midstream.cost.graph import Plan, order, plan
from midstream.cost.known import Number
from midstream.cost.price import Fleet, price, price_json, rows_that_fit
from midstream.cost.taken import Setting, block_mask_bytes, memory
from midstream.cost.workload import Device
from midstream.study.stages import Continue, Pretrain
from midstream.study.store import Ledger
from midstream.study.studies import Study

A100 = GPUS["A100-80"]


@pytest.fixture
def work(study: Study, tmp_path: Path) -> Plan:
    return plan(study, Ledger(tmp_path))


@pytest.fixture
def large(study: Study) -> Pretrain:
    """A text stage at the paper's size."""
    text = next(stage for stage in order(study) if isinstance(stage, Pretrain))
    rows = Rows(row_length=2048, batch_rows=256, layout="joined")
    shares = (Share(source="stories", share=1.0),)
    budget = Mixture(total_tokens=28 * 10**9, shares=shares)
    training = text.training.model_copy(update={"rows": rows, "budget": budget})
    return text.model_copy(update={"decoder": DECODERS["1b"], "training": training})


def with_data(study: Study, **changed: Any) -> Study:
    """The study on other data; all its stages have the same."""
    data = study.lines[0].result.of.data
    other = data.model_copy(update=changed).model_dump_json()
    return Study.model_validate_json(study.model_dump_json().replace(data.model_dump_json(), other))


def test_gpus_are_found_by_name_or_given_in_numbers() -> None:
    assert find_gpu("a100-80") == A100
    own = find_gpu("500:32")
    assert (own.tflops, own.gib) == (500, 32)
    with pytest.raises(ValueError, match="no GPU 'H10'; did you mean H100"):
        find_gpu("H10")
    for text in ("fast:0", "inf:80", "500:nan"):
        with pytest.raises(ValueError, match="TFLOPS:GIB"):
            find_gpu(text)
    with pytest.raises(ValueError, match="did you mean A100-40 or A100-80"):
        find_gpu("a100")


def test_every_device_that_a_driver_names_is_priced() -> None:
    for device, name in DEVICES.items():
        assert gpu_of_device(device) is GPUS[name]
    assert gpu_of_device("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_gpu_hours_follow_from_model_flops_peak_and_utilisation(work: Plan, tmp_path: Path) -> None:
    found = price(work, Ledger(tmp_path), Fleet(A100, utilisation=0.5))
    needed = sum(row.cost.model_flops or 0.0 for row in work.to_run)
    assert needed < work.remaining_flops
    assert found.gpu_hours == pytest.approx(needed / (312e12 * 0.5 * 3600))
    assert Fleet(A100).utilisation == UTILISATION
    values = price_json(found, work)
    assert values["gpu_hours_alone"] > values["gpu_hours_once"]
    assert values["gpu_hours_once"] == pytest.approx(values["gpu_hours"])
    with pytest.raises(ValueError, match="above 0 and at most 1, not 30"):
        Fleet(A100, utilisation=30)


def test_done_stages_take_no_more_hours(study: Study, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    before = price(plan(study, ledger), ledger, Fleet(A100))
    encoder = next(stage for stage in order(study) if stage.kind == "train_encoder")
    with ledger.open_stage(encoder) as opened:
        opened.finish({"weights_digest": "w", "seconds": 1.0})
    after = price(plan(study, ledger), ledger, Fleet(A100))
    assert after.gpu_hours < before.gpu_hours
    assert encoder.name not in after.timing.starts
    assert after.kept_bytes == before.kept_bytes


def test_memory_is_shared_by_ranks_and_falls_with_smaller_micro_batches(large: Pretrain) -> None:
    stage, work = large, work_of(large, None)
    one, eight = (memory(stage, work, Setting(ranks, 1)) for ranks in (1, 8))
    parameters = model_parameters(stage.model)
    assert one.weights + one.moments + one.gradients == 16 * parameters
    assert eight.weights + eight.moments + eight.gradients == 2 * parameters
    assert eight.total < one.total
    two = memory(stage, work, Setting(1, 2))
    assert two.activations == pytest.approx(2 * one.activations)
    less = memory(stage, work, Setting(1, 2, checkpointing=True))
    assert less.activations < two.activations / 5


def test_masks_are_blocks_on_a_gpu_and_dense_on_a_cpu_where_rows_are_not_cut_apart(
    study: Study,
) -> None:
    seen = next(stage for stage in order(study) if isinstance(stage, Continue))
    length, layers = 1024, seen.model.decoder.num_layers
    told = {"num_examples": 10_000, "num_tokens": 500_000, "num_targets": 200_000}
    expected = (
        ExpectedSource(name="stories", kind="text", **told),
        ExpectedSource(name="captions", kind="caption", num_images=10_000, **told),
    )
    data = seen.data.model_copy(update={"expected": expected})

    def masks(attention: Attention, device: Device, layout: str = "filled") -> tuple[Number, ...]:
        rows = Rows.model_validate({"row_length": length, "batch_rows": 4, "layout": layout})
        training = seen.training.model_copy(update={"rows": rows})
        changed = {"data": data, "attention": attention, "training": training}
        stage = seen.model_copy(update=changed)
        work = work_of(stage, None, device)
        found = memory(stage, work, Setting(1, 2, device=device))
        return found.masks, found.activations

    for attention in get_args(Attention):
        expected = 2 * block_mask_bytes(attention, length) if attention != "causal" else 0
        assert masks(attention, "cuda")[0] == expected
    assert masks("segments", "cuda", "padded")[0] == masks("segments", "cpu")[0] == 0
    dense, kept = masks("prefix", "cpu")
    assert dense == pytest.approx(2 * length**2, rel=0.05)
    # Each block keeps its own, of floats.
    cut = masks("segments", "cpu")[1]
    assert kept - cut == pytest.approx(4 * layers * dense)


def test_the_largest_micro_batch_that_fits_is_named(
    study: Study, large: Pretrain, tmp_path: Path
) -> None:
    stage = large
    result = study.baselines["text only"].model_copy(update={"of": stage})
    study = study.model_copy(update={"lines": (), "baselines": {"text": result}})
    ledger = Ledger(tmp_path)
    found = price(plan(study, ledger), ledger, Fleet(A100, 8))
    fit = next(one.fit for one in found.stages if one.row.stage.kind == "pretrain")
    assert fit.fits
    assert fit.memory.total <= A100.room
    work = work_of(stage, None)
    more = memory(stage, work, Setting(fit.gpus, fit.micro_rows + 1))
    assert more.total > A100.room
    # So many rows a run takes on such GPUs.
    same = rows_that_fit(stage, ledger, Machine(ranks=fit.gpus), A100.gib * 2**30)
    assert same == fit
    # Where one GPU has no room for the moments, several share them.
    small = find_gpu("100:24")
    several = price(plan(study, ledger), ledger, Fleet(small, 8))
    fit = next(one.fit for one in several.stages if one.row.stage.kind == "pretrain")
    assert fit.fits
    assert fit.gpus > 1
    none = price(plan(study, ledger), ledger, Fleet(find_gpu("100:4"), 2))
    assert [one.row.stage.kind for one in none.too_large] == ["pretrain"]
    with pytest.raises(ValueError, match="batch_rows 256 is no multiple of 3"):
        price(plan(study, ledger), ledger, Fleet(A100, 8, per_stage=3))


def test_rows_that_fit_are_fewer_in_less_memory_and_more_with_recomputed_blocks(
    large: Pretrain, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)

    def rows(gib: int, **machine: object) -> int:
        fit = rows_that_fit(large, ledger, Machine.model_validate(machine), gib * 2**30)
        return fit.micro_rows

    assert 0 == rows(4) < rows(40) < rows(80)
    assert rows(80) < rows(80, activation_checkpointing="blocks")
    assert rows(80) <= rows(80, ranks=8) <= 256 // 8
    # As many as divide a step or not, one row is each rank's at least.
    assert rows(141, ranks=3) <= 256 // 3
    assert rows(141, ranks=512) == 1


def test_disk_holds_milestones_with_moments_and_weights_of_the_rest(
    work: Plan, tmp_path: Path
) -> None:
    found = price(work, Ledger(tmp_path), Fleet(A100))
    kept = {one.row.stage.kind: one for one in found.stages}
    text = kept["pretrain"].row.stage
    # At 20 and 100 %: float32 weights and two moments each.
    assert kept["pretrain"].kept == 2 * 12 * model_parameters(text.model)
    seen = kept["continue"].row.stage
    assert kept["continue"].kept == 4 * model_parameters(seen.model)
    assert found.peak_bytes >= found.kept_bytes


def test_a_token_takes_four_bytes_where_its_tokenizer_has_more_ids_than_two_bytes_tell(
    study: Study, tmp_path: Path
) -> None:
    told = ExpectedSource(
        name="stories", kind="text", num_examples=100, num_tokens=5_000, num_targets=2_000
    )
    for words, token in ((2**16 - 2, 2), (2**16 - 1, 4)):
        path = tmp_path / f"{words}.json"
        # Beside the words an end of text and the separator.
        Tokenizer(models.WordLevel({str(n): n for n in range(words)}, "0")).save(str(path))
        tokenizer = TokenizerFile.read(path)
        other = with_data(study, tokenizer=tokenizer, expected=(told,))
        found = price(plan(other, Ledger(tmp_path)), Ledger(tmp_path), Fleet(A100))
        (kept,) = (s.kept for s in found.stages if getattr(s.row.stage, "source", "") == "stories")
        assert kept == 5_000 * token + 100 * 24


def test_expected_sources_price_a_study_whole(study: Study, tmp_path: Path) -> None:
    told = {"num_examples": 100, "num_tokens": 5_000, "num_targets": 2_000}
    expected = (
        ExpectedSource(name="stories", kind="text", **told),
        ExpectedSource(name="captions", kind="caption", num_images=100, **told),
        ExpectedSource(name="chats", kind="instruct", num_images=50, **told),
    )
    work = plan(with_data(study, expected=expected), Ledger(tmp_path))
    assert work.num_unknown == 0
    assert work.num_expected == len([r for r in work.rows if "prepare" not in r.stage.kind])
    assert all(row.cost.flops is not None for row in work.rows)
