"""The stand-in for deep-spin's package against the package itself."""

from __future__ import annotations

import inspect
from typing import Any

import entmax as original
import pytest
import torch
from torch import Tensor

from flash_entmax.compat import entmax as ours
from reference import assert_close

FUNCTIONS = [
    "sparsemax", "entmax15", "sparsemax_bisect", "entmax_bisect", "normmax_bisect", "budget_bisect",
    "sparsemax_loss", "entmax15_loss", "sparsemax_bisect_loss", "entmax_bisect_loss",
    "normmax_bisect_loss",
]  # fmt: skip
MODULES = [
    "Sparsemax", "Entmax15", "SparsemaxBisect", "EntmaxBisect", "NormmaxBisect", "BudgetBisect",
    "SparsemaxLoss", "SparsemaxBisectLoss", "Entmax15Loss", "EntmaxBisectLoss", "NormmaxBisectLoss",
]  # fmt: skip


def test_every_public_name_is_there() -> None:
    names = {
        name
        for name, value in vars(original).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert names == set(FUNCTIONS) | set(MODULES)
    assert names <= set(ours.__all__)
    assert ours.__version__ == original.__version__


@pytest.mark.parametrize("name", FUNCTIONS + MODULES)
def test_signatures(name: str) -> None:
    """The original's parameters in order, with its defaults; more may follow."""
    expected = inspect.signature(getattr(original, name)).parameters
    actual = inspect.signature(getattr(ours, name)).parameters
    shared = list(actual.values())[: len(expected)]
    assert [p.name for p in shared] == list(expected)
    assert [p.default for p in shared] == [p.default for p in expected.values()]
    assert all(p.default is not p.empty for p in list(actual.values())[len(expected) :])


def gradients(function: Any, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
    return output, list(grads)


def compare(name: str, tensors: list[Tensor], tolerance: float, *args: Any, **kwargs: Any) -> None:
    actual, grads = gradients(lambda *t: getattr(ours, name)(*t, *args, **kwargs), tensors)
    expected, others = gradients(lambda *t: getattr(original, name)(*t, *args, **kwargs), tensors)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, tolerance)
    for one, other in zip(grads, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert_close(one, other, 20 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sparsemax", {}),
        ("sparsemax", {"k": 3}),
        ("entmax15", {}),
        ("entmax15", {"k": 100}),
        ("sparsemax_bisect", {"n_iter": 60}),
        ("entmax_bisect", {"n_iter": 60}),
        ("entmax_bisect", {"alpha": 1.2, "n_iter": 60, "ensure_sum_one": False}),
        ("entmax_bisect", {"alpha": 2.5, "n_iter": 60}),
        ("entmax_bisect", {"alpha": 0.7, "n_iter": 60}),
        ("normmax_bisect", {"n_iter": 60}),
        ("normmax_bisect", {"alpha": 1.5, "n_iter": 60}),
        ("budget_bisect", {"n_iter": 60}),
        ("budget_bisect", {"budget": 1.5, "n_iter": 60}),
    ],
)
def test_mappings(name: str, arguments: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
    scores = torch.randn(4, 5, 6).to(dtype)
    compare(name, [scores], 1e-9 if dtype == torch.float64 else 2e-5, dim=dim, **arguments)


@pytest.mark.parametrize("scores_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha_type", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4, 1), (1,), (4, 1, 1)])
def test_tensor_alpha(
    shape: tuple[int, ...], alpha_type: torch.dtype, scores_type: torch.dtype
) -> None:
    """Values, the gradient in α, and the type that comes of two types."""
    scores = torch.randn(4, 6) if len(shape) < 3 else torch.randn(4, 3, 6)
    alpha = 1.2 + 0.7 * torch.rand(shape)
    both_double = scores_type == alpha_type == torch.float64
    compare(
        "entmax_bisect",
        [scores.to(scores_type), alpha.to(alpha_type)],
        1e-8 if both_double else 1e-4,
        n_iter=60,
    )


def test_tensor_alpha_along_another_dimension() -> None:
    scores = torch.randn(3, 4, 2, dtype=torch.float64)
    alpha = 1.1 + torch.rand(3, 1, 2, dtype=torch.float64)
    compare("entmax_bisect", [scores, alpha], 1e-8, dim=1, n_iter=60)


@pytest.mark.parametrize("name", ["normmax_bisect", "budget_bisect"])
def test_tensor_parameters(name: str) -> None:
    scores = torch.randn(5, 4, 6, dtype=torch.float64)
    parameter = 1.2 + 2.5 * torch.rand(5, 1, 6, dtype=torch.float64)
    if name == "budget_bisect":
        parameter = parameter.round(decimals=0)
    compare(name, [scores], 1e-8, parameter, dim=1, n_iter=60)
    compare(name, [scores], 1e-8, torch.tensor(2.0, dtype=torch.float64), n_iter=60)
    compare(name, [scores.float()], 1e-4, torch.tensor(2.0, dtype=torch.float64), n_iter=60)


