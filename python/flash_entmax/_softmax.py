"""α = 1 on GPUs, whose engine begins above 1: softmax by PyTorch's scaled_dot_product_attention.

Masks that PyTorch's kernels do not know by themselves (windows, lengths, packed sequences, slopes,
a bias) are written out, and scores with a cap, which those kernels do not know either, are computed
densely: both cost memory of the size query_length × key_length.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    cu_query: Tensor | None,
    cu_key: Tensor | None,
    scale: float | None,
    softcap: float,
) -> None:
    """What the operators check in C++."""
    batch, heads, _, size = query.shape
    kv_heads = key.shape[1]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch:
            raise ValueError(
                f"{name}: got batch {tensor.shape[0]}; must be of the batch of query, {batch}"
            )
    if size < 1 or value.shape[3] < 1:
        raise ValueError(f"{'query' if size < 1 else 'value'}: got head size 0; must be ≥ 1")
    if key.shape[3] != size:
        raise ValueError(
            f"key: got head_size {key.shape[3]}; must be of the head_size of query, {size}"
        )
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value: got shape {list(value.shape)}; must be of the kv_heads and key_length of key, "
            f"{list(key.shape)}"
        )
    if heads > 0 and (kv_heads == 0 or heads % kv_heads != 0):
        raise ValueError(
            f"key: got {kv_heads} heads; must be a divisor of the {heads} heads of query"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}; must be finite")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap: got {softcap}; must be finite and ≥ 0")
    if key_lengths is not None and key_lengths.shape != (batch,):
        raise ValueError(f"key_lengths: got shape {list(key_lengths.shape)}; must be [{batch}]")
    if cu_query is None and cu_key is None:
        return
    if cu_query is None or cu_key is None or cu_query.dim() != 1 or cu_query.shape[0] < 1:
        got = "nothing" if cu_query is None else f"shape {list(cu_query.shape)}"
        raise ValueError(f"cu_query: got {got}; must be [sequences + 1], as cu_key")
    if cu_key.shape != cu_query.shape:
        raise ValueError(
            f"cu_key: got shape {list(cu_key.shape)}; must be {list(cu_query.shape)}, as cu_query"
        )


def _sequence(cu: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of each token: the sequence that it is in, and whether it is in any."""
    at = torch.arange(tokens, device=cu.device)
    found = torch.searchsorted(cu, at, right=True) - 1
    sequence = found.clamp(0, cu.shape[0] - 2)
    return sequence, found == sequence


def _places(
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    cu_query: Tensor | None,
    cu_key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place of each query among the keys, of each key, and which keys exist for a query.

    [1 or batch, queries, 1], [1, keys], [1 or batch, 1 or queries, keys].
    """
    queries, keys = query.shape[2], key.shape[2]
    row, at = (torch.arange(count, device=query.device) for count in (queries, keys))
    if cu_query is not None and cu_key is not None:
        cu_query, cu_key = cu_query.long(), cu_key.long()
        of_query, is_query = _sequence(cu_query, queries)
        of_key, is_key = _sequence(cu_key, keys)
        shift = (cu_key.diff() - cu_query.diff())[of_query] - cu_query[of_query]
        exists = (of_query[:, None] == of_key) & is_query[:, None] & is_key
        return (row + shift)[None, :, None], (at - cu_key[of_key])[None], exists[None]
    if key_lengths is None:
        everything = at.new_ones(1, 1, keys, dtype=torch.bool)
        return (row + (keys - queries))[None, :, None], at[None], everything
    lengths = key_lengths.long().clamp(0, keys)[:, None, None]
    return row[None, :, None] + (lengths - queries), at[None], at < lengths


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_query: Tensor | None = None,
    cu_key: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The arguments of the operator ``attention`` without α; [batch, heads, length, size]."""
    _check(query, key, value, key_lengths, cu_query, cu_key, scale, softcap)
    for name, window in (("window_left", window_left), ("window_right", window_right)):
        if window is not None and window < 0:
            raise ValueError(f"{name}: got {window}; must be ≥ 0")
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    dtype = query.dtype
    no_sequence = cu_query is not None and cu_query.shape[0] == 1
    if no_sequence or 0 in (batch, heads, queries, keys):  # No row, or none that sees a key.
        nothing = query.new_zeros(batch, heads, queries, value.shape[3])
        return nothing + 0 * (query.sum() + key.sum() + value.sum())
    if query_scale is not None:
        factor = query_scale.expand(batch, heads, queries).unsqueeze(-1)
        query = (query * factor).to(dtype)
    if causal:
        window_right = 0
    given = (bias, alibi_slopes, key_lengths, key_mask, cu_query)
    plain = window_left is None and all(tensor is None for tensor in given)
    if plain and not softcap and (window_right is None or (causal and queries in (1, keys))):
        return _sdpa(query, key, value, None, causal and queries > 1, scale)

    place, at, seen = _places(query, key, key_lengths, cu_query, cu_key)
    if window_right is not None:
        seen = seen & (at <= place + min(window_right, queries + keys))
    if window_left is not None:
        seen = seen & (at >= place - min(window_left, queries + keys))
    if key_mask is not None:
        seen = seen & key_mask.bool().expand(batch, keys)[:, None]
    seen = seen.unsqueeze(1)
    attend = partial(_capped, softcap) if softcap else _sdpa
    added = bias
    if alibi_slopes is not None:
        slopes = alibi_slopes.float().expand(heads)[:, None, None]
        distance = (place - at).abs().unsqueeze(1)
        added = -slopes * distance if added is None else added - slopes * distance
    if added is None:
        hidden = ~seen.any(-1, keepdim=True)
        # Rows that see no key see all here, so that no kernel divides by zero, and are cut below.
        output = attend(query, key, value, seen | hidden, False, scale)
    else:
        # In the wider of the types: PyTorch rounds the mask to the type of the query.
        wide = torch.promote_types(added.dtype, dtype)
        mask = torch.where(seen, added.to(wide), -torch.inf)
        hidden = (mask == -torch.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(hidden, 0.0)
        output = attend(query.to(wide), key.to(wide), value.to(wide), mask, False, scale).to(dtype)
    return output.masked_fill(hidden, 0.0)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = heads != kv_heads
    if grouped and (mask is not None or query.dtype not in (torch.bfloat16, torch.float16)):
        # The kernels with a mask, and those for float32, do not know groups.
        key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
        grouped = False
    if mask is not None:
        mask = mask.expand(query.shape[0], heads, query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _capped(
    softcap: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    causal: bool,
    scale: float | None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    factor = query.shape[3] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * factor
    scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(value.dtype) @ value
