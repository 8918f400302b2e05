"""Factors of the scores that grow with the context, so that attention stays sharp in long ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def log_positions(length: int, first: int, device: torch.device) -> Tensor:
    """log(i + 2) of the positions i from ``first`` on. [length]."""
    return torch.arange(first + 2, first + 2 + length, device=device, dtype=torch.float32).log()


class SSMaxScale(nn.Module):
    """SSMax (Nakanishi 2025): the query at position i is scaled by s·log(i + 2), s learnt per head.

    s starts where the factor is 1 at position 255.

    Parameters
    ----------
    heads : int
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads,), 1.0 / math.log(257)))

    def forward(self, hidden: Tensor, first: int = 0) -> Tensor:
        """The factors [batch, heads, length] of hidden states [batch, length, features]."""
        logs = log_positions(hidden.shape[1], first, hidden.device)
        factor = self.weight[:, None] * logs
        return factor.expand(hidden.shape[0], -1, -1)


class ASEntmaxScale(nn.Module):
    r"""ASEntmax (Vasylenko, Pitorro, Martins & Treviso, ICLR 2026): a factor learnt from content.

    The query at position i is scaled by 1 + βᵢ·log(i + 2)^γᵢ with β = softplus(x·W_β + b_β) and
    γ = 2·tanh(x·W_γ + b_γ) predicted from the token's hidden state x. Both projections start at
    zero, with b_β such that the factor starts at 1.05 everywhere.

    Parameters
    ----------
    features : int
        Size of the hidden states.
    heads : int
    scaled : Tensor, optional
        bool [heads]: which heads are scaled; the others have the factor 1. (In the paper the heads
        without ALiBi.) All if not given.
    """

    START = 1.05

    def __init__(self, features: int, heads: int, scaled: Tensor | None = None) -> None:
        super().__init__()
        self.beta = nn.Linear(features, heads)
        self.gamma = nn.Linear(features, heads)
        for linear in (self.beta, self.gamma):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.beta.bias, math.log(math.expm1(self.START - 1.0)))
        self.register_buffer("scaled", scaled, persistent=False)
        self.scaled: Tensor | None

    def forward(self, hidden: Tensor, first: int = 0) -> Tensor:
        """The factors [batch, heads, length] of hidden states [batch, length, features]."""
        logs = log_positions(hidden.shape[1], first, hidden.device).unsqueeze(-1)
        beta = nn.functional.softplus(self.beta(hidden).float())
        gamma = 2.0 * torch.tanh(self.gamma(hidden).float())
        factor = (1.0 + beta * logs**gamma).transpose(1, 2)
        if self.scaled is not None:
            factor = torch.where(self.scaled[:, None], factor, 1.0)
        return factor
