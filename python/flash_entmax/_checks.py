"""Checks of arguments that need Python's types. The C++ library checks shapes and values."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; must be a torch.Tensor")
    return tensor


def check_floating(name: str, tensor: object) -> Tensor:
    tensor = check_tensor(name, tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}; must be torch.strided")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: got {tensor.dtype}; must be float32, bfloat16, float16 or float64"
        )
    return tensor


def check_same(name: str, tensor: object, other_name: str, other: Tensor) -> Tensor:
    """Floating point, of the other's type, on the other's device."""
    tensor = check_floating(name, tensor)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: got {tensor.dtype}; must be {other.dtype}, as {other_name} is")
    check_device(name, tensor, other_name, other)
    return tensor


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}; must be on {other.device}, as "
            f"{other_name} is"
        )


def check_integer(name: str, tensor: object, other_name: str, other: Tensor) -> Tensor:
    tensor = check_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {tensor.dtype}; must be int32 or int64")
    check_device(name, tensor, other_name, other)
    return tensor


def check_mask(name: str, tensor: object, other_name: str, other: Tensor) -> Tensor:
    tensor = check_tensor(name, tensor)
    if tensor.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{name}: got {tensor.dtype}; must be bool or uint8 (False or 0 hides)")
    check_device(name, tensor, other_name, other)
    return tensor


def check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}; must be a number")
    if isinstance(value, torch.SymFloat):  # Under tracing.
        return value  # type: ignore[return-value]
    return float(value)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast asks for on a kind of device; None where it is off."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def check_cpu_mapping(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "meta"):
        raise NotImplementedError(
            f"{name}: got a tensor on {tensor.device}; the mappings and losses run on CPU tensors "
            "only (attention runs on CUDA tensors as well)"
        )
