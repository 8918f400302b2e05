"""What the tests of CUDA tensors share: marks, tolerances, inputs and comparisons.

FLASH_ENTMAX_TEST_DEVICE=cpu runs the tests that need no GPU for their subject on the CPU engine, to
test the tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from reference import assert_close

NAMES = ("query", "key", "value")
DEVICE = os.environ.get("FLASH_ENTMAX_TEST_DEVICE", "cuda")

cuda = pytest.mark.skipif(
    not torch.cuda.is_available()
    or not torch._C._dispatch_has_kernel_for_dispatch_key("flash_entmax::attention", "CUDA"),
    reason="needs a GPU, and the package built with FLASH_ENTMAX_CUDA",
)
needs_gpu = cuda if DEVICE == "cuda" else pytest.mark.skipif(False, reason="")

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
HALF = [torch.bfloat16, torch.float16]
# Rows of 70 and 700 keys are computed by different kernels.
LENGTHS = [70, 700]


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


def heads_first(tensors: list[Tensor], layout: str) -> list[Tensor]:
    return [t if layout == "bhnd" else t.transpose(1, 2) for t in tensors]


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