@pytest.mark.parametrize("budget", [0, 6, 0.0])
def test_budgets_at_the_ends(budget: float) -> None:
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    actual = ours.budget_bisect(scores, torch.tensor(budget, dtype=torch.float64))
    assert_close(actual, original.budget_bisect(scores, budget, n_iter=60), 1e-12)
    actual.sum().backward()
    assert scores.grad is not None and torch.equal(scores.grad, torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sparsemax_loss", {}),
        ("sparsemax_loss", {"k": 4}),
        ("entmax15_loss", {"k": None}),
        ("sparsemax_bisect_loss", {"n_iter": 60}),
        ("entmax_bisect_loss", {"n_iter": 60}),
        ("entmax_bisect_loss", {"alpha": 1.3, "n_iter": 60}),
        ("entmax_bisect_loss", {"alpha": torch.tensor(1.3, dtype=torch.float64), "n_iter": 60}),
        ("normmax_bisect_loss", {"n_iter": 60}),
        ("normmax_bisect_loss", {"alpha": 3.0, "n_iter": 60}),
    ],
)
def test_losses(name: str, arguments: dict[str, Any]) -> None:
    scores = torch.randn(5, 7, dtype=torch.float64)
    compare(name, [scores], 1e-7, torch.randint(7, (5,)), **arguments)
    if not isinstance(arguments.get("alpha"), Tensor):
        compare(name, [scores.float()], 1e-4, torch.randint(7, (5,)), **arguments)


def test_loss_with_one_alpha_a_row() -> None:
    scores = torch.randn(4, 7, dtype=torch.float64)
    target = torch.randint(7, (4,))
    alpha = torch.tensor([1.2, 1.5, 1.5, 2.0], dtype=torch.float64)
    actual = ours.entmax_bisect_loss(scores, target, alpha[:, None])
    for row in range(4):
        alone = ours.entmax_bisect_loss(scores[[row]], target[[row]], float(alpha[row]))
        assert_close(actual[[row]], alone, 1e-12)


@pytest.mark.parametrize("reduction", ["elementwise_mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("Loss")])
def test_loss_modules(name: str, ignore_index: int, reduction: str) -> None:
    target = torch.randint(5, (6,))
    target[0] = 2
    arguments = {"ignore_index": ignore_index, "reduction": reduction}
    results = []
    for package in (ours, original):
        module = getattr(package, name)(**arguments)
        generator = torch.Generator().manual_seed(1)
        scores = torch.randn(6, 5, dtype=torch.float64, generator=generator, requires_grad=True)
        loss = module(scores, target)
        (grad,) = torch.autograd.grad(loss.sum(), scores)
        results.append((loss, grad))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-8)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("Loss")])
def test_mapping_modules(name: str) -> None:
    scores = torch.randn(3, 4, 5, dtype=torch.float64)
    arguments = {"dim": 1} | ({"n_iter": 60} if "Bisect" in name else {})
    module = getattr(ours, name)(**arguments)
    assert_close(module(scores), getattr(original, name)(**arguments)(scores), 1e-8)


def test_alpha_may_be_a_parameter() -> None:
    module = ours.EntmaxBisect(torch.nn.Parameter(torch.tensor(1.5)))
    module(torch.randn(3, 5)).square().sum().backward()
    (alpha,) = module.parameters()
    assert alpha.grad is not None


def test_support_size() -> None:
    scores = torch.randn(3, 4, 5)
    for name in ("sparsemax", "entmax15"):
        weights, size = getattr(ours, name)(scores, dim=1, return_support_size=True)
        assert torch.equal(size, (weights > 0).sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
def test_hidden_scores(name: str) -> None:
    scores = torch.randn(2, 6)
    scores[:, 3:] = -torch.inf
    compare(name, [scores.double()], 1e-9)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax_bisect", "budget_bisect"])
def test_second_derivatives(name: str) -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(getattr(ours, name), (scores,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: ours.sparsemax(s, k=1.5), TypeError, "k: got float"),
        (lambda s: ours.entmax_bisect(s, n_iter="9"), TypeError, "n_iter: got str"),
        (lambda s: ours.entmax_bisect(s.int()), TypeError, "X: got torch.int32"),
        (lambda s: ours.entmax_bisect(s, -1), ValueError, "alpha: got -1"),
        (lambda s: ours.entmax15(s, dim=3), ValueError, "dim: got 3"),
        (lambda s: ours.entmax15_loss(s, torch.full((4,), -100)), ValueError, "target"),
        (lambda s: ours.EntmaxBisectLoss(reduction="mean"), ValueError, "reduction: got 'mean'"),
        (lambda s: ours.entmax_bisect_loss(s, torch.zeros(4).long(), torch.ones(3)), ValueError,
         r"alpha: got shape \[3\]"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4, 6))
