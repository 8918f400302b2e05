"""Moving α gradually, as from softmax (1) to 1.5 while a model is fine-tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._checks import check_int, check_number

__all__ = ["AlphaSchedule"]


@dataclass(frozen=True)
class AlphaSchedule:
    """α as a function of the training step.

    α stays at ``start`` until step ``begin``, reaches ``target`` ``steps`` steps later, and stays
    there.

    Parameters
    ----------
    steps : int
        How many steps the move takes; ≥ 1.
    start, target : float
        Finite and > 0.
    begin : int
        ≥ 0.
    shape : str
        ``"linear"``, or ``"cosine"`` (slow at both ends).

    Examples
    --------
    >>> schedule = AlphaSchedule(steps=100)
    >>> schedule(0), schedule(50), schedule(1000)
    (1.0, 1.25, 1.5)
    """

    steps: int
    start: float = 1.0
    target: float = 1.5
    begin: int = 0
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        check_int("begin", self.begin)
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}; must be ≥ 1")
        if self.begin < 0:
            raise ValueError(f"begin: got {self.begin}; must be ≥ 0")
        for name in ("start", "target"):
            value = check_number(name, getattr(self, name))
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"{name}: got {value}; must be finite and > 0")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"shape: got {self.shape!r}; must be 'linear' or 'cosine'")

    def __call__(self, step: int) -> float:
        """α at a step."""
        if math.isnan(check_number("step", step)):
            raise ValueError(f"step: got {step}; must be a number of steps")
        done = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        if self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        if done == 1.0:
            return self.target
        return self.start + (self.target - self.start) * done
