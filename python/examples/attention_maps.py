"""Draws which keys the queries of a sentence-like sequence keep, for several α.

    python python/examples/attention_maps.py attention_maps.png

White is a weight of exactly zero. Needs matplotlib.
"""

from __future__ import annotations

import argparse

import matplotlib
import torch

import flash_entmax

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", help="file to write, as attention_maps.png")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    # Tokens of twelve kinds; tokens of a kind look for each other, and a little for neighbours.
    kind = torch.randint(12, (64,))
    meaning = torch.nn.functional.normalize(torch.randn(12, 32), dim=-1)
    place = torch.arange(64)[:, None] / 10 * torch.rand(8)
    hidden = torch.cat([4 * meaning[kind], 1.3 * place.sin(), 1.3 * place.cos()], dim=-1)[
        None, None
    ]
    alphas = [1.0, 1.25, 1.5, 2.0]
    figure, axes = pyplot.subplots(1, len(alphas), figsize=(4.2 * len(alphas), 4.4), sharey=True)
    for axis, alpha in zip(axes, alphas, strict=True):
        weights = flash_entmax.attention_weights(
            hidden, hidden, alpha=alpha, causal=True, dense=True
        )[0, 0]
        kept = (weights > 0).sum(1).float().mean().item()
        masked = weights.masked_fill(weights == 0, torch.nan)
        image = axis.imshow(masked.numpy(), cmap="viridis", vmin=0.0, vmax=1.0)
        axis.set_title(f"α = {alpha:g}: {kept:.1f} keys a query")
        axis.set_xlabel("key")
        print(f"alpha {alpha:g}: {kept:.1f} keys kept a query")
    axes[0].set_ylabel("query")
    figure.colorbar(image, ax=axes, label="weight", pad=0.02, shrink=0.75)
    figure.savefig(arguments.picture, bbox_inches="tight")


if __name__ == "__main__":
    main()
