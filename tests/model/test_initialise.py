import math
from collections.abc import Callable

import pytest
import torch

from midstream.config import DECODERS, DecoderConfig, EncoderConfig, ProjectorConfig, VLMConfig
from midstream.model.decoder import Decoder
from midstream.model.projector import Projector
from midstream.model.vlm import VLM
from midstream.model.weights import initialise, weights_digest

CONFIG = DecoderConfig(hidden_size=128, num_layers=4, num_heads=2, vocab_size=700)


def normal_share(value: torch.Tensor) -> torch.Tensor:
    """The share of a standard normal cut at three sigma that lies below a value."""
    whole = math.erf(3 / math.sqrt(2))
    return 0.5 + torch.special.erf(value.clamp(-3, 3) / math.sqrt(2)) / (2 * whole)


def distance(values: torch.Tensor, share: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Kolmogorov's and Smirnov's largest distance times the root of n; by chance above 2.2 once
    in 8,000 draws of `share`'s distribution."""
    ordered = values.flatten().double().sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    expected = share(ordered)
    apart = torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs())
    return float(apart.max()) * math.sqrt(len(ordered))


@pytest.mark.parametrize(
    ("config", "ffn"),
    [
        (DECODERS["11m"].model_copy(update={"vocab_size": 3000}), 256),
        (CONFIG.model_copy(update={"hidden_size": 256, "num_layers": 3, "qk_norm": False}), 768),
    ],
)
def test_each_decoder_parameter_is_of_openlms_distribution(config: DecoderConfig, ffn: int) -> None:
    decoder = Decoder(config)
    initialise(decoder, 0)
    # The standard deviation of a normal cut at three sigma.
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    shrink = math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    assert shrink == pytest.approx(0.98658, abs=1e-4)
    norms = 0
    for name, trained in decoder.named_parameters():
        parameter = trained.detach()
        if "norm" in name:
            norms += 1
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        sigma = (ffn if "w3" in name else config.hidden_size) ** -0.5
        if "w3" in name or "out_proj" in name:
            sigma /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
        few = 4 / math.sqrt(2 * parameter.numel())  # four standard errors
        assert float(parameter.std()) == pytest.approx(shrink * sigma, rel=few), name
        assert abs(float(parameter.mean())) < 4 * sigma / math.sqrt(parameter.numel()), name
        assert float(parameter.abs().max()) <= 3 * sigma * (1 + 1e-6), name
        # The outermost of n draws lies nearer to the cut than ten n-ths of the distribution.
        tail = normal_share(parameter.abs().max().double() / sigma)
        assert 2 * (1 - float(tail)) < 10 / parameter.numel(), name
        assert distance(parameter / sigma, normal_share) < 2.2, name
    assert norms == (4 if config.qk_norm else 2) * config.num_layers + 1


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
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    encoder = EncoderConfig(image_size=8, patch_size=4, **sizes)
    vlm = VLM(VLMConfig(decoder=CONFIG, encoder=encoder, owns_encoder=True))
    # What was not initialised shows it.
    assert all(parameter.isnan().all() for parameter in vlm.parameters())
    initialise(vlm, 0)
    assert all(parameter.isfinite().all() for parameter in vlm.parameters())
    assert torch.equal(before, torch.get_rng_state())


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


@pytest.mark.parametrize(
    "config",
    [
        ProjectorConfig(num_layers=1),
        ProjectorConfig(num_layers=2),
        ProjectorConfig(num_layers=2, hidden="decoder"),
        ProjectorConfig(num_layers=3),
    ],
    ids=str,
)
def test_projector_starts_as_torch_linear_layers_do(config: ProjectorConfig) -> None:
    projector = Projector(config, in_width=64, out_width=96)
    initialise(projector, 0)
    widths = config.widths(64, 96)
    names = [f"{2 * at}.{kind}" for at in range(len(widths) - 1) for kind in ("weight", "bias")]
    assert [name for name, _ in projector.named_parameters()] == names
    for name, trained in projector.named_parameters():
        parameter = trained.detach()
        bound = widths[int(name.split(".")[0]) // 2] ** -0.5
        assert float(parameter.abs().max()) <= bound, name
        assert distance(parameter / bound, lambda value: (value + 1) / 2) < 2.2, name
