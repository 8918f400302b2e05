"""Loads the operators, and tells PyTorch what it needs to know to trace and batch them.

The operators themselves are in ``python/csrc``: they validate, convert and call the C++ library.
This file adds the shapes of their results for tracing (fake kernels) and their gradients; the
mappings and losses of CUDA tensors are in ``_mapping_tensors.py``, the rules for ``torch.vmap`` in
``_vmap.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _mapping_tensors
from ._mapping_tensors import statistics_type

MAPPING_ENTMAX = _mapping_tensors.ENTMAX
MAPPING_NORMMAX = _mapping_tensors.NORMMAX
MAPPING_BUDGET = _mapping_tensors.BUDGET

# The tensors among the arguments of attention that can have a gradient: their positions, in the
# order of the results (and of the bits of `wanted`) of attention_backward.
GRADIENT_POSITIONS = (0, 1, 2, 3, 5, 6, 4)
# Tensors come first in the schemas of attention; then these plain arguments.
ATTENTION_TENSORS = 11
ATTENTION_ARGUMENTS = 19

torch.ops.load_library(  # type: ignore[no-untyped-call]
    str(Path(__file__).with_name("_operators.so"))
)
operators = torch.ops.flash_entmax


def transforms_active() -> bool:
    """Whether one of functorch's transforms (grad, vmap, …) is running."""
    return bool(torch._C._are_functorch_transforms_active())


# ------------------------------------------------------------------------------------- mappings


def _row_shape(tensor: Tensor, dim: int) -> list[int]:
    shape = list(tensor.shape)
    if shape:
        shape[dim] = 1
    return shape


