"""α-entmax and its neighbours along a dimension of a tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_int,
    check_mapping_device,
    check_mask,
    check_number,
)
from ._library import MAPPING_BUDGET, MAPPING_ENTMAX, MAPPING_NORMMAX
from ._mapping_tensors import statistics_type


class RowStatistics(NamedTuple):
    """What ``entmax`` can report besides probabilities; shapes as the scores, 1 at ``dim``."""

    probabilities: Tensor
    threshold: Tensor
    """τ of each row for α ≠ 1, log Σ exp(s) for α = 1; NaN for rows without a distribution."""
    support_size: Tensor
    """How many entries are positive (int64)."""


def row_shape(scores: Tensor, dim: int) -> list[int]:
    """The shape of one number a row: size 1 at ``dim``."""
    if not -scores.dim() <= check_int("dim", dim) < scores.dim():
        raise ValueError(
            f"dim: got {dim}; must be in [{-scores.dim()}, {scores.dim()}) for scores of "
            f"{scores.dim()} dimensions"
        )
    shape = list(scores.shape)
    shape[dim] = 1
    return shape


def _prepare(
    scores: Tensor, parameter: float | Tensor, name: str, dim: int, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """Scores (in float32 under autocast, as softmax), per-row parameter, mask, one parameter."""
    check_floating("scores", scores)
    check_mapping_device("scores", scores)
    if scores.dim() == 0:
        raise ValueError("scores: got 0 dimensions; must have at least 1")
    shape = row_shape(scores, dim)
    if autocast_dtype(scores.device.type) is not None and scores.dtype != torch.float64:
        scores = scores.float()
    if mask is not None:
        mask = check_mask("mask", mask, "scores", scores)
    if not isinstance(parameter, Tensor):
        return scores, None, mask, check_number(name, parameter)
    check_floating(name, parameter)
    check_device(name, parameter, "scores", scores)
    try:
        rows = parameter.to(statistics_type(scores.dtype)).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: got shape {list(parameter.shape)}; must be expandable to {shape}"
        ) from None
    return scores, rows, mask, 0.0


def entmax(
    scores: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""α-entmax: like softmax, but small scores get a probability of exactly zero.

    pᵢ = max(0, (α − 1)·sᵢ − τ)^(1/(α − 1)), with τ such that Σᵢ pᵢ = 1

    Parameters
    ----------
    scores : Tensor
        Any shape of 1 to 8 dimensions, any strides; float32, float64, bfloat16 or float16.
    alpha : float or Tensor
        Finite and > 0. 1 is softmax, 1.5 is 1.5-entmax, 2 is sparsemax. A tensor gives one a row
        (expandable to the shape of ``scores`` with size 1 at ``dim``), and gets a gradient. On CUDA
        its numbers are not looked at: rows whose α is not allowed are NaN.
    dim : int
        The dimension along which probabilities sum to 1.
    mask : Tensor, optional
        bool or uint8, broadcastable to ``scores``; False excludes an entry, as a score of −∞ does.

    Returns
    -------
    Tensor
        Probabilities, of the type and shape of ``scores``. A row with every entry masked is zero;
        a row with NaN or +∞ is NaN. Under autocast the type is float32, as for softmax.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        With the argument, its value and what is allowed.

    Notes
    -----
    The threshold is solved in double precision: the result does not depend on a number of
    iterations. The gradient is u ⊙ (g − u·g / Σu) with u = p^(2 − α) on the support (Peters,
    Niculae & Martins 2019, Proposition 2); the one in α is that of Correia, Niculae & Martins
    (2019), continuous through α = 1.
    """
    scores, rows, mask, number = _prepare(scores, alpha, "alpha", dim, mask)
    return _library.mapping(scores, rows, mask, MAPPING_ENTMAX, number, dim)


def entmax_with_statistics(
    scores: Tensor,
    alpha: float | Tensor = 1.5,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> RowStatistics:
    """``entmax``, with the threshold and the size of the support of every row."""
    scores, rows, mask, number = _prepare(scores, alpha, "alpha", dim, mask)
    return RowStatistics(
        *_library.call(
            _library.operators.mapping_with_statistics,
            scores,
            rows,
            mask,
            MAPPING_ENTMAX,
            number,
            dim,
        )
    )


def sparsemax(scores: Tensor, dim: int = -1, *, mask: Tensor | None = None) -> Tensor:
    """α-entmax with α = 2: the Euclidean projection onto the simplex (Martins & Astudillo 2016).

    Parameters, result and errors are those of ``entmax``.
    """
    return entmax(scores, 2.0, dim, mask=mask)


def entmax15(scores: Tensor, dim: int = -1, *, mask: Tensor | None = None) -> Tensor:
    """α-entmax with α = 1.5 (Peters, Niculae & Martins 2019); see ``entmax``."""
    return entmax(scores, 1.5, dim, mask=mask)


def normmax(
    scores: Tensor,
    alpha: float | Tensor = 2.0,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    r"""α-normmax: the p that maximises p·s − ‖p‖_α over the simplex.

    Blondel, Martins & Niculae (2020). ``alpha`` is > 1; it gets no gradient. Everything else is as
    in ``entmax``.
    """
    scores, rows, mask, number = _prepare(scores, alpha, "alpha", dim, mask)
    if rows is not None and rows.requires_grad:
        raise NotImplementedError(
            "alpha: got a tensor that requires a gradient; normmax has none in alpha (detach it)"
        )
    return _library.mapping(scores, rows, mask, MAPPING_NORMMAX, number, dim)


def budget(
    scores: Tensor, budget: float = 1.0, dim: int = -1, *, mask: Tensor | None = None
) -> Tensor:
    r"""A soft choice of ``budget`` items: the p that maximises p·s − ½‖p‖².

    Subject to 0 ≤ p ≤ 1 and Σp = ``budget``. With a budget of 1 it is
    ``sparsemax``. Everything else is as in ``entmax``.

    Parameters
    ----------
    budget : float
        In (0, size of ``dim``]. A row with fewer unmasked entries gets 1 on each of them.
    """
    if isinstance(budget, Tensor):
        raise TypeError(
            "budget: got Tensor; must be a number "
            "(flash_entmax.compat.entmax.budget_bisect takes one budget a row)"
        )
    scores, _, mask, number = _prepare(scores, budget, "budget", dim, mask)
    return _library.mapping(scores, None, mask, MAPPING_BUDGET, number, dim)
