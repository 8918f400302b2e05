"""Exact α-entmax attention: like softmax attention, but most weights are exactly zero."""

import importlib
from types import ModuleType

from . import _vmap, nn, schedules
from ._attention import (
    AttentionSupport,
    attention,
    attention_varlen,
    attention_weights,
    support,
)
from ._losses import entmax15_loss, entmax_loss, normmax_loss, sparsemax_loss
from ._mapping import (
    RowStatistics,
    budget,
    entmax,
    entmax15,
    entmax_with_statistics,
    normmax,
    sparsemax,
)

_vmap.register()


def __getattr__(name: str) -> ModuleType:
    """``flash_entmax.hf``, which needs transformers, is imported when it is first used."""
    if name != "hf":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(".hf", __name__)


__version__ = "0.1.0"

__all__ = [
    "AttentionSupport",
    "RowStatistics",
    "attention",
    "attention_varlen",
    "attention_weights",
    "budget",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_loss",
    "entmax_with_statistics",
    "nn",
    "normmax",
    "normmax_loss",
    "schedules",
    "sparsemax",
    "sparsemax_loss",
    "support",
]
