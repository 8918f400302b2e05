"""Attention as one dense computation in float64, differentiable; its mapping is deep-spin's where
that package is installed, and else a bisection of its own."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from entmax import entmax_bisect
except ImportError:

    def entmax_bisect(scores: Tensor, alpha: float | Tensor, n_iter: int = 60) -> Tensor:
        """α > 1, along the last dimension."""
        order = alpha - 1.0
        # The gradient in α multiplies by the scores, and zero times −∞ is not a number.
        scores = scores.clamp(min=-1e300)

        def power(threshold: Tensor) -> Tensor:
            above = order * scores - threshold
            return torch.where(above > 0, above.clamp(min=1e-300) ** (1.0 / order), 0.0)

        with torch.no_grad():
            high = (order * scores).amax(-1, keepdim=True)
            low = high - 1.0
            for _ in range(n_iter):
                middle = (low + high) / 2
                more = power(middle).sum(-1, keepdim=True) >= 1.0
                low, high = torch.where(more, middle, low), torch.where(more, high, middle)
            probability = power(low)
            slope = torch.where(probability > 0, probability ** (1.0 - order) / order, 0.0)
            slope = slope.sum(-1, keepdim=True)
        # A step of Newton's method; its derivative is that of the solution.
        return power(low + (power(low).sum(-1, keepdim=True) - 1.0) / slope)


def dense_entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """α-entmax along the last dimension; rows without any finite score are zero."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = torch.where(empty, 0.0, scores)
    if isinstance(alpha, Tensor) or alpha != 1.0:
        weights = entmax_bisect(scores, alpha, n_iter=60)
    else:
        weights = scores.softmax(-1)
    return torch.where(empty, 0.0, weights)


def dense_weights(
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
) -> Tensor:
    query, key = query.double(), key.double()
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    if query_scale is not None:
        scores = scores * query_scale.double().expand(batch, heads, queries)[..., None]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at_device = query.device
    if key_lengths is None:
        lengths = torch.full((batch,), keys, device=at_device)
    else:
        lengths = key_lengths.long()
    # Position of each query among the keys of its entry. [batch, queries, keys]
    position = (
        torch.arange(queries, device=at_device)[None, :, None] + (lengths - queries)[:, None, None]
    )
    at = torch.arange(keys, device=at_device)[None, None, :]
    seen = (at < lengths[:, None, None]).expand(batch, queries, keys)
    if causal:
        seen = seen & (at <= position)
    if window_left is not None:
        seen = seen & (at >= position - window_left)
    if window_right is not None:
        seen = seen & (at <= position + window_right)
    if key_mask is not None:
        seen = seen & key_mask.bool().expand(batch, keys)[:, None, :]
    if alibi_slopes is not None:
        distance = (position - at).abs()[:, None]
        scores = scores - alibi_slopes.double().expand(heads)[:, None, None] * distance
    if bias is not None:
        scores = scores + bias.double()
    scores = torch.where(seen[:, None], scores, -torch.inf)
    if isinstance(alpha, Tensor):
        alpha = alpha.double().expand(heads)[:, None, None]
    return dense_entmax(scores, alpha)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    weights = dense_weights(query, key, **options)  # type: ignore[arg-type]
    return weights @ value.double().repeat_interleave(query.shape[1] // value.shape[1], 1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within tolerance·max(1, largest expected), with not-a-number a failure."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return
    bound = tolerance * max(1.0, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"
