"""CUDA tensors: mappings and losses (FLASH_ENTMAX_TEST_DEVICE: see cuda_cases.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import flash_entmax
from cuda_cases import DEVICE
from reference import assert_close

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
