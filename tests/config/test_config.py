import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from midstream import config
from midstream.config import (
    DECODERS,
    AdamW,
    Config,
    Constant,
    ContinuedCosine,
    DecoderConfig,
    EncoderConfig,
    Evaluation,
    Machine,
    Mixture,
    Rows,
    Share,
    Training,
    WarmupCosine,
    WarmupStableDecay,
)
from midstream.config.training import check_start, moments_factor, rate_at
from midstream.model.decoder import Decoder

MODELS = [
    kind
    for _, kind in inspect.getmembers(config, inspect.isclass)
    if issubclass(kind, Config) and kind is not Config
]
ENCODER = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 24,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 40,
}


def test_every_model_refuses_an_unknown_field_and_names_the_known_ones() -> None:
    for kind in MODELS:
        assert kind.model_config["frozen"], kind
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({"zzz_unknown": 1})
        assert f"{kind.__name__} has no field 'zzz_unknown'" in str(caught.value)
        for name in kind.model_fields:
            assert name in str(caught.value)


def test_a_misspelt_field_gets_the_nearest_known_one() -> None:
    with pytest.raises(ValidationError, match="did you mean 'num_layers'"):
        EncoderConfig.model_validate({**ENCODER, "n_layers": 4})


SHARES = (Share(source="a", share=1.0), Share(source="b", share=0.5))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (DecoderConfig, {"hidden_size": 66, "num_layers": 1, "num_heads": 2}, "66.*num_heads 2"),
        (EncoderConfig, {**ENCODER, "hidden_size": 25}, "25.*no multiple of 2"),
        (EncoderConfig, {**ENCODER, "feature_layer": 0}, r"must lie in -3\.\.-1"),
        (EncoderConfig, {**ENCODER, "feature_layer": -4}, r"must lie in -3\.\.-1"),
        (Rows, {"row_length": 0, "batch_rows": 1}, "greater than 0"),
        (Mixture, {"total_tokens": 10, "shares": SHARES}, "not to 1"),
        (Mixture, {"total_tokens": 10, "shares": SHARES[1:] * 2}, "named twice"),
        (Mixture, {"total_tokens": 10, "shares": ()}, "at least 1 item"),
        (Share, {"source": "a", "share": 1.5}, "less than or equal to 1"),
        (WarmupCosine, {"peak_rate": 1.0}, "less than 1"),
        (WarmupCosine, {"peak_rate": -1e-3}, "greater than or equal to 0"),
        (
            WarmupStableDecay,
            {"peak_rate": 1e-3, "warmup_fraction": 0.7, "decay_fraction": 0.4},
            r"0\.7 and decay_fraction 0\.4 are more than the whole",
        ),
        *(
            (AdamW, {name: value}, name)
            for name, value in {
                "eps": 0.0,
                "beta1": 1.0,
                "beta2": -0.1,
                "weight_decay": -1.0,
                "clip_norm": 0.0,
            }.items()
        ),
        *(
            (Machine, {"nodes": 2, "workers": 1, "master": master}, "reached at HOST:PORT")
            for master in ("node-0", "node-0:", ":29500")
        ),
        (Evaluation, {"prompts": "long"}, "official"),
        (Rows, {"row_length": 8, "batch_rows": 1, "layout": "packed"}, "joined"),
    ],
)
def test_what_fits_nothing_is_refused_with_its_numbers(
    kind: type[Config], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(values)


def test_a_picture_has_one_feature_a_whole_patch() -> None:
    assert EncoderConfig(**ENCODER).num_patches == 4
    assert EncoderConfig(**{**ENCODER, "image_size": 384, "patch_size": 14}).num_patches == 729


def test_shares_of_thirds_add_up_to_one() -> None:
    thirds = tuple(Share(source=name, share=1 / 3) for name in "abc")
    assert Mixture(total_tokens=10, shares=thirds).max_epochs == 1


def test_a_budget_is_read_by_its_kind() -> None:
    values: dict[str, Any] = {
        "rows": {"row_length": 8, "batch_rows": 2},
        "schedule": {"kind": "warmup_cosine", "peak_rate": 0.1},
        "budget": {"kind": "epochs", "sources": ("a",), "epochs": 2},
    }
    assert Training.model_validate(values).budget.kind == "epochs"
    with pytest.raises(ValidationError, match="epoch"):
        Training.model_validate(values | {"budget": {"kind": "mixture", "epochs": 2}})
    with pytest.raises(ValidationError, match="kind"):
        Training.model_validate(values | {"budget": {"kind": "forever"}})


# Parameters: all, without the input embedding, without both embeddings. Sources: OpenLM's
# model_configs and DCLM's exp_data/models (`params`, `params_no_embed`).
COUNTS = [
    ("11m", {}, (10_570_848, 5_729_376, 887_904)),
    ("79m", {}, (78_922_240, 53_101_056, 27_279_872)),
    ("79m", {"vocab_size": 66816}, (95_699_456, 61_489_664, 27_279_872)),
    ("154m", {}, (153_705_024, 124_656_192, 95_607_360)),
    ("411m", {}, (411_665_408, 360_023_040, 308_380_672)),
    ("1b", {"qk_norm": False}, (1_439_795_200, 1_336_510_464, 1_233_225_728)),
    ("1b", {}, (1_439_893_504, 1_336_608_768, 1_233_324_032)),
    ("1b", {"vocab_size": 66816}, (1_507_002_368, 1_370_163_200, 1_233_324_032)),
    ("7b", {}, (6_889_672_704, 6_683_103_232, 6_476_533_760)),
]


def on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize(("name", "changes", "counts"), COUNTS)
def test_presets_have_openlms_parameters_to_the_last_one(
    name: str, changes: dict[str, object], counts: tuple[int, int, int]
) -> None:
    config = DECODERS[name].model_copy(update=changes)
    decoder = on_meta(config)
    sizes = {key: parameter.numel() for key, parameter in decoder.named_parameters()}
    every = sum(sizes.values())
    head = every - sizes["tok_embeddings.weight"]
    assert (every, head, head - sizes["output.weight"]) == counts
    assert config.num_parameters == every
    assert all(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize(
    ("name", "head_dim", "ffn"),
    [
        ("11m", 24, 256),
        ("79m", 128, 1536),
        ("154m", 72, 1536),
        ("411m", 128, 2816),
        ("1b", 128, 5632),
        ("7b", 128, 11008),
    ],
)
def test_heads_and_feed_forward_of_presets_are_openlms(name: str, head_dim: int, ffn: int) -> None:
    assert DECODERS.keys() == {counted for counted, _, _ in COUNTS}
    config, decoder = DECODERS[name], on_meta(DECODERS[name])
    matrices = [one for one in decoder.layers.parameters() if one.dim() == 2]
    assert config.linear_parameters == sum(one.numel() for one in matrices)
    assert (config.head_dim, config.ffn_size) == (head_dim, ffn)
    shapes = {key: tuple(value.shape) for key, value in decoder.named_parameters()}
    width = config.hidden_size
    assert shapes["layers.0.feed_forward.w12.weight"] == (2 * ffn, width)
    assert shapes["layers.0.feed_forward.w3.weight"] == (width, ffn)
    assert shapes["layers.0.attention.in_proj.weight"] == (3 * width, width)
    assert shapes["layers.0.attention.q_norm.weight"] == (width,)


# The text run of the paper's 1.4B model: 512 sequences of 2,048 tokens a step.
STEP_TOKENS = 512 * 2048
NUM_STEPS, WARMUP_STEPS = 4_119_287, 5_000
PAPER = WarmupCosine(peak_rate=1e-2, end_rate=3e-5, warmup_fraction=WARMUP_STEPS / NUM_STEPS)


def paper_rate(step: int) -> float:
    return rate_at(PAPER, step * STEP_TOKENS, NUM_STEPS * STEP_TOKENS)


@pytest.mark.parametrize(
    ("step", "percent", "rate"),
    [
        (813_264, 19.74, 0.009080349589287376),
        (1_666_010, 40.44, 0.006499974971416897),
        (2_481_280, 60.24, 0.0034466737184832607),
        (3_297_840, 80.06, 0.0009788970261355868),
    ],
)
def test_the_text_schedule_has_the_rates_that_the_papers_continued_runs_started_at(
    step: int, percent: float, rate: float
) -> None:
    assert step / NUM_STEPS == pytest.approx(percent / 100, abs=1e-4)
    assert paper_rate(step) == pytest.approx(rate, rel=1e-4)
    total = 10**12
    near = rate_at(PAPER, round(percent / 100 * total), total)
    assert near == pytest.approx(rate, rel=0.01)


@given(
    peak=st.floats(1e-5, 0.5),
    end_share=st.floats(0.0, 1.0),
    warmup=st.floats(0.0, 0.9),
    total=st.integers(1_000, 10**13),
    at=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
)
def test_the_rate_rises_through_the_warm_up_and_falls_to_the_end(
    peak: float, end_share: float, warmup: float, total: int, at: tuple[float, float]
) -> None:
    schedule = WarmupCosine(peak_rate=peak, end_rate=peak * end_share, warmup_fraction=warmup)
    early, late = sorted(int(share * total) for share in at)
    first, second = (rate_at(schedule, tokens, total) for tokens in (early, late))
    assert 0.0 <= first <= peak * (1 + 1e-12)
    if late <= warmup * total:
        assert first <= second
    if early >= warmup * total:
        assert first >= second * (1 - 1e-12)
        assert second >= schedule.end_rate * (1 - 1e-12)


def test_the_warm_up_is_a_line_from_zero_to_the_peak() -> None:
    schedule = WarmupCosine(peak_rate=8e-3, end_rate=1e-4, warmup_fraction=0.25)
    assert [rate_at(schedule, tokens, 4_000) for tokens in (0, 250, 500, 1_000)] == pytest.approx(
        [0.0, 2e-3, 4e-3, 8e-3]
    )
    assert rate_at(schedule, 2_500, 4_000) == pytest.approx((8e-3 + 1e-4) / 2)
    assert rate_at(schedule, 4_000, 4_000) == 1e-4


@given(parent=st.floats(1e-4, 0.5), total=st.integers(1_000, 10**13))
def test_a_continued_schedule_goes_from_the_parents_rate_to_its_own_end(
    parent: float, total: int
) -> None:
    schedule = ContinuedCosine(end_rate=3e-5)
    rates = [rate_at(schedule, total * part // 8, total, parent_rate=parent) for part in range(9)]
    assert rates[0] == parent
    assert rates[-1] == 3e-5
    assert rates[4] == pytest.approx((parent + 3e-5) / 2, rel=1e-2)
    assert rates == sorted(rates, reverse=True)


def test_the_rate_is_a_function_of_the_share_and_not_of_the_scale() -> None:
    schedule = WarmupCosine(peak_rate=1e-2, end_rate=3e-5, warmup_fraction=0.1)
    for part in range(101):
        assert rate_at(schedule, part, 100) == pytest.approx(
            rate_at(schedule, part * 10**9, 100 * 10**9), rel=1e-12
        )


@pytest.mark.parametrize(
    ("schedule", "parent", "message"),
    [
        *(
            (ContinuedCosine(end_rate=3e-5), parent, r"above the end rate 3e-05.*WarmupCosine")
            for parent in (3e-5, 2e-5, 0.0)
        ),
        (ContinuedCosine(), None, r"its parent has none.*WarmupCosine"),
        *(
            (kind(peak_rate=0.0), None, r"the learning rate is 0 .* peak_rate above 0")
            for kind in (WarmupCosine, Constant, WarmupStableDecay)
        ),
    ],
)
def test_a_schedule_that_cannot_start_is_refused(
    schedule: Any, parent: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"stage-7.*{message}"):
        check_start(schedule, parent, "stage-7")


def test_a_constant_rate_stays_and_a_stable_one_falls_at_its_end() -> None:
    constant = Constant(peak_rate=2e-3, warmup_fraction=0.5)
    assert [rate_at(constant, at, 1_000) for at in (250, 500, 1_000)] == [1e-3, 2e-3, 2e-3]
    stable = WarmupStableDecay(
        peak_rate=2e-3, end_rate=1e-3, warmup_fraction=0.1, decay_fraction=0.2
    )
    rates = [rate_at(stable, at, 1_000) for at in (50, 100, 800, 900, 1_000)]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 1.5e-3, 1e-3])


def test_the_first_step_of_a_warm_up_moves_the_weights() -> None:
    schedule = WarmupCosine(peak_rate=1e-3, warmup_fraction=0.1)
    assert rate_at(schedule, 0, 10_000, step_tokens=100) == pytest.approx(1e-4)


def test_moments_that_start_at_zero_let_the_rate_rise_over_a_hundredth() -> None:
    factors = [moments_factor(at, 100_000, step_tokens=100) for at in (0, 400, 900, 50_000)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0])