def _mapping_fake(
    scores: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> Tensor:
    return torch.empty_like(scores)


def _mapping_with_statistics_fake(
    scores: Tensor, alpha: Tensor | None, mask: Tensor | None, kind: int, parameter: float, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _row_shape(scores, dim)
    return (
        torch.empty_like(scores),
        scores.new_empty(shape, dtype=statistics_type(scores.dtype)),
        scores.new_empty(shape, dtype=torch.int64),
    )


def _mapping_backward_fake(
    probabilities: Tensor,
    grad: Tensor,
    alpha: Tensor | None,
    kind: int,
    parameter: float,
    dim: int,
    alpha_gradient: bool,
) -> tuple[Tensor, Tensor]:
    shape = _row_shape(probabilities, dim) if alpha_gradient else [0]
    return (
        torch.empty_like(probabilities),
        probabilities.new_empty(shape, dtype=statistics_type(probabilities.dtype)),
    )


def _mapping_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, alpha, _, ctx.kind, ctx.parameter, ctx.dim = inputs
    ctx.save_for_backward(output if isinstance(output, Tensor) else output[0], alpha)
    ctx.set_materialize_grads(False)


def _mapping_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    probabilities, alpha = ctx.saved_tensors
    alpha_gradient = alpha is not None and ctx.needs_input_grad[1]
    backward = _MappingBackward.apply if transforms_active() else operators.mapping_backward
    grad_scores, grad_alpha = backward(
        probabilities, grad, alpha, ctx.kind, ctx.parameter, ctx.dim, alpha_gradient
    )
    if alpha_gradient:
        grad_alpha = grad_alpha.to(alpha.dtype)
    return grad_scores, grad_alpha if alpha_gradient else None, None, None, None, None


def _mapping_with_statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _mapping_setup(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1], output[2])


def _mapping_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    probabilities, grad, alpha, ctx.kind, ctx.parameter, ctx.dim, _ = inputs
    ctx.save_for_backward(probabilities, grad, alpha)
    ctx.set_materialize_grads(False)


def _mapping_double_backward(
    ctx: Any, v: Tensor | None, grad_grad_alpha: Tensor | None
) -> tuple[Any, ...]:
    """Gradients of y = u ⊙ (g − ḡ), with u = p^(2−α) and ḡ = (u·g)/Σu, in p, g and α.

    With v the gradient in y and v̄ = (u·v)/Σu: in g it is u ⊙ (v − v̄), because y is linear and
    symmetric in g; in u it is (g − ḡ) ⊙ (v − v̄); from u on the chain rule.
    """
    if grad_grad_alpha is not None and grad_grad_alpha.numel() > 0:
        raise NotImplementedError(
            "the gradient in alpha cannot be differentiated again; pass alpha as a number, or "
            "detach it, where second derivatives are needed"
        )
    if v is None:
        return (None,) * 7
    if ctx.kind == MAPPING_NORMMAX:
        raise NotImplementedError("normmax cannot be differentiated twice; entmax and budget can")
    p, g, alpha = ctx.saved_tensors
    grad_g = operators.mapping_backward(p, v, alpha, ctx.kind, ctx.parameter, ctx.dim, False)[0]
    if ctx.kind == MAPPING_BUDGET:  # u is 1 or 0.
        return torch.zeros_like(p), grad_g, None, None, None, None, None
    a = ctx.parameter if alpha is None else alpha
    positive = p > 0
    safe = torch.where(positive, p, 1.0)
    u = torch.where(positive, safe ** (2 - a), 0.0)
    total = u.sum(ctx.dim, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    centred_g = g - (u * g).sum(ctx.dim, keepdim=True) / total
    centred_v = v - (u * v).sum(ctx.dim, keepdim=True) / total
    grad_u = torch.where(positive, centred_g * centred_v, 0.0)
    grad_p = (grad_u * (2 - a) * safe ** (1 - a)).to(p.dtype)
    grad_alpha = None
    if alpha is not None and ctx.needs_input_grad[2]:
        grad_alpha = -(grad_u * u * safe.log()).sum(ctx.dim, keepdim=True).to(alpha.dtype)
    return grad_p, grad_g, grad_alpha, None, None, None, None


def _loss_fake(
    scores: Tensor, target: Tensor, kind: int, alpha: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    loss = scores.new_empty([scores.shape[0]], dtype=statistics_type(scores.dtype))
    return loss, torch.empty_like(scores)


def _loss_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # The scores only where they are needed to notice a second derivative.
    ctx.save_for_backward(output[1], inputs[0] if transforms_active() else None)
    ctx.set_materialize_grads(False)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _loss_save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _loss_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    grad_scores, scores = ctx.saved_tensors
    if torch.is_grad_enabled():
        # p − e_y was computed as numbers; a second derivative would not see that p has one.
        if scores is None:
            scores = torch.empty(0, requires_grad=True)
        grad_scores = _LossSecondDerivative.apply(grad_scores, scores)
    grad_scores = grad_scores * grad.unsqueeze(1).to(grad_scores.dtype)
    return grad_scores, None, None, None, None


def _loss_second_derivative(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "a Fenchel–Young loss cannot be differentiated twice; use create_graph=False"
    )


# ------------------------------------------------------------------------------------ attention


def _saved_bytes(args: tuple[Any, ...]) -> Any:
    query = args[0]
    shapes = [list(tensor.shape) for tensor in args[:3]]
    numbers = all(isinstance(size, int) for shape in shapes for size in shape)
    if numbers and query.device.type != "cuda":
        return operators.attention_saved_bytes(*shapes, query.dtype)
    alpha, scale, causal, window_left, window_right, softcap = args[11:17]
    plain = all(isinstance(n, int | float) for n in (alpha, softcap)) and all(
        n is None or isinstance(n, int | float) for n in (scale, window_left, window_right)
    )
    if numbers and plain and query.device.type == "cuda" and _plans_for_cuda():
        device = torch.cuda.current_device() if query.device.index is None else query.device.index
        optional = args[3:ATTENTION_TENSORS]
        tensors = sum(1 << i for i, tensor in enumerate(optional) if tensor is not None)
        return operators.attention_saved_bytes_cuda(
            *shapes, query.dtype, device, tensors, alpha, scale, causal, window_left, window_right,
            softcap,
        )  # fmt: skip
    # The engines' plans want numbers, and the GPU's a GPU: one more symbolic size.
    return torch.library.get_ctx().new_dynamic_size()


def _plans_for_cuda() -> bool:
    return hasattr(operators, "attention_saved_bytes_cuda") and torch.cuda.is_available()


def _attention_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = args[:3]
    save = args[ATTENTION_ARGUMENTS]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: got {tensor.dim()} dimensions; must have 4")
    batch, heads, length, _ = query.shape
    size = value.shape[3]
    if query.stride(1) < query.stride(2):  # As EmptyOutput in attention_ops.cc.
        output = query.new_empty([batch, length, heads, size]).transpose(1, 2)
    else:
        output = query.new_empty([batch, heads, length, size])
    threshold = query.new_empty([batch, heads, length], dtype=statistics_type(query.dtype))
    saved_bytes = _saved_bytes(args) if save else 0
    return output, threshold, query.new_empty([saved_bytes], dtype=torch.uint8)


def _attention_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:ATTENTION_TENSORS], output[2])
    ctx.plain = inputs[ATTENTION_TENSORS:ATTENTION_ARGUMENTS]


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _attention_save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1], output[2])


