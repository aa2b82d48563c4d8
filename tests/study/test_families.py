"""The table of published runs, against what their publishers say elsewhere."""

import itertools

import pytest

from midstream.exchange.import_source import settle
from midstream.study.families import RUNS, holds_final_weights, known_checkpoint
from midstream.study.imported import Position


def position(name: str, revision: str | None) -> Position:
    known = known_checkpoint(name, revision)
    assert known is not None
    return known.position


@pytest.mark.parametrize(
    ("name", "revision", "billions"),
    [
        ("EleutherAI/pythia-410m", "step71000", 148.9),
        ("EleutherAI/pythia-1b", "main", 299.9),
        ("EleutherAI/pythia-14m", "step0", 0.0),
        ("EleutherAI/pythia-160m-v0", "step1000", 2.1),
        ("EleutherAI/pythia-410m-seed3", "step71000", 148.9),
        ("EleutherAI/pythia-160m-data-seed1", "main", 299.9),
        ("allenai/OLMo-1B-hf", "step738020-tokens3095B", 3095.5),
        ("allenai/OLMo-7B", "step556000-tokens2460B", 2460.0),
        ("allenai/OLMo-1B-0724-hf", "step1454000-tokens3048B", 3048.0),
        ("allenai/OLMo-2-0425-1B", "stage1-step1907359-tokens4001B", 4000.0),
        ("allenai/OLMo-2-0425-1B-early-training", "stage1-step1000-tokens3B", 2.1),
        ("allenai/OLMo-2-0425-1B-early-training", "stage1-step20000-tokens42B", 41.9),
        ("allenai/OLMo-2-1124-7B", "step1000-tokens5B", 4.2),
        ("allenai/OLMo-2-1124-13B", "stage1-step596057-tokens5001B", 5000.1),
        ("allenai/OLMo-2-1124-7B", "stage2-ingredient1-step11931-tokens50B", 3945.1),
        ("allenai/OLMo-2-0425-1B", "stage2-ingredient3-step12000-tokens26B", 4025.2),
        ("allenai/OLMo-2-0325-32B", "stage1-step721901-tokens6056B", 6056.0),
        ("HuggingFaceTB/SmolLM2-360M-intermediate-checkpoints", "step-160000", 251.7),
        ("HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints", "step-125000", 262.1),
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "stage3-step-4720000", 11135.9),
        ("TinyLlama/TinyLlama-1.1B-step-50K-105b", None, 104.9),
        ("PY007/TinyLlama-1.1B-intermediate-step-480k-1T", None, 1006.6),
        ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", None, 3000.0),
        ("LLM360/Amber", "ckpt_000", 3.5),
        ("LLM360/Amber", None, 1258.5),
        ("infly/OpenCoder-1.5B-Base-Checkpoints", "pretrain_iter_0001000", 4.2),
        ("HuggingFaceFW/ablation-model-fineweb-edu", "step-001000-2BT", 2.0),
    ],
)
def test_published_names_give_the_tokens_that_their_checkpoints_have_seen(
    name: str, revision: str | None, billions: float
) -> None:
    found = position(name, revision)
    assert found.tokens_seen == pytest.approx(billions * 1e9, abs=0.06e9)
    assert settle(Position(), Position(), found) == (found, [])


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("EleutherAI/pythia-410m", "step71001b"),
        ("EleutherAI/pythia-410m", "ckpt_001"),
        ("somebody/pythia-410m", "step1000"),
        ("EleutherAI/pythia-410m-data-seed3", "step1000"),
        ("allenai/OLMo-2-1124-7B", None),
        ("allenai/OLMo-2-1124-7B", "main"),
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "lc-4k-to-32k-step-4000"),
        ("infly/OpenCoder-8B-Base-Checkpoints", "anneal_iter_0001000"),
        ("meta-llama/Llama-3.2-1B", None),
    ],
)
def test_nothing_is_claimed_of_other_names(name: str, revision: str | None) -> None:
    assert known_checkpoint(name, revision) is None


def test_stage_two_of_olmo_2_starts_at_the_rate_that_stage_one_is_said_to_end_with() -> None:
    one = position("allenai/OLMo-2-0425-1B", "stage1-step1907359-tokens4001B")
    assert one.rate == pytest.approx(7.4487e-5, rel=1e-5)  # OLMo2-1B-stage2-seed42.yaml
    seven = position("allenai/OLMo-2-1124-7B", "stage1-step928646-tokens3896B")
    assert seven.rate == pytest.approx(6.1499e-5, rel=3e-3)  # OLMo2-7B-stage2-seed42.yaml
    second = position("allenai/OLMo-2-0425-1B", "stage2-ingredient1-step11921-tokens25B")
    assert second.rate == pytest.approx(7.4487e-5 / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "revision", "rate"),
    [
        # Of a peak of 3e-4: half-way through warm-up, its end, and the floor.
        ("EleutherAI/pythia-410m", "step715", 1.5e-4),
        ("EleutherAI/pythia-410m", "step143000", 3e-5),
        # Half a turn of 143,000 steps behind the warm-up of 1,430.
        ("EleutherAI/pythia-70m-deduped", "step72930", 5e-4),
        ("allenai/OLMo-2-1124-7B", "stage1-step1000-tokens5B", 1.5e-4),
        ("allenai/OLMo-1B", "step0-tokens0B", 4e-5),
        ("HuggingFaceTB/SmolLM2-1.7B-intermediate-checkpoints", "step-4716000", 5e-4),
        ("HuggingFaceTB/SmolLM2-360M-intermediate-checkpoints", "step-1000", 1.5e-3),
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "stage2-step-4000000", 2e-4),
        ("HuggingFaceTB/SmolLM3-3B-checkpoints", "stage3-step-4459001", 1e-4),
        ("LLM360/Amber", "ckpt_359", 3e-5),
        ("LLM360/Amber", "ckpt_000", 1.143e-4),
    ],
)
def test_the_rate_at_a_checkpoint_is_that_of_the_published_schedule(
    name: str, revision: str, rate: float
) -> None:
    assert position(name, revision).rate == pytest.approx(rate, rel=1e-3)


