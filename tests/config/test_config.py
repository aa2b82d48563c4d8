import inspect
from typing import Any

import pytest
from pydantic import ValidationError

from midstream import config
from midstream.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    Evaluation,
    Mixture,
    PocketWorld,
    Rows,
    Share,
    Training,
    WarmupCosine,
)

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


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_model_refuses_an_unknown_field_and_names_the_known_ones(kind: type[Config]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"zzz_unknown": 1})
    assert f"{kind.__name__} has no field 'zzz_unknown'" in str(caught.value)
    for name in kind.model_fields:
        assert name in str(caught.value)


def test_a_misspelt_field_gets_the_nearest_known_one() -> None:
    with pytest.raises(ValidationError, match="did you mean 'num_layers'"):
        EncoderConfig.model_validate({**ENCODER, "n_layers": 4})


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_model_is_frozen(kind: type[Config]) -> None:
    assert kind.model_config["frozen"]


def test_a_frozen_model_refuses_another_value() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PocketWorld().seed = 1


# Parameter counts published with the models (79M: open_lm's own config; 1.4B: DCLM's "params").
@pytest.mark.parametrize(
    ("shape", "qk_norm", "num_parameters"),
    [
        ((512, 8, 4), True, 78_922_240),
        ((576, 24, 8), True, 153_705_024),
        ((1024, 24, 8), True, 411_665_408),
        ((2048, 24, 16), False, 1_439_795_200),
    ],
)
def test_the_number_of_parameters_is_the_published_one(
    shape: tuple[int, int, int], qk_norm: bool, num_parameters: int
) -> None:
    size, layers, heads = shape
    decoder = DecoderConfig(hidden_size=size, num_layers=layers, num_heads=heads, qk_norm=qk_norm)
    assert decoder.num_parameters == num_parameters


@pytest.mark.parametrize(
    ("size", "ffn_size"), [(512, 1536), (1024, 2816), (2048, 5632), (4096, 11008)]
)
def test_the_width_of_swiglu_is_that_of_openlm(size: int, ffn_size: int) -> None:
    assert DecoderConfig(hidden_size=size, num_layers=1, num_heads=4).ffn_size == ffn_size


def _refused(message: str, kind: type[Config], **values: Any) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(values)


def test_shapes_that_do_not_fit_are_refused_with_both_numbers() -> None:
    _refused("66.*num_heads 2", DecoderConfig, hidden_size=66, num_layers=1, num_heads=2)
    _refused("25.*no multiple of 2", EncoderConfig, **{**ENCODER, "hidden_size": 25})
    for layer in (0, -4):
        _refused(r"must lie in -3\.\.-1", EncoderConfig, **{**ENCODER, "feature_layer": layer})
    _refused("greater than 0", Rows, row_length=0, batch_rows=1)


def test_a_picture_has_one_feature_a_whole_patch() -> None:
    assert EncoderConfig(**ENCODER).num_patches == 4
    assert EncoderConfig(**{**ENCODER, "image_size": 384, "patch_size": 14}).num_patches == 729


def test_shares_must_add_up_to_one_and_name_each_source_once() -> None:
    one, half = Share(source="a", share=1.0), Share(source="b", share=0.5)
    _refused("not to 1", Mixture, total_tokens=10, shares=(one, half))
    _refused("named twice", Mixture, total_tokens=10, shares=(half, half))
    _refused("at least 1 item", Mixture, total_tokens=10, shares=())
    _refused("less than or equal to 1", Share, source="a", share=1.5)
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


def test_rates_are_learning_rates_below_one() -> None:
    _refused("less than 1", WarmupCosine, peak_rate=1.0)
    _refused("greater than or equal to 0", WarmupCosine, peak_rate=-1e-3)


def test_choices_are_closed() -> None:
    _refused("official", Evaluation, prompts="long")
    _refused("joined", Rows, row_length=8, batch_rows=1, layout="packed")
