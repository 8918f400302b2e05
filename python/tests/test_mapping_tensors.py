"""What CUDA tensors take for the mappings and losses, run on CPU tensors beside the CPU operators.

The last part puts it in the place of the CPU operators, under gradients, transforms and compilers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import flash_entmax
from flash_entmax import _mapping_tensors
from flash_entmax._library import operators
from flash_entmax._mapping_tensors import BUDGET, ENTMAX, NORMMAX
from reference import assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Kind, and α or budget.
CASES = [
    *((ENTMAX, a) for a in (0.3, 0.9, 1 - 1e-9, 1.0, 1 + 1e-12, 1.001, 1.2, 1.5, 1.9, 2.0)),
    *((ENTMAX, a) for a in (2.0001, 2.5, 3.0, 6.0)),
    *((NORMMAX, a) for a in (1.1, 1.5, 2.0, 3.0, 10.0)),
    *((BUDGET, b) for b in (0.3, 1.0, 2.5, 5.0)),
]


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """As assert_close, with not-a-number and infinities in the same places."""
    assert torch.equal(actual.isnan(), expected.isnan())
    unbounded = expected.isinf()
    assert torch.equal(actual.isinf(), unbounded)
    assert torch.equal(actual[unbounded], expected[unbounded])
    assert_close(*(t.nan_to_num(0.0, 0.0, 0.0) for t in (actual, expected)), tolerance)


def compare_forward(
    scores: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> Tensor:
    """Probabilities, thresholds and sizes of supports; returns the probabilities."""
    arguments = (scores, alpha, mask, kind, parameter, dim)
    p, threshold, size = _mapping_tensors.mapping_with_statistics(*arguments)
    expected, other_threshold, other_size = operators.mapping_with_statistics(*arguments)
    assert p.dtype == expected.dtype and p.stride() == expected.stride()
    assert_same(p, _mapping_tensors.mapping(*arguments), 0.0)
    number = 3.0 if isinstance(alpha, Tensor) else parameter
    steep = kind != BUDGET and number > 2.0
    tolerance = 16 * torch.finfo(scores.dtype).eps
    if scores.dtype == torch.float64 and (steep or kind == NORMMAX):
        tolerance = 1e-9
    if scores.dtype == torch.float32 and (steep or kind != ENTMAX):
        tolerance = 2e-5
    assert_same(p, expected, tolerance)
    assert threshold.dtype == other_threshold.dtype and size.dtype == torch.int64
    assert threshold.shape == other_threshold.shape == size.shape
    # Where a whole interval of thresholds gives the same budget, they need not agree.
    free = kind == BUDGET and parameter == round(parameter)
    if not free:
        epsilon = 16 * torch.finfo(threshold.dtype).eps
        assert_same(threshold, other_threshold, max(epsilon, tolerance if steep else 0.0))
    assert torch.equal(size, (p > 0).sum(dim, keepdim=True))
    # Entries of the size of rounding may be in the one support and not in the other.
    differ = (p > 0) != (expected > 0)
    assert bool((torch.maximum(p, expected)[differ] < 1e-3).all())
    assert bool(((other_size - size).abs() <= differ.sum(dim, keepdim=True)).all())
    return p


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "parameter"), CASES)
def test_forward(kind: int, parameter: float, dtype: torch.dtype) -> None:
    for shape, dim in (((7, 33), -1), ((5, 3, 11), 1), ((17, 2), 0), ((1000,), 0), ((4, 6, 8), -3)):
        size = shape[dim]
        number = min(parameter, size) if kind == BUDGET else parameter
        compare_forward((3 * torch.randn(shape)).to(dtype), None, None, kind, number, dim)
    scores = (3 * torch.randn(6, 4, 9)).to(dtype).transpose(0, 2)
    compare_forward(scores, None, None, kind, parameter if kind != BUDGET else 1.5, 1)
    compare_forward(scores[:1, ::2], None, None, kind, parameter if kind != BUDGET else 1.5, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "parameter"), CASES)
def test_masks_and_rows_without_a_distribution(
    kind: int, parameter: float, dtype: torch.dtype
) -> None:
    scores = torch.randn(8, 12, dtype=dtype)
    mask = torch.rand(8, 12) < 0.6
    mask[:, 0] = True
    mask[0] = False
    mask[1, 3] = False
    scores[1, 3] = torch.nan  # Hidden, so without effect.
    scores[2, 0] = torch.nan
    scores[3, 0] = torch.inf
    scores[4] = -torch.inf
    scores[5, 4:] = -torch.inf
    for hidden in (mask, mask.to(torch.uint8) * 3, torch.rand(12) < 0.5, None):
        rows = scores if hidden is mask else scores[3:] if hidden is None else scores
        compare_forward(rows, None, hidden, kind, parameter, -1)
    p = _mapping_tensors.mapping(scores, None, mask, kind, parameter, -1)
    assert bool((p[[0, 4]] == 0).all()) and bool(p[[2, 3]].isnan().all())
    assert bool(p[[1, 5, 6, 7]].isfinite().all()) and bool((p[5:][~mask[5:]] == 0).all())


EXTREMES = {
    "ties": torch.tensor([1.0] * 7 + [0.0]),
    "all tied": torch.zeros(1000),
    "one": torch.tensor([3.0]),
    "far": torch.tensor([1e30, 0.0, -1e30, 1e30]),
    "large and close": torch.tensor([16777216.0, 16777215.0, 16777214.0, 0.0]),
    "tiny": torch.tensor([1e-38, 0.0, -1e-38, 1e-45]),
    "geometric": -(0.5 ** torch.arange(100.0)),
    "geometric rising": -(1.5 ** torch.arange(-80.0, 20.0)),
    "harmonic": -1.0 / torch.arange(1.0, 300.0),
    "steps": -torch.arange(64.0) / 64,
    "mask values": torch.tensor([0.5, 0.1, -1e9, -1e30, -3e38]),
    "at the edge": torch.tensor([2.0, 0.0, 0.0, 0.0]),
    "outlier": torch.cat([torch.tensor([40.0]), torch.zeros(500)]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "parameter"), CASES)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, kind: int, parameter: float, dtype: torch.dtype) -> None:
    scores = EXTREMES[name].to(dtype)
    number = min(parameter, len(scores)) if kind == BUDGET else parameter
    if name == "far" and kind == BUDGET:  # The CPU rounds to digits of the scores' range.
        p = _mapping_tensors.mapping(scores, None, None, kind, number, 0)
    else:
        p = compare_forward(scores, None, None, kind, number, 0)
    total = number if kind == BUDGET else 1.0
    assert_close(p.sum(), torch.tensor(total, dtype=dtype), 1e-5 if kind == NORMMAX else 2e-6)


@pytest.mark.parametrize("alpha", [0.4, 1.1, 1.3, 1.5, 1.8, 2.0])
def test_the_number_of_steps_settles_any_row(alpha: float) -> None:
    """Rows in which every step of Newton's method finds some more entries."""
    for size in (10, 100, 3000):
        for base in (-0.25, -0.5, -0.8, -0.97, -0.999, 0.5, 0.97):
            powers = abs(base) ** torch.arange(size, dtype=torch.float64)
            scores = (powers if base > 0 else -powers) / abs(alpha - 1)
            p = _mapping_tensors.mapping(scores, None, None, ENTMAX, alpha, 0)
            assert float((p.sum() - 1).abs()) <= torch.finfo(torch.float64).eps * max(16, size)
            # Fewer steps, from the same numbers.
            scores = scores.float()
            p = _mapping_tensors.mapping(scores.double(), None, None, ENTMAX, alpha, 0)
            short = _mapping_tensors.mapping(scores, None, None, ENTMAX, alpha, 0)
            assert_close(short, p, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [ENTMAX, NORMMAX])
