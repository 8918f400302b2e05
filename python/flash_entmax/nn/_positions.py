"""Where tokens are: slopes of ALiBi, and rotary embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of ALiBi (Press, Smith & Lewis 2022): 2^(−8h/heads) for h = 1 … heads. [heads].

    For numbers of heads that are not powers of two, the original's rule: the slopes of the next
    lower power of two, then every other one of the next higher.
    """
    if heads < 1:
        raise ValueError(f"heads: got {heads}; must be ≥ 1")

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * h / count) for h in range(1, count + 1)]

    lower: int = 2 ** int(math.log2(heads))
    slopes = geometric(lower)
    if lower < heads:
        slopes += geometric(2 * lower)[0::2][: heads - lower]
    return torch.tensor(slopes)


def nape_slopes(heads: int) -> Tensor:
    """Slopes of NAPE (Vasylenko, Pitorro, Martins & Treviso 2026). [heads].

    The first half of the heads has the slopes 1, 1/2, …, 1/(heads/2), the second half no position
    code at all (slope 0).
    """
    if heads < 2 or heads % 2 != 0:
        raise ValueError(f"heads: got {heads}; must be even")
    half = heads // 2
    return torch.cat([1.0 / torch.arange(1, half + 1), torch.zeros(half)])


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021), halves rotated against each other.

    Parameters
    ----------
    size : int
        Size of a head; even.
    base : float
        Wavelengths grow geometrically from 2π to 2π·base.
    """

    def __init__(self, size: int, base: float = 10000.0) -> None:
        super().__init__()
        if size < 2 or size % 2 != 0:
            raise ValueError(f"size: got {size}; must be even")
        self.base = base
        frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        self.register_buffer("frequency", frequency.float(), persistent=False)

    def forward(self, tensor: Tensor, first: int = 0) -> Tensor:
        """[…, length, size], whose first row is at position ``first``, rotated."""
        frequency: Tensor = self.get_buffer("frequency")
        position = torch.arange(first, first + tensor.shape[-2], device=tensor.device)
        angle = position.unsqueeze(-1) * frequency
        cos, sin = angle.cos().to(tensor.dtype), angle.sin().to(tensor.dtype)
        left, right = tensor.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def extra_repr(self) -> str:
        return f"size={2 * self.get_buffer('frequency').shape[0]}, base={self.base}"
