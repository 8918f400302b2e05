"""Stand-in for ``torch.nn.functional.scaled_dot_product_attention``, with one more argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _attention
from .._checks import check_dense, check_floating

__all__ = ["scaled_dot_product_attention"]


def _mask_arguments(
    mask: Tensor, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's mask as (key_mask, bias)."""
    full = (*query.shape[:3], key.shape[2])
    missing = 4 - mask.dim()
    try:
        mask.expand(full)
    except RuntimeError:
        raise ValueError(
            f"attn_mask: got shape {list(mask.shape)}; must be broadcastable to {list(full)}"
        ) from None
    mask = mask.reshape(*[1] * missing, *mask.shape)
    if mask.dtype != torch.bool:
        if not mask.dtype.is_floating_point:
            raise TypeError(f"attn_mask: got {mask.dtype}; must be bool or floating point")
        return None, mask
    if mask.shape[1] == 1 and mask.shape[2] == 1:  # The same keys for every row: padding.
        return mask[:, 0, 0], None
    bias = torch.zeros((), dtype=query.dtype, device=query.device)
    return None, torch.where(mask, bias, -torch.inf)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 1.5,
) -> Tensor:
    """PyTorch's function with α-entmax instead of softmax (α = 1 is softmax).

    Parameters
    ----------
    query, key, value : Tensor
        [..., heads, length, size], or [length, size].
    attn_mask : Tensor, optional
        bool (True takes part) or floating point (added to the scores), broadcastable to
        [..., heads, query_length, key_length]. It becomes ``key_mask`` or ``bias`` of
        ``flash_entmax.attention``, which costs memory and time that ``is_causal`` does not.
    dropout_p : float
        Must be 0: dropout of sparse weights is another function.
    is_causal : bool
        Query i sees key j only if j ≤ i: aligned at the beginning, as in PyTorch.
    scale : float, optional
        1/√head_size if not given.
    enable_gqa : bool
        Whether ``query`` may have more heads than ``key`` and ``value``.
    alpha : float or Tensor
        As in ``flash_entmax.attention``.

    Notes
    -----
    A row that may see no key is zero here.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p: got {dropout_p}; must be 0")
    tensors = [("query", query), ("key", key), ("value", value)]
    for name, tensor in tensors:
        if check_floating(name, tensor).dim() != query.dim() or tensor.dim() < 2:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; query, key and value must have the same "
                "number of dimensions, at least 2"
            )
    lead = query.shape[:-2]
    if query.dim() != 4:
        heads = lead[-1] if lead else 1
        query, key, value = (
            t.reshape(-1, t.shape[-3] if lead else 1, *t.shape[-2:]) for _, t in tensors
        )
        if (
            attn_mask is not None
            and len(lead) > 2
            and check_dense("attn_mask", attn_mask).dim() > 3
        ):
            attn_mask = attn_mask.expand(*lead[:-1], *attn_mask.shape[-3:]).reshape(
                -1, *attn_mask.shape[-3:]
            )
        query = query.reshape(-1, heads, *query.shape[-2:])
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key: got {key.shape[1]} heads; must be {query.shape[1]} as query has (or set "
            "enable_gqa=True)"
        )
    key_mask = bias = None
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask: got a tensor; must be None with is_causal=True")
        key_mask, bias = _mask_arguments(check_dense("attn_mask", attn_mask), query, key)
    window_right = None
    if is_causal and key.shape[2] > query.shape[2]:  # Keys that no row may see.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if is_causal and key.shape[2] < query.shape[2]:  # j ≤ i, with i counted from the keys' end.
        window_right, is_causal = query.shape[2] - key.shape[2], False
    output = _attention.attention(
        query,
        key,
        value,
        alpha=alpha,
        causal=is_causal,
        scale=scale,
        window_right=window_right,
        key_mask=key_mask,
        bias=bias,
    )
    return output.reshape(*lead, *output.shape[-2:]) if output.dim() != len(lead) + 2 else output
