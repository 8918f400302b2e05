"""The stand-in for PyTorch's attention: against it where α = 1, else a dense computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_entmax.compat.sdpa import scaled_dot_product_attention as ours
from reference import assert_close, dense_attention


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (9, 5), (1, 6)])
@pytest.mark.parametrize("lead", [(2, 4), (4,), (), (2, 3, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(causal: bool, lead: tuple[int, ...], lengths: tuple[int, int]) -> None:
    queries, keys = lengths
    query = torch.randn(*lead, queries, 8)
    key, value = torch.randn(*lead, keys, 8), torch.randn(*lead, keys, 6)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    assert_close(ours(query, key, value, is_causal=causal, alpha=1.0), expected, 1e-5)


@pytest.mark.parametrize(
    "shape", [(6, 7), (1, 7), (2, 1, 1, 7), (1, 1, 1, 7), (2, 4, 6, 7), (4, 1, 7), (2, 1, 6, 7)]
)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind: str, shape: tuple[int, ...]) -> None:
    query = torch.randn(2, 4, 6, 8)
    key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.randn(shape)
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 3] = True  # PyTorch gives not-a-number where a row sees nothing.
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close(ours(query, key, value, attn_mask=mask, alpha=1.0), expected, 1e-5)


def test_mask_of_more_dimensions() -> None:
    query = torch.randn(3, 2, 4, 6, 8)
    mask = torch.randn(2, 1, 6, 6)
    expected = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert_close(ours(query, query, query, mask, alpha=1.0), expected, 1e-5)


def test_grouped_heads_scale_and_alpha() -> None:
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    expected = dense_attention(query, key, key, alpha=1.5, scale=0.3)
    assert_close(ours(query, key, key, scale=0.3, enable_gqa=True), expected, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: got 0.1"),
        ({"key": torch.randn(2, 2, 6, 8)}, ValueError, "key: got 2 heads"),
        ({"key": torch.randn(6, 8)}, ValueError, "key: got shape"),
        ({"attn_mask": torch.ones(6, 6), "is_causal": True}, ValueError, "attn_mask: got a tensor"),
        ({"attn_mask": torch.ones(6, 6).long()}, TypeError, "attn_mask: got torch.int64"),
        ({"attn_mask": torch.ones(6, 5)}, ValueError, "attn_mask: got shape"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    tensors = {name: torch.randn(2, 4, 6, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=message):
        ours(**(tensors | arguments))
