"""Arguments that no function can work with: an error that names the argument, never a crash, and
never a result."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_entmax
from flash_entmax.compat import adasplash, entmax, sdpa
from flash_entmax.schedules import AlphaSchedule

ERRORS = (TypeError, ValueError, NotImplementedError)
SHAPE = (2, 4, 6, 8)


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(SHAPE), 1.0, 0, torch.quint8)


# No function takes any of these for any of its tensors.
NOT_TENSORS: dict[str, Callable[[], Any]] = {
    "list": lambda: [1.0],
    "str": lambda: "x",
    "complex": lambda: torch.ones(SHAPE, dtype=torch.complex64),
    "sparse": lambda: torch.ones(SHAPE).to_sparse(),
    "csr": lambda: torch.eye(6).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(SHAPE).to_mkldnn(),
    "float8": lambda: torch.ones(SHAPE).to(torch.float8_e4m3fn),
    "quantized": quantized,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4, 6, 8), torch.ones(4, 5, 8)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(6, 8), torch.ones(5, 8)], layout=torch.jagged
    ),
}


def tokens() -> Tensor:
    return torch.randn(4, 2, 8)


def offsets() -> Tensor:
    return torch.tensor([0, 4])


# Functions of one bad tensor.
PLACES: dict[str, Callable[[Any], Any]] = {
    "attention": lambda t: flash_entmax.attention(t, t, t),
    "support": lambda t: flash_entmax.support(t, t),
    "attention_weights": lambda t: flash_entmax.attention_weights(t, t),
    "attention_varlen": lambda t: flash_entmax.attention_varlen(t, t, t, offsets(), offsets()),
    "cu_query": lambda t: flash_entmax.attention_varlen(tokens(), tokens(), tokens(), t, offsets()),
    "entmax": lambda t: flash_entmax.entmax(t),
    "entmax alpha": lambda t: flash_entmax.entmax(torch.randn(2, 3), t),
    "entmax mask": lambda t: flash_entmax.entmax(torch.randn(2, 3), mask=t),
    "loss": lambda t: flash_entmax.entmax15_loss(t, torch.zeros(2).long()),
    "loss target": lambda t: flash_entmax.entmax15_loss(torch.randn(2, 3), t),
    "sdpa": lambda t: sdpa.scaled_dot_product_attention(t, t, t),
    "sdpa mask": lambda t: sdpa.scaled_dot_product_attention(
        torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE), attn_mask=t
    ),
    "adasplash": lambda t: adasplash.adasplash(t, t, t),
    "adasplash varlen": lambda t: adasplash.adasplash(
        torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE), varlen=t
    ),
    "compat entmax15": lambda t: entmax.entmax15(t),
    "compat bisect": lambda t: entmax.entmax_bisect(torch.randn(2, 3), t),
    "compat loss": lambda t: entmax.entmax15_loss(t, torch.zeros(2).long()),
    "module": lambda t: flash_entmax.nn.EntmaxAttention(8, 2)(t),
}
for argument in (
    "query", "key", "value", "bias", "key_mask", "key_lengths", "alibi_slopes", "query_scale",
    "alpha",
):  # fmt: skip
    PLACES[f"attention {argument}"] = lambda t, argument=argument: flash_entmax.attention(
        **({name: torch.randn(SHAPE) for name in ("query", "key", "value")} | {argument: t})
    )


@pytest.mark.parametrize("kind", NOT_TENSORS)
@pytest.mark.parametrize("place", PLACES)
def test_tensors(place: str, kind: str) -> None:
    with pytest.raises(ERRORS, match="got"):
        PLACES[place](NOT_TENSORS[kind]())


NUMBERS: list[Any] = [float("nan"), float("inf"), "1.5", 1j, [1.5], 10**400, object()]
NUMBER_PLACES: dict[str, Callable[[Any], Any]] = {
    "entmax alpha": lambda n: flash_entmax.entmax(torch.randn(2, 3), n),
    "entmax dim": lambda n: flash_entmax.entmax(torch.randn(2, 3), 1.5, n),
    "normmax": lambda n: flash_entmax.normmax(torch.randn(2, 3), n),
    "budget": lambda n: flash_entmax.budget(torch.randn(2, 3), n),
    "loss alpha": lambda n: flash_entmax.entmax_loss(torch.randn(2, 3), torch.zeros(2).long(), n),
    "ignore_index": lambda n: flash_entmax.entmax_loss(
        torch.randn(2, 3), torch.zeros(2).long(), ignore_index=n
    ),
    "reduction": lambda n: flash_entmax.entmax_loss(
        torch.randn(2, 3), torch.zeros(2).long(), reduction=n
    ),
    "max_query_length": lambda n: flash_entmax.attention_varlen(
        tokens(), tokens(), tokens(), offsets(), offsets(), max_query_length=n
    ),
    "heads": lambda n: flash_entmax.nn.EntmaxAttention(8, n),
    "head_size": lambda n: flash_entmax.nn.EntmaxAttention(8, 2, head_size=n),
    "window": lambda n: flash_entmax.nn.EntmaxAttention(8, 2, window=n),
    "module alpha": lambda n: flash_entmax.nn.EntmaxAttention(8, 2, alpha=n),
    "steps": lambda n: AlphaSchedule(steps=n),
    "start": lambda n: AlphaSchedule(steps=3, start=n),
}
for argument in ("alpha", "scale", "softcap", "window_left", "window_right", "causal", "layout"):
    NUMBER_PLACES[argument] = lambda n, argument=argument: flash_entmax.attention(
        *(torch.randn(SHAPE) for _ in range(3)), **{argument: n}
    )


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: str(n)[:8])
@pytest.mark.parametrize("place", NUMBER_PLACES)
def test_numbers(place: str, number: Any) -> None:
    if place in ("heads", "head_size", "window") and number == 10**400:
        number = 2**63
    with pytest.raises(ERRORS, match="got"):
        NUMBER_PLACES[place](number)


@pytest.mark.parametrize("dim", [2, -3, 2**31, 2**32, 2**40, -(2**32), 2**63 - 1, 2**64])
def test_dim(dim: int) -> None:
    with pytest.raises(ValueError, match="dim: got"):
        flash_entmax.entmax(torch.randn(2, 3), 1.5, dim)


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40, 2**63 - 1])
def test_huge_windows_are_none(window: int) -> None:
    tensors = [torch.randn(SHAPE) for _ in range(3)]
    output = flash_entmax.attention(*tensors, window_left=window, window_right=window)
    assert torch.equal(output, flash_entmax.attention(*tensors))


def test_other_things() -> None:
    query = torch.randn(SHAPE)
    with pytest.raises(TypeError, match="dropout"):
        flash_entmax.attention(query, query, query, dropout=0.1)  # type: ignore[call-arg]
    with pytest.raises(NotImplementedError, match="query: got a tensor on meta"):
        flash_entmax.attention_weights(query.to("meta"), query.to("meta"))
    with pytest.raises(ValueError, match="key: got a tensor on meta"):
        flash_entmax.attention(query, query.to("meta"), query)
    with pytest.raises(ValueError, match="step: got nan"):
        AlphaSchedule(steps=3)(float("nan"))
    with pytest.raises(ValueError, match="alpha: got nan"):
        flash_entmax.nn.EntmaxAttention(8, 2).alpha = float("nan")
    with pytest.raises(TypeError, match=r"key_mask: got torch\.float32"):
        flash_entmax.attention(query, query, query, key_mask=torch.ones(2, 6, requires_grad=True))


@pytest.mark.parametrize("shape", [(0, 4, 6, 8), (2, 0, 6, 8), (2, 4, 0, 8)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, requires_grad=True)
    output = flash_entmax.attention(tensor, tensor, tensor)
    assert output.shape == shape
    output.sum().backward()
    assert tensor.grad is not None and tensor.grad.shape == shape
    sparse = flash_entmax.attention_weights(tensor, tensor)
    dense = flash_entmax.attention_weights(tensor, tensor, dense=True)
    assert sparse.shape[0] == shape[0] * shape[1] * shape[2]
    assert dense.shape == (*shape[:3], shape[2])
