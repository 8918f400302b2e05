"""Exact α-entmax attention."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, _softmax
from ._checks import (
    FLOATS,
    autocast_dtype,
    check_device,
    check_floating,
    check_int,
    check_integer,
    check_mask,
    check_number,
    check_same,
    is_dense,
)
from ._library import operators
from ._mapping_tensors import statistics_type

LAYOUTS = ("bhnd", "bnhd")


class AttentionSupport(NamedTuple):
    """The positive probabilities in compressed rows; rows are (batch, head, query), row-major."""

    row_offsets: Tensor
    """int64 [batch·heads·query_length + 1]"""
    key_index: Tensor
    """int32 [entries], ascending in a row; counted within the sequence"""
    probability: Tensor
    """float32 [entries]"""


def _per_head(name: str, value: Tensor, query: Tensor, heads: int) -> Tensor:
    """One number a head in the engine's type."""
    value = check_floating(name, value)
    check_device(name, value, "query", query)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != heads):
        # Slopes may be those of the first heads only.
        fewer = " or fewer" if name == "alibi_slopes" else ""
        raise ValueError(f"{name}: got shape {list(value.shape)}; must be [] or [{heads}]{fewer}")
    value = value.to(statistics_type(query.dtype))
    return value.expand(heads) if value.dim() == 0 else value


def _expand(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}; must be broadcastable to {list(shape)}"
        ) from None


def _check_cuda(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the GPU engine lacks is an error; what it wants in another type is converted."""
    (
        query,
        key,
        value,
        alpha,
        query_scale,
        bias,
        slopes,
        lengths,
        mask,
        cu_q,
        cu_k,
        number,
        *rest,
    ) = arguments

    def lacks(name: str, got: str, allowed: str) -> NotImplementedError:
        return NotImplementedError(f"{name}: got {got}; on CUDA must be {allowed}")

    if query.dtype == torch.float64:
        raise lacks("query", "float64", "bfloat16, float16 or float32")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] > 256:
            raise lacks(name, f"head size {tensor.shape[-1]}", "at most 256")
    if bias is not None:
        raise lacks("bias", "a tensor", "None")
    if mask is not None:
        raise lacks("key_mask", "a tensor", "None (use key_lengths for padding at the end)")
    if alpha is None and not 1.0 < number <= 2.0:
        if not (math.isfinite(number) and number >= 1.0):
            raise ValueError(f"alpha: got {number}; must be finite and ≥ 1")
        raise lacks("alpha", str(number), "in [1, 2]")
    if query_scale is not None:
        query_scale = _expand("query_scale", query_scale, query.shape[:3]).contiguous()
    alpha, slopes = (
        tensor if tensor is None else tensor.contiguous() for tensor in (alpha, slopes)
    )
    lengths, cu_q, cu_k = (
        tensor if tensor is None else tensor.to(torch.int32).contiguous()
        for tensor in (lengths, cu_q, cu_k)
    )
    return (
        query, key, value, alpha, query_scale, bias, slopes, lengths, mask, cu_q, cu_k, number,
        *rest,
    )  # fmt: skip


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    causal: bool,
    scale: float | None,
    window_left: int | None,
    window_right: int | None,
    key_lengths: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float,
    query_scale: Tensor | None,
    cu_query: Tensor | None = None,
    cu_key: Tensor | None = None,
    max_query_length: int = 0,
    max_key_length: int = 0,
) -> tuple[Any, ...]:
    """The operators' arguments from four-dimensional [batch, heads, length, size] tensors."""
    if (
        not isinstance(query, Tensor)
        or query.dtype not in FLOATS
        or not is_dense(query)
        or not isinstance(key, Tensor)
        or not isinstance(value, Tensor)
        or key.dtype != query.dtype
        or value.dtype != query.dtype
        or not is_dense(key)
        or not is_dense(value)
        or key.device != query.device
        or value.device != query.device
    ):
        query = check_floating("query", query)
        check_same("key", key, "query", query)
        check_same("value", value, "query", query)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 4:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; must have 4 dimensions")
    device_type = query.device.type
    dtype = autocast_dtype(device_type)
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}; must be True or False")
    heads = query.shape[1]
    rows = None
    if isinstance(alpha, Tensor):
        rows = _per_head("alpha", alpha, query, heads)
        number = 1.5  # Not used.
    else:
        if isinstance(alpha, (list, tuple)):
            raise TypeError(
                f"alpha: got {type(alpha).__name__}; must be a number or a torch.Tensor with one a "
                "head"
            )
        number = alpha if type(alpha) is float else check_number("alpha", alpha)
    if scale is not None:
        scale = check_number("scale", scale)
    if window_left is not None or window_right is not None:
        for name, window in (("window_left", window_left), ("window_right", window_right)):
            if window is not None:
                check_int(name, window)
    if key_lengths is not None:
        key_lengths = check_integer("key_lengths", key_lengths, "query", query)
    if key_mask is not None:
        key_mask = check_mask("key_mask", key_mask, "query", query)
    if bias is not None:
        bias = check_floating("bias", bias)
        check_device("bias", bias, "query", query)
    if alibi_slopes is not None:
        count = heads
        if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 1:
            # Of the first heads; the others have none.
            count = min(max(alibi_slopes.shape[0], 1), heads)
        alibi_slopes = _per_head("alibi_slopes", alibi_slopes, query, count)
    if query_scale is not None:
        query_scale = check_floating("query_scale", query_scale)
        check_device("query_scale", query_scale, "query", query)
        query_scale = query_scale.to(statistics_type(query.dtype))
    arguments = (
        query, key, value, rows, query_scale, bias, alibi_slopes, key_lengths, key_mask, cu_query,
        cu_key, number, scale, causal, window_left, window_right,
        softcap if type(softcap) is float else check_number("softcap", softcap),
        max_query_length, max_key_length,
    )  # fmt: skip
    return arguments


