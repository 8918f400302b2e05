"""The mappings and their losses as compositions of PyTorch's tensor operations, for CUDA tensors.

Registered as the CUDA implementation of the operators that ``python/csrc/mapping_ops.cc``
implements on the CPU, with the same meaning; nothing here depends on the device. Nothing is read
back to the host: the number of passes depends on the shape, the type and the kind alone. Arguments
whose numbers are on the device are therefore not refused but answered: a row whose α is not
allowed, or whose target is no class, is NaN.

Everything is computed in float64, from distances to the largest score of the row, and rounded once.
The unknown is P, the probability of the largest score. With m = α − 1 and distances δ,

    p = P·[1 − m·δ·P^(−m)]₊^(1/m),      Q = P^m = m·max s − τ.

* **m ≤ 1.** Newton's method in Q on the α-norm (Σp)^m = 1, from Q = 1, where the row sums to at
  least 1. F(Q) = (Σp)^m − 1 is convex and rises in Q for m > 0 (for m < 0 the same holds of
  1 − (Σp)^m as Q falls), so that every iterate stays on its side; and a step of Newton's method on
  a convex function leaves F₊/F + F′₊/F′ ≤ 1, hence F₊·F′₊ ≤ ¼·F·F′. F and F′ begin at n^|m| or less
  and F′ ends at 1 or more (m < 0: one and n^−|m|), so that k steps leave an error of at most
  n^(2|m|)·4^(−k), relative to the largest entry: 26 + |m|·log₂ n steps settle a float64, and
  13 + |m|·log₂ n a float32, whatever the scores are. (Most rows need six; the number is fixed
  because asking would mean waiting for the device.)
* **m > 1.** Neither holds. P is halved in [1/n, 1] until its neighbours are left, 54 + log₂ n
  times; next to the threshold p is so steep that Σp may jump over 1 between the two, and the row
  is then the mixture of both that sums to 1.
* **Normmax** has the threshold of such a curve with m = (α − 1)/α < 1.
* **Budget.** With k the budget rounded up, the threshold is between the k-th largest score and one
  below it. That interval is halved, and a Newton step inside what is left ends it.

Cost, in passes over the row in float64 (8 bytes an entry, read or written; each kernel is one to
three of them): α = 1 six in the scores' own type or float32; α = 1.5 and 2 six a step; other α
16 a step, with a logarithm and two exponentials (m > 1: 11, one exponential); budget five a
halving, 54 of them (float32: 26), and a ``topk``. For α = 1.5, float32 and 32,768 entries that is
21 steps, about 130 passes. Backward: about ten passes, and about 50 more for the gradient in α.
Memory: two or three float64 tensors of the scores' shape, freed on return.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ENTMAX, NORMMAX, BUDGET = 0, 1, 2  # As MappingKind in mapping.h.

# In the place of m = 0, where 1/m has no value: p differs from softmax by less than 1e-25.
_TINY = 1e-30


def statistics_type(dtype: torch.dtype) -> torch.dtype:
    """Type of thresholds and of gradients of single numbers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_shape(tensor: Tensor, dim: int) -> list[int]:
    shape = list(tensor.shape)
    shape[dim] = 1
    return shape


def _rounded(values: Tensor, like: Tensor) -> Tensor:
    """In the type and with the strides that the operators' results have."""
    return torch.empty_like(like).copy_(values)


