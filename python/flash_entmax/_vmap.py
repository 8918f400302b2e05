"""How the operators are batched by ``torch.vmap``.

Mappings and losses get the batch as one more leading dimension. Attention folds it into the heads:
heads are independent, and every argument that can have a gradient is given per head or can be. Only
arguments given per batch entry (lengths, masks, packed sequences) make it run one problem after
the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._library import ATTENTION_ARGUMENTS, GRADIENT_POSITIONS, operators

# Positions of attention's arguments that are given per batch entry.
_PER_BATCH = (7, 8, 9, 10)


def _front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with the batch in front, repeated if it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: Any, args: Any) -> Any:
    """Runs the operator for each entry of the batch, and stacks the results."""
    results = []
    for index in range(info.batch_size):
        results.append(
            operator(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
        )
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _mapping_rule(operator: Callable[..., Any], tensors: int, dim_at: int) -> Callable[..., Any]:
    """For operators whose first argument has `dim`, and tensors that broadcast to its shape."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        first = _front(args[0], in_dims[0], info.batch_size)
        rank = first.dim()
        moved: list[Any] = [first]
        for tensor, dim in zip(args[1:tensors], in_dims[1:tensors], strict=True):
            if tensor is not None and dim is not None:
                tensor = tensor.movedim(dim, 0)
                missing = rank - tensor.dim()
                tensor = tensor.reshape(tensor.shape[0], *[1] * missing, *tensor.shape[1:])
            moved.append(tensor)
        rest = list(args[tensors:])
        at = dim_at - tensors
        if rest[at] >= 0:
            rest[at] += 1
        result = operator(*moved, *rest)
        if isinstance(result, Tensor):
            return result, 0
        # The gradient in α has no elements where it was not asked for.
        return result, tuple(None if part.shape == (0,) else 0 for part in result)

    return rule


def _loss_rule(
    operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> Any:
    """Rows are independent: the batch becomes more of them."""
    scores, target = (_front(args[i], in_dims[i], info.batch_size) for i in (0, 1))
    batch, rows, classes = scores.shape
    loss, grad = operator(
        scores.reshape(batch * rows, classes), target.reshape(batch * rows), *args[2:]
    )
    return (loss.view(batch, rows), grad.view(batch, rows, classes)), (0, 0)


class _Fold:
    """Attention's arguments with the batch folded into the heads, and its results unfolded."""

    def __init__(self, info: Any, in_dims: Any, args: Any) -> None:
        self.size = info.batch_size
        self.in_dims, self.args = in_dims, args

    def _at(self, position: int) -> Tensor:
        return _front(self.args[position], self.in_dims[position], self.size)

    def heads_second(self, tensor: Tensor) -> Tensor:
        """[size, batch, heads, …] to [batch, size·heads, …]."""
        tensor = tensor.movedim(0, 1)
        return tensor.reshape(tensor.shape[0], tensor.shape[1] * tensor.shape[2], *tensor.shape[3:])

    def unfold(self, tensor: Tensor) -> Tensor:
        """[batch, size·heads, …] to [size, batch, heads, …]."""
        heads = tensor.shape[1] // self.size
        shape = (tensor.shape[0], self.size, heads, *tensor.shape[2:])
        return tensor.reshape(shape).movedim(1, 0)

    def _broadcastable(self, position: int, rank: int) -> Tensor | None:
        """Query scale or bias, with the heads written out."""
        if self.args[position] is None:
            return None
        tensor = self._at(position)
        missing = rank - (tensor.dim() - 1)
        tensor = tensor.reshape(self.size, *[1] * missing, *tensor.shape[1:])
        heads = self._at(0).shape[2]
        return self.heads_second(tensor.expand(-1, -1, heads, *[-1] * (rank - 2)))

    def arguments(self) -> list[Any]:
        folded = [self.heads_second(self._at(i)) for i in range(3)]
        slopes = [
            None if self.args[i] is None else self._at(i).reshape(-1) for i in (3, 6)
        ]  # α and the slopes of ALiBi.
        return [
            *folded,
            slopes[0],
            self._broadcastable(4, 3),
            self._broadcastable(5, 4),
            slopes[1],
            *self.args[7:ATTENTION_ARGUMENTS],
        ]

    def gradient(self, bit: int, gradient: Tensor) -> Tensor:
        """The gradient of argument number `bit`, of the argument's own shape in each entry."""
        position = GRADIENT_POSITIONS[bit]
        dim = self.in_dims[position]
        own = list(self.args[position].shape)
        if dim is not None:
            del own[dim]
        if position in (3, 6):
            return gradient.reshape(self.size, *own)
        gradient = self.unfold(gradient)
        if position in (4, 5):  # Summed where the argument was broadcast.
            gradient = gradient.sum_to_size(
                self.size, *[1] * (gradient.dim() - 1 - len(own)), *own
            ).reshape(self.size, *own)
        return gradient


def _batched_per_entry(in_dims: Any) -> bool:
    return any(in_dims[position] is not None for position in _PER_BATCH)


def _attention_rule(
    operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> Any:
    if _batched_per_entry(in_dims):
        return _one_by_one(operator, info, in_dims, args)
    fold = _Fold(info, in_dims, args)
    output, threshold, saved = operator(*fold.arguments(), *args[ATTENTION_ARGUMENTS:])
    # What is kept for the backward pass belongs to the whole batch.
    return (fold.unfold(output), fold.unfold(threshold), saved), (0, 0, None)


def _attention_backward_rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    grad_at, saved_at = ATTENTION_ARGUMENTS, ATTENTION_ARGUMENTS + 1
    wanted = args[-1]
    # Kept entry by entry, or the forward pass was not batched at all (a Jacobian's rows).
    if in_dims[saved_at] is not None or all(dim is None for dim in in_dims[:grad_at]):
        return _one_by_one(operators.attention_backward, info, in_dims, args)
    fold = _Fold(info, in_dims, args)
    grad = fold.heads_second(_front(args[grad_at], in_dims[grad_at], info.batch_size))
    results = operators.attention_backward(*fold.arguments(), grad, args[saved_at], wanted)
    is_wanted = [bool(wanted >> bit & 1) for bit in range(len(results))]
    return (
        tuple(
            fold.gradient(bit, result) if is_wanted[bit] else result
            for bit, result in enumerate(results)
        ),
        tuple(0 if yes else None for yes in is_wanted),
    )


def register() -> None:
    """Called once, after the operators are loaded."""
    rules: list[tuple[str, Callable[[Any], Callable[..., Any]]]] = [
        ("mapping_with_statistics", lambda operator: _mapping_rule(operator, 3, 5)),
        ("mapping_backward", lambda operator: _mapping_rule(operator, 3, 5)),
        ("attention_backward", lambda operator: _attention_backward_rule),
    ]
    for suffix in ("", "_forward"):  # With a registered gradient, and without.
        rules += [
            ("mapping" + suffix, lambda operator: _mapping_rule(operator, 3, 5)),
            ("fenchel_young_loss" + suffix, lambda operator: partial(_loss_rule, operator)),
            ("attention" + suffix, lambda operator: partial(_attention_rule, operator)),
        ]
    for name, rule in rules:
        torch.library.register_vmap(f"flash_entmax::{name}", rule(getattr(operators, name)))
