"""CUDA tensors: values, gradients, supports (FLASH_ENTMAX_TEST_DEVICE: see cuda_cases.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_entmax
from cuda_cases import (
    DEVICE,
    KINDS,
    LENGTHS,
    TOLERANCE,
    compare,
    cuda,
    heads_first,
    leaves,
    needs_gpu,
    strided,
)
from reference import assert_close, dense_attention, dense_weights

# ------------------------------------------------------------------------------ values, gradients


@needs_gpu
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_attention(dtype: torch.dtype, length: int, layout: str) -> None:
    shapes = [(2, heads, length, 64) for heads in (4, 2, 2)]
    if layout == "bnhd":
        shapes = [(b, n, h, d) for b, h, n, d in shapes]
    tensors = leaves(dtype, *shapes)
    actual = flash_entmax.attention(*tensors, causal=True, layout=layout)
    assert actual.dtype == dtype
    expected = dense_attention(*heads_first(tensors, layout), causal=True)
    compare(
        actual,
        expected if layout == "bhnd" else expected.transpose(1, 2),
        tensors,
        TOLERANCE[dtype],
    )


@needs_gpu
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
@pytest.mark.parametrize("sizes", [(32, 32), (64, 64), (128, 128), (40, 24), (256, 1), (7, 9)])
@pytest.mark.parametrize("lengths", [(600, 600), (37, 620), (1, 700), (620, 37)])
def test_shapes(lengths: tuple[int, int], sizes: tuple[int, int], alpha: float) -> None:
    queries, keys = lengths
    causal = bool(torch.rand(()) < 0.5)
    tensors = leaves(
        torch.float16, (1, 4, queries, sizes[0]), (1, 2, keys, sizes[0]), (1, 2, keys, sizes[1])
    )
    actual = flash_entmax.attention(*tensors, alpha=alpha, causal=causal)
    expected = dense_attention(*tensors, alpha=alpha, causal=causal)
    compare(actual, expected, tensors, 8e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_rows_that_are_not_sparse(dtype: torch.dtype) -> None:
    """Supports that do not fit where they are kept."""
    tensors = leaves(dtype, *[(1, 2, 1500, 64)] * 3)
    with torch.no_grad():
        tensors[0].mul_(0.02)
    actual = flash_entmax.attention(*tensors)
    compare(actual, dense_attention(*tensors), tensors, TOLERANCE[dtype])


@needs_gpu
def test_options() -> None:
    tensors = leaves(torch.float32, (2, 4, 50, 32), (2, 2, 60, 32), (2, 2, 60, 32))
    parameters = [
        torch.tensor([1.2, 1.4, 1.6, 2.0], device=DEVICE, requires_grad=True),
        torch.rand(4, device=DEVICE, requires_grad=True),
        (0.5 + torch.rand(4, 50, device=DEVICE)).requires_grad_(),
    ]
    lengths = torch.tensor([60, 33], device=DEVICE)
    plain: dict[str, Any] = {"causal": True, "window_left": 40, "softcap": 4.0, "scale": 0.3}
    names = ("alpha", "alibi_slopes", "query_scale")
    actual = flash_entmax.attention(
        *tensors, key_lengths=lengths, **plain, **dict(zip(names, parameters, strict=True))
    )
    expected = dense_attention(
        *tensors, key_lengths=lengths, **plain,
        **dict(zip(names, parameters, strict=True)),
    )  # fmt: skip
    compare(actual, expected, [*tensors, *parameters], 1e-4)
    # Only some of the gradients.
    output = flash_entmax.attention(*tensors, alpha=parameters[0])
    (only,) = torch.autograd.grad(output.square().sum(), tensors[0])
    assert bool(only.isfinite().all())


@needs_gpu
def test_one_number_for_all_heads() -> None:
    tensors = leaves(torch.float32, *[(2, 4, 30, 16)] * 3)
    alpha = torch.tensor(1.3, device=DEVICE, requires_grad=True)
    slope = torch.tensor(0.2, device=DEVICE, requires_grad=True)
    scale = torch.tensor(1.5, device=DEVICE, requires_grad=True)
    actual = flash_entmax.attention(*tensors, alpha=alpha, alibi_slopes=slope, query_scale=scale)
    expected = dense_attention(*tensors, alpha=alpha, alibi_slopes=slope, query_scale=scale)
    compare(actual, expected, [*tensors, alpha, slope, scale], 1e-4)
    # A part of a larger tensor.
    every_second = torch.tensor([1.2, 0.0, 1.4, 0.0, 1.6, 0.0, 1.8, 0.0], device=DEVICE)[::2]
    lengths = torch.tensor([30, 0, 7, 0], device=DEVICE, dtype=torch.int32)[::2]
    actual = flash_entmax.attention(*tensors, alpha=every_second, key_lengths=lengths)
    expected = dense_attention(*tensors, alpha=every_second, key_lengths=lengths)
    assert_close(actual, expected, 1e-4)


@needs_gpu
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_slopes_of_the_first_heads(dtype: torch.dtype, length: int, kv_heads: int) -> None:
    """Two heads of four; those without slopes get a call of their own where keys are not shared."""
    tensors = leaves(dtype, *[(2, heads, length, 64) for heads in (4, kv_heads, kv_heads)])
    slopes = torch.tensor([0.7, 0.05], device=DEVICE, requires_grad=True)
    actual = flash_entmax.attention(*tensors, alibi_slopes=slopes, causal=True)
    padded = torch.nn.functional.pad(slopes, (0, 2))
    expected = dense_attention(*tensors, alibi_slopes=padded, causal=True)
    compare(actual, expected, [*tensors, slopes], TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str, length: int, dtype: torch.dtype) -> None:
    base, tensors = strided(kind, length, dtype)
    actual = flash_entmax.attention(*tensors, causal=True)
    expected = dense_attention(*tensors, causal=True)
    compare(actual, expected, base, TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
def test_strides_of_the_gradient(length: int, dtype: torch.dtype) -> None:
    tensors = leaves(dtype, *[(2, 4, length, 64)] * 3)
    gradients = [
        torch.ones((), device=DEVICE, dtype=dtype).expand(2, 4, length, 64),  # As sum() makes it.
        torch.randn(2, 4, length, 1, device=DEVICE).to(dtype).expand(2, 4, length, 64),
        torch.randn(2, 1, length, 64, device=DEVICE).to(dtype).expand(2, 4, length, 64),
        torch.randn(2, 4, 64, length, device=DEVICE).to(dtype).transpose(2, 3),
        torch.randn(2, 4, length, 67, device=DEVICE).to(dtype)[..., 2:66],
        torch.randn(2 * 4 * length * 64 + 3, device=DEVICE).to(dtype)[3:].view(2, 4, length, 64),
        torch.randn(2, length, 4, 64, device=DEVICE).to(dtype).transpose(1, 2),
    ]
    output = flash_entmax.attention(*tensors)
    for number, gradient in enumerate(gradients):
        print("gradient", number)
        actual = torch.autograd.grad(output, tensors, gradient, retain_graph=True)
        plain = torch.empty(gradient.shape, dtype=dtype, device=DEVICE).copy_(gradient)
        expected = torch.autograd.grad(output, tensors, plain, retain_graph=True)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
    flash_entmax.attention(*tensors).sum().backward()


@needs_gpu
@pytest.mark.parametrize("shape", [(0, 2, 600, 64), (2, 0, 600, 64), (2, 2, 0, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    (tensor,) = leaves(dtype, shape)
    output = flash_entmax.attention(tensor, tensor, tensor)
    assert output.shape == shape
    output.sum().backward()
    query, key = leaves(dtype, (2, 2, 600, 64), (2, 2, 0, 64))
    output = flash_entmax.attention(query, key, key)  # No keys.
    assert torch.equal(output, torch.zeros_like(query))
    gradients = torch.autograd.grad(output.sum(), (query, key))
    assert torch.equal(gradients[0], torch.zeros_like(query))
    (query,), keys = leaves(dtype, (2, 2, 0, 64)), leaves(dtype, (2, 2, 600, 64))
    output = flash_entmax.attention(query, keys[0], keys[0])  # No queries.
    (gradient,) = torch.autograd.grad(output.sum(), keys)
    assert torch.equal(gradient, torch.zeros_like(gradient))


# --------------------------------------------------------------------- packed sequences, supports


@needs_gpu
@pytest.mark.parametrize("maxima", [True, False])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen(dtype: torch.dtype, integers: torch.dtype, maxima: bool) -> None:
    tensors = leaves(dtype, (110, 4, 32), (130, 2, 32), (130, 2, 32))
    cu_query = torch.tensor([0, 30, 30, 110], device=DEVICE, dtype=integers)
    cu_key = torch.tensor([0, 50, 52, 130], device=DEVICE, dtype=integers)
    lengths = {"max_query_length": 80, "max_key_length": 78} if maxima else {}
    actual = flash_entmax.attention_varlen(*tensors, cu_query, cu_key, causal=True, **lengths)
    parts = []
    for queries, keys in ((slice(0, 30), slice(0, 50)), (slice(30, 110), slice(52, 130))):
        cut = (tensors[0][queries], tensors[1][keys], tensors[2][keys])
        q, k, v = (t.transpose(0, 1)[None] for t in cut)
        parts.append(dense_attention(q, k, v, causal=True)[0].transpose(0, 1))
    compare(actual, torch.cat(parts), tensors, TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("length", [60, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_support_and_weights(dtype: torch.dtype, length: int, layout: str) -> None:
    query, key = leaves(dtype, (2, 4, length, 64), (2, 2, length, 64))
    given = (query, key) if layout == "bhnd" else (query.transpose(1, 2), key.transpose(1, 2))
    expected = dense_weights(query, key, causal=True).detach()
    dense = flash_entmax.attention_weights(*given, dense=True, causal=True, layout=layout)
    assert_close(dense, expected, 1e-4)
    sparse = flash_entmax.attention_weights(*given, causal=True, layout=layout)
    assert sparse.layout == torch.sparse_csr and sparse.device.type == DEVICE
    assert_close(sparse.to_dense(), expected.view(-1, length), 1e-4)
    offsets, index, probability = flash_entmax.support(*given, causal=True, layout=layout)
    assert int(offsets[-1]) == index.numel() == probability.numel()
    assert offsets.dtype == torch.int64 and index.dtype == torch.int32
    value = torch.randn(2, 2, length, 64, device=DEVICE, dtype=dtype)
    output = flash_entmax.attention(query, key, value, causal=True)
    composed = dense.double() @ value.double().repeat_interleave(2, 1)
    assert_close(output, composed, TOLERANCE[dtype])


# ------------------------------------------------------------------------------ α = 1 is softmax


SOFTMAX_OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "causal": lambda: {"causal": True},
    "window": lambda: {"causal": True, "window_left": 100},
    "lengths": lambda: {"key_lengths": torch.tensor([300, 7]), "causal": True},
    "mask": lambda: {"key_mask": torch.rand(2, 300) < 0.5},
    "slopes": lambda: {"alibi_slopes": torch.rand(4), "causal": True},
    "softcap": lambda: {"softcap": 3.0, "causal": True},
}


@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", SOFTMAX_OPTIONS)
@pytest.mark.parametrize("queries", [300, 20, 1])
def test_alpha_one(queries: int, name: str, dtype: torch.dtype) -> None:
    options = SOFTMAX_OPTIONS[name]()
    tensors = leaves(dtype, (2, 4, queries, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    there = {n: o.to(DEVICE) if isinstance(o, Tensor) else o for n, o in options.items()}
    actual = flash_entmax.attention(*tensors, alpha=1.0, **there)
    assert actual.dtype == dtype
    expected = dense_attention(*tensors, alpha=1.0, **there)
    compare(actual, expected, tensors, max(TOLERANCE[dtype], 1e-4))


@cuda
def test_alpha_one_is_pytorchs_own() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 300, 64)] * 3)
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)
        actual = flash_entmax.attention(*tensors, alpha=1.0, causal=causal)
        assert torch.equal(actual, expected)
    packed = [t[0].transpose(0, 1) for t in tensors]
    offsets = torch.tensor([0, 100, 300], device="cuda")
    actual = flash_entmax.attention_varlen(*packed, offsets, offsets, alpha=1.0, causal=True)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t[part].transpose(0, 1)[None] for t in packed), is_causal=True
        )[0].transpose(0, 1)
        for part in (slice(0, 100), slice(100, 300))
    ]
    assert_close(actual, torch.cat(parts), 2e-2)
    with pytest.raises(NotImplementedError, match=r"alpha: got 1\.0"):
        flash_entmax.support(*tensors[:2], alpha=1.0)
