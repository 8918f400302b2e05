from __future__ import annotations

import entmax as deep_spin
import pytest
import torch
from torch import Tensor

import flash_entmax
from reference import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, 3.0, 0.6])
def test_entmax_equals_bisection(alpha: float, dtype: torch.dtype) -> None:
    scores = (3 * torch.randn(5, 33)).to(dtype)
    expected = deep_spin.entmax_bisect(scores.double(), alpha, n_iter=70)
    actual = flash_entmax.entmax(scores, alpha)
    assert actual.dtype == dtype
    assert_close(actual, expected, 8 * torch.finfo(dtype).eps + (3e-6 if alpha > 2 else 0))


def test_alpha_one_is_softmax() -> None:
    scores = torch.randn(4, 7, dtype=torch.float64)
    assert_close(flash_entmax.entmax(scores, 1.0), scores.softmax(-1), 1e-14)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_dimensions_and_strides(dim: int) -> None:
    scores = torch.randn(3, 4, 5).transpose(0, 2)
    moved = flash_entmax.sparsemax(scores.movedim(dim, -1).contiguous()).movedim(-1, dim)
    assert torch.equal(flash_entmax.sparsemax(scores, dim), moved)


def test_mask_hides_and_empty_rows_are_zero() -> None:
    scores = torch.randn(4, 6)
    mask = torch.rand(4, 6) < 0.5
    mask[0] = False
    actual = flash_entmax.entmax15(scores, mask=mask)
    hidden = flash_entmax.entmax15(scores.masked_fill(~mask, -torch.inf))
    assert torch.equal(actual, hidden)
    assert torch.equal(actual[0], torch.zeros(6))
    assert bool((actual[~mask] == 0).all())


def test_nan_stays_in_its_row() -> None:
    scores = torch.randn(3, 5)
    scores[1, 2] = torch.nan
    actual = flash_entmax.entmax15(scores)
    assert bool(actual[1].isnan().all())
    assert bool(actual[[0, 2]].isfinite().all())


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, 2.5, 0.7])
def test_gradient_of_scores(alpha: float) -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: flash_entmax.entmax(s, alpha), (scores,))


@pytest.mark.parametrize("shape", [(), (1, 1), (3, 1), (1,)])
def test_gradient_of_alpha(shape: tuple[int, ...]) -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    alpha = (1.1 + torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(flash_entmax.entmax, (scores, alpha))


def test_gradient_of_alpha_at_one() -> None:
    """The formula of Correia et al. is 0/0 there; differences over both sides say what it is."""
    scores = torch.randn(4, 6, dtype=torch.float64)
    alpha = torch.ones((), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64)
    (flash_entmax.entmax(scores, alpha) * weight).sum().backward()
    step = 1e-5
    above, below = ((flash_entmax.entmax(scores, 1 + s) * weight).sum() for s in (step, -step))
    assert alpha.grad is not None
    assert_close(alpha.grad, (above - below) / (2 * step), 1e-8)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_second_derivative(alpha: float) -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda s: flash_entmax.entmax(s, alpha), (scores,))


def test_second_derivative_through_alpha() -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        flash_entmax.entmax(scores, alpha).square().sum(), scores, create_graph=True
    )
    (actual,) = torch.autograd.grad(grad.square().sum(), alpha)

    def value(number: float) -> Tensor:
        leaf = scores.detach().requires_grad_()
        return (
            torch.autograd.grad(flash_entmax.entmax(leaf, number).square().sum(), leaf)[0]
            .square()
            .sum()
        )

    assert_close(actual, (value(1.4 + 1e-5) - value(1.4 - 1e-5)) / 2e-5, 1e-5)
    (first,) = torch.autograd.grad(
        flash_entmax.entmax(scores, alpha).square().sum(), alpha, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="gradient in alpha cannot be differentiated"):
        torch.autograd.grad(first, scores)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 4.0])
def test_normmax(alpha: float) -> None:
    scores = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    expected = deep_spin.normmax_bisect(scores, alpha, n_iter=70)
    assert_close(flash_entmax.normmax(scores, alpha), expected, 1e-8)
    assert torch.autograd.gradcheck(lambda s: flash_entmax.normmax(s, alpha), (scores,))
    (grad,) = torch.autograd.grad(
        flash_entmax.normmax(scores, alpha).square().sum(), scores, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="normmax cannot be differentiated twice"):
        grad.sum().backward()


