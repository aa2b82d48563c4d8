import pytest
import torch
from torch import Tensor
from torch.nn import functional

from midstream.model import vlm as module
from midstream.model.vlm import summed_loss


def problem(
    num_targets: int, vocab: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(num_targets)
    hidden = torch.randn(num_targets, 16, generator=source, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, 16, generator=source, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (num_targets,), generator=source)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """All logits at once, and autograd."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    return loss + z_loss * logits.logsumexp(dim=1).square().sum(), loss


@pytest.mark.parametrize("num_targets", [1, 24])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("max_logits", [1, 5 * 40, 24 * 40])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    num_targets: int, z_loss: float, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", max_logits)
    found, expected = [], []
    for kept, computed in ((found, summed_loss), (expected, plain)):
        hidden, weight, targets = problem(num_targets, dtype=torch.float64)
        total, loss = computed(hidden, weight, targets, z_loss)
        (3 * total).backward()
        kept += [total.detach(), loss.detach(), hidden.grad, weight.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice() -> None:
    total, _ = summed_loss(*problem(5), 0.2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        total.backward()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_extreme_logits_give_finite_losses_and_gradients(scale: float) -> None:
    hidden, weight, targets = problem(24)
    with torch.no_grad():
        hidden *= scale
    expected = plain(hidden.detach().double(), weight.detach().double(), targets, 1e-4)
    total, loss = summed_loss(hidden, weight, targets, 1e-4)
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.double(), expected[1], rtol=1e-6, atol=1e-6)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_no_logit_is_computed_twice_and_no_more_than_allowed_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    inner = module.linear

    def counted(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = inner(hidden, weight)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(module, "linear", counted)
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 200)
    hidden, weight, targets = problem(24)
    summed_loss(hidden, weight, targets, 0.3)[0].backward()
    assert max(sizes) <= 200
    assert sum(sizes) == 24 * 40


def test_low_precision_products_keep_float32_losses_and_weight_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(module.MAX_LOGITS, "cpu", 160)
    hidden, weight, targets = problem(24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, loss = summed_loss(hidden, weight, targets, 1e-4)
    assert total.dtype == loss.dtype == torch.float32
    total.backward()
    exact = problem(24)
    expected, _ = plain(*exact, 1e-4)
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    for mine, theirs in zip((hidden, weight), exact[:2], strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.float32
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-2


def test_no_target_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, weight, targets = problem(0)
    total, loss = summed_loss(hidden, weight, targets, 0.1)
    # What is reported is no way for gradients.
    assert (total.requires_grad, loss.requires_grad) == (True, False)
    total.backward()
    assert float(total.detach()) == float(loss) == 0
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = problem(24)
    both = [value.detach().clone().requires_grad_() for value in (hidden, weight)]
    expected = summed_loss(*both, targets, 0.1)
    expected[0].backward()
    if frozen != "hidden":

        def refused(*_: Tensor) -> None:
            raise AssertionError("a gradient of the weight was computed")

        monkeypatch.setattr(module, "_add_product", refused)
    if frozen == "both":
        with torch.no_grad():
            found = summed_loss(hidden, weight, targets, 0.1)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
        return
    {"weight": weight, "hidden": hidden}[frozen].requires_grad_(False)
    summed_loss(hidden, weight, targets, 0.1)[0].backward()
    for mine, other in zip((hidden, weight), both, strict=True):
        assert (mine.grad is not None) == mine.requires_grad
        assert mine.grad is None or torch.equal(mine.grad, other.grad)
