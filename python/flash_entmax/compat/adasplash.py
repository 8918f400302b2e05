"""Stand-in for ``adasplash`` 0.2.2: ``from flash_entmax.compat.adasplash import adasplash``.

The same public functions, arguments and defaults. The result is the exact one whatever ``niter``,
``n_iter``, ``use_histogram`` and ``fast_math`` say (they are accepted). What else differs:

* Any length, head size up to 256 on GPUs (any on CPUs) and strides, where the original wants powers
  of two, certain head sizes and contiguous tensors; grouped heads everywhere; CPU tensors as well.
* Bad arguments are ValueError or TypeError (there: AssertionError).
* The ``triton_…`` mappings are compositions of PyTorch's operations, on CPU tensors one C++ pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _attention, _mapping
from .._checks import check_floating, check_integer

__version__ = "0.2.0"  # What version 0.2.2 says of itself.

__all__ = [
    "__version__",
    "adasplash",
    "adasplash2",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, alpha: float, is_causal: bool, varlen: Tensor | None
) -> Tensor:
    if varlen is None:
        return _attention.attention(q, k, v, alpha=alpha, causal=is_causal)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if check_floating(name, tensor).dim() != 4:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; must be [batch, heads, length, head_size]"
            )
    batch, length = q.shape[0], q.shape[2]
    check_integer("varlen", varlen, "q", q)
    if varlen.shape != (batch,):
        raise ValueError(f"varlen: got shape {list(varlen.shape)}; must be [{batch}]")
    if k.shape[2] != length or v.shape[2] != length:
        raise ValueError(f"k: got length {k.shape[2]}; must be that of q, {length}, with varlen")
    if batch > 0 and not (int(varlen.min()) >= 0 and int(varlen.max()) <= length):
        raise ValueError(f"varlen: got {varlen.tolist()}; must be in [0, {length}]")
    # The rows that count, one sequence after the other.
    valid = torch.arange(length, device=q.device) < varlen.unsqueeze(1)
    query, key, value = (tensor.transpose(1, 2)[valid] for tensor in (q, k, v))
    offsets = torch.nn.functional.pad(varlen.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(varlen.max()) if batch > 0 else 0
    packed = _attention.attention_varlen(
        query,
        key,
        value,
        offsets,
        offsets,
        max_query_length=longest,
        max_key_length=longest,
        alpha=alpha,
        causal=is_causal,
    )
    output = packed.new_zeros(batch, length, q.shape[1], v.shape[3])
    return output.index_put((valid,), packed).transpose(1, 2)


def adasplash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """α-entmax attention over [batch, heads, length, head_size].

    ``varlen`` [batch], int32 or int64: the valid length of each entry. Keys after it are not seen,
    rows after it are zero.
    """
    return _attend(q, k, v, alpha, is_causal, varlen)


def adasplash_no_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """As ``adasplash_v1``."""
    return _attend(q, k, v, alpha, is_causal, varlen)


def adasplash_v2(
    q: Tensor, k: Tensor, v: Tensor, niter: int = 1, varlen: Tensor | None = None
) -> Tensor:
    """Causal attention with α = 1.5, and fewer heads of ``k`` and ``v`` than of ``q`` if wanted."""
    return _attend(q, k, v, 1.5, True, varlen)


adasplash2 = adasplash_v2


def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = True,
    varlen: Tensor | None = None,
    niter: int | None = None,
) -> Tensor:
    """As ``adasplash_v1``, but causal unless told otherwise."""
    return _attend(q, k, v, alpha, is_causal, varlen)


def triton_entmax_v1(
    x: Tensor, alpha: float = 1.5, n_iter: int = 10, fast_math: bool = True
) -> Tensor:
    """α-entmax along the last dimension."""
    return _mapping.entmax(x, alpha)


def triton_entmax_v2(
    x: Tensor,
    alpha: float = 1.5,
    n_iter: int = 2,
    use_histogram: bool = True,
    fast_math: bool = False,
) -> Tensor:
    """α-entmax along the last dimension."""
    return _mapping.entmax(x, alpha)


def triton_entmax(
    x: Tensor,
    alpha: float = 1.5,
    n_iter: int = 2,
    use_histogram: bool = True,
    fast_math: bool = False,
) -> Tensor:
    """α-entmax along the last dimension."""
    return _mapping.entmax(x, alpha)


def triton_sparsemax(x: Tensor, **kwargs: Any) -> Tensor:
    """Sparsemax along the last dimension; the keyword arguments of ``triton_entmax``."""
    return triton_entmax(x, alpha=2.0, **kwargs)


def triton_entmax15(x: Tensor, **kwargs: Any) -> Tensor:
    """1.5-entmax along the last dimension; the keyword arguments of ``triton_entmax``."""
    return triton_entmax(x, alpha=1.5, **kwargs)
