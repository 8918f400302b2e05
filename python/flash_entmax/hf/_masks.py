"""The mask that a model makes once and hands to every layer.

transformers describes a mask by a function of positions. The patterns that the engine knows by
itself (everything, causal, causal with a sliding window, each with padding) are recognised from
that function, and what is handed on is small and says which pattern it is:

    None                     no padding; causal if the layer is
    bool [batch, keys]       padding of bidirectional attention; False hides
    bool [batch, keys, w]    causal within a window of w keys (w ≥ keys: no window); every [..., i]
                             is the same padding mask in the same memory
    bool [batch, 1, queries, keys]
                             everything else, written out

Nothing is guessed: a pattern that is not recognised is written out, which is correct and costs
memory. Under torch.compile that includes sliding windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

BIDIRECTIONAL = "bidirectional"
CAUSAL = "causal"


def _cells(function: Callable[..., Any]) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def recognise(function: Callable[..., Any]) -> tuple[str, int | None] | None:
    """The pattern and window of a mask function, or None."""
    if function is masking_utils.bidirectional_mask_function:
        return BIDIRECTIONAL, None
    if function is masking_utils.causal_mask_function:
        return CAUSAL, None
    if torch.compiler.is_compiling():
        return None  # The tracer does not show what functions are made of.
    # sliding_window_causal_mask_function(w) is and_masks(sliding_window_overlay(w), causal).
    if getattr(function, "__qualname__", "") == "and_masks.<locals>.and_mask":
        cells = _cells(function)
        if len(cells) == 1 and isinstance(cells[0], tuple) and len(cells[0]) == 2:
            window, causal = cells[0]
            name = getattr(window, "__qualname__", "")
            if (
                causal is masking_utils.causal_mask_function
                and name == "sliding_window_overlay.<locals>.inner_mask"
            ):
                (size,) = _cells(window)
                if isinstance(size, int):
                    return CAUSAL, size
    return None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask interface; see the top of this file for what it returns."""
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask  # Made before, by `generate`.
    pattern = recognise(mask_function)
    if pattern is not None:
        kind, window = pattern
        if kind == BIDIRECTIONAL:
            known = allow_is_bidirectional_skip
        else:
            # The engine counts positions from the last key. A cache of fixed size has keys beyond.
            known = (
                allow_is_causal_skip
                and isinstance(q_offset, int)
                and q_offset + q_length == kv_offset + kv_length
            )
        if known:
            padding = _padding(attention_mask, kv_length, kv_offset)
            if kind == BIDIRECTIONAL:
                return padding
            if window is None or window >= kv_length:
                if padding is None:
                    return None
                window = kv_length
            if padding is None:
                padding = torch.ones((), dtype=torch.bool, device=device)
                return padding.expand(batch_size, kv_length, window)
            return padding.unsqueeze(-1).expand(-1, -1, window)
    write_out: Any = masking_utils.sdpa_mask
    mask: Tensor | None = write_out(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **kwargs,
    )
    return mask


def _padding(mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """The keys that are there, or None if it can be seen without tracing that all are."""
    mask = masking_utils.prepare_padding_mask(mask, kv_length, kv_offset)
    if mask is None:
        return None
    mask = mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return None if not is_tracing(mask) and bool(mask.all()) else mask