def test_one_alpha_a_row(kind: int, dtype: torch.dtype) -> None:
    numbers = [1.0, 1 + 1e-7, 0.5, 1.3, 1.5, 2.0, 2.7, 5.0] if kind == ENTMAX else [
        1.05, 1.5, 2.0, 4.0
    ]  # fmt: skip
    scores = (2 * torch.randn(len(numbers), 21, 2)).to(dtype)
    alpha = torch.tensor(numbers, dtype=_mapping_tensors.statistics_type(dtype)).view(-1, 1, 1)
    mask = torch.rand(21, 1) < 0.8
    mask[0] = True
    p = compare_forward(scores, alpha.expand(-1, 1, 2), mask, kind, 0.0, 1)
    for row, number in enumerate(alpha.flatten().tolist()):
        alone = _mapping_tensors.mapping(scores[row], None, mask, kind, number, 0)
        assert_close(p[row], alone, 16 * torch.finfo(dtype).eps)


def test_rows_with_an_alpha_that_is_not_allowed() -> None:
    scores = torch.randn(5, 6)
    alpha = torch.tensor([1.5, -1.0, torch.nan, torch.inf, 0.0])[:, None]
    p, threshold, size = _mapping_tensors.mapping_with_statistics(
        scores, alpha, None, ENTMAX, 0.0, 1
    )
    assert bool(p[0].isfinite().all()) and bool(p[1:].isnan().all())
    assert bool(threshold[1:].isnan().all()) and size[1:].tolist() == [[0]] * 4
    grads = _mapping_tensors.mapping_backward(
        p[:1].expand(5, 6), torch.randn(5, 6), alpha, ENTMAX, 0.0, 1, True
    )
    assert all(bool(g[0].isfinite().all()) and bool(g[1:].isnan().all()) for g in grads)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (3, 4, 0), (1,), (2, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape)
    for dim in range(len(shape)):
        compare_forward(scores, None, None, ENTMAX, 1.5, dim)
        compare_forward(scores, None, None, ENTMAX, 1.0, dim)
        arguments = (scores, scores, torch.tensor(1.5), ENTMAX, 0.0, dim, True)
        for one, other in zip(
            _mapping_tensors.mapping_backward(*arguments),
            operators.mapping_backward(*arguments),
            strict=True,
        ):
            assert one.shape == other.shape and one.dtype == other.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "parameter"), CASES)
