import pytest
import torch
from torch import Tensor
from torch.nn import functional

from midstream.model.loss import summed_loss


def problem(num_targets: int, vocab: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(num_targets)
    hidden = torch.randn(num_targets, 16, generator=source).requires_grad_()
    weight = torch.randn(vocab, 16, generator=source).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (num_targets,), generator=source)


@pytest.mark.parametrize("num_targets", [1, 5, 24])
def test_loss_is_the_summed_cross_entropy_and_the_summed_squared_normaliser(
    num_targets: int,
) -> None:
    hidden, weight, targets = problem(num_targets)
    loss, z_sum = summed_loss(hidden, weight, targets, 0.1)
    logits = (hidden @ weight.T).detach()
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    square = sum(float(row.double().exp().sum().log()) ** 2 for row in logits)
    assert float(z_sum.detach()) == pytest.approx(0.1 * square, rel=1e-5)


@pytest.mark.parametrize("max_logits", [1, 40, 5 * 40, 24 * 40])
@pytest.mark.parametrize(("of_loss", "of_z"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_pieces_give_the_loss_and_gradients_of_the_whole(
    max_logits: int, of_loss: float, of_z: float
) -> None:
    grads, values = [], []
    for limit in (10**9, max_logits):
        hidden, weight, targets = problem(24)
        loss, z_sum = summed_loss(hidden, weight, targets, 0.3, max_logits=limit)
        (of_loss * loss + of_z * z_sum).backward()
        grads.append((hidden.grad, weight.grad))
        values.append((loss.detach(), z_sum.detach()))
    for whole, pieces in zip(*values, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    for whole, pieces in zip(*grads, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def test_no_more_logits_than_allowed_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    import midstream.model.loss as module

    sizes = []
    plain = module.linear

    def counted(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = plain(hidden, weight)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(module, "linear", counted)
    hidden, weight, targets = problem(24)
    sum(summed_loss(hidden, weight, targets, 0.3, max_logits=200)).backward()  # type: ignore[union-attr]
    assert max(sizes) <= 200
    # Once in the forward and once in the backward pass.
    assert sum(sizes) == 2 * 24 * 40


def test_no_target_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, weight, targets = problem(0)
    loss, z_sum = summed_loss(hidden, weight, targets, 0.1)
    (loss + z_sum).backward()
    assert float(loss.detach()) == float(z_sum.detach()) == 0
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0
