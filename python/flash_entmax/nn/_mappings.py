"""The mappings as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _mapping


class Entmax(nn.Module):
    """``flash_entmax.entmax`` along ``dim``.

    Parameters
    ----------
    alpha : float or Tensor
        Finite and > 0; a parameter or tensor must be expandable to the scores with size 1 at
        ``dim``.
    dim : int
    """

    def __init__(self, alpha: float | Tensor = 1.5, dim: int = -1) -> None:
        super().__init__()
        if isinstance(alpha, Tensor) and not isinstance(alpha, nn.Parameter):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.dim = dim

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mapping.entmax(scores, self.alpha, self.dim, mask=mask)

    def extra_repr(self) -> str:
        alpha = self.alpha
        return f"alpha={alpha.tolist() if isinstance(alpha, Tensor) else alpha}, dim={self.dim}"


class Sparsemax(Entmax):
    """``flash_entmax.sparsemax`` along ``dim``."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__(2.0, dim)


class Entmax15(Entmax):
    """``flash_entmax.entmax15`` along ``dim``."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__(1.5, dim)


class Normmax(nn.Module):
    """``flash_entmax.normmax`` along ``dim``."""

    def __init__(self, alpha: float = 2.0, dim: int = -1) -> None:
        super().__init__()
        self.alpha = alpha
        self.dim = dim

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mapping.normmax(scores, self.alpha, self.dim, mask=mask)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, dim={self.dim}"


class Budget(nn.Module):
    """``flash_entmax.budget`` along ``dim``."""

    def __init__(self, budget: float = 1.0, dim: int = -1) -> None:
        super().__init__()
        self.budget = budget
        self.dim = dim

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        return _mapping.budget(scores, self.budget, self.dim, mask=mask)

    def extra_repr(self) -> str:
        return f"budget={self.budget}, dim={self.dim}"


def bounded_alpha(alpha: float) -> Tensor:
    """The a for which 1 + sigmoid(a) is α, as one number."""
    if not 1.0 < alpha < 2.0:
        raise ValueError(f"alpha: got {alpha}; must be in (1, 2) to be learnt")
    return torch.logit(torch.tensor(alpha - 1.0, dtype=torch.float64)).float()