def _row_result(values: Tensor, like: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return like.new_empty(_row_shape(like, dim), dtype=dtype).copy_(values)


# ---------------------------------------------------------------------------------------- checks


def _check_tensor(scores: Tensor, dim: int) -> None:
    if not 1 <= scores.dim() <= 8:
        raise ValueError(f"scores: got rank {scores.dim()}; must be of rank 1 to 8")
    if not -scores.dim() <= dim < scores.dim():
        raise ValueError(f"dim: got {dim}; must be in [{-scores.dim()}, {scores.dim() - 1}]")


def _check_parameter(kind: int, parameter: float, size: int, entries: int) -> None:
    if kind == BUDGET:
        if entries > 0 and not 0.0 < parameter <= size:
            raise ValueError(
                f"budget: got {parameter}; must be > 0 and at most the row length, {size}"
            )
    elif not (math.isfinite(parameter) and parameter > (0.0 if kind == ENTMAX else 1.0)):
        rule = "finite and > 0" if kind == ENTMAX else "finite and > 1 for normmax"
        raise ValueError(f"alpha: got {parameter}; must be {rule}")


def _alpha_rows(kind: int, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """α of every row in float64, with something harmless where it is not allowed, and where."""
    rows = alpha.double()
    allowed = rows.isfinite() & (rows > (0.0 if kind == ENTMAX else 1.0))
    return torch.where(allowed, rows, 1.5), allowed


# --------------------------------------------------------------------------------------- solvers


def _steps(growth: float, size: int, dtype: torch.dtype) -> int:
    """Newton steps that settle any row; `growth` is the largest |m|. See above."""
    digits = 26 if dtype == torch.float64 else 13
    return digits + math.ceil(growth * math.log2(max(size, 2)))


def _solve_simple(distance: Tensor, slope: float, square: bool, steps: int, dim: int) -> Tensor:
    """Q with Σ [Q − slope·δ]₊ = 1, or Σ of the squares = 1; leaves p in `distance`."""
    y = distance if slope == 1.0 else distance.mul_(slope)
    level = torch.ones_like(y.narrow(dim, 0, 1))
    above = torch.empty_like(y)
    for _ in range(steps):
        torch.sub(level, y, out=above).clamp_(min=0.0)
        total = above.sum(dim, keepdim=True)
        if square:
            norm = torch.linalg.vector_norm(above, 2, dim, keepdim=True)
            level = level - norm * (norm - 1.0) / total
        else:
            count = torch.linalg.vector_norm(above, 0, dim, keepdim=True)
            level = level - (total - 1.0) / count
    y.neg_().add_(level).clamp_(min=0.0)
    if square:
        y.square_()
    return level


def _solve_curve(
    y: Tensor, m: float | Tensor, weight_exponent: float | Tensor | None, dtype: torch.dtype,
    dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """p and P of p = P·[1 − y·P^(−m)]₊^(1/m), Σp = 1, for m of any size but 0.

    With `weight_exponent` w, the first result is [1 − y·P^(−m)]₊^w, normalised, instead.
    """
    size = y.shape[dim]
    maybe_steep = isinstance(m, Tensor) or m > 1.0
    maybe_flat = isinstance(m, Tensor) or m <= 1.0
    low = torch.full_like(y.narrow(dim, 0, 1), 1.0 / size)
    peak = high = torch.ones_like(low)
    first, second = torch.empty_like(y), torch.empty_like(y)

    def log_base(peak: Tensor, out: Tensor) -> Tensor:
        # A product with δ = 0 must stay 0.
        steepness = torch.pow(peak, -m).clamp_(max=1e280)
        return torch.mul(y, -steepness, out=out).clamp_(min=-1.0).log1p_()

    if isinstance(m, Tensor):
        exponents = 1.0 / m - 1.0
        exponent: float | Tensor = torch.where(exponents == 0.0, _TINY, exponents)  # 0·log 0
        growth = 1.0
    else:
        exponent = 1.0 / m - 1.0 or _TINY
        growth = abs(m)
    newton = _steps(growth, size, dtype) if maybe_flat else 0
    halvings = 54 + math.ceil(math.log2(max(size, 2))) if maybe_steep else 0
    for step in range(max(newton, halvings)):
        log = log_base(peak, first)
        relative = torch.div(log, m, out=second).exp_().sum(dim, keepdim=True)
        total = peak * relative
        following = peak
        if step < newton:
            slope = log.mul_(exponent).exp_().sum(dim, keepdim=True)
            change = relative / slope * torch.expm1(-m * total.log())
            following = peak * torch.exp(torch.log1p(change) / m)
        if maybe_steep:
            more = total >= 1.0
            high = torch.where(more, peak, high)
            low = torch.where(more, low, peak)
            middle = 0.5 * (low + high)
            following = torch.where(m > 1.0, middle, following) if isinstance(m, Tensor) else middle
        peak = following
    if weight_exponent is not None:
        weights = log_base(peak, first).mul_(weight_exponent).exp_()
        return weights.div_(weights.sum(dim, keepdim=True)), peak
    if not maybe_steep:
        return log_base(peak, first).div_(m).exp_().mul_(peak), peak
    if isinstance(m, Tensor):  # Nothing to mix in the rows with m ≤ 1.
        low, high = (torch.where(m > 1.0, end, peak) for end in (low, high))
    lower = log_base(low, first).div_(m).exp_().mul_(low)
    upper = log_base(high, second).div_(m).exp_().mul_(high)
    below, beyond = (end.sum(dim, keepdim=True) for end in (lower, upper))
    share = ((1.0 - below) / (beyond - below)).clamp_(0.0, 1.0).nan_to_num_(nan=1.0)
    return torch.lerp(lower, upper, share), high


def _solve_budget(scores: Tensor, budget: float, dim: int, accurate: bool) -> tuple[Tensor, Tensor]:
    """clamp(s − τ, 0, 1) that sum to the budget, and τ."""
    chosen = math.ceil(budget)
    pivot = scores.topk(chosen, dim, sorted=False).values.amin(dim, keepdim=True).double()
    # τ = pivot − shift with shift in [0, 1]; −∞ where everything is chosen.
    everything = (scores > -torch.inf).sum(dim, keepdim=True) <= budget
    origin = torch.where(everything, 0.0, pivot)
    relative = torch.sub(scores, origin)  # float64
    buffer = torch.empty_like(relative)
    low, high = torch.zeros_like(origin), torch.ones_like(origin)
    for _ in range(54 if accurate else 26):
        middle = 0.5 * (low + high)
        torch.add(relative, middle, out=buffer).clamp_(0.0, 1.0)
        more = buffer.sum(dim, keepdim=True) >= budget
        high = torch.where(more, middle, high)
        low = torch.where(more, low, middle)
    torch.add(relative, high, out=buffer)
    active = ((buffer > 0.0) & (buffer < 1.0)).sum(dim, keepdim=True)
    excess = buffer.clamp_(0.0, 1.0).sum(dim, keepdim=True) - budget
    shift = torch.where(active > 0, high - excess / active, high)
    shift = torch.minimum(torch.maximum(shift, low), high)
    probabilities = relative.add_(shift).clamp_(0.0, 1.0)
    probabilities = torch.where(everything, (scores > -torch.inf).double(), probabilities)
    return probabilities, torch.where(everything, -torch.inf, origin - shift)


def _solve(
    scores: Tensor, top: Tensor, alpha: Tensor | None, kind: int, parameter: float, dim: int
) -> tuple[Tensor, Tensor]:
    """p and τ in float64, of scores with −∞ where masked; `top` is the largest of each row."""
    accurate = scores.dtype == torch.float64
    if kind == BUDGET:
        return _solve_budget(scores, parameter, dim, accurate)
    number = parameter
    if alpha is None and kind == ENTMAX and number == 1.0:
        p = torch.softmax(scores, dim, dtype=statistics_type(scores.dtype))
        return p, top.double() - p.amax(dim, keepdim=True).double().log()
    top = top.double()
    distance = torch.sub(top, scores)  # float64, whatever the scores are.
    if alpha is None:
        m = number - 1.0 if kind == ENTMAX else (number - 1.0) / number
        slope = m if kind == ENTMAX else 1.0
        # The probabilities of 2-normmax are not those of its curve.
        if m == 0.5 or m == 1.0:
            square = m == 0.5
            steps = _steps(m, distance.shape[dim], scores.dtype)
            level = _solve_simple(distance, slope, square, steps, dim)
            if kind == NORMMAX:
                distance.sqrt_()
                distance.div_(distance.sum(dim, keepdim=True))
            return distance, slope * top - level
        weight = 1.0 / (number - 1.0) if kind == NORMMAX else None
        p, peak = _solve_curve(distance.mul_(slope), m, weight, scores.dtype, dim)
        return p, slope * top - peak**m
    rows, allowed = _alpha_rows(kind, alpha)
    if kind == NORMMAX:
        exponents = (rows - 1.0) / rows
        p, peak = _solve_curve(distance, exponents, 1.0 / (rows - 1.0), scores.dtype, dim)
        threshold = top - peak**exponents
    else:
        softmax = rows == 1.0
        exponents = torch.where(softmax, _TINY, rows - 1.0)
        p, peak = _solve_curve(distance.mul_(exponents), exponents, None, scores.dtype, dim)
        threshold = (rows - 1.0) * top - peak**exponents
        threshold = torch.where(softmax, top - peak.log(), threshold)
    return torch.where(allowed, p, torch.nan), torch.where(allowed, threshold, torch.nan)


def _map(
    scores: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> tuple[Tensor, Tensor]:
    """p and τ, in float64 or a type that holds them as well; rows without entries are excluded."""
    if mask is not None:
        scores = torch.where(mask.bool(), scores, -torch.inf)
    top = scores.amax(dim, keepdim=True)  # NaN if there is one.
    defined = top.isfinite()
    p, threshold = _solve(scores, top, alpha, kind, parameter, dim)
    # Nothing to choose from is nothing chosen; what has no order has no probabilities.
    p = torch.where(defined, p, torch.where(top == -torch.inf, 0.0, torch.nan).to(p.dtype))
    return p, torch.where(defined, threshold, torch.nan)


# ------------------------------------------------------------------------------------- operators


def _without_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients are registered with the operators; none of the steps in between has one."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return run


def _checked(
    tensor: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> None:
    _check_tensor(tensor, dim)
    if alpha is None or kind == BUDGET:
        _check_parameter(kind, parameter, tensor.shape[dim], tensor.numel())
    for name, other, shape in (
        ("alpha", alpha, _row_shape(tensor, dim)),
        ("mask", mask, list(tensor.shape)),
    ):
        if other is None:
            continue
        if other.device != tensor.device:
            raise ValueError(
                f"{name}: got a tensor on {other.device}; must be on {tensor.device}, as scores is"
            )
        own = list(other.shape)
        fitting = shape[len(shape) - len(own) :] if len(own) <= len(shape) else None
        if fitting is None or any(a not in (1, b) for a, b in zip(own, fitting, strict=True)):
            raise ValueError(f"{name}: got shape {own}; must be broadcastable to {shape}")


@_without_gradient
def mapping(
    scores: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> Tensor:
    """The operators `mapping` and `mapping_forward`."""
    _checked(scores, alpha, mask, kind, parameter, dim)
    if scores.numel() == 0:
        return torch.empty_like(scores)
    return _rounded(_map(scores, alpha, mask, kind, parameter, dim)[0], scores)


@_without_gradient
def mapping_with_statistics(
    scores: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name."""
    _checked(scores, alpha, mask, kind, parameter, dim)
    dtype = statistics_type(scores.dtype)
    if scores.numel() == 0:
        shape = _row_shape(scores, dim)
        return (
            torch.empty_like(scores),
            scores.new_full(shape, torch.nan, dtype=dtype),
            scores.new_zeros(shape, dtype=torch.int64),
        )
    p, threshold = _map(scores, alpha, mask, kind, parameter, dim)
    p = _rounded(p, scores)
    size = (p > 0).sum(dim, keepdim=True)
    return (
        p,
        _row_result(threshold, scores, dim, dtype),
        _row_result(size, scores, dim, torch.int64),
    )


def _second_remainder(z: Tensor) -> Tensor:
    """φ₂(z) = (e^z − 1 − z)/z², ½ at 0."""
    # Where the quotient would cancel: ½·(1 + z/3·(1 + z/4·(1 + …))).
    small = z.clamp(-0.125, 0.125)
    one = torch.ones((), dtype=z.dtype, device=z.device)
    series = torch.ones_like(z)
    for k in range(12, 2, -1):
        series = torch.addcmul(one, series, small, value=1.0 / k)
    near = z.abs() <= 0.125
    safe = torch.where(near, 1.0, z)
    return torch.where(near, 0.5 * series, (torch.expm1(safe) - safe) / (safe * safe))


def _entmax_backward(
    p: Tensor, g: Tensor, alpha: Tensor | float, dim: int, alpha_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    positive = p > 0.0
    zero = p.new_zeros(())
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        u = torch.where(positive, p, zero)
    elif not isinstance(alpha, Tensor) and alpha == 1.5:
        u = torch.where(positive, p, zero).sqrt_()
    elif not isinstance(alpha, Tensor) and alpha == 2.0:
        u = positive.to(p.dtype)
    else:
        u = torch.where(positive, torch.pow(torch.where(positive, p, 1.0), 2.0 - alpha), zero)
    # g outside the support does not matter, not even if it is infinite.
    kept = torch.where(positive, g, zero)
    total = u.sum(dim, keepdim=True)
    mean = (u * kept).sum(dim, keepdim=True) / torch.where(total > 0.0, total, 1.0)
    centred = torch.where(positive, kept - mean, zero)
    grad_scores = u.mul_(centred)
    if not alpha_gradient:
        return grad_scores, None
    log = torch.where(positive, p, 1.0).log_()
    partial = _second_remainder(log * (1.0 - alpha)).mul_(log).mul_(log).mul_(p)
    partial = torch.where(positive, partial.mul_(centred), zero)
    return grad_scores, partial.sum(dim, keepdim=True).neg_()


def _normmax_backward(p: Tensor, g: Tensor, alpha: Tensor | float, dim: int) -> Tensor:
    positive = p > 0.0
    zero = p.new_zeros(())
    safe = torch.where(positive, p, 1.0)
    kept = torch.where(positive, g, zero)
    p = torch.where(positive, p, zero)
    mean = (p * kept).sum(dim, keepdim=True)
    power = torch.where(positive, torch.pow(safe, alpha), zero).sum(dim, keepdim=True)
    factor = torch.pow(power, (alpha - 1.0) / alpha) / (alpha - 1.0)
    weight = factor * torch.pow(safe, 2.0 - alpha)
    change = torch.where(positive, weight * (kept - mean), zero)
    return change.sub_(p * change.sum(dim, keepdim=True))


def _budget_backward(p: Tensor, g: Tensor, dim: int) -> Tensor:
    moves = (p > 0.0) & (p < 1.0)
    kept = torch.where(moves, g, 0.0)
    mean = kept.sum(dim, keepdim=True) / moves.sum(dim, keepdim=True).clamp_(min=1)
    return torch.where(moves, kept - mean, 0.0)


@_without_gradient
def mapping_backward(
    probabilities: Tensor, grad: Tensor, alpha: Tensor | None, kind: int, parameter: float,
    dim: int, alpha_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator of that name."""
    _checked(probabilities, alpha, None, kind, parameter, dim)
    if grad.shape != probabilities.shape or grad.dtype != probabilities.dtype:
        raise ValueError(
            f"grad_probabilities: got {grad.dtype} of shape {list(grad.shape)}; must be "
            f"{probabilities.dtype} of shape {list(probabilities.shape)}"
        )
    if alpha_gradient and kind != ENTMAX:
        raise NotImplementedError(
            "grad_alpha: got a tensor; must be left out for normmax and budget, whose gradient in "
            "α is not provided"
        )
    dtype = statistics_type(probabilities.dtype)
    p, g = probabilities.double(), grad.double()
    undefined = (probabilities + grad).isnan().any(dim, keepdim=True)
    order: Tensor | float = parameter
    if alpha is not None and kind != BUDGET:
        order, allowed = _alpha_rows(kind, alpha)
        undefined = undefined | ~allowed
    grad_alpha = None
    if kind == ENTMAX:
        grad_scores, grad_alpha = _entmax_backward(p, g, order, dim, alpha_gradient)
    elif kind == NORMMAX:
        grad_scores = _normmax_backward(p, g, order, dim)
    else:
        grad_scores = _budget_backward(p, g, dim)
    grad_scores = _rounded(torch.where(undefined, torch.nan, grad_scores), probabilities)
    if grad_alpha is None:
        return grad_scores, probabilities.new_empty([0], dtype=dtype)
    grad_alpha = torch.where(undefined, torch.nan, grad_alpha)
    return grad_scores, _row_result(grad_alpha, probabilities, dim, dtype)


def _entropy(p: Tensor, kind: int, alpha: float) -> Tensor:
    """H(p) of loss.h, one number a row of [rows, classes]."""
    if kind == NORMMAX:
        return 1.0 - p.pow(alpha).sum(1).pow_(1.0 / alpha)
    m = alpha - 1.0
    log = torch.where(p > 0.0, p, 1.0).log_()
    # (p − p^α)/m = −p·(p^m − 1)/m, which tends to −p·log p as α → 1 without cancellation.
    part = log if m == 0.0 else log.mul_(m).expm1_().div_(m)
    return part.mul_(p).sum(1).div_(-alpha)


@_without_gradient
def fenchel_young_loss(
    scores: Tensor, target: Tensor, kind: int, alpha: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The operators `fenchel_young_loss` and `fenchel_young_loss_forward`."""
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(
            f"scores: got shape {list(scores.shape)}; must be [rows, classes] with at least one "
            "class"
        )
    rows, classes = scores.shape
    if target.dtype != torch.int64:
        raise ValueError(f"target: got {target.dtype}; must be int64")
    if list(target.shape) != [rows]:
        raise ValueError(f"target: got shape {list(target.shape)}; must be [{rows}]")
    if target.device != scores.device:
        raise ValueError(
            f"target: got a tensor on {target.device}; must be on {scores.device}, as scores is"
        )
    if kind not in (ENTMAX, NORMMAX):
        raise ValueError("kind: got kBudget; must be kEntmax or kNormmax")
    _check_parameter(kind, alpha, classes, scores.numel())
    wide = scores.double()
    p, threshold = _map(wide, None, None, kind, alpha, 1)
    ignored = target == ignore_index
    invalid = ((target < 0) | (target >= classes)) & ~ignored
    safe = torch.where(ignored, 0, target).clamp_(0, classes - 1).unsqueeze(1)
    # (p − e_y)·s, summed as differences from s_y, which are small near L = 0.
    inner = torch.where(p > 0.0, p * (wide - wide.gather(1, safe)), 0.0).sum(1)
    loss = (inner + _entropy(p, kind, alpha)).clamp_(min=0.0)
    undefined = threshold.squeeze(1).isnan() | invalid
    loss = torch.where(undefined, torch.nan, loss).masked_fill_(ignored, 0.0)
    hit = torch.arange(classes, device=scores.device) == safe
    grad = torch.where(hit, p - 1.0, p)
    grad = torch.where(undefined.unsqueeze(1), torch.nan, grad)
    grad.masked_fill_(ignored.unsqueeze(1), 0.0)
    result = scores.new_empty([rows], dtype=statistics_type(scores.dtype)).copy_(loss)
    return result, _rounded(grad, scores)


OPERATORS: dict[str, Callable[..., Any]] = {
    "mapping": mapping,
    "mapping_forward": mapping,
    "mapping_with_statistics": mapping_with_statistics,
    "mapping_backward": mapping_backward,
    "fenchel_young_loss": fenchel_young_loss,
    "fenchel_young_loss_forward": fenchel_young_loss,
}


def register() -> None:
    """Called once, after the operators are loaded."""
    for name, function in OPERATORS.items():
        torch.library.register_kernel(f"flash_entmax::{name}", "cuda", function)
