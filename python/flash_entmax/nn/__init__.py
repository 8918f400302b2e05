"""Modules: attention, mappings and losses."""

from ._attention import EntmaxAttention
from ._losses import Entmax15Loss, EntmaxLoss, NormmaxLoss, SparsemaxLoss
from ._mappings import Budget, Entmax, Entmax15, Normmax, Sparsemax
from ._positions import RotaryEmbedding, alibi_slopes, nape_slopes
from ._scaling import ASEntmaxScale, SSMaxScale

__all__ = [
    "ASEntmaxScale",
    "Budget",
    "Entmax",
    "Entmax15",
    "Entmax15Loss",
    "EntmaxAttention",
    "EntmaxLoss",
    "Normmax",
    "NormmaxLoss",
    "RotaryEmbedding",
    "SSMaxScale",
    "Sparsemax",
    "SparsemaxLoss",
    "alibi_slopes",
    "nape_slopes",
]
