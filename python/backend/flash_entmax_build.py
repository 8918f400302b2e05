"""The build backend: scikit-build-core's, which asks for PyTorch only where none is installed and
none is named (FLASH_ENTMAX_TORCH_DIR)."""

from __future__ import annotations

from typing import Any

from find_torch import find_torch
from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403


def _requirements(found: list[str], settings: dict[str, Any] | None) -> list[str]:
    named = "cmake.define.FLASH_ENTMAX_TORCH_DIR" in (settings or {})
    return found if named or find_torch() is not None else [*found, "torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requirements(_build.get_requires_for_build_wheel(config_settings), config_settings)


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _requirements(_build.get_requires_for_build_editable(config_settings), config_settings)
