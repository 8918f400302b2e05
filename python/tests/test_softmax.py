"""α = 1 as CUDA tensors take it, by PyTorch's own attention, here on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_entmax
from flash_entmax import _softmax
from reference import assert_close, dense_attention


def ours(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return _softmax.attention(query, key, value, **options)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


OPTIONS: dict[str, Any] = {
    "nothing": dict,
    "causal": lambda: {"causal": True},
    "scale": lambda: {"scale": 0.7, "causal": True},
    "window": lambda: {"window_left": 3, "window_right": 2},
    "causal window": lambda: {"causal": True, "window_left": 4, "window_right": 100},
    "huge windows": lambda: {"window_left": 2**40, "window_right": 2**62},
    "lengths": lambda: {"key_lengths": torch.tensor([9, 0]), "causal": True},
    "mask": lambda: {"key_mask": torch.tensor([[True] * 5 + [False] * 4, [False] * 9])},
    "softcap": lambda: {"softcap": 2.0, "causal": True},
    "everything": lambda: {
        "softcap": 3.0, "window_right": 1, "key_lengths": torch.tensor([4, 8]),
        "key_mask": torch.rand(9) < 0.8, "scale": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("queries", [9, 6, 1, 12])
def test_options(name: str, queries: int) -> None:
    options = OPTIONS[name]()
    tensors = leaves((2, 4, queries, 8), (2, 2, 9, 8), (2, 2, 9, 5))
    actual = ours(*tensors, **options)
    expected = dense_attention(*tensors, alpha=1.0, **options)
    assert_close(actual, expected, 1e-10)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((actual * weight).sum(), tensors)
    others = torch.autograd.grad((expected * weight).sum(), tensors)
    for one, other in zip(grads, others, strict=True):
        assert_close(one, other, 1e-9)


def test_the_largest_windows() -> None:
    tensors = leaves((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    largest = 2**63 - 1
    for attend in (ours, lambda *t, **o: flash_entmax.attention(*t, alpha=1.0, **o)):
        output = attend(*tensors, window_left=largest, window_right=largest)
        assert_close(output, attend(*tensors), 1e-12)


def test_gradients_of_the_parameters() -> None:
    tensors = leaves((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    parameters = {
        "query_scale": torch.rand(4, 7, dtype=torch.float64, requires_grad=True),
        "bias": torch.randn(4, 1, 9, dtype=torch.float64, requires_grad=True),
        "alibi_slopes": torch.rand(4, dtype=torch.float64, requires_grad=True),
    }
    everything = [*tensors, *parameters.values()]
    results = [
        torch.autograd.grad(
            function(*tensors, causal=True, **parameters).square().sum(), everything
        )
        for function in (ours, lambda *t, **o: dense_attention(*t, alpha=1.0, **o))
    ]
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)


def test_half_precision_adds_slopes_in_float32() -> None:
    tensors = leaves((1, 2, 300, 16), (1, 2, 300, 16), (1, 2, 300, 16), dtype=torch.bfloat16)
    slopes = torch.tensor([0.3, 0.01])
    actual = ours(*tensors, alibi_slopes=slopes, causal=True)
    assert actual.dtype == torch.bfloat16
    expected = dense_attention(*tensors, alpha=1.0, alibi_slopes=slopes, causal=True)
    assert_close(actual, expected, 8e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(causal: bool) -> None:
    """As the CPU engine has them, tokens outside every sequence included."""
    query, key = torch.randn(12, 4, 8).double(), torch.randn(15, 2, 8).double()
    for cu_query, cu_key in (
        ([0, 5, 5, 12], [0, 6, 10, 15]),
        ([0, 5, 12], [0, 0, 15]),
        ([0, 12], [0, 15]),
        ([0], [0]),
    ):
        cu = [torch.tensor(numbers, dtype=torch.int32) for numbers in (cu_query, cu_key)]
        q, k = query[: cu_query[-1]], key[: cu_key[-1]]
        expected = flash_entmax.attention_varlen(q, k, k, *cu, alpha=1.0, causal=causal)
        actual = ours(
            *(t.transpose(0, 1)[None] for t in (q, k, k)), cu_query=cu[0], cu_key=cu[1],
            causal=causal,
        )  # fmt: skip
        assert_close(actual[0].transpose(0, 1), expected, 1e-10)


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    (tensor,) = leaves(shape)
    output = ours(tensor, tensor, tensor, causal=True)
    assert output.shape == shape
    output.sum().backward()
    query = torch.randn(2, 2, 4, 8, requires_grad=True)
    output = ours(query, query[:, :, :0], query[:, :, :0])
    assert torch.equal(output, torch.zeros_like(query))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.randn(3, 2, 5, 8)}, "key: got batch 3"),
        ({"key": torch.randn(2, 2, 5, 7)}, "key: got head_size 7"),
        ({"value": torch.randn(2, 2, 6, 8)}, "value: got shape"),
        ({"query": torch.randn(2, 3, 5, 8)}, "key: got 2 heads"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"window_left": -1}, "window_left: got -1"),
        ({"key_lengths": torch.tensor([1, 2, 3])}, "key_lengths: got shape"),
        ({"cu_query": torch.tensor([0, 5])}, "cu_query: got shape"),
        ({"cu_key": torch.tensor([0, 5])}, "cu_query: got nothing"),
        ({"cu_query": torch.tensor([0, 5]), "cu_key": torch.tensor([0, 3, 5])}, "cu_key: got"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    tensors = {name: torch.randn(2, 2, 5, 8) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        ours(**(tensors | changes))
