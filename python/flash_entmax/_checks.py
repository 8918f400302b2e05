"""Checks of arguments that need Python's types. The C++ library checks shapes and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}; must be a torch.Tensor")
    return tensor


def is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def check_dense(name: str, tensor: object) -> Tensor:
    tensor = check_tensor(name, tensor)
    if not is_dense(tensor):
        got = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: got {got}; must be a dense tensor (torch.strided)")
    return tensor


def check_floating(name: str, tensor: object) -> Tensor:
    tensor = check_dense(name, tensor)
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
    tensor = check_dense(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {tensor.dtype}; must be int32 or int64")
    check_device(name, tensor, other_name, other)
    return tensor


def check_mask(name: str, tensor: object, other_name: str, other: Tensor) -> Tensor:
    tensor = check_dense(name, tensor)
    if tensor.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{name}: got {tensor.dtype}; must be bool or uint8 (False or 0 hides)")
    check_device(name, tensor, other_name, other)
    return tensor


def check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}; must be a number")
    if isinstance(value, torch.SymFloat):  # Under tracing.
        return value  # type: ignore[return-value]
    try:
        return float(value)
    except OverflowError:
        bits = int(value).bit_length()
        raise ValueError(f"{name}: got an int of {bits} bits; must fit a float") from None


def check_int(name: str, value: object) -> Any:
    """A whole number that fits 64 bits (symbolic under tracing)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}; must be an int")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {value}; must be in [-2^63, 2^63)")
    return value


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast asks for on a kind of device; None where it is off."""
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def check_mapping_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"{name}: got a tensor on {tensor.device}; must be on the CPU or a CUDA device"
        )