def test_backward(kind: int, parameter: float, dtype: torch.dtype) -> None:
    scores = (2 * torch.randn(9, 5, 14)).to(dtype).transpose(0, 2)
    scores[2] = -torch.inf
    scores[:, 1, 0] = -torch.inf
    scores[3, 3, 3] = torch.nan
    p = operators.mapping_forward(scores, None, None, kind, parameter, 0)
    g = torch.randn_like(p)
    g[p == 0] = torch.inf if kind == ENTMAX else 0.0  # Without effect.
    g[1, 2, 4] = torch.nan
    for alpha_gradient in (False, True) if kind == ENTMAX else (False,):
        alpha = torch.full((1, 1, 1), parameter).double() if alpha_gradient else None
        arguments = (p, g, alpha, kind, parameter, 0, alpha_gradient)
        actual, actual_alpha = _mapping_tensors.mapping_backward(*arguments)
        expected, expected_alpha = operators.mapping_backward(*arguments)
        assert actual.dtype == expected.dtype and actual.stride() == expected.stride()
        assert actual_alpha.shape == expected_alpha.shape
        if kind != ENTMAX:
            assert_same(actual, expected, 16 * torch.finfo(dtype).eps)
            continue
        # As mapping.h says of the CPU's; for large α, u and the partial derivatives are huge.
        log = torch.where(p > 0, p.double(), 1.0).log()
        u = torch.where(p > 0, ((2 - parameter) * log).exp(), 0.0)
        greatest = float(g[g.isfinite()].abs().max())
        bound = torch.finfo(dtype).eps * (16 + 8 * ((2 - parameter) * log).abs()) * u * greatest
        assert torch.equal(actual.isnan(), expected.isnan())
        assert not bool(((actual.double() - expected.double()).abs() > bound).any())
        if alpha_gradient:
            partial = (
                p.double() * log**2 * _mapping_tensors._second_remainder((1 - parameter) * log)
            )
            epsilon = 64 * torch.finfo(actual_alpha.dtype).eps
            bound = epsilon * partial.sum(0, keepdim=True) * greatest
            assert torch.equal(actual_alpha.isnan(), expected_alpha.isnan())
            error = (actual_alpha.double() - expected_alpha.double()).abs()
            assert not bool((error > bound).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "alpha"),
    [(ENTMAX, a) for a in (0.5, 1.0, 1.3, 1.5, 2.0, 3.0)] + [(NORMMAX, a) for a in (1.3, 2.0, 4.0)],
)
def test_losses(kind: int, alpha: float, dtype: torch.dtype) -> None:
    scores = (3 * torch.randn(12, 9)).to(dtype)
    target = torch.randint(9, (12,))
    target[0] = -100
    scores[1, 4] = torch.nan
    scores[2] = -torch.inf
    scores[3, target[3]] = -torch.inf
    scores[4, target[4]] = 50.0
    scores[5, 0] = torch.inf
    for rows in (scores, scores.t().contiguous().t()):
        actual, actual_grad = _mapping_tensors.fenchel_young_loss(rows, target, kind, alpha, -100)
        expected, expected_grad = operators.fenchel_young_loss(rows, target, kind, alpha, -100)
        assert actual.dtype == expected.dtype and actual_grad.dtype == expected_grad.dtype
        assert actual_grad.stride() == expected_grad.stride()
        assert_same(actual, expected, 1e-10 if dtype == torch.float64 else 1e-5)
        assert_same(actual_grad, expected_grad, 1e-9 if dtype == torch.float64 else 1e-5)
    assert actual[0] == 0 and bool((actual_grad[0] == 0).all())
    wrong = torch.tensor([0, 9, -1, 3] + [0] * 8)
    actual, actual_grad = _mapping_tensors.fenchel_young_loss(scores, wrong, kind, alpha, -100)
    assert bool(actual[[1, 2]].isnan().all()) and bool(actual_grad[[1, 2]].isnan().all())
    assert bool(actual[0].isfinite())


