import math

import pytest
import torch

from midstream.config import DecoderConfig, EncoderConfig, ProjectorConfig, VLMConfig
from midstream.model.decoder import Decoder
from midstream.model.initialise import Initialiser, generator, initialise
from midstream.model.projector import Projector
from midstream.model.vlm import VLM
from midstream.model.weights import weights_digest

CONFIG = DecoderConfig(hidden_size=128, num_layers=4, num_heads=2, vocab_size=700)


def test_statistics_of_each_decoder_parameter_are_openlms() -> None:
    decoder = Decoder(CONFIG)
    initialise(decoder, 0)
    width, ffn = 128, 512
    # The standard deviation of a normal cut at three sigma.
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    shrink = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    assert shrink == pytest.approx(0.98658, abs=1e-4)
    for name, trained in decoder.named_parameters():
        parameter = trained.detach()
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        sigma = (ffn if "w3" in name else width) ** -0.5
        if "w3" in name or "out_proj" in name:
            sigma /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
        few = 4 / math.sqrt(2 * parameter.numel())  # four standard errors
        assert float(parameter.std()) == pytest.approx(shrink * sigma, rel=few), name
        assert abs(float(parameter.mean())) < 4 * sigma / math.sqrt(parameter.numel()), name
        assert float(parameter.abs().max()) <= 3 * sigma * (1 + 1e-6), name
        assert float(parameter.abs().max()) > 2.8 * sigma, name


def test_a_parameter_depends_on_seed_and_name_alone() -> None:
    small = Decoder(CONFIG.model_copy(update={"num_layers": 2}))
    large = Decoder(CONFIG)
    other = Decoder(CONFIG)
    initialise(small, 3)
    initialise(large, 3)
    initialise(other, 4)
    theirs = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert not torch.equal(large.output.weight, other.output.weight)
    assert not torch.equal(large.output.weight, large.tok_embeddings.weight)


def test_initialising_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    vlm = VLM(
        VLMConfig(
            decoder=CONFIG,
            encoder=EncoderConfig(
                image_size=8,
                patch_size=4,
                hidden_size=16,
                num_layers=2,
                num_heads=2,
                intermediate_size=32,
            ),
        )
    )
    initialise(vlm, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_was_not_initialised_shows_it() -> None:
    vlm = VLM(VLMConfig(decoder=CONFIG))
    assert all(parameter.isnan().all() for parameter in vlm.parameters())
    initialise(vlm, 0)
    assert all(parameter.isfinite().all() for parameter in vlm.parameters())


def test_number_of_threads_changes_no_weight() -> None:
    threads = torch.get_num_threads()
    digests = set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            decoder = Decoder(CONFIG)
            initialise(decoder, 0)
            digests.add(weights_digest(decoder))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_projector_starts_as_torch_linear_layers_do() -> None:
    projector = Projector(ProjectorConfig(num_layers=3), in_width=64, out_width=96)
    initialise(projector, 0)
    for name, trained in projector.named_parameters():
        parameter = trained.detach()
        bound = {"0": 64, "2": 256, "4": 96}[name.split(".")[0]] ** -0.5
        assert float(parameter.abs().max()) <= bound
        assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2), name


def test_generators_of_different_purposes_differ() -> None:
    draws = {
        float(torch.rand((), generator=generator(seed, purpose)))
        for seed in (0, 1)
        for purpose in ("a", "b")
    }
    assert len(draws) == 4
    assert Initialiser("constant", 2.0).draw(torch.Size([2]), generator(0, "a")).tolist() == [2, 2]
