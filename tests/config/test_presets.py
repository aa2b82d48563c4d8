import pytest
import torch

from midstream.config import DECODERS, DecoderConfig
from midstream.model.decoder import Decoder

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


@pytest.mark.parametrize("name", DECODERS)
def test_linear_parameters_are_the_matrices_between_the_embeddings(name: str) -> None:
    decoder = on_meta(DECODERS[name])
    matrices = [one for one in decoder.layers.parameters() if one.dim() == 2]
    assert DECODERS[name].linear_parameters == sum(one.numel() for one in matrices)


def test_every_preset_is_counted_and_none_is_left_out() -> None:
    assert {name for name, _, _ in COUNTS} == set(DECODERS)


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
    config, decoder = DECODERS[name], on_meta(DECODERS[name])
    assert (config.head_dim, config.ffn_size) == (head_dim, ffn)
    shapes = {key: tuple(value.shape) for key, value in decoder.named_parameters()}
    width = config.hidden_size
    assert shapes["layers.0.feed_forward.w12.weight"] == (2 * ffn, width)
    assert shapes["layers.0.feed_forward.w3.weight"] == (width, ffn)
    assert shapes["layers.0.attention.in_proj.weight"] == (3 * width, width)
    assert shapes["layers.0.attention.q_norm.weight"] == (width,)
