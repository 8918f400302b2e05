"""A classifier whose probabilities are exactly zero for most classes: the 1.5-entmax loss.

    python python/examples/classification.py

Digits drawn as noisy strokes on a grid, ten classes. The loss replaces cross-entropy; the mapping
replaces softmax. Printed: accuracy, and how many classes keep a positive probability.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import flash_entmax

CLASSES = 10


def draw(prototypes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of the classes' prototypes."""
    label = torch.randint(CLASSES, (count,))
    return prototypes[label] + 1.2 * torch.randn(count, prototypes.shape[1]), label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    prototypes = torch.randn(CLASSES, 64)
    test, expected = draw(prototypes, 2000)
    for name, alpha in (("cross-entropy (α = 1)", 1.0), ("1.5-entmax", 1.5), ("sparsemax", 2.0)):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(arguments.steps):
            inputs, label = draw(prototypes, 128)
            loss = flash_entmax.entmax_loss(model(inputs), label, alpha)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            probability = flash_entmax.entmax(model(test), alpha)
        right = (probability.argmax(1) == expected).float().mean().item()
        kept = (probability > 0).sum(1).float().mean().item()
        print(f"{name:22s} accuracy {right:.3f}, {kept:.1f} of {CLASSES} classes kept")


if __name__ == "__main__":
    main()
