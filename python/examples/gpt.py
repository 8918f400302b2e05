"""Trains a small GPT on a local text for a minute, with softmax attention or with α-entmax.

    python python/examples/gpt.py --attention entmax
    python python/examples/gpt.py --attention softmax

The two differ in one line (see Attention.forward). The text is Python's own library, which every
machine that runs this has.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_entmax


class Attention(nn.Module):
    def __init__(self, features: int, heads: int, kind: str) -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.project = nn.Linear(features, 3 * features)
        self.output = nn.Linear(features, features)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, features = hidden.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.project(hidden).chunk(3, dim=-1)
        )
        if self.kind == "softmax":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = flash_entmax.attention(query, key, value, alpha=1.5, causal=True)
        projected: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, features))
        return projected


class Block(nn.Module):
    def __init__(self, features: int, heads: int, kind: str) -> None:
        super().__init__()
        self.attention = Attention(features, heads, kind)
        self.before, self.between = nn.LayerNorm(features), nn.LayerNorm(features)
        self.mix = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.before(hidden))
        mixed: Tensor = hidden + self.mix(self.between(hidden))
        return mixed


class GPT(nn.Module):
    def __init__(self, features: int, heads: int, layers: int, length: int, kind: str) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, features)
        self.position = nn.Parameter(0.02 * torch.randn(length, features))
        self.blocks = nn.Sequential(*(Block(features, heads, kind) for _ in range(layers)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, 256)

    def forward(self, bytes_: Tensor) -> Tensor:
        hidden = self.byte(bytes_) + self.position[: bytes_.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", choices=["entmax", "softmax"], default="entmax")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="stop after as many steps")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    library = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:60])
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    if not 1 <= arguments.length < len(data) - 1:
        parser.error(f"--length: got {arguments.length}; must be in [1, {len(data) - 2}]")
    model = GPT(96, 4, 3, arguments.length, arguments.attention)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    print(f"{len(text):,} bytes of text, {sum(p.numel() for p in model.parameters()):,} parameters")

    start, step, smooth = time.perf_counter(), 0, float("nan")
    while time.perf_counter() - start < arguments.seconds and step != arguments.steps:
        first = torch.randint(len(data) - arguments.length - 1, (8,))
        batch = torch.stack([data[i : i + arguments.length + 1] for i in first])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bits = loss.item() / 0.6931
        smooth = bits if step == 0 else 0.95 * smooth + 0.05 * bits
        step += 1
        if step % 50 == 0:
            print(f"step {step:5d}  {smooth:.2f} bits a byte")
    seconds = time.perf_counter() - start
    print(f"{arguments.attention}: {smooth:.2f} bits a byte after {step} steps in {seconds:.0f} s")


if __name__ == "__main__":
    main()