def _attention_gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * (ATTENTION_ARGUMENTS + 1)
    wanted = sum(1 << bit for bit, at in enumerate(GRADIENT_POSITIONS) if ctx.needs_input_grad[at])
    if grad is None or wanted == 0:
        return tuple(gradients)
    *tensors, saved = ctx.saved_tensors
    backward = _AttentionBackward.apply if transforms_active() else operators.attention_backward
    results = backward(*tensors, *ctx.plain, grad, saved, wanted)
    for bit, at in enumerate(GRADIENT_POSITIONS):
        if wanted >> bit & 1:
            gradients[at] = results[bit]
    return tuple(gradients)


def _attention_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    query = args[0]
    wanted = args[-1]
    results = []
    for bit, at in enumerate(GRADIENT_POSITIONS):
        tensor = args[at]
        if tensor is None:
            results.append(query.new_empty([0], dtype=statistics_type(query.dtype)))
        elif wanted >> bit & 1:
            results.append(torch.empty_like(tensor))
        else:
            results.append(tensor.new_empty([0]))
    return tuple(results)


def _attention_double_backward(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "attention cannot be differentiated twice; use create_graph=False, or compute the weights "
        "with flash_entmax.entmax, which can"
    )


def _attention_support_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    query = args[0]
    batch, heads, length, _ = query.shape
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        query.new_empty([batch * heads * length + 1], dtype=torch.int64),
        query.new_empty([entries], dtype=torch.int32),
        query.new_empty([entries], dtype=torch.float32),
    )


def _nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _register() -> None:
    library = torch.library
    for name, fake in (
        ("mapping", _mapping_fake),
        ("mapping_forward", _mapping_fake),
        ("mapping_with_statistics", _mapping_with_statistics_fake),
        ("mapping_backward", _mapping_backward_fake),
        ("fenchel_young_loss", _loss_fake),
        ("fenchel_young_loss_forward", _loss_fake),
        ("attention", _attention_fake),
        ("attention_forward", _attention_fake),
        ("attention_backward", _attention_backward_fake),
        ("attention_support", _attention_support_fake),
    ):
        library.register_fake(f"flash_entmax::{name}", fake)
    for name, gradient, setup in (
        ("mapping", _mapping_gradient, _mapping_setup),
        ("mapping_with_statistics", _mapping_gradient, _mapping_with_statistics_setup),
        ("mapping_backward", _mapping_double_backward, _mapping_backward_setup),
        ("fenchel_young_loss", _loss_gradient, _loss_setup),
        ("attention", _attention_gradient, _attention_setup),
        ("attention_backward", _attention_double_backward, _nothing),
    ):
        library.register_autograd(f"flash_entmax::{name}", gradient, setup_context=setup)
    _mapping_tensors.register()


