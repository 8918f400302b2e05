from __future__ import annotations

import entmax as deep_spin
import pytest
import torch

import flash_entmax
from flash_entmax import nn
from reference import assert_close


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_equals_deep_spin(alpha: float, reduction: str) -> None:
    scores = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    target = torch.randint(9, (6,))
    actual = flash_entmax.entmax_loss(scores, target, alpha, reduction=reduction)
    expected = deep_spin.entmax_bisect_loss(scores, target, alpha, 70)
    if reduction != "none":
        expected = getattr(expected, reduction)()
    assert_close(actual, expected, 1e-10)
    weight = torch.randn_like(actual)
    (grad,) = torch.autograd.grad((actual * weight).sum(), scores)
    (other,) = torch.autograd.grad((expected * weight).sum(), scores)
    assert_close(grad, other, 1e-10)


def test_alpha_one_is_cross_entropy_with_ignored_rows() -> None:
    scores = torch.randn(6, 9, requires_grad=True)
    target = torch.randint(9, (6,))
    target[2] = -100
    actual = flash_entmax.entmax_loss(scores, target, 1.0)
    expected = torch.nn.functional.cross_entropy(scores, target)
    assert_close(actual, expected, 1e-6)
    (grad,) = torch.autograd.grad(actual, scores)
    (other,) = torch.autograd.grad(expected, scores)
    assert_close(grad, other, 1e-6)
    everything = torch.full((6,), -100)
    assert flash_entmax.entmax_loss(scores, everything).item() == 0.0


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_normmax(alpha: float) -> None:
    scores = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    target = torch.randint(9, (6,))
    expected = deep_spin.normmax_bisect_loss(scores, target, alpha, 70)
    actual = flash_entmax.normmax_loss(scores, target, alpha, reduction="none")
    assert_close(actual, expected, 1e-7)
    assert torch.autograd.gradcheck(
        lambda s: flash_entmax.normmax_loss(s, target, alpha), (scores,), eps=1e-5, atol=1e-4
    )


def test_margin() -> None:
    """The loss is exactly zero where the target leads by 1/(α−1)."""
    scores = torch.zeros(1, 5)
    scores[0, 3] = 2.0
    assert flash_entmax.entmax15_loss(scores, torch.tensor([3])).item() == 0.0
    assert flash_entmax.sparsemax_loss(scores, torch.tensor([3])).item() == 0.0
    assert flash_entmax.entmax15_loss(scores, torch.tensor([2])).item() > 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 6).to(dtype).requires_grad_()
    loss = flash_entmax.entmax15_loss(scores, torch.arange(4))
    assert loss.dtype == dtype
    loss.backward()
    assert scores.grad is not None and scores.grad.dtype == dtype


def test_modules() -> None:
    scores, target = torch.randn(4, 6), torch.arange(4)
    pairs = [
        (nn.EntmaxLoss(1.3), flash_entmax.entmax_loss(scores, target, 1.3)),
        (nn.Entmax15Loss(), flash_entmax.entmax15_loss(scores, target)),
        (nn.SparsemaxLoss(), flash_entmax.sparsemax_loss(scores, target)),
        (nn.NormmaxLoss(3.0), flash_entmax.normmax_loss(scores, target, 3.0)),
    ]
    for module, expected in pairs:
        assert torch.equal(module(scores, target), expected)
        assert "alpha" in repr(module)


def test_no_second_derivative() -> None:
    scores = torch.randn(4, 6, requires_grad=True)
    loss = flash_entmax.entmax15_loss(scores, torch.arange(4))
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: flash_entmax.entmax_loss(s, t.int()), TypeError, "target: got torch.int32"),
        (lambda s, t: flash_entmax.entmax_loss(s, t + 5), ValueError, "target"),
        (lambda s, t: flash_entmax.entmax_loss(s, t[:2]), ValueError, "target"),
        (lambda s, t: flash_entmax.entmax_loss(s[0], t), ValueError, "scores: got shape"),
        (lambda s, t: flash_entmax.entmax_loss(s, t, 0.0), ValueError, "alpha"),
        (lambda s, t: flash_entmax.normmax_loss(s, t, 1.0), ValueError, "alpha"),
        (lambda s, t: flash_entmax.entmax_loss(s, t, reduction="max"), ValueError, "reduction"),
        (lambda s, t: nn.EntmaxLoss(reduction="max"), ValueError, "reduction"),
    ],
)
def test_bad_arguments(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6), torch.arange(4))  # type: ignore[operator]
