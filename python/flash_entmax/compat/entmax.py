"""Stand-in for deep-spin's ``entmax`` 1.3: ``from flash_entmax.compat import entmax``.

The same names, signatures, defaults, return values and types. What differs, and why:

* The results are exact whatever ``n_iter`` says, and sum to one whatever ``ensure_sum_one`` says;
  ``k`` does not matter either. All are accepted.
* α = 1 is softmax and is differentiable in α (there: not a number), and a row whose scores are all
  −∞ gives zeros (there: not a number).
* Bad arguments are ValueError or TypeError (there: AssertionError, RuntimeError or nothing).
* The losses have no second derivative and say so (there: it is wrong without notice).
* ``entmax_bisect_loss`` accepts one α a row (there: documented, but the result has a wrong shape).
* On CUDA the numbers of a tensor of α, and targets, are not looked at: a row with one that is not
  allowed is NaN. Budgets that are tensors, and α of losses that are, are read back to the host.

Beyond version 1.3, the two functions that sort accept ``return_support_size``, as the package's
development version does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _library, _mapping
from .._checks import check_floating, is_dense
from .._losses import fenchel_young_loss

__version__ = "1.3"

__all__ = [
    "BudgetBisect",
    "Entmax15",
    "Entmax15Loss",
    "EntmaxBisect",
    "EntmaxBisectLoss",
    "NormmaxBisect",
    "NormmaxBisectLoss",
    "Sparsemax",
    "SparsemaxBisect",
    "SparsemaxBisectLoss",
    "SparsemaxLoss",
    "budget_bisect",
    "entmax15",
    "entmax15_loss",
    "entmax_bisect",
    "entmax_bisect_loss",
    "normmax_bisect",
    "normmax_bisect_loss",
    "sparsemax",
    "sparsemax_bisect",
    "sparsemax_bisect_loss",
    "sparsemax_loss",
]

# No target equals it, so that every target must be a class.
_IGNORE_NOTHING = -(2**62)


def _check_int(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: got {type(value).__name__}; must be an int or None")


def _promote(X: Tensor, parameter: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """The types that PyTorch's arithmetic gives to scores and a parameter expanded to rows."""
    check_floating("X", X)
    if not isinstance(parameter, Tensor):
        return X, parameter
    whole = not (parameter.is_floating_point() or parameter.is_complex() or parameter.is_quantized)
    if not whole or not is_dense(parameter):
        check_floating("parameter", parameter)
        X = X.to(torch.promote_types(X.dtype, parameter.dtype))
    return X, parameter.to(X.dtype)


def _exact(X: Tensor, alpha: float, dim: int, k: int | None, return_support_size: bool) -> Any:
    _check_int("k", k)
    if not return_support_size:
        return _mapping.entmax(X, alpha, dim)
    statistics = _mapping.entmax_with_statistics(X, alpha, dim)
    return statistics.probabilities, statistics.support_size


def sparsemax(
    X: Tensor, dim: int = -1, k: int | None = None, return_support_size: bool = False
) -> Any:
    """Sparsemax; with ``return_support_size`` also how many entries of each row are positive."""
    return _exact(X, 2.0, dim, k, return_support_size)


def entmax15(
    X: Tensor, dim: int = -1, k: int | None = None, return_support_size: bool = False
) -> Any:
    """1.5-entmax; with ``return_support_size`` also how many entries of each row are positive."""
    return _exact(X, 1.5, dim, k, return_support_size)


def sparsemax_bisect(
    X: Tensor, dim: int = -1, n_iter: int | None = 50, ensure_sum_one: bool = True
) -> Tensor:
    """Sparsemax."""
    _check_int("n_iter", n_iter)
    return _mapping.sparsemax(X, dim)


def entmax_bisect(
    X: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    n_iter: int = 50,
    ensure_sum_one: bool = True,
) -> Tensor:
    """α-entmax, differentiable in ``X`` and ``alpha`` (a number, or expandable to rows)."""
    _check_int("n_iter", n_iter)
    X, alpha = _promote(X, alpha)
    return _mapping.entmax(X, alpha, dim)


