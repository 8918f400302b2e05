"""CUDA tensors: what can be said of them anywhere, and results where there is a GPU.

FLASH_ENTMAX_TEST_DEVICE=cpu runs the tests that need no GPU for their subject on the CPU engine, to
test the tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import flash_entmax
from flash_entmax import _library
from reference import assert_close, dense_attention, dense_weights

NAMES = ("query", "key", "value")
DEVICE = os.environ.get("FLASH_ENTMAX_TEST_DEVICE", "cuda")

cuda = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not torch._C._dispatch_has_kernel_for_dispatch_key("flash_entmax::attention", "CUDA"),
    reason="needs a GPU, and the package built with FLASH_ENTMAX_CUDA",
)
needs_gpu = cuda if DEVICE == "cuda" else pytest.mark.skipif(False, reason="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.5}, "alpha: got 2.5"),
        ({"bias": torch.randn(7, 7)}, "bias: got a tensor"),
        ({"key_mask": torch.ones(2, 7).bool()}, "key_mask: got a tensor"),
        ({name: torch.randn(2, 3, 7, 300) for name in ("query", "key")}, "query: got head size"),
        ({"value": torch.randn(2, 3, 7, 300)}, "value: got head size 300"),
        ({name: torch.randn(2, 3, 7, 8).double() for name in NAMES}, "query: got float64"),
    ],
)
def test_what_the_gpu_engine_lacks_is_an_error(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that CUDA tensors pass through, on the arguments of CPU tensors."""
    seen = []
    monkeypatch.setattr(
        flash_entmax._library, "attention", lambda *arguments: seen.append(arguments)
    )
    flash_entmax.attention(**({name: torch.randn(2, 3, 7, 8) for name in NAMES} | changes))
    with pytest.raises(NotImplementedError, match=message):
        flash_entmax._attention._check_cuda(seen[0])


def test_what_is_converted_for_the_gpu_engine() -> None:
    query = torch.randn(2, 3, 7, 8)
    lengths = torch.tensor([3, 7])
    rest = (1.5, None, True, None, None, 0.0, 0, 0)
    arguments = (query, query, query, None, torch.rand(7), None, None, lengths, None, None, None)
    result = flash_entmax._attention._check_cuda((*arguments, *rest))
    assert result[4].shape == (2, 3, 7) and result[4].is_contiguous()
    assert result[7].dtype == torch.int32
    assert result[:4] == arguments[:4] and result[11:] == rest


def test_other_devices_are_an_error() -> None:
    tensor: Any = SimpleNamespace(device=torch.device("xpu"))
    with pytest.raises(NotImplementedError, match="got a tensor on xpu; must be on the CPU or a"):
        flash_entmax._checks.check_mapping_device("scores", tensor)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs PyTorch with CUDA")
def test_shapes_without_a_gpu() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()):
        query = torch.empty(2, 3, 7, 8, device="cuda")
        scale = torch.empty(7, device="cuda")
        lengths = torch.empty(2, device="cuda", dtype=torch.int64)
        output = flash_entmax.attention(query, query, query, query_scale=scale, key_lengths=lengths)
        assert output.shape == query.shape and output.device.type == "cuda"
        rest = (None,) * 4, (1.5, None, True, None, None, 0.0, 0, 0)
        arguments = (query, query, query, None, scale, None, None, *rest[0], *rest[1])
        _, _, saved = flash_entmax._library.operators.attention_forward(*arguments, True)
        results = flash_entmax._library.operators.attention_backward(
            *arguments, output, saved, 0b1000001
        )
        assert results[0].shape == query.shape and results[6].shape == scale.shape
        assert results[1].shape == (0,)
        probabilities = flash_entmax.entmax(query, torch.full((7, 1), 1.5, device="cuda"))
        assert probabilities.shape == query.shape and probabilities.device.type == "cuda"
        target = torch.empty(7, device="cuda", dtype=torch.int64)
        assert flash_entmax.entmax15_loss(query[0, 0], target).device.type == "cuda"


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def compare(actual: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    """Values and gradients; `expected` is computed in float64 from the same leaves."""
    assert actual.device.type == DEVICE
    assert_close(actual, expected, tolerance)
    weight = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * weight).sum(), tensors)
    others = torch.autograd.grad((expected * weight.double()).sum(), tensors)
    for one, other in zip(grads, others, strict=True):
        assert one.dtype == other.dtype and one.device.type == DEVICE
        assert_close(one, other, 4 * tolerance)


TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
HALF = [torch.bfloat16, torch.float16]
# Rows of 70 and 700 keys are computed by different kernels.
LENGTHS = [70, 700]


def heads_first(tensors: list[Tensor], layout: str) -> list[Tensor]:
    return [t if layout == "bhnd" else t.transpose(1, 2) for t in tensors]


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


def strided(kind: str, length: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and a query, key and value of them, [2, 4, length, 64], with unusual strides."""
    if kind == "columns apart":
        base = leaves(dtype, *[(2, 4, length, 128)] * 3)
        return base, [t[..., ::2] for t in base]
    if kind == "columns first":
        base = leaves(dtype, *[(2, 4, 64, length)] * 3)
        return base, [t.transpose(2, 3) for t in base]
    if kind == "odd address":
        base = leaves(dtype, *[(2 * 4 * length * 64 + 1,)] * 3)
        return base, [t[1:].view(2, 4, length, 64) for t in base]
    if kind == "odd rows":
        base = leaves(dtype, *[(2, 4, length, 67)] * 3)
        return base, [t[..., 1:65] for t in base]
    if kind == "one tensor":
        base = leaves(dtype, (2, length, 3, 4, 64))
        return base, [t.transpose(1, 2) for t in base[0].unbind(2)]
    if kind == "expanded":
        base = leaves(dtype, (2, 4, length, 64), (2, 1, length, 64), (1, 4, length, 64))
        return base, [t.expand(2, 4, length, 64) for t in base]
    if kind == "backwards":
        base = leaves(dtype, *[(length, 4, 2, 64)] * 3)
        return base, [t.transpose(0, 2) for t in base]
    raise ValueError(kind)


KINDS = [
    "columns apart", "columns first", "odd address", "odd rows", "one tensor", "expanded",
    "backwards",
]  # fmt: skip


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


# -------------------------------------------------------------------------------------- bad input


@cuda
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": "cpu"}, ValueError, "key: got a tensor on cpu"),
        ({"alpha": torch.full((4,), 1.5)}, ValueError, "alpha: got a tensor on cpu"),
        ({"alibi_slopes": torch.ones(4)}, ValueError, "alibi_slopes: got a tensor on cpu"),
        ({"query_scale": torch.ones(4, 20)}, ValueError, "query_scale: got a tensor on cpu"),
        ({"key_lengths": torch.tensor([1, 2])}, ValueError, "key_lengths: got a tensor on cpu"),
        ({"alpha": 2.5}, NotImplementedError, "alpha: got 2.5"),
        ({"alpha": 0.5}, ValueError, "alpha: got 0.5"),
        ({"alpha": float("nan")}, ValueError, "alpha: got nan"),
        ({"alpha": 1.0 + 1e-12}, NotImplementedError, "alpha: got 1"),
        ({"bias": torch.ones(20, 20)}, ValueError, "bias: got a tensor on cpu"),
        ({"scale": float("inf")}, ValueError, "scale: got inf"),
        ({"window_left": -1}, ValueError, "window_left: got -1"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.randn(2, 4, 20, 16, device="cuda") for name in NAMES}
    arguments |= {n: arguments[n].cpu() if v == "cpu" else v for n, v in changes.items()}
    with pytest.raises(error, match=message):
        flash_entmax.attention(**arguments)


@cuda
def test_operators_refuse_mixed_devices() -> None:
    query = torch.randn(2, 4, 20, 16, device="cuda")
    rest = (None,) * 8, (1.5, None, True, None, None, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="key: got a tensor on another device"):
        _library.operators.attention_forward(query, query.cpu(), query, *rest[0], *rest[1], True)
    output, _, saved = _library.operators.attention_forward(
        query, query, query, *rest[0], *rest[1], True
    )
    with pytest.raises(RuntimeError, match="grad_output: got a tensor on another device"):
        _library.operators.attention_backward(
            query, query, query, *rest[0], *rest[1], output.cpu(), saved, 7
        )


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 700, 64)] * 3)
    elsewhere = [t.detach().to("cuda:1").requires_grad_() for t in tensors]
    output = flash_entmax.attention(*elsewhere, causal=True)
    output.sum().backward()
    expected = flash_entmax.attention(*tensors, causal=True)
    expected.sum().backward()
    assert torch.equal(output.cpu(), expected.cpu()) and torch.cuda.current_device() == 0
    for one, other in zip(elsewhere, tensors, strict=True):
        assert one.grad is not None and torch.equal(one.grad.cpu(), other.grad.cpu())
    with pytest.raises(ValueError, match="key: got a tensor on cuda:1"):
        flash_entmax.attention(tensors[0], elsewhere[1], tensors[2])


# ------------------------------------------------------------------------------ PyTorch's machinery


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype: torch.dtype) -> None:
    tensors = leaves(torch.float32, *[(2, 4, 600, 64)] * 3)
    with torch.autocast(DEVICE, dtype=dtype):
        output = flash_entmax.attention(*tensors, causal=True)
        softmax = flash_entmax.attention(*tensors, causal=True, alpha=1.0)
    assert output.dtype == softmax.dtype == dtype
    half = [t.detach().to(dtype) for t in tensors]
    assert torch.equal(output, flash_entmax.attention(*half, causal=True))
    output.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)


@needs_gpu
def test_again_and_twice() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 600, 64)] * 3)
    output = flash_entmax.attention(*tensors)
    first = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), tensors)
    output = flash_entmax.attention(*tensors)
    gradient = torch.autograd.grad(output.sum(), tensors, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"twice|does not require grad"):
        gradient[0].sum().backward()
    with torch.inference_mode():
        assert torch.equal(flash_entmax.attention(*tensors), output)
    with torch.autograd.graph.save_on_cpu():
        output = flash_entmax.attention(*tensors)
    again = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compile(dtype: torch.dtype, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(*tensors: Tensor) -> Tensor:
        doubled = [2 * t for t in tensors]
        return flash_entmax.attention(*doubled, causal=True) + tensors[0]

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (256, 640, 300) if dynamic else (640,):
        tensors = leaves(dtype, *[(2, 4, length, 64)] * 3)
        actual, expected = compiled(*tensors), function(*tensors)
        assert_close(actual, expected, TOLERANCE[dtype])
        weight = torch.randn_like(actual)
        grads = torch.autograd.grad(actual, tensors, weight)
        others = torch.autograd.grad(expected, tensors, weight)
        for one, other in zip(grads, others, strict=True):
            assert_close(one, other, TOLERANCE[dtype])
        with torch.no_grad():
            assert_close(compiled(*tensors), expected, TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compile_with_strides(kind: str) -> None:
    torch._dynamo.reset()
    base, tensors = strided(kind, 600, torch.bfloat16)

    def function(*given: Tensor) -> Tensor:
        return flash_entmax.attention(*given, causal=True)

    actual = torch.compile(function, fullgraph=True)(*tensors)
    expected = function(*tensors)
    assert_close(actual, expected, 1e-6)
    grads = torch.autograd.grad(actual.sum(), base, retain_graph=True)
    others = torch.autograd.grad(expected.sum(), base, retain_graph=True)
    for one, other in zip(grads, others, strict=True):
        assert_close(one, other, 2e-2)


@cuda
def test_the_tracer_knows_the_size_of_what_is_kept() -> None:
    operator = _library.operators.attention_forward
    features: list[dict[int, Any]] = [
        {}, {14: 100}, {14: 2**40, 15: 2**40}, {16: 2.0}, {3: torch.full((4,), 1.5, device="cuda")},
        {12: -1.0}, {11: 2.0},
    ]  # fmt: skip
    for length in (100, 700):
        for dtype in TOLERANCE:
            for feature in features:
                query = torch.randn(2, 4, length, 64, device="cuda").to(dtype)
                arguments: list[Any] = [query, query, query, *[None] * 8]
                arguments += [1.5, None, True, None, None, 0.0, 0, 0, True]
                for position, change in feature.items():
                    arguments[position] = change
                real = operator(*arguments)[2]
                with FakeTensorMode(shape_env=ShapeEnv()) as mode:
                    fake = operator(
                        *(
                            mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a
                            for a in arguments
                        )
                    )[2]
                assert fake.shape == real.shape, (length, dtype, feature)


@cuda
def test_compiled_into_cuda_graphs() -> None:
    torch._dynamo.reset()
    module = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)

    def step(query: Tensor) -> Tensor:
        return flash_entmax.attention(module(query), query, query, causal=True).square().mean()

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        query = torch.randn(2, 4, 640, 64, device="cuda").bfloat16()
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(query), step(query)
        assert_close(actual, expected, 2e-2)
        (one,) = torch.autograd.grad(actual, module.weight)
        (other,) = torch.autograd.grad(expected, module.weight)
        assert_close(one, other, 2e-2)


@needs_gpu
def test_export() -> None:
    module = flash_entmax.nn.EntmaxAttention(64, 4, causal=True, positions="rope").to(DEVICE)
    hidden = torch.randn(2, 30, 64, device=DEVICE)
    program = torch.export.export(module, (hidden,))
    assert_close(program.module()(hidden), module(hidden), 1e-5)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
def test_cuda_graph(length: int, dtype: torch.dtype) -> None:
    tensors = leaves(dtype, *[(1, 4, length, 64)] * 3)
    weight = torch.randn(1, 4, length, 64, device="cuda").to(dtype)

    def step() -> tuple[Tensor, ...]:
        output = flash_entmax.attention(*tensors, causal=True)
        return output, *torch.autograd.grad(output, tensors, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # As PyTorch's documentation asks for.
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*tensors, weight):
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        results = [t.clone() for t in captured]
        for one, other in zip(results, step(), strict=True):
            assert torch.equal(one, other)


@cuda
def test_streams() -> None:
    """Many calls on several streams, whose memory is given back while others run."""
    lengths = [700, 300, 1500, 90]
    inputs = [leaves(torch.bfloat16, *[(2, 4, length, 64)] * 3) for length in lengths]

    def step(tensors: list[Tensor]) -> list[Tensor]:
        output = flash_entmax.attention(*tensors, causal=True)
        return [output.detach(), *torch.autograd.grad(output.sum(), tensors)]

    expected = [step(tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        actual: list[list[Tensor]] = [[] for _ in inputs]
        for i, (stream, tensors) in enumerate(zip(streams, inputs, strict=True)):
            with torch.cuda.stream(stream):
                actual[i] = step(tensors)
        torch.cuda.synchronize()
        for ours, others in zip(actual, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@cuda
def test_nothing_synchronises() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 700, 64)] * 3)
    alpha = torch.full((4,), 1.5, device="cuda", requires_grad=True)
    flash_entmax.attention(*tensors).sum().backward()  # What PyTorch does once.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_entmax.attention(*tensors, causal=True).sum().backward()
        flash_entmax.attention(*tensors, alpha=alpha).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("length", LENGTHS)
def test_determinism(length: int) -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, length, 64)] * 3)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(5):
            output = flash_entmax.attention(*tensors, causal=True)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@needs_gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 640, 64)] * 3)
    plain = torch.autograd.grad(flash_entmax.attention(*tensors).square().sum(), tensors)
    output = torch.utils.checkpoint.checkpoint(
        flash_entmax.attention, *tensors, use_reentrant=reentrant
    )
    output.square().sum().backward()
    for tensor, expected in zip(tensors, plain, strict=True):
        assert tensor.grad is not None and torch.equal(tensor.grad, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batched", ["query", "parameters", "lengths"])
def test_vmap(batched: str, dtype: torch.dtype) -> None:
    query, key = (t.detach() for t in leaves(dtype, (3, 2, 4, 530, 32), (3, 2, 2, 530, 32)))
    alpha = 1.1 + 0.8 * torch.rand(3, 4, device=DEVICE)
    scale = 0.5 + torch.rand(3, 530, device=DEVICE)
    lengths = torch.tensor([[530, 3], [20, 100], [530, 530]], device=DEVICE)
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    dims: tuple[int | None, ...]
    attend = flash_entmax.attention
    function, inputs, dims = {
        "query": (lambda q, k: attend(q, k, k, causal=True), (query, key), (0, 0)),
        "parameters": (
            lambda q, k, a, s: attend(q, k, k, alpha=a, query_scale=s),
            (query[0], key[0], alpha, scale),
            (None, None, 0, 0),
        ),
        "lengths": (
            lambda q, k, n: attend(q, k, k, key_lengths=n, causal=True),
            (query, key, lengths),
            (0, 0, 0),
        ),
    }[batched]
    entries = [
        tuple(t if d is None else t[i] for t, d in zip(inputs, dims, strict=True)) for i in range(3)
    ]
    expected = torch.stack([function(*entry) for entry in entries])
    assert_close(vmap(function, in_dims=dims)(*inputs), expected, TOLERANCE[dtype])
    floating = tuple(i for i, t in enumerate(inputs) if t.is_floating_point())

    def loss(*arguments: Tensor) -> Tensor:
        return function(*arguments).float().square().sum()

    gradients = vmap(grad(loss, argnums=floating), in_dims=dims)(*inputs)
    for position in floating:
        print("argument", position)
        stacked = torch.stack([grad(loss, argnums=position)(*entry) for entry in entries])
        assert_close(gradients[position], stacked, 4 * TOLERANCE[dtype])


def operator_arguments(length: int, dtype: torch.dtype, everything: bool) -> tuple[Any, ...]:
    tensors = leaves(dtype, *[(2, 4, length, 64)] * 3)
    extra: list[Any] = [None] * 8
    if everything:
        extra[0] = torch.tensor([1.2, 1.4, 1.6, 1.8], device=DEVICE, requires_grad=True)
        extra[1] = (0.5 + torch.rand(2, 4, length, device=DEVICE)).requires_grad_()
        extra[3] = torch.rand(4, device=DEVICE, requires_grad=True)
        # A row without keys has a threshold that is not a number, which is not equal to itself.
        extra[4] = torch.tensor([length, length], device=DEVICE, dtype=torch.int32)
    return (*tensors, *extra, 1.5, None, True, None, None, 0.0, 0, 0)


@needs_gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("length", "dtype"), [(9, torch.float32), (520, torch.bfloat16)])
def test_opcheck(length: int, dtype: torch.dtype, everything: bool) -> None:
    arguments = operator_arguments(length, dtype, everything)
    bare = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    operators = _library.operators
    # Long rows keep their supports in the order in which they are found: the same numbers, in other
    # places from run to run. test_compile compares what follows from them.
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if everything or length < 512:
        utilities.append("test_aot_dispatch_dynamic")
    torch.use_deterministic_algorithms(True)  # Bytes that nothing writes have a value then.
    try:
        torch.library.opcheck(
            operators.attention.default, (*arguments, True), test_utils=tuple(utilities)
        )
        torch.library.opcheck(operators.attention_forward.default, (*bare, False))
        torch.library.opcheck(operators.attention_support.default, bare)
        output, _, saved = operators.attention_forward(*bare, True)
        wanted = 0b1101111 if everything else 0b111
        torch.library.opcheck(
            operators.attention_backward.default,
            (*bare, torch.randn_like(output), saved, wanted & ~(1 << 4)),
        )
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_fully_sharded_data_parallel(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if DEVICE == "cuda" and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(
        backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        model = torch.nn.Sequential(
            *(flash_entmax.nn.EntmaxAttention(64, 4, causal=True) for _ in range(2))
        ).to(DEVICE)
        hidden = torch.randn(2, 90, 64, device=DEVICE)
        expected = model(hidden)
        expected.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        mesh = distributed.init_device_mesh(DEVICE, (1,))
        for module in model:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        actual = model(hidden)
        assert_close(actual, expected, 1e-5)
        actual.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(parameter.grad.full_tensor(), grads[name], 1e-4)
    finally:
        distributed.destroy_process_group()


@cuda
def test_memory_grows_with_the_length() -> None:
    tensors = leaves(torch.bfloat16, *[(1, 1, 65536, 64)] * 3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_entmax.attention(*tensors, causal=True).sum().backward()
    # One matrix of scores in 16 bits would be 8 GiB.
    assert torch.cuda.max_memory_allocated() - before < 2**31


# --------------------------------------------------------------------------- mappings and losses

# Tests of test_mapping_tensors.py compare the same functions in detail, on the CPU.
needs_a_gpu = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"
)
MAPPING_TOLERANCE = {
    torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3,
}  # fmt: skip


def compare_devices(
    function: Callable[..., Tensor], tensors: list[Tensor], *rest: Any, tolerance: float
) -> None:
    """Values and gradients of floating-point CPU tensors, and of the same on the device."""
    results = []
    for device in ("cpu", DEVICE):
        given = [t.detach().to(device).requires_grad_() for t in tensors]
        others = [r.to(device) if isinstance(r, Tensor) else r for r in rest]
        output = function(*given, *others)
        assert output.device.type == device
        weight = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)
        grads = torch.autograd.grad((output * weight).sum(), given)
        results.append([output.detach(), *grads])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
        assert_close(actual.cpu(), expected, tolerance)


MAPPINGS: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda s, dim: flash_entmax.entmax(s, 1.0, dim),
    "entmax15": flash_entmax.entmax15,
    "sparsemax": flash_entmax.sparsemax,
    "1.3": lambda s, dim: flash_entmax.entmax(s, 1.3, dim),
    "0.7": lambda s, dim: flash_entmax.entmax(s, 0.7, dim),
    "2.5": lambda s, dim: flash_entmax.entmax(s, 2.5, dim),
    "normmax": lambda s, dim: flash_entmax.normmax(s, dim=dim),
    "normmax 1.5": lambda s, dim: flash_entmax.normmax(s, 1.5, dim),
    "normmax 4": lambda s, dim: flash_entmax.normmax(s, 4.0, dim),
    "budget": lambda s, dim: flash_entmax.budget(s, 2.5, dim),
}


@needs_a_gpu
@pytest.mark.parametrize("dtype", list(MAPPING_TOLERANCE))
@pytest.mark.parametrize("name", MAPPINGS)
def test_mapping(name: str, dtype: torch.dtype) -> None:
    tolerance = MAPPING_TOLERANCE[dtype]
    if dtype == torch.float64 and name in ("2.5", "normmax 1.5", "normmax 4"):
        tolerance = 1e-7
    for shape, dim in (((5, 70), -1), ((3, 9, 4), 1), ((3000, 2), 0)):
        scores = (2 * torch.randn(shape)).to(dtype)
        compare_devices(MAPPINGS[name], [scores], dim, tolerance=tolerance)
    compare_devices(
        MAPPINGS[name], [torch.randn(4, 6, 8).to(dtype).transpose(0, 2)], 1, tolerance=tolerance
    )


@needs_a_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mapping_with_alphas_and_masks(dtype: torch.dtype) -> None:
    scores = torch.randn(6, 40, dtype=dtype)
    alpha = torch.tensor([1.0, 0.8, 1.2, 1.5, 2.0, 2.4], dtype=dtype)[:, None]
    mask = torch.rand(6, 40) < 0.7
    mask[3] = False
    compare_devices(
        lambda s, a, m: flash_entmax.entmax(s, a, mask=m), [scores, alpha], mask,
        tolerance=1e-8 if dtype == torch.float64 else 1e-4,
    )  # fmt: skip
    scores[1, 3] = torch.nan
    scores[2, 0] = torch.inf
    for kind in (flash_entmax.entmax15, flash_entmax.sparsemax, flash_entmax.budget):
        actual = kind(scores.to(DEVICE), mask=mask.to(DEVICE)).cpu()
        expected = kind(scores, mask=mask)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert_close(actual.nan_to_num(), expected.nan_to_num(), 1e-6)


@needs_a_gpu
def test_statistics_of_rows() -> None:
    scores = 3 * torch.randn(5, 100, 2)
    for alpha in (1.0, 1.3, 1.5, 2.0, 2.5):
        expected = flash_entmax.entmax_with_statistics(scores, alpha, 1)
        actual = flash_entmax.entmax_with_statistics(scores.to(DEVICE), alpha, 1)
        assert_close(actual.threshold.cpu(), expected.threshold, 1e-5)
        assert actual.support_size.dtype == torch.int64
        positive = (actual.probabilities > 0).sum(1, keepdim=True)
        assert torch.equal(actual.support_size, positive)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "entmax15": flash_entmax.entmax15_loss,
    "sparsemax": flash_entmax.sparsemax_loss,
    "cross-entropy": lambda s, t: flash_entmax.entmax_loss(s, t, 1.0),
    "1.3": lambda s, t: flash_entmax.entmax_loss(s, t, 1.3, reduction="sum"),
    "2.5": lambda s, t: flash_entmax.entmax_loss(s, t, 2.5, reduction="none"),
    "normmax": flash_entmax.normmax_loss,
    "module": lambda s, t: flash_entmax.nn.Entmax15Loss(ignore_index=0)(s, t),
}


@needs_a_gpu
@pytest.mark.parametrize("dtype", list(MAPPING_TOLERANCE))
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str, dtype: torch.dtype) -> None:
    target = torch.randint(500, (20,))
    target[3] = -100 if name != "module" else 0
    scores = (2 * torch.randn(20, 500)).to(dtype)
    compare_devices(LOSSES[name], [scores], target, tolerance=MAPPING_TOLERANCE[dtype])


@needs_a_gpu
@pytest.mark.parametrize(
    "name",
    ["Sparsemax", "Entmax15", "SparsemaxBisect", "EntmaxBisect", "NormmaxBisect", "BudgetBisect",
     "SparsemaxLoss", "SparsemaxBisectLoss", "Entmax15Loss", "EntmaxBisectLoss",
     "NormmaxBisectLoss"],
)  # fmt: skip
def test_compat_modules(name: str) -> None:
    from flash_entmax.compat import entmax as compat

    module = getattr(compat, name)()
    rest = (torch.randint(9, (8,)),) if name.endswith("Loss") else ()
    compare_devices(module, [torch.randn(8, 9)], *rest, tolerance=2e-5)


@needs_a_gpu
def test_compat_with_one_parameter_a_row() -> None:
    from flash_entmax.compat import entmax as compat

    scores, target = torch.randn(8, 9, dtype=torch.float64), torch.randint(9, (8,))
    alpha = 1.1 + torch.rand(8, 1, dtype=torch.float64)
    compare_devices(compat.entmax_bisect, [scores, alpha], tolerance=1e-9)
    compare_devices(compat.normmax_bisect, [scores], alpha, tolerance=1e-7)
    compare_devices(compat.budget_bisect, [scores], 2 * alpha, tolerance=1e-9)
    compare_devices(compat.entmax_bisect_loss, [scores], target, alpha, tolerance=1e-9)


@needs_a_gpu
def test_mappings_with_the_compiler_and_transforms() -> None:
    torch._dynamo.reset()
    scores = torch.randn(4, 6, 9, device=DEVICE)
    target = torch.randint(9, (6,), device=DEVICE)

    def function(s: Tensor) -> Tensor:
        return flash_entmax.entmax15(s).square().sum() + flash_entmax.sparsemax_loss(s, target)

    expected = torch.stack([grad(function)(s) for s in scores])
    assert_close(vmap(grad(function))(scores), expected, 1e-5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaf = scores[0].clone().requires_grad_()
    (actual,) = torch.autograd.grad(compiled(leaf), leaf)
    assert_close(actual, expected[0], 1e-5)


@needs_a_gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_mappings_do_not_wait_for_the_device() -> None:
    scores = torch.randn(4, 300, device="cuda", requires_grad=True)
    alpha = torch.full((4, 1), 1.4, device="cuda", requires_grad=True)
    target = torch.randint(300, (4,), device="cuda")

    def everything() -> Tensor:
        total = flash_entmax.entmax(scores, alpha).square().sum()
        for number in (1.0, 1.5, 2.0, 1.3, 2.5):
            total = total + flash_entmax.entmax(scores, number).square().sum()
            total = total + flash_entmax.entmax_loss(scores, target, number)
        total = total + flash_entmax.budget(scores, 3.0).square().sum()
        return total + flash_entmax.normmax(scores, 1.5).square().sum()

    everything().backward()  # What PyTorch itself makes once.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_a_gpu
def test_autocast_of_mappings() -> None:
    scores = torch.randn(4, 30, device=DEVICE)
    expected = flash_entmax.entmax(scores, 1.3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = flash_entmax.entmax(scores, 1.3)
        loss = flash_entmax.entmax15_loss(scores.bfloat16(), torch.arange(4, device=DEVICE))
    assert torch.equal(actual, expected) and loss.dtype == torch.float32


# ---------------------------------------------------------------------- modules, adasplash, models


@needs_gpu
@pytest.mark.parametrize("positions", ["none", "alibi", "nape", "rope"])
@pytest.mark.parametrize("scaling", ["none", "ssmax", "asentmax"])
def test_module(scaling: str, positions: str) -> None:
    if scaling == "asentmax" and positions == "alibi":
        pytest.skip("not a combination")
    module = flash_entmax.nn.EntmaxAttention(
        64, 4, kv_heads=2, causal=True, learnable_alpha=True, positions=positions, scaling=scaling,
        window=50,
    )  # fmt: skip
    hidden = torch.randn(2, 90, 64)
    expected = module(hidden)
    names, parameters = zip(*module.named_parameters(), strict=True)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    module = module.to(DEVICE)
    actual = module(hidden.to(DEVICE))
    assert_close(actual.cpu(), expected, 1e-4)
    grads = torch.autograd.grad(actual.square().sum(), list(module.parameters()), allow_unused=True)
    for name, one, other in zip(names, grads, expected_grads, strict=True):
        print(name)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_close(one.cpu(), other, 1e-3)


ADASPLASH_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("adasplash", {}),
    ("adasplash", {"alpha": 1.333}),
    ("adasplash", {"is_causal": False}),
    ("adasplash_v1", {"niter": 20}),
    ("adasplash_v1", {"is_causal": True, "niter": 20}),
    ("adasplash_no_block_mask", {"is_causal": True, "niter": 20}),
    ("adasplash_v2", {"niter": 10}),
]


@cuda
@pytest.mark.skipif(importlib.util.find_spec("adasplash") is None, reason="needs adasplash")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "arguments"), ADASPLASH_CALLS)
def test_adasplash(name: str, arguments: dict[str, Any], packed: bool) -> None:
    """Beside the original, with more of its iterations where it has them."""
    os.environ.setdefault("ADASPLASH_TEST_FAST_AUTOTUNE", "1")  # Read when its kernels are made.
    import adasplash as original

    from flash_entmax.compat import adasplash as ours

    tensors = leaves(torch.bfloat16, *[(2, 4, 1024, 64)] * 3)
    if packed:
        arguments = arguments | {
            "varlen": torch.tensor([1024, 640], device="cuda", dtype=torch.int32)
        }
    try:
        expected = getattr(original, name)(*tensors, **arguments)
        weight = torch.randn_like(expected)
        if packed:  # What the original leaves in rows after the end is its own affair.
            weight[1, :, 640:] = 0
        others = torch.autograd.grad(expected, tensors, weight)
    except Exception as error:  # It compiles its kernels for the machine, which may fail.
        pytest.skip(f"the original cannot run this: {type(error).__name__}: {error}"[:200])
    actual = getattr(ours, name)(*tensors, **arguments)
    grads = torch.autograd.grad(actual, tensors, weight)
    if packed:
        assert bool((actual[1, :, 640:] == 0).all())
        actual, expected = (torch.cat([t[0], t[1, :, :640]], dim=1) for t in (actual, expected))
        others = tuple(t.clone() for t in others)
        for one, other in zip(grads, others, strict=True):
            assert bool((one[1, :, 640:] == 0).all())
            other[1, :, 640:] = 0
    assert_close(actual, expected, 3e-2)
    for one, other in zip(grads, others, strict=True):
        assert_close(one, other, 6e-2)


def needs_transformers(function: Any) -> Any:
    missing = importlib.util.find_spec("transformers") is None
    return needs_gpu(pytest.mark.skipif(missing, reason="needs transformers")(function))


MODELS = ["llama", "mistral", "gemma2", "gemma3", "bert", "bert decoder"]


def model_and_batch(name: str, padding: str) -> tuple[Any, Tensor, Tensor]:
    import test_hf

    test_hf.register_all()
    ids, mask = test_hf.batch(padding)
    return test_hf.make(name).to(DEVICE), ids.to(DEVICE), mask.to(DEVICE)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_alpha_one(name: str, padding: str) -> None:
    """The model's own logits."""
    from flash_entmax import hf

    model, ids, mask = model_and_batch(name, padding)
    # sdpa ignores Gemma 2's cap of the scores.
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    hf.convert(model, 1.0)
    actual = model(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(actual, expected, 1e-4)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, padding: str) -> None:
    import test_hf
    from flash_entmax import hf

    model, ids, mask = model_and_batch(name, padding)
    hf.convert(model, 1.5)
    results = []
    for implementation in (hf.NAME, test_hf.DENSE):
        model.set_attn_implementation(implementation)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        model.zero_grad()
        logits.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits, grads))
    (actual, grads), (expected, others) = results
    assert_close(actual, expected, 1e-3)
    for parameter, gradient in grads.items():
        print(parameter)
        assert_close(gradient, others[parameter], 5e-3)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_generation(name: str, padding: str) -> None:
    from flash_entmax import hf

    model, ids, mask = model_and_batch(name, padding)
    hf.convert(model)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    longer = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    position = (longer.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(
            output.sequences, attention_mask=longer, position_ids=position, use_cache=False
        ).logits
    for step, logits in enumerate(output.logits):
        assert_close(logits, whole[:, 11 + step], 1e-3)


@needs_transformers
def test_learnt_alpha_and_alpha_by_head() -> None:
    from flash_entmax import hf

    model, ids, mask = model_and_batch("llama", "left")
    hf.convert(model, 1.3, learnable=True)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    found = [p for n, p in model.named_parameters() if n.endswith("flash_entmax_alpha_logits")]
    assert len(found) == 2
    assert all(p.grad is not None and bool(p.grad.abs().min() > 0) for p in found)
    other, *_ = model_and_batch("llama", "none")
    hf.convert(other, [1.0, [1.2, 1.4, 1.6, 2.0]])
    assert bool(other(ids).logits.isfinite().all())
    if DEVICE == "cuda":
        hf.set_alpha(other, [1.5, [1.0, 1.4, 1.6, 2.0]])
        with pytest.raises(NotImplementedError, match="flash_entmax_alpha"):
            other(ids)


@needs_transformers
def test_a_model_in_bfloat16_compiled() -> None:
    from flash_entmax import hf

    torch._dynamo.reset()
    model, *_ = model_and_batch("llama", "none")
    hf.convert(model.bfloat16(), 1.5)
    ids = torch.randint(3, 60, (2, 60), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids).logits, model(ids).logits, 5e-2)
    # Without a cache transformers writes a mask out, for sequences that might be packed.
    if DEVICE == "cuda":
        with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match="use_cache"):
            compiled(ids, use_cache=False)
