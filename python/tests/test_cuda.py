"""CUDA tensors without a GPU, and bad input (FLASH_ENTMAX_TEST_DEVICE: see cuda_cases.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import flash_entmax
from cuda_cases import NAMES, cuda, leaves
from flash_entmax import _library


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
