"""Fenchel–Young losses of the mappings (Blondel, Martins & Niculae 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._checks import (
    autocast_dtype,
    check_dense,
    check_device,
    check_floating,
    check_int,
    check_mapping_device,
    check_number,
)
from ._library import MAPPING_ENTMAX, MAPPING_NORMMAX

REDUCTIONS = ("mean", "sum", "none")


def fenchel_young_loss(
    kind: int, scores: Tensor, target: Tensor, alpha: float, ignore_index: int, reduction: str
) -> Tensor:
    """Any of the losses; see ``entmax_loss``."""
    check_floating("scores", scores)
    check_mapping_device("scores", scores)
    if check_dense("target", target).dtype != torch.int64:
        raise TypeError(f"target: got {target.dtype}; must be int64")
    check_device("target", target, "scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"scores: got shape {list(scores.shape)}; must be [rows, classes]")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; must be one of {', '.join(REDUCTIONS)}")
    if autocast_dtype(scores.device.type) is not None and scores.dtype != torch.float64:
        scores = scores.float()
    check_int("ignore_index", ignore_index)
    loss = _library.loss(scores, target, kind, check_number("alpha", alpha), ignore_index)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        # No rows at all give 0, as no rows that count do.
        loss = loss.sum() / (target != ignore_index).sum().clamp(min=1)
    return loss.to(scores.dtype)


def entmax_loss(
    scores: Tensor,
    target: Tensor,
    alpha: float = 1.5,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The Fenchel–Young loss of α-entmax: a sparse relative of cross-entropy.

    L(s; y) = (p − e_y)·s + Σᵢ (pᵢ − pᵢ^α) / (α·(α − 1)) with p = α-entmax(s)

    It is ≥ 0, and exactly 0 where the mapping puts all weight on the target, which it does as soon
    as the target's score leads by 1/(α−1). α = 1 is cross-entropy.

    Parameters
    ----------
    scores : Tensor
        [rows, classes], floating point, any strides.
    target : Tensor
        [rows], int64: each ``ignore_index`` or in [0, classes). On CUDA, where an error would have
        to wait for the device, the loss and the gradient of a row with another target are NaN.
    alpha : float
        Finite and > 0.
    ignore_index : int
        Rows with this target have loss 0, gradient 0, and do not count in the mean.
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"`` ([rows]).

    Returns
    -------
    Tensor
        The loss, of the type of ``scores``. Its gradient is p − e_y; there is no second
        derivative (NotImplementedError).
    """
    return fenchel_young_loss(MAPPING_ENTMAX, scores, target, alpha, ignore_index, reduction)


def entmax15_loss(
    scores: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """``entmax_loss`` with α = 1.5."""
    return entmax_loss(scores, target, 1.5, ignore_index=ignore_index, reduction=reduction)


def sparsemax_loss(
    scores: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """``entmax_loss`` with α = 2."""
    return entmax_loss(scores, target, 2.0, ignore_index=ignore_index, reduction=reduction)


def normmax_loss(
    scores: Tensor,
    target: Tensor,
    alpha: float = 2.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The Fenchel–Young loss of α-normmax, α > 1: as ``entmax_loss`` with
    H(p) = 1 − ‖p‖_α.
    """
    return fenchel_young_loss(MAPPING_NORMMAX, scores, target, alpha, ignore_index, reduction)
