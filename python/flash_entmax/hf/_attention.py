"""The attention function that models call in every layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _attention

NAME = "flash_entmax"
# The parameter of an attention layer whose α is learnt.
LOGITS = "flash_entmax_alpha_logits"

# Arguments that some models pass and that change the result in ways that do not exist here.
_UNSUPPORTED = ("s_aux", "cache", "head_mask", "block_mask", "score_mod")


class Pattern(NamedTuple):
    """A mask in the engine's terms."""

    causal: bool
    window_left: int | None
    key_mask: Tensor | None
    """bool [batch, keys]"""
    bias: Tensor | None
    """[batch, 1 or heads, queries, keys]"""


def read_mask(
    mask: Tensor | None, is_causal: bool, query: Tensor, sliding_window: int | None
) -> Pattern:
    """What the mask of ``_masks.py`` says; four dimensions may also be a float mask to add."""
    if mask is None:
        # As with flash attention, where the model made no mask at all the layer's own window holds.
        window = sliding_window - 1 if is_causal and sliding_window is not None else None
        return Pattern(is_causal, window, None, None)
    if mask.dim() == 2:
        return Pattern(False, None, mask, None)
    if mask.dim() == 3:
        window = None if mask.shape[2] >= mask.shape[1] else mask.shape[2] - 1
        everything = mask.stride(0) == 0 and mask.stride(1) == 0
        return Pattern(True, window, None if everything else mask[:, :, 0], None)
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}; must have 2 to 4 dimensions"
        )
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, -torch.inf)
    return Pattern(False, None, None, mask)


def alpha_of(module: nn.Module, query: Tensor) -> float | Tensor:
    """The layer's α: learnt, else its entry in the configuration, else 1.5."""
    logits = getattr(module, LOGITS, None)
    if logits is not None:
        return 1.0 + torch.sigmoid(logits.float())
    alpha = getattr(getattr(module, "config", None), "flash_entmax_alpha", 1.5)
    if isinstance(alpha, (list, tuple)):
        layer = getattr(module, "layer_idx", None)
        if layer is None or not 0 <= layer < len(alpha):
            raise ValueError(
                f"flash_entmax_alpha: got {len(alpha)} values; must have one for layer {layer}"
            )
        alpha = alpha[layer]
    if isinstance(alpha, (list, tuple)):
        if len(set(alpha)) == 1:
            return float(alpha[0])
        if query.device.type == "cuda" and not all(1.0 < value <= 2.0 for value in alpha):
            raise NotImplementedError(
                f"flash_entmax_alpha: got {list(alpha)} for the heads of a layer; on CUDA each "
                "must be in (1, 2], or all of a layer the same"
            )
        return torch.tensor(alpha, dtype=torch.float32, device=query.device)
    return float(alpha)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Parameters
    ----------
    query, key, value : Tensor
        [batch, heads, queries, size], [batch, kv_heads, keys, size] (twice).
    attention_mask : Tensor, optional
        As ``_masks.attention_mask`` makes it, or [batch, 1 or heads, queries, keys]: bool, or
        floating point to add.
    dropout : float
        Must be 0: set ``attention_dropout`` (or ``attention_probs_dropout_prob``) to 0.

    Returns
    -------
    tuple
        Output [batch, queries, heads, size], and None for the weights.
    """
    if dropout != 0.0:
        raise NotImplementedError(
            f"dropout: got {dropout}; must be 0 (set the model's attention dropout to 0)"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: got a value; must be None")
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions: got True; must be False (flash_entmax.attention_weights computes "
            "the weights of a layer)"
        )
    alpha = alpha_of(module, query)
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    options: dict[str, Any] = {
        "alpha": alpha,
        "scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
    }
    if cu_seq_lens_q is not None and attention_mask is None:
        if query.shape[0] != 1 or cu_seq_lens_k is None:
            raise ValueError("cu_seq_lens_q: must come with batch 1 and with cu_seq_lens_k")
        output = _attention.attention_varlen(
            query.squeeze(0).transpose(0, 1),
            key.squeeze(0).transpose(0, 1),
            value.squeeze(0).transpose(0, 1),
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_query_length=max_length_q or 0,
            max_key_length=max_length_k or 0,
            causal=causal,
            window_left=sliding_window - 1 if causal and sliding_window is not None else None,
            **options,
        )
        return output.unsqueeze(0), None
    pattern = read_mask(attention_mask, causal, query, sliding_window)
    if position_bias is not None:
        bias = position_bias if pattern.bias is None else pattern.bias + position_bias
        pattern = pattern._replace(bias=bias)
    if query.device.type == "cuda":
        softmax = not isinstance(alpha, Tensor) and alpha == 1.0
        if pattern.bias is not None and not softmax:
            raise NotImplementedError(
                f"attention_mask: got one of shape {list(pattern.bias.shape)} that is written out; "
                "on CUDA must be causal, a sliding window or padding (torch.compile with "
                "use_cache=False makes transformers write out a mask: leave use_cache on)"
            )
        if pattern.key_mask is not None and not softmax:
            return unpadded_attention(query, key, value, pattern, **options), None
    output = _attention.attention(
        query,
        key,
        value,
        causal=pattern.causal,
        window_left=pattern.window_left,
        key_mask=pattern.key_mask,
        bias=pattern.bias,
        **options,
    )
    return output.transpose(1, 2), None


def unpadded_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, **options: Any
) -> Tensor:
    """Attention without the padding, for the GPU engine, which has no mask of keys.

    The queries are the last ones of the keys, as for flash attention. Returns
    [batch, queries, heads, size], zero where the query is padding.
    """
    assert pattern.key_mask is not None and pattern.bias is None
    batch, queries = query.shape[0], query.shape[2]
    keys_there = pattern.key_mask.expand(batch, -1)
    queries_there = keys_there
    if not pattern.causal and queries != key.shape[2]:  # Attention to another sequence.
        queries_there = keys_there.new_ones(batch, queries)
    elif queries != key.shape[2]:
        queries_there = keys_there[:, -queries:]

    def offsets(there: Tensor) -> Tensor:
        return nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).to(torch.int32)

    packed = _attention.attention_varlen(
        query.transpose(1, 2)[queries_there],
        key.transpose(1, 2)[keys_there],
        value.transpose(1, 2)[keys_there],
        offsets(queries_there),
        offsets(keys_there),
        max_query_length=queries,
        max_key_length=key.shape[2],
        causal=pattern.causal,
        window_left=pattern.window_left,
        **options,
    )
    output = packed.new_zeros(batch, queries, query.shape[1], value.shape[3])
    return output.index_put((queries_there,), packed)