_register()


_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, MemoryError, NotImplementedError)
}


def translated(error: RuntimeError) -> Exception:
    """The exception that an operator's error names (see ThrowIfError in tensors.cc)."""
    name, _, text = str(error).partition(": ")
    kind = _ERRORS.get(name)
    return error if kind is None else kind(text)


def call(function: Any, *args: Any) -> Any:
    """`function(*args)`, with the exceptions that Python users expect."""
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except RuntimeError as error:
        raise translated(error) from None


# How Python calls them. Where there is nothing to differentiate, the bare operators; elsewhere the
# same gradients in three forms: registered with the operator for PyTorch's tracers (one node in the
# graph), as an autograd Function that functorch's transforms can take apart, and as a plain one,
# which costs half as much per call.


def _transformable(setup: Any, gradient: Any, forward: Any) -> Any:
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(gradient),
    }
    return type("_Transformable", (torch.autograd.Function,), members)


class _Differentiable:
    """One of the operators `name`, which has a registered gradient, and `name`_forward.

    Called, it gives the operator's first result. `save` is `setup` without what concerns the
    others, which the plain autograd Function does not return.
    """

    def __init__(self, name: str, save: Any, setup: Any, gradient: Any) -> None:
        self.registered = getattr(operators, name).default
        bare = getattr(operators, f"{name}_forward").default
        self.bare = bare

        def plain(ctx: Any, *args: Any) -> Tensor:
            output = bare(*args)
            save(ctx, args, output)
            first: Tensor = output if isinstance(output, Tensor) else output[0]
            return first

        members = {"forward": staticmethod(plain), "backward": staticmethod(gradient)}
        self.plain = type("_Plain", (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]
        self.transformable = _transformable(setup, gradient, lambda *args: bare(*args)).apply

    def __call__(self, gradient: bool, *args: Any) -> Tensor:
        """`gradient`: whether an argument requires one and gradients are enabled."""
        if torch.compiler.is_compiling():
            output = self.registered(*args)
        else:
            function = self.plain if gradient else self.bare
            if transforms_active():
                function = self.transformable if torch.is_grad_enabled() else self.bare
            output = call(function, *args)
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        return first


_MappingBackward = _transformable(
    _mapping_backward_setup,
    _mapping_double_backward,
    lambda *args: operators.mapping_backward(*args),
)
_AttentionBackward = _transformable(
    _nothing, _attention_double_backward, lambda *args: operators.attention_backward(*args)
)
_LossSecondDerivative = _transformable(
    _nothing, _loss_second_derivative, lambda grad_scores, scores: grad_scores.clone()
)
_mapping = _Differentiable("mapping", _mapping_setup, _mapping_setup, _mapping_gradient)
_loss = _Differentiable("fenchel_young_loss", _loss_save, _loss_setup, _loss_gradient)
_attention = _Differentiable("attention", _attention_save, _attention_setup, _attention_gradient)


def mapping(*args: Any) -> Tensor:
    """Arguments of the operator `mapping`."""
    gradient = torch.is_grad_enabled() and (
        args[0].requires_grad or (args[1] is not None and args[1].requires_grad)
    )
    return _mapping(gradient, *args)


def loss(*args: Any) -> Tensor:
    """Arguments of the operator `fenchel_young_loss`; one loss a row."""
    return _loss(torch.is_grad_enabled() and args[0].requires_grad, *args)


def attention(*args: Any) -> Tensor:
    """Arguments of the operator `attention` up to `max_key_length`; the output."""
    gradient = False
    if torch.is_grad_enabled():
        for tensor in args[:7]:
            if tensor is not None and tensor.requires_grad:
                gradient = True
                break
    return _attention(gradient, *args, gradient)
