"""The stand-in for adasplash: its signatures against the package's, its results against a dense
computation (the package itself needs a GPU to run)."""

from __future__ import annotations

import inspect
from typing import Any

import adasplash as original
import pytest
import torch
from torch import Tensor

from flash_entmax.compat import adasplash as ours
from reference import assert_close, dense_attention, dense_entmax


def test_public_names_and_version() -> None:
    assert sorted(ours.__all__) == sorted(original.__all__)
    assert ours.__version__ == original.__version__


@pytest.mark.parametrize("name", [name for name in original.__all__ if name != "__version__"])
def test_signatures(name: str) -> None:
    expected = inspect.signature(getattr(original, name)).parameters
    actual = inspect.signature(getattr(ours, name)).parameters
    assert [(p.name, p.default, p.kind) for p in actual.values()] == [
        (p.name, p.default, p.kind) for p in expected.values()
    ]


def inputs(kv_heads: int = 4, length: int = 24) -> list[Tensor]:
    return [
        torch.randn(3, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]


def compare(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_close(actual, expected, 1e-9)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((actual * weight).sum(), leaves)
    others = torch.autograd.grad((expected * weight).sum(), leaves)
    for one, other in zip(grads, others, strict=True):
        assert_close(one, other, 1e-8)


CALLS: list[tuple[str, dict[str, Any], float, bool]] = [
    ("adasplash", {}, 1.5, True),
    ("adasplash", {"alpha": 1.333, "niter": 3}, 1.333, True),
    ("adasplash", {"is_causal": False}, 1.5, False),
    ("adasplash_v1", {}, 1.5, False),
    ("adasplash_v1", {"alpha": 2.0, "is_causal": True}, 2.0, True),
    ("adasplash_no_block_mask", {"niter": 1}, 1.5, False),
    ("adasplash_v2", {}, 1.5, True),
    ("adasplash2", {"niter": 5}, 1.5, True),
]


@pytest.mark.parametrize(("name", "arguments", "alpha", "causal"), CALLS)
def test_attention(name: str, arguments: dict[str, Any], alpha: float, causal: bool) -> None:
    leaves = inputs(2 if name in ("adasplash_v2", "adasplash2") else 4)
    compare(
        getattr(ours, name)(*leaves, **arguments),
        dense_attention(*leaves, alpha=alpha, causal=causal),
        leaves,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("name", "arguments", "alpha", "causal"), CALLS)
def test_varlen(
    name: str, arguments: dict[str, Any], alpha: float, causal: bool, dtype: torch.dtype
) -> None:
    """Every entry alone, cut to its length; rows after it are zero."""
    leaves = inputs()
    varlen = torch.tensor([24, 0, int(torch.randint(1, 24, ()))], dtype=dtype)
    actual = getattr(ours, name)(*leaves, varlen=varlen, **arguments)
    parts = []
    for entry, length in enumerate(varlen.tolist()):
        cut = [leaf[[entry], :, :length] for leaf in leaves]
        output = cut[0] if length == 0 else dense_attention(*cut, alpha=alpha, causal=causal)
        parts.append(torch.nn.functional.pad(output, (0, 0, 0, 24 - length)))
    compare(actual, torch.cat(parts), leaves)


def test_padding_may_hold_anything() -> None:
    leaves = [leaf.detach().clone() for leaf in inputs()]
    varlen = torch.tensor([5, 6, 7], dtype=torch.int32)
    expected = ours.adasplash(*leaves, varlen=varlen)
    for leaf in leaves:
        leaf[0, :, 5:] = torch.nan
        leaf.requires_grad_()
    actual = ours.adasplash(*leaves, varlen=varlen)
    assert torch.equal(actual, expected)
    for grad in torch.autograd.grad(actual.square().sum(), leaves):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize(
    ("name", "arguments", "alpha"),
    [
        ("triton_entmax", {"n_iter": 9, "use_histogram": False, "fast_math": True}, 1.5),
        ("triton_entmax", {"alpha": 1.25}, 1.25),
        ("triton_entmax_v1", {"fast_math": False}, 1.5),
        ("triton_entmax_v2", {}, 1.5),
        ("triton_sparsemax", {"n_iter": 1}, 2.0),
        ("triton_entmax15", {}, 1.5),
    ],
)
def test_mappings(name: str, arguments: dict[str, Any], alpha: float) -> None:
    scores = torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)
    compare(getattr(ours, name)(scores, **arguments), dense_entmax(scores, alpha), [scores])


@pytest.mark.parametrize(
    ("varlen", "error", "message"),
    [
        (torch.tensor([1, 2]), ValueError, "varlen: got shape"),
        (torch.tensor([1, 2, 25]), ValueError, r"varlen: got \[1, 2, 25\]"),
        (torch.tensor([1, 2, -1]), ValueError, "varlen: got"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, "varlen: got torch.float32"),
        ([1, 2, 3], TypeError, "varlen: got list"),
    ],
)
def test_bad_varlen(varlen: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ours.adasplash(*inputs(), varlen=varlen)