def test_pythia_decays_towards_zero_and_is_cut_at_a_tenth() -> None:
    # A cosine to the floor itself would be at 0.316 of the peak after 110,000 steps, not 0.1.
    assert position("EleutherAI/pythia-1.4b", "step110000").rate == pytest.approx(
        2e-4 * 0.1363, rel=1e-3
    )
    assert position("EleutherAI/pythia-1.4b", "step125000").rate == pytest.approx(2e-5)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("EleutherAI/pythia-1b", "step1000"),
        ("EleutherAI/pythia-14m", "step1000"),
        ("EleutherAI/pythia-410m-v0", "step1000"),
        ("allenai/OLMo-2-1124-13B", "stage1-step1000-tokens9B"),
        ("TinyLlama/TinyLlama-1.1B-step-50K-105b", None),
    ],
)
def test_a_rate_that_the_publishers_say_twice_or_never_is_unknown(
    name: str, revision: str | None
) -> None:
    found = position(name, revision)
    assert found.rate is None
    assert found.tokens_seen is not None
    assert "rate" not in found.origins
    assert found.origins["tokens_seen"] == "known family"


def test_where_a_revision_disagrees_with_its_own_step_its_tokens_are_taken_without_a_rate() -> None:
    found = position("allenai/OLMo-2-0425-1B", "stage1-step120000-tokens999B")
    assert (found.tokens_seen, found.rate) == (999 * 10**9, None)


def test_rates_never_leave_the_published_range() -> None:
    for run in RUNS:
        if run.rate is not None:
            assert run.peak_rate is not None
            assert run.end_rate is not None
            assert run.total_tokens is not None
            steps = [int(run.total_tokens / (run.tokens_per_step or 1) * part / 97) for part in
                     range(98)]  # fmt: skip
            rates = [run.rate(step) for step in steps]
            assert max(rates) <= run.peak_rate * (1 + 1e-12)
            assert min(rates) >= 0.0
            top = rates.index(max(rates))
            assert all(one >= other for one, other in itertools.pairwise(rates[top:]))
            assert run.end_rate * (1 - 1e-9) <= rates[-1] <= 0.3 * run.peak_rate


def test_what_the_user_gives_wins_and_each_conflict_is_told() -> None:
    given = Position(rate=1e-4, tokens_seen=100)
    files = Position(rate=2e-4, tokens_seen=100, peak_rate=3e-4)
    table = Position(rate=3e-4, peak_rate=3e-4, total_tokens=1000)
    found, conflicts = settle(given, files, table)
    assert (found.rate, found.tokens_seen) == (1e-4, 100)
    assert (found.peak_rate, found.total_tokens, found.end_rate) == (3e-4, 1000, None)
    assert found.origins == {
        "rate": "given",
        "tokens_seen": "given",
        "peak_rate": "checkpoint",
        "total_tokens": "known family",
    }
    assert conflicts == [
        "rate is 0.0001 (given); checkpoint says 0.0002",
        "rate is 0.0001 (given); known family says 0.0003",
    ]


def test_numbers_that_cannot_both_be_true_are_refused() -> None:
    nothing = Position()
    with pytest.raises(
        ValueError, match=r"tokens_seen 200 is above total_tokens 100.*--tokens-see"
    ):
        settle(Position(tokens_seen=200), nothing, Position(total_tokens=100))
    with pytest.raises(ValueError, match=r"rate 0.01 is above peak_rate 0.001"):
        settle(Position(rate=1e-2), Position(peak_rate=1e-3), nothing)


@pytest.mark.parametrize(
    ("revision", "final"),
    [
        *(("step512", True), ("step64000", True), ("step66000", False), ("step71000", False)),
        *(("step103000", True), ("step142000", False), ("main", False), (None, False)),
    ],
)
def test_branches_that_serve_the_final_weights_are_known(revision: str | None, final: bool) -> None:
    assert holds_final_weights("EleutherAI/pythia-2.8b", revision) is final
    assert not holds_final_weights("EleutherAI/pythia-410m", revision)
