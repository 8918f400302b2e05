"""CUDA tensors: what can be said of them anywhere, and results where there is a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import flash_entmax
from reference import assert_close, dense_attention, dense_weights

NAMES = ("query", "key", "value")

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not torch._C._dispatch_has_kernel_for_dispatch_key("flash_entmax::attention", "CUDA"),
    reason="needs a GPU, and the package built with FLASH_ENTMAX_CUDA",
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, "alpha: got 1.0"),
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


def test_mappings_want_the_cpu() -> None:
    tensor: Any = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(NotImplementedError, match="run on CPU tensors"):
        flash_entmax._checks.check_cpu_mapping("scores", tensor)


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


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in shapes]


def compare(actual: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float) -> None:
    assert_close(actual.cpu(), expected, tolerance)
    weight = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * weight).sum(), tensors)
    others = torch.autograd.grad((expected * weight.cpu().double()).sum(), tensors)
    for one, other in zip(grads, others, strict=True):
        assert one.dtype == other.dtype and one.device.type == "cuda"
        assert_close(one.cpu(), other.cpu(), 4 * tolerance)


TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@needs_gpu
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("length", [70, 700])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_attention(dtype: torch.dtype, length: int, layout: str) -> None:
    shapes = [(2, heads, length, 64) for heads in (4, 2, 2)]
    if layout == "bnhd":
        shapes = [(b, n, h, d) for b, h, n, d in shapes]
    tensors = leaves(dtype, *shapes)
    actual = flash_entmax.attention(*tensors, causal=True, layout=layout)
    on_cpu = [t.cpu() if layout == "bhnd" else t.cpu().transpose(1, 2) for t in tensors]
    expected = dense_attention(*on_cpu, causal=True)
    compare(
        actual,
        expected if layout == "bhnd" else expected.transpose(1, 2),
        tensors,
        TOLERANCE[dtype],
    )


@needs_gpu
def test_options() -> None:
    tensors = leaves(torch.float32, (2, 4, 50, 32), (2, 2, 60, 32), (2, 2, 60, 32))
    parameters = [
        torch.tensor([1.2, 1.4, 1.6, 2.0], device="cuda", requires_grad=True),
        torch.rand(4, device="cuda", requires_grad=True),
        (0.5 + torch.rand(4, 50, device="cuda")).requires_grad_(),
    ]
    lengths = torch.tensor([60, 33], device="cuda")
    plain: dict[str, Any] = {"causal": True, "window_left": 40, "softcap": 4.0, "scale": 0.3}
    names = ("alpha", "alibi_slopes", "query_scale")
    actual = flash_entmax.attention(
        *tensors, key_lengths=lengths, **plain, **dict(zip(names, parameters, strict=True))
    )
    expected = dense_attention(
        *(t.cpu() for t in tensors), key_lengths=lengths.cpu(), **plain,
        **{name: p.cpu() for name, p in zip(names, parameters, strict=True)},
    )  # fmt: skip
    compare(actual, expected, [*tensors, *parameters], 1e-4)
    # Only some of the gradients.
    output = flash_entmax.attention(*tensors, alpha=parameters[0])
    (grad,) = torch.autograd.grad(output.square().sum(), tensors[0])
    assert bool(grad.isfinite().all())


@needs_gpu
def test_varlen_and_support() -> None:
    query, key = leaves(torch.float32, (110, 4, 32), (110, 2, 32))
    offsets = torch.tensor([0, 30, 30, 110], device="cuda")
    actual = flash_entmax.attention_varlen(
        query, key, key, offsets, offsets, causal=True, max_query_length=80, max_key_length=80
    )
    for part in (slice(0, 30), slice(30, 110)):
        q, k = (t[part].detach().cpu().transpose(0, 1)[None] for t in (query, key))
        expected = dense_attention(q, k, k, causal=True)
        assert_close(actual[part].cpu(), expected[0].transpose(0, 1), 3e-5)
    q, k = (t.detach().transpose(0, 1)[None] for t in (query, key))
    weights = flash_entmax.attention_weights(q, k, dense=True, causal=True)
    assert_close(weights.cpu(), dense_weights(q.cpu(), k.cpu(), causal=True), 1e-4)


@needs_gpu
def test_compile_and_streams() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 256, 64)] * 3)
    expected = flash_entmax.attention(*tensors, causal=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: flash_entmax.attention(*t, causal=True), fullgraph=True)
    actual = compiled(*tensors)
    assert torch.equal(actual, expected)
    actual.sum().backward()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = flash_entmax.attention(*tensors, causal=True)
    stream.synchronize()
    assert torch.equal(again, expected)