@pytest.mark.parametrize("budget", [0.5, 1.0, 2.5, 6.0])
def test_budget(budget: float) -> None:
    scores = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    expected = deep_spin.budget_bisect(scores, budget, n_iter=70)
    actual = flash_entmax.budget(scores, budget)
    assert_close(actual, expected, 1e-12)
    assert_close(actual.sum(-1), torch.full((4,), budget), 1e-12)
    assert torch.autograd.gradcheck(lambda s: flash_entmax.budget(s, budget), (scores,))
    assert torch.autograd.gradgradcheck(lambda s: flash_entmax.budget(s, budget), (scores,))


def test_statistics() -> None:
    scores = torch.randn(3, 9, 4, requires_grad=True)
    result = flash_entmax.entmax_with_statistics(scores, 2.0, dim=1)
    assert result.threshold.shape == result.support_size.shape == (3, 1, 4)
    assert torch.equal(result.support_size, (result.probabilities > 0).sum(1, keepdim=True))
    assert_close((scores - result.threshold).clamp(min=0), result.probabilities, 1e-6)
    result.probabilities.square().sum().backward()
    assert scores.grad is not None and not result.threshold.requires_grad


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (1,), (2, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, requires_grad=True)
    actual = flash_entmax.entmax15(scores)
    assert actual.shape == shape
    actual.sum().backward()
    assert scores.grad is not None and scores.grad.shape == shape


def test_second_backward_call() -> None:
    scores = torch.randn(3, 5, requires_grad=True)
    loss = flash_entmax.entmax15(scores).square().sum()
    loss.backward(retain_graph=True)
    assert scores.grad is not None
    first = scores.grad.clone()
    loss.backward()
    assert torch.equal(scores.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: flash_entmax.entmax(s, -1.0), ValueError, "alpha: got -1"),
        (lambda s: flash_entmax.entmax(s, float("nan")), ValueError, "alpha: got nan"),
        (lambda s: flash_entmax.entmax(s, "1"), TypeError, "alpha: got str"),
        (lambda s: flash_entmax.entmax(s, True), TypeError, "alpha: got bool"),
        (lambda s: flash_entmax.entmax(s, torch.tensor([1.5, -2.0, 1.1])[:, None]), ValueError,
         "alpha"),
        (lambda s: flash_entmax.entmax(s, torch.ones(2, 2)), ValueError, "alpha: got shape"),
        (lambda s: flash_entmax.entmax(s, torch.tensor(2)), TypeError, "alpha: got torch.int64"),
        (lambda s: flash_entmax.entmax(s, 1.5, 2), ValueError, "dim: got 2"),
        (lambda s: flash_entmax.entmax(s.long()), TypeError, "scores: got torch.int64"),
        (lambda s: flash_entmax.entmax(s.tolist()), TypeError, "scores: got list"),
        (lambda s: flash_entmax.entmax(s[0, 0]), ValueError, "scores: got 0 dimensions"),
        (lambda s: flash_entmax.entmax(s, mask=torch.ones(3, 5)), TypeError, "mask: got"),
        (lambda s: flash_entmax.entmax(s, mask=torch.ones(7).bool()), ValueError, "mask"),
        (lambda s: flash_entmax.entmax(s, mask=torch.ones(5, dtype=torch.bool, device="meta")),
         ValueError, "mask: got a tensor on meta"),
        (lambda s: flash_entmax.budget(s, 6.0), ValueError, "budget"),
        (lambda s: flash_entmax.budget(s, torch.tensor(2.0)), TypeError, "budget: got Tensor"),
        (lambda s: flash_entmax.normmax(s, 1.0), ValueError, "alpha"),
        (lambda s: flash_entmax.normmax(s, torch.tensor(2.0, requires_grad=True)),
         NotImplementedError, "requires a gradient"),
        (lambda s: flash_entmax.entmax(s.to_sparse()), TypeError, "layout torch.sparse_coo"),
    ],
)  # fmt: skip
def test_bad_arguments(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5))  # type: ignore[operator]
