"""The losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from .._library import MAPPING_ENTMAX, MAPPING_NORMMAX
from .._losses import REDUCTIONS, fenchel_young_loss


class EntmaxLoss(nn.Module):
    """``flash_entmax.entmax_loss``.

    Parameters
    ----------
    alpha : float
        Finite and > 0; 1 is cross-entropy.
    ignore_index : int
    reduction : str
        ``"mean"``, ``"sum"`` or ``"none"``.
    """

    kind = MAPPING_ENTMAX

    def __init__(
        self, alpha: float = 1.5, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction: got {reduction!r}; must be one of {', '.join(REDUCTIONS)}"
            )
        self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        return fenchel_young_loss(
            self.kind, scores, target, self.alpha, self.ignore_index, self.reduction
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class Entmax15Loss(EntmaxLoss):
    """``flash_entmax.entmax15_loss``."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(1.5, ignore_index=ignore_index, reduction=reduction)


class SparsemaxLoss(EntmaxLoss):
    """``flash_entmax.sparsemax_loss``."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(2.0, ignore_index=ignore_index, reduction=reduction)


class NormmaxLoss(EntmaxLoss):
    """``flash_entmax.normmax_loss``; ``alpha`` > 1."""

    kind = MAPPING_NORMMAX

    def __init__(
        self, alpha: float = 2.0, *, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__(alpha, ignore_index=ignore_index, reduction=reduction)