def _with_all_slopes(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Heads beyond the slopes that were given get slopes of zero."""
    slopes, heads = arguments[6], arguments[0].shape[1]
    if slopes is None or slopes.shape[0] == heads:
        return arguments
    slopes = torch.nn.functional.pad(slopes, (0, heads - slopes.shape[0]))
    return *arguments[:6], slopes, *arguments[7:]


def _run(arguments: tuple[Any, ...]) -> Tensor:
    """Attention by the engine of the tensors' device."""
    if arguments[0].device.type != "cuda":
        return _library.attention(*_with_all_slopes(arguments))
    if arguments[3] is None and arguments[11] == 1.0:
        arguments = _with_all_slopes(arguments)
        return _softmax.attention(*arguments[:3], *arguments[4:11], *arguments[12:17])
    arguments = _check_cuda(arguments)
    heads, kv_heads, slopes = arguments[0].shape[1], arguments[1].shape[1], arguments[6]
    if slopes is not None and slopes.shape[0] < heads and kv_heads > 0:
        if slopes.shape[0] * kv_heads % heads == 0:  # No key head serves both kinds.
            return _run_in_parts(arguments)
    return _library.attention(*_with_all_slopes(arguments))


def _run_in_parts(arguments: tuple[Any, ...]) -> Tensor:
    """The heads with slopes and those without in a call each: on GPUs their kernels differ."""
    query, key, value, alpha, query_scale, bias, slopes, *rest = arguments
    heads, kv_heads, sloped = query.shape[1], key.shape[1], slopes.shape[0]

    def parts(tensor: Tensor | None, dim: int, count: int) -> tuple[Tensor | None, Tensor | None]:
        if tensor is None:
            return None, None
        first = sloped * count // heads
        left, right = torch.split(tensor, [first, count - first], dim)
        return left, right

    split = [
        parts(query, 1, heads), parts(key, 1, kv_heads), parts(value, 1, kv_heads),
        parts(alpha, 0, heads), parts(query_scale, 1, heads), (bias, bias), (slopes, None),
    ]  # fmt: skip
    outputs = [_library.attention(*(pair[i] for pair in split), *rest) for i in (0, 1)]
    if query.stride(1) < query.stride(2):  # As the operator lays its output out.
        return torch.cat([part.transpose(1, 2) for part in outputs], 2).transpose(1, 2)
    return torch.cat(outputs, 1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    query_scale: Tensor | None = None,
    layout: str = "bhnd",
) -> Tensor:
    r"""Exact α-entmax attention: most weights are exactly zero.

    For query row i and the keys j that it may see,

        sᵢⱼ = cap(cᵢ · scale · qᵢ·kⱼ) − m·|i' − j| + bᵢⱼ
        pᵢ = α-entmax(sᵢ),  oᵢ = Σⱼ pᵢⱼ·vⱼ

    with c = ``query_scale``, m the head's ALiBi slope, b = ``bias``,
    cap(x) = softcap·tanh(x/softcap), and i' = i + key_length − query_length the position of the
    query among the keys. The result is that of the dense computation: keys are left out only where
    they are proved to have weight zero.

    Parameters
    ----------
    query, key, value : Tensor
        [batch, heads, query_length, head_size], [batch, kv_heads, key_length, head_size] and
        [batch, kv_heads, key_length, value_size], any strides, of one type: float32, bfloat16,
        float16 or float64 (CPU). heads is a multiple of kv_heads (grouped-query attention).
    alpha : float or Tensor
        > 0 on CPUs, in [1, 2] on GPUs. 1 is softmax (on GPUs computed by PyTorch's
        ``scaled_dot_product_attention``, with ``softcap`` as a dense computation), 2 is sparsemax.
        A tensor of shape [heads] or [] gives one a head, and gets a gradient; on GPUs its numbers
        must be in (1, 2], and are not checked.
    causal : bool
        Query i sees key j only if j ≤ i', that is, aligned at the end of the keys. (PyTorch's
        ``is_causal`` aligns at the beginning; the two agree where the lengths are equal.)
    scale : float, optional
        Factor of the dot products; 1/√head_size if not given.
    window_left, window_right : int, optional
        ≥ 0: query i sees key j only if i' − window_left ≤ j ≤ i' + window_right.
    key_lengths : Tensor, optional
        int32 or int64 [batch]: the keys that each entry has. Positions follow from it.
    key_mask : Tensor, optional
        bool or uint8, broadcastable to [batch, key_length]; False hides the key. On GPUs only with
        α = 1.
    bias : Tensor, optional
        Floating point, broadcastable to [batch, heads, query_length, key_length]; −∞ hides.
        It gets a gradient. On GPUs only with α = 1.
    alibi_slopes : Tensor, optional
        [heads] or [], ≥ 0; or [n], n < heads, for the first n heads, while the others have no
        slope. On GPUs that is faster than slopes of zero. It gets a gradient.
    softcap : float
        0 means none.
    query_scale : Tensor, optional
        Floating point, broadcastable to [batch, heads, query_length]. It gets a gradient.
    layout : str
        ``"bhnd"``, or ``"bnhd"`` for query, key, value and output as [batch, length, heads, size].

    Returns
    -------
    Tensor
        [batch, heads, query_length, value_size] (or as ``layout`` says), of the type of ``query``.
        Rows that see no key are zero.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        With the argument, its value and what is allowed. A second derivative raises
        NotImplementedError.

    Notes
    -----
    Gradients run over the support only: with u = p^(2 − α),
    ∂L/∂s = u·(∂L/∂p − δ) and δ = Σ u·∂L/∂p / Σ u (Peters, Niculae & Martins 2019); the
    one in α follows Correia, Niculae & Martins (2019). They are deterministic, with any number of
    threads. Under autocast, query, key and value are cast to its type.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}; must be 'bhnd' or 'bnhd'")
    transposed = layout == "bnhd"
    if transposed:
        query, key, value = (
            transpose_heads(name, tensor)
            for name, tensor in (("query", query), ("key", key), ("value", value))
        )
    output = _run(
        _arguments(
            query,
            key,
            value,
            alpha,
            causal,
            scale,
            window_left,
            window_right,
            key_lengths,
            key_mask,
            bias,
            alibi_slopes,
            softcap,
            query_scale,
        )
    )
    return output.transpose(1, 2) if transposed else output


def transpose_heads(name: str, tensor: Tensor) -> Tensor:
    """[batch, length, heads, size] as [batch, heads, length, size]."""
    tensor = check_floating(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; must have 4 dimensions")
    return tensor.transpose(1, 2)


def _pack(name: str, tensor: Tensor) -> Tensor:
    tensor = check_floating(name, tensor)
    if tensor.dim() != 3:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}; must be [tokens, heads, size]")
    return tensor.transpose(0, 1).unsqueeze(0)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    *,
    max_query_length: int = 0,
    max_key_length: int = 0,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    query_scale: Tensor | None = None,
) -> Tensor:
    """``attention`` over sequences of different lengths, packed one after the other.

    Parameters that are not described here are those of ``attention``; positions count within
    each sequence.

    Parameters
    ----------
    query, key, value : Tensor
        [query_tokens, heads, head_size], [key_tokens, kv_heads, head_size] and
        [key_tokens, kv_heads, value_size].
    cu_query, cu_key : Tensor
        int32 or int64 [sequences + 1], ascending from 0 to the number of tokens: sequence b is the
        queries cu_query[b] … cu_query[b+1]−1 and the keys cu_key[b] … cu_key[b+1]−1.
    max_query_length, max_key_length : int
        No sequence is longer; 0 if unknown. Only speed on GPUs depends on them.
    query_scale : Tensor, optional
        Broadcastable to [heads, query_tokens].

    Returns
    -------
    Tensor
        [query_tokens, heads, value_size]
    """
    query, key, value = _pack("query", query), _pack("key", key), _pack("value", value)
    cu_query = check_integer("cu_query", cu_query, "query", query)
    cu_key = check_integer("cu_key", cu_key, "query", query)
    for name, length in (
        ("max_query_length", max_query_length),
        ("max_key_length", max_key_length),
    ):
        if check_int(name, length) < 0:
            raise ValueError(f"{name}: got {length}; must be ≥ 0 (0 if unknown)")
    if query_scale is not None:
        query_scale = check_floating("query_scale", query_scale).unsqueeze(0)
    output = _run(
        _arguments(
            query,
            key,
            value,
            alpha,
            causal,
            scale,
            window_left,
            window_right,
            None,
            None,
            None,
            alibi_slopes,
            softcap,
            query_scale,
            cu_query,
            cu_key,
            max_query_length,
            max_key_length,
        )
    )
    return output.squeeze(0).transpose(0, 1)


def support(
    query: Tensor,
    key: Tensor,
    *,
    alpha: float | Tensor = 1.5,
    causal: bool = False,
    scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    query_scale: Tensor | None = None,
    layout: str = "bhnd",
) -> AttentionSupport:
    """Which keys every query of ``attention`` keeps, and with what weight.

    The arguments are those of ``attention``, without the values. Nothing of size
    query_length × key_length is made. No gradients.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}; must be 'bhnd' or 'bnhd'")
    if layout == "bnhd":
        query, key = transpose_heads("query", query), transpose_heads("key", key)
    key = check_floating("key", key)
    value = key.new_zeros(1).expand(*key.shape[:-1], 1)
    arguments = _arguments(
        query, key, value, alpha, causal, scale, window_left, window_right, key_lengths,
        key_mask, bias, alibi_slopes, softcap, query_scale,
    )  # fmt: skip
    arguments = _with_all_slopes(arguments)
    if query.device.type == "cuda":
        if arguments[3] is None and arguments[11] == 1.0:
            raise NotImplementedError(
                "alpha: got 1.0; on CUDA must be in (1, 2] for the support (that of softmax is "
                "every key)"
            )
        arguments = _check_cuda(arguments)
    if query.device.type == "meta":
        raise NotImplementedError(
            "query: got a tensor on meta; the size of the support depends on the numbers"
        )
    with torch.no_grad():
        return AttentionSupport(*_library.call(operators.attention_support, *arguments))


def attention_weights(query: Tensor, key: Tensor, *, dense: bool = False, **options: Any) -> Tensor:
    """The weights of ``attention``, for those who want to look at them.

    Parameters
    ----------
    query, key, **options
        As for ``support``.
    dense : bool
        Whether to make a dense tensor.

    Returns
    -------
    Tensor
        float32: a sparse CSR tensor [batch·heads·query_length, key_length], or a dense
        [batch, heads, query_length, key_length].
    """
    result = support(query, key, **options)
    length_at, heads_at = (1, 2) if options.get("layout") == "bnhd" else (2, 1)
    batch, heads, length = query.shape[0], query.shape[heads_at], query.shape[length_at]
    keys = key.shape[length_at]
    rows = batch * heads * length
    if not dense:
        with warnings.catch_warnings():  # That PyTorch calls such tensors a beta.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                result.row_offsets,
                result.key_index.long(),
                result.probability,
                (rows, keys),
                check_invariants=False,
            )
    weights = result.probability.new_zeros(rows * keys)
    row = torch.repeat_interleave(result.row_offsets.diff())
    weights[row * keys + result.key_index] = result.probability
    return weights.view(batch, heads, length, keys)
