import pytest
import torch

from midstream.config import AdamW, VLMConfig
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.train.step import make_optimizer, set_rate
from tiny import DECODER


def model() -> VLM:
    made = VLM(VLMConfig(decoder=DECODER))
    initialise(made, 0)
    return made


def after_a_step_without_gradient(vlm: VLM, settings: AdamW) -> dict[str, float]:
    """By parameter: the length of its vector after the step over that before."""
    before = {name: value.detach().clone() for name, value in vlm.named_parameters()}
    optimizer = make_optimizer(vlm, settings)
    set_rate(optimizer, 0.5)
    for value in vlm.parameters():
        value.grad = torch.zeros_like(value) if value.requires_grad else None
    optimizer.step()
    return {n: float(v.detach().norm() / before[n].norm()) for n, v in vlm.named_parameters()}


def test_every_weight_decays_as_in_openlm_or_matrices_only_as_in_prismatic() -> None:
    shrunk = pytest.approx(1 - 0.5 * 0.1, rel=1e-5)
    everything = after_a_step_without_gradient(model(), AdamW(weight_decay=0.1, decay="all"))
    assert all(ratio == shrunk for ratio in everything.values())
    vlm = model()
    matrices = after_a_step_without_gradient(vlm, AdamW(weight_decay=0.1, decay="matrices"))
    vectors = {name for name, value in vlm.named_parameters() if value.ndim < 2}
    assert vectors
    for name, ratio in matrices.items():
        assert ratio == (1.0 if name in vectors else shrunk), name


def test_frozen_parameters_are_left_out() -> None:
    vlm = model()
    vlm.decoder.output.weight.requires_grad_(False)
    optimizer = make_optimizer(vlm, AdamW(decay="matrices"))
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert held == {id(v) for v in vlm.parameters()} - {id(vlm.decoder.output.weight)}


def test_the_rate_is_set_in_every_group_and_starts_at_zero() -> None:
    optimizer = make_optimizer(model(), AdamW(decay="matrices"))
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_betas_and_epsilon_are_those_of_the_settings() -> None:
    optimizer = make_optimizer(model(), AdamW(beta1=0.8, beta2=0.7, eps=1e-5))
    assert all(g["betas"] == (0.8, 0.7) and g["eps"] == 1e-5 for g in optimizer.param_groups)