def normmax_bisect(X: Tensor, alpha: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    """α-normmax, differentiable in ``X`` (``alpha`` gets no gradient)."""
    _check_int("n_iter", n_iter)
    X, alpha = _promote(X, alpha)
    return _mapping.normmax(X, alpha.detach() if isinstance(alpha, Tensor) else alpha, dim)


def _budget_of_rows(rows: Tensor, budget: float) -> Tensor:
    """[rows, entries] with one budget, which may lie outside (0, entries)."""
    if not budget > 0 or budget >= rows.shape[-1]:  # Nothing may be chosen, or everything must be.
        return rows.masked_fill(torch.ones_like(rows, dtype=torch.bool), float(budget > 0))
    return _mapping.budget(rows, budget)


def budget_bisect(X: Tensor, budget: float | Tensor = 2, dim: int = -1, n_iter: int = 50) -> Tensor:
    """Budget-sparsemax, differentiable in ``X``; one budget, or a tensor expandable to rows."""
    _check_int("n_iter", n_iter)
    X, budget = _promote(X, budget)
    shape = _mapping.row_shape(X, dim)
    if not isinstance(budget, Tensor) or budget.numel() == 1:
        number = float(budget)
        if 0 < number <= X.shape[dim]:
            return _mapping.budget(X, number, dim)
        return _budget_of_rows(X.movedim(dim, -1), number).movedim(-1, dim)
    # The engine takes one budget a call: a call for each that occurs.
    budgets = budget.detach().expand(shape).movedim(dim, -1).reshape(-1)
    rows = X.movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    order, parts = [], []
    for number in sorted(set(budgets.tolist())):
        chosen = (budgets == number).nonzero().squeeze(1)
        order.append(chosen)
        parts.append(_budget_of_rows(flat[chosen], number))
    result = torch.cat(parts)[torch.cat(order).argsort()]
    return result.view(rows.shape).movedim(-1, dim)


def _loss(kind: int, X: Tensor, target: Tensor, alpha: float) -> Tensor:
    return fenchel_young_loss(kind, X, target, alpha, _IGNORE_NOTHING, "none")


def sparsemax_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """Sparsemax loss of each row; ``X`` is [rows, classes], ``target`` int64 [rows]."""
    _check_int("k", k)
    return _loss(_library.MAPPING_ENTMAX, X, target, 2.0)


def sparsemax_bisect_loss(X: Tensor, target: Tensor, n_iter: int = 50) -> Tensor:
    """Sparsemax loss of each row."""
    _check_int("n_iter", n_iter)
    return _loss(_library.MAPPING_ENTMAX, X, target, 2.0)


def entmax15_loss(X: Tensor, target: Tensor, k: int | None = None) -> Tensor:
    """1.5-entmax loss of each row."""
    _check_int("k", k)
    return _loss(_library.MAPPING_ENTMAX, X, target, 1.5)


def _loss_with_alphas(kind: int, X: Tensor, target: Tensor, alpha: float | Tensor) -> Tensor:
    if not isinstance(alpha, Tensor):
        return _loss(kind, X, target, alpha)
    if alpha.numel() == 1:
        return _loss(kind, *_promoted_scores(X, target, alpha), alpha.item())
    alphas = alpha.detach().reshape(-1)
    if alphas.shape != X.shape[:1]:
        raise ValueError(
            f"alpha: got shape {list(alpha.shape)}; must have 1 element or {X.shape[0]}, one a row"
        )
    X, target = _promoted_scores(X, target, alpha)
    order, parts = [], []
    for number in sorted(set(alphas.tolist())):
        chosen = (alphas == number).nonzero().squeeze(1)
        order.append(chosen)
        parts.append(_loss(kind, X[chosen], target[chosen], number))
    return torch.cat(parts)[torch.cat(order).argsort()]


def _promoted_scores(X: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return _promote(X, alpha)[0], target


def entmax_bisect_loss(
    X: Tensor, target: Tensor, alpha: float | Tensor = 1.5, n_iter: int = 50
) -> Tensor:
    """α-entmax loss of each row."""
    _check_int("n_iter", n_iter)
    return _loss_with_alphas(_library.MAPPING_ENTMAX, X, target, alpha)


def normmax_bisect_loss(
    X: Tensor, target: Tensor, alpha: float | Tensor = 2, n_iter: int = 50
) -> Tensor:
    """α-normmax loss of each row."""
    _check_int("n_iter", n_iter)
    return _loss_with_alphas(_library.MAPPING_NORMMAX, X, target, alpha)


class Sparsemax(nn.Module):
    """Module of ``sparsemax``."""

    def __init__(self, dim: int = -1, k: int | None = None, return_support_size: bool = False):
        super().__init__()
        self.dim = dim
        self.k = k
        self.return_support_size = return_support_size

    def forward(self, X: Tensor) -> Any:
        return sparsemax(X, self.dim, self.k, self.return_support_size)


class Entmax15(nn.Module):
    """Module of ``entmax15``."""

    def __init__(self, dim: int = -1, k: int | None = None, return_support_size: bool = False):
        super().__init__()
        self.dim = dim
        self.k = k
        self.return_support_size = return_support_size

    def forward(self, X: Tensor) -> Any:
        return entmax15(X, self.dim, self.k, self.return_support_size)


class SparsemaxBisect(nn.Module):
    """Module of ``sparsemax_bisect``."""

    def __init__(self, dim: int = -1, n_iter: int | None = None):
        super().__init__()
        self.dim = dim
        self.n_iter = n_iter

    def forward(self, X: Tensor) -> Tensor:
        return sparsemax_bisect(X, dim=self.dim, n_iter=self.n_iter)


class EntmaxBisect(nn.Module):
    """Module of ``entmax_bisect``; ``alpha`` may be a parameter."""

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1, n_iter: int = 50):
        super().__init__()
        self.dim = dim
        self.n_iter = n_iter
        self.alpha = alpha

    def forward(self, X: Tensor) -> Tensor:
        return entmax_bisect(X, alpha=self.alpha, dim=self.dim, n_iter=self.n_iter)


class NormmaxBisect(nn.Module):
    """Module of ``normmax_bisect``."""

    def __init__(self, alpha: float | Tensor = 2, dim: int = -1, n_iter: int = 50):
        super().__init__()
        self.dim = dim
        self.n_iter = n_iter
        self.alpha = alpha

    def forward(self, X: Tensor) -> Tensor:
        return normmax_bisect(X, alpha=self.alpha, dim=self.dim, n_iter=self.n_iter)


class BudgetBisect(nn.Module):
    """Module of ``budget_bisect``."""

    def __init__(self, budget: float | Tensor = 2, dim: int = -1, n_iter: int = 50):
        super().__init__()
        self.dim = dim
        self.n_iter = n_iter
        self.budget = budget

    def forward(self, X: Tensor) -> Tensor:
        return budget_bisect(X, budget=self.budget, dim=self.dim, n_iter=self.n_iter)


class _Loss(nn.Module):
    """Reduction of one loss a row.

    As in the original, only an ``ignore_index`` ≥ 0 is ever ignored: it must be a class.
    """

    def __init__(self, ignore_index: int = -100, reduction: str = "elementwise_mean"):
        if reduction not in ("elementwise_mean", "sum", "none"):
            raise ValueError(
                f"reduction: got {reduction!r}; must be 'elementwise_mean', 'sum' or 'none'"
            )
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def loss(self, X: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError("a loss of each row")

    def forward(self, X: Tensor, target: Tensor) -> Tensor:
        loss = self.loss(X, target)
        count: int | Tensor = target.size(0)
        if self.ignore_index >= 0:
            ignored = target == self.ignore_index
            count = count - ignored.sum()
            loss = loss.masked_fill(ignored, 0.0)
        if self.reduction == "sum":
            return loss.sum()
        if self.reduction == "elementwise_mean":
            return loss.sum() / count
        return loss


class SparsemaxLoss(_Loss):
    """Module of ``sparsemax_loss``."""

    def __init__(
        self, k: int | None = None, ignore_index: int = -100, reduction: str = "elementwise_mean"
    ):
        super().__init__(ignore_index, reduction)
        self.k = k

    def loss(self, X: Tensor, target: Tensor) -> Tensor:
        return sparsemax_loss(X, target, self.k)


class SparsemaxBisectLoss(_Loss):
    """Module of ``sparsemax_bisect_loss``."""

    def __init__(
        self, n_iter: int = 50, ignore_index: int = -100, reduction: str = "elementwise_mean"
    ):
        super().__init__(ignore_index, reduction)
        self.n_iter = n_iter

    def loss(self, X: Tensor, target: Tensor) -> Tensor:
        return sparsemax_bisect_loss(X, target, self.n_iter)


class Entmax15Loss(_Loss):
    """Module of ``entmax15_loss``."""

    def __init__(
        self, k: int | None = 100, ignore_index: int = -100, reduction: str = "elementwise_mean"
    ):
        super().__init__(ignore_index, reduction)
        self.k = k

    def loss(self, X: Tensor, target: Tensor) -> Tensor:
        return entmax15_loss(X, target, self.k)


class EntmaxBisectLoss(_Loss):
    """Module of ``entmax_bisect_loss``."""

    def __init__(
        self,
        alpha: float | Tensor = 1.5,
        n_iter: int = 50,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
    ):
        super().__init__(ignore_index, reduction)
        self.alpha = alpha
        self.n_iter = n_iter

    def loss(self, X: Tensor, target: Tensor) -> Tensor:
        return entmax_bisect_loss(X, target, self.alpha, self.n_iter)


class NormmaxBisectLoss(_Loss):
    """Module of ``normmax_bisect_loss``."""

    def __init__(
        self,
        alpha: float | Tensor = 2,
        n_iter: int = 50,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
    ):
        super().__init__(ignore_index, reduction)
        self.alpha = alpha
        self.n_iter = n_iter

    def loss(self, X: Tensor, target: Tensor) -> Tensor:
        return normmax_bisect_loss(X, target, self.alpha, self.n_iter)
