"""Language models of `transformers` as decoders: theirs in every number, behind our interface."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, LlamaConfig, PreTrainedModel, Qwen2Config

import checkpoints
from midstream.config import TransformersDecoderConfig
from midstream.core.batch import PADDING
from midstream.core.identity import digest
from midstream.model.attention import make_mask, move_mask
from midstream.model.pretrained import (
    FAMILIES,
    TransformersDecoder,
    describe,
    transformers_config,
    with_vocabulary,
)
from midstream.model.weights import initialise

every_family = pytest.mark.parametrize("family", checkpoints.FAMILIES)
# Against transformers' own kernels on the same mask nothing may differ; between two masks or two
# shapes float32 sums are ordered otherwise. Hidden states are of size 1.
TOLERANCE = 1e-5


@cache
def theirs(family: str) -> PreTrainedModel:
    """A tiny model of transformers, read only."""
    return checkpoints.build_model(family)


def filled(model: PreTrainedModel, decoder: TransformersDecoder) -> TransformersDecoder:
    """The decoder with the weights of `model`, found under their names there."""
    state = {decoder.parameter_name(name): value for name, value in model.state_dict().items()}
    decoder.load_state_dict(state)
    return decoder.eval()


@cache
def ours(family: str) -> TransformersDecoder:
    """The decoder of the same weights, read only."""
    return filled(theirs(family), TransformersDecoder(describe(theirs(family).config)))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(checkpoints.VOCAB_SIZE, (rows, length), generator=source)


def counted(rows: int, length: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + length).expand(rows, length)


def causal(rows: int, length: int, seen: int | None = None) -> Tensor:
    seen = length if seen is None else seen
    mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    return mask.expand(rows, 1, length, seen)


@torch.no_grad()
def hidden_of(
    decoder: TransformersDecoder, ids: Tensor, mask: Tensor | BlockMask | None = None
) -> Tensor:
    return decoder(decoder.embed(ids), counted(*ids.shape), mask)


def assert_close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=TOLERANCE)


@every_family
def test_logits_equal_those_of_transformers(family: str) -> None:
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = theirs(family)(ids).logits
        found = ours(family).output(hidden_of(ours(family), ids))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() == 0.0


@every_family
def test_position_ids_and_masks_mean_what_they_mean_to_transformers(family: str) -> None:
    ids, position_ids = tokens(2, 12), counted(2, 12) * 3
    mask = causal(2, 12).clone()
    mask[:, :, 6:, 2] = False
    with torch.no_grad():
        expected = theirs(family)(ids, position_ids=position_ids, attention_mask=mask).logits
        decoder = ours(family)
        found = decoder.output(decoder(decoder.embed(ids), position_ids, mask))
        elsewhere = decoder.output(decoder(decoder.embed(ids), counted(2, 12), mask))
    assert (found - expected).abs().max() == 0.0
    assert (elsewhere - expected).abs().max() > 0.01


def test_every_known_family_is_tested() -> None:
    assert {build().config.model_type for build in checkpoints.FAMILIES.values()} == set(FAMILIES)


@every_family
def test_no_mask_is_causal_over_the_row_even_where_positions_start_again(family: str) -> None:
    # transformers takes such positions for packed segments.
    ids, decoder = tokens(2, 16), ours(family)
    position_ids = torch.cat((counted(2, 7), counted(2, 9)), dim=1)
    with torch.no_grad():
        plain = decoder(decoder.embed(ids), position_ids, None)
        explicit = decoder(decoder.embed(ids), position_ids, causal(2, 16))
        alone = hidden_of(decoder, ids[:, 7:])
    assert_close(plain, explicit)
    assert (plain[:, 7:] - alone).abs().max() > 0.01


# Grouped queries with heads narrower than the kernels take; rotary embeddings of a part of a head.
@pytest.mark.parametrize("family", ["llama3", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_a_block_mask_is_that_of_flex_attention_and_gives_what_the_dense_one_gives(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, ids = ours(family), tokens(2, 100)
    segment_ids = torch.tensor([[0] * 30 + [1] * 70, [0] * 55 + [1] * 40 + [PADDING] * 5])
    dense, blocks = (
        make_mask(segment_ids, None, "segments", kind=kind) for kind in ("dense", "blocks")
    )
    assert isinstance(dense, Tensor)
    assert isinstance(blocks, BlockMask)
    expected = hidden_of(decoder, ids, dense)
    assert (expected - hidden_of(decoder, ids)).abs().max() > 0.01
    with monkeypatch.context() as without:
        # Neither kernels under a dense mask nor masks of transformers.
        without.delattr("torch.nn.functional.scaled_dot_product_attention")
        without.delattr("transformers.masking_utils.sdpa_mask")
        assert_close(hidden_of(decoder, ids, blocks), expected)
    if family == "llama3":
        # Turned queries and keys are float32 there, values are not.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors = [(hidden_of(decoder, ids, one) - expected).abs() for one in (blocks, dense)]
        assert 0 < errors[0].max() < 1.5 * errors[1].max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs the kernels of a GPU")
@pytest.mark.parametrize("family", ["llama3", "gpt_neox"])
def test_gradients_under_a_block_mask_on_a_gpu_are_those_under_the_dense_one(family: str) -> None:
    decoder = filled(theirs(family), TransformersDecoder(ours(family).config)).cuda()
    ids, segment_ids = tokens(2, 300), torch.arange(300).div(70, rounding_mode="floor")[None]
    found = []
    for kind in ("dense", "blocks"):
        mask = make_mask(segment_ids.expand(2, -1), None, "segments", kind=kind)
        mask = move_mask(mask, torch.device("cuda"))
        decoder.zero_grad()
        hidden = decoder(decoder.embed(ids.cuda()), counted(*ids.shape).cuda(), mask)
        hidden.square().mean().backward()
        gradients = [one.grad for one in decoder.parameters() if one.grad is not None]
        found.append([hidden.detach(), *gradients])
    for dense, blocks in zip(*found, strict=True):
        assert (blocks - dense).abs().max() < 1e-3 * dense.abs().max()


def new_cache(decoder: TransformersDecoder, rows: int, columns: int) -> Any:
    return decoder.new_cache(
        rows=rows, columns=columns, dtype=torch.float32, device=torch.device("cpu")
    )


def feed(decoder: TransformersDecoder, ids: Tensor, mask: Tensor | None, held: Any) -> Tensor:
    position_ids = counted(*ids.shape, start=held.length)
    with torch.no_grad():
        return decoder(decoder.embed(ids), position_ids, mask, held)


@every_family
def test_decoding_with_a_cache_equals_decoding_without(family: str) -> None:
    ids, decoder = tokens(3, 12), ours(family)
    held = new_cache(decoder, 3, 12)
    assert held.length == 0
    parts = [feed(decoder, ids[:, :6], None, held)]
    assert held.length == 6
    parts.append(feed(decoder, ids[:, 6:11], causal(3, 5, 11), held))
    parts.append(feed(decoder, ids[:, 11:], causal(3, 1, 12), held))
    assert held.length == 12
    assert_close(torch.cat(parts, dim=1), hidden_of(decoder, ids))


@every_family
def test_gradients_reach_every_parameter(family: str) -> None:
    decoder = filled(theirs(family), TransformersDecoder(ours(family).config)).train()
    # Every id once, so that every row of the embeddings is used, that of padding too.
    ids = torch.arange(checkpoints.VOCAB_SIZE).view(10, -1)
    hidden = decoder(decoder.embed(ids), counted(*ids.shape), None)
    (hidden.square().mean() + decoder.output(hidden).square().mean()).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    embedded = decoder.model.get_input_embeddings().weight.grad
    assert (embedded.abs().amax(dim=1) > 0).all()


@every_family
def test_a_new_decoder_is_unset_draws_nothing_and_has_the_count_of_the_model(family: str) -> None:
    config, before = describe(theirs(family).config), torch.get_rng_state()
    decoder = TransformersDecoder(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.isnan().all() for parameter in decoder.parameters())
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    for model in (decoder, theirs(family)):
        assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters


@pytest.mark.parametrize("family", ["llama3", "gpt_neox", "qwen2"])
def test_initialisers_are_cut_normals_ones_and_zeros(family: str) -> None:
    config = ours(family).config
    assert config.settings["initializer_range"] == 0.02
    decoder = TransformersDecoder(
        config.model_copy(update={"settings": config.settings | {"initializer_range": 0.05}})
    )
    initialise(decoder, seed=0)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (parameter == expected).all(), name
            continue
        assert parameter.abs().max() <= 3 * 0.05, name
        # A normal cut at three sigma keeps 0.9866 of its deviation; four standard errors.
        assert (
            abs(float(parameter.detach().std()) / (0.05 * 0.9866) - 1)
            < 4 * (0.5 / parameter.numel()) ** 0.5
        ), name


@every_family
def test_tied_embeddings_are_one_parameter(family: str) -> None:
    decoder, tied = ours(family), theirs(family).config.tie_word_embeddings
    assert decoder.config.tied_embeddings == tied
    assert (decoder.output.weight is decoder.model.get_input_embeddings().weight) == tied
    names = [name for name, _ in decoder.named_parameters()]
    assert decoder.initialisers().keys() == set(names)
    assert ("model.lm_head.weight" in names) != tied


@every_family
def test_rotary_frequencies_outlive_half_precision_and_the_meta_device(family: str) -> None:
    ids, expected = tokens(1, 40), hidden_of(ours(family), tokens(1, 40))
    halved = TransformersDecoder(ours(family).config).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(hidden_of(filled(theirs(family), halved), ids), expected)
    with torch.device("meta"):
        unset = TransformersDecoder(ours(family).config)
    emptied = filled(theirs(family), unset.to_empty(device="cpu"))
    assert torch.equal(hidden_of(emptied, ids), expected)


def test_autocast_changes_the_precision_alone() -> None:
    ids, decoder = tokens(2, 12), ours("qwen3")
    held = new_cache(decoder, 2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = hidden_of(decoder, ids)
        parts = [feed(decoder, ids[:, :6], None, held)]
        parts.append(feed(decoder, ids[:, 6:], causal(2, 6, 12), held))
    exact = hidden_of(decoder, ids)
    for found in (whole, torch.cat(parts, dim=1)):
        assert 0 < (found.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@every_family
def test_the_names_of_a_checkpoint_without_output_layer_are_found(family: str) -> None:
    decoder = ours(family)
    for name in theirs(family).base_model.state_dict():
        assert decoder.parameter_name(name) in decoder.state_dict()


def test_what_the_model_computes_itself_has_no_parameter() -> None:
    for family, name in (
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias"),
    ):
        assert ours(family).parameter_name(name) is None
    neox = "gpt_neox.layers.1.attention.dense.bias"
    assert ours("gpt_neox").parameter_name(neox) == f"model.{neox}"
    assert ours("llama").parameter_name("foreign.weight") == "model.foreign.weight"
    assert ours("gpt_neox").parameter_name("embed_out.weight") == "model.lm_head.weight"
    assert ours("llama3").parameter_name("lm_head.weight") in ours("llama3").state_dict()


@every_family
def test_a_config_survives_json_and_building(family: str, tmp_path: Path) -> None:
    config = describe(theirs(family).config)
    identity = digest(config)
    again = TransformersDecoderConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert describe(transformers_config(again)) == config
    theirs(family).config.save_pretrained(tmp_path)
    assert describe(AutoConfig.from_pretrained(tmp_path)) == config
    decoder = filled(theirs(family), TransformersDecoder(again))
    assert torch.equal(hidden_of(decoder, tokens(1, 9)), hidden_of(ours(family), tokens(1, 9)))
    assert digest(again) == identity


def test_building_completes_no_settings_in_the_config_that_it_was_given() -> None:
    config = ours("llama").config
    rope = {"rope_theta": 10000.0}
    short = config.model_copy(update={"settings": config.settings | {"rope_parameters": rope}})
    TransformersDecoder(short)
    with_vocabulary(short, 320)
    assert short.settings["rope_parameters"] == {"rope_theta": 10000.0}


def test_a_config_does_not_hold_where_the_model_came_from() -> None:
    model = theirs("llama").config
    other = LlamaConfig.from_dict(model.to_dict() | {"torch_dtype": "bfloat16", "use_cache": False})
    other._name_or_path, other.architectures = "somewhere/else", ["LlamaForCausalLM"]
    assert describe(other) == describe(model)


def test_settings_of_the_older_format_are_the_same_model() -> None:
    config = theirs("llama3").config.to_dict()
    rope = config.pop("rope_parameters")
    older = config | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert describe(LlamaConfig.from_dict(older)) == describe(theirs("llama3").config)


@every_family
def test_another_vocabulary_changes_the_embeddings_alone(family: str) -> None:
    config = ours(family).config
    larger = with_vocabulary(config, 320)
    matrices = 1 if config.tied_embeddings else 2
    assert larger.vocab_size == larger.settings["vocab_size"] == 320
    assert larger.num_parameters - config.num_parameters == matrices * 20 * config.hidden_size
    assert larger.linear_parameters == config.linear_parameters
    decoder = TransformersDecoder(larger)
    assert decoder.embed(torch.tensor([[319]])).shape == (1, 1, config.hidden_size)
    assert decoder.output.weight.shape == (320, config.hidden_size)
    assert with_vocabulary(larger, 300) == config


def test_a_smaller_vocabulary_drops_a_padding_id_that_does_not_fit() -> None:
    config = describe(LlamaConfig(**checkpoints.SIZES | {"pad_token_id": 299}))
    assert with_vocabulary(config, 299).settings["pad_token_id"] is None
    assert with_vocabulary(config, 400).settings["pad_token_id"] == 299


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"'gpt2' is no family known here.*llama.*gpt_neox"):
        describe(GPT2Config())
    unknown = ours("llama").config.model_copy(update={"model_type": "gpt2", "settings": {}})
    with pytest.raises(ValueError, match=r"'gpt2' is no family known here"):
        TransformersDecoder(unknown)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("num_local_experts", 8),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("logits_scaling", 8.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_dropout", 0.1),
        ("is_causal", False),
    ],
)
def test_a_setting_that_our_interface_would_not_honour_is_refused(
    setting: str, value: object
) -> None:
    config = ours("llama").config
    changed = config.model_copy(update={"settings": config.settings | {setting: value}})
    with pytest.raises(ValueError, match=f"this llama model has {setting}"):
        TransformersDecoder(changed)
    with pytest.raises(ValueError, match=f"this llama model has {setting}"):
        describe(LlamaConfig(**config.settings | {setting: value}))


def test_a_sliding_window_is_refused_where_some_layer_uses_it() -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match=r"qwen2 model has sliding_window 8.*set sliding_window"):
        describe(Qwen2Config(**checkpoints.GROUPED | windowed | {"max_window_layers": 1}))
    # Layers from the third on would have it, and there are two.
    unused = describe(Qwen2Config(**checkpoints.GROUPED | windowed | {"max_window_layers": 2}))
    assert unused.num_layers == 2
    mistral = ours("mistral").config
    with pytest.raises(ValueError, match="mistral model has sliding_window 64"):
        transformers_config(
            mistral.model_copy(update={"settings": mistral.settings | {"sliding_window": 64}})
        )


def test_rotary_frequencies_that_depend_on_the_row_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type 'dynamic', known are default"):
        describe(LlamaConfig(**checkpoints.SIZES | {"rope_parameters": rope}))


SIZES = ["hidden_size", "num_layers", "num_heads", "vocab_size", "num_parameters"]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_the_settings_contradict_is_refused(size: str) -> None:
    config = ours("llama").config
    stated = getattr(config, size)
    wrong = config.model_copy(update={size: stated + 1})
    with pytest.raises(ValueError, match=f"{size} {stated + 1}, its settings make it {stated}"):
        TransformersDecoder(wrong)