# --------------------------------------------------------------------- in the operators' own place


@pytest.fixture
def in_place() -> Iterator[None]:
    """The operators of CPU tensors are those of CUDA tensors."""
    library = torch.library.Library("flash_entmax", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, function in _mapping_tensors.OPERATORS.items():
                library.impl(name, function, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def test_they_are_registered_for_cuda() -> None:
    for name in _mapping_tensors.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_entmax::{name}", "CUDA")


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.3, 1.5, 2.0, 2.5])
def test_gradients(alpha: float) -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    rows = torch.full((3, 1), alpha, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: flash_entmax.entmax(s, alpha), (scores,))
    assert torch.autograd.gradcheck(flash_entmax.entmax, (scores, rows))
    assert torch.autograd.gradgradcheck(lambda s: flash_entmax.entmax(s, alpha), (scores,))
    target = torch.arange(3)
    assert torch.autograd.gradcheck(lambda s: flash_entmax.entmax_loss(s, target, alpha), (scores,))
    assert torch.autograd.gradcheck(lambda s: flash_entmax.normmax(s, 1 + alpha), (scores,))
    assert torch.autograd.gradcheck(lambda s: flash_entmax.budget(s, alpha), (scores,))


OPCHECKS: dict[str, tuple[Any, ...]] = {
    "mapping": (torch.randn(3, 5, requires_grad=True), None, None, ENTMAX, 1.5, -1),
    "mapping_forward": (torch.randn(5, 3).t(), None, torch.rand(3, 5) < 0.5, BUDGET, 1.5, 1),
    "mapping_with_statistics": (
        torch.randn(3, 5, requires_grad=True), torch.full((1, 5), 1.7, requires_grad=True), None,
        ENTMAX, 0.0, 0,
    ),
    "mapping_backward": (
        torch.randn(3, 5).softmax(-1).requires_grad_(), torch.randn(3, 5, requires_grad=True), None,
        ENTMAX, 1.5, -1, False,
    ),
    "fenchel_young_loss": (
        torch.randn(3, 5, requires_grad=True), torch.arange(3), ENTMAX, 1.5, -100,
    ),
    "fenchel_young_loss_forward": (torch.randn(3, 5), torch.arange(3), NORMMAX, 2.0, -100),
}  # fmt: skip


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(operators, name).default, OPCHECKS[name])


@pytest.mark.usefixtures("in_place")
def test_vmap_and_compile() -> None:
    torch._dynamo.reset()
    scores = torch.randn(4, 3, 5, dtype=torch.float64)
    alpha = 1.1 + torch.rand(4, 3, 1, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7

    def function(s: Tensor, a: Tensor, m: Tensor) -> Tensor:
        mapped = flash_entmax.entmax(s, a, mask=m)
        return mapped.square().sum() + flash_entmax.entmax15_loss(s, torch.arange(3))

    entries = list(zip(scores, alpha, mask, strict=True))
    expected = torch.stack([function(*entry) for entry in entries])
    assert_close(vmap(function)(scores, alpha, mask), expected, 1e-12)
    for argument in (0, 1):
        one = vmap(grad(function, argnums=argument))(scores, alpha, mask)
        other = torch.stack([grad(function, argnums=argument)(*entry) for entry in entries])
        assert_close(one, other, 1e-12)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaf = scores[0].clone().requires_grad_()
    for run in (function, compiled):
        actual = run(leaf, alpha[0], mask[0])
        assert_close(actual, expected[0], 1e-12)
        (gradient,) = torch.autograd.grad(actual, leaf)
        assert_close(gradient, grad(function)(*entries[0]), 1e-12)


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: flash_entmax.entmax(s, -1.0), "alpha: got -1"),
        (lambda s: flash_entmax.entmax(s, float("nan")), "alpha: got nan"),
        (lambda s: flash_entmax.entmax(s, mask=torch.ones(7).bool()), "mask: got shape"),
        (lambda s: flash_entmax.budget(s, 6.0), "budget: got 6"),
        (lambda s: flash_entmax.budget(s, 0.0), "budget: got 0"),
        (lambda s: flash_entmax.normmax(s, 1.0), "alpha: got 1"),
        (lambda s: flash_entmax.entmax_loss(s, torch.arange(2)), "target: got shape"),
        (lambda s: flash_entmax.entmax_loss(s, torch.arange(3), 0.0), "alpha: got 0"),
        (lambda s: flash_entmax.entmax(s[(None,) * 7]), "scores: got rank 9"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 5))
