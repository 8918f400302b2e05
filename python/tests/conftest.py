"""What all tests share."""

from __future__ import annotations

import secrets

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new seed for every test; pytest shows it when the test fails."""
    value = secrets.randbelow(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value
