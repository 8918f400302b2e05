"""What Python adds to a call, and times beside deep-spin's entmax and torch.softmax.

    python python/bench/overhead_and_ratios.py [--threads N]

Times are the fastest of several runs of each, in turns in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import entmax as deep_spin
import torch
import torch.nn.functional as F
from torch import Tensor

import flash_entmax


def fastest(
    functions: dict[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, float]:
    """Seconds a call."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.perf_counter() - start) / calls)
    return best


def overhead() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tensor = torch.randn(1, 1, 1, 8)
    leaf = tensor.clone().requires_grad_()
    row = torch.randn(1, 8)
    result = fastest(
        {
            "attention, 1 query and key": lambda: flash_entmax.attention(tensor, tensor, tensor),
            "the same with gradient": lambda: flash_entmax.attention(leaf, leaf, leaf),
            "PyTorch's attention": lambda: F.scaled_dot_product_attention(tensor, tensor, tensor),
            "the same with gradient (PyTorch)": lambda: F.scaled_dot_product_attention(
                leaf, leaf, leaf
            ),
            "entmax of 8 numbers": lambda: flash_entmax.entmax(row),
            "softmax of 8 numbers": lambda: row.softmax(-1),
        },
        rounds=20,
        calls=500,
    )
    for name, seconds in result.items():
        print(f"{name:34s} {seconds * 1e6:8.1f} µs")
    torch.set_num_threads(threads)


def composed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return deep_spin.entmax15(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5) @ value


def step(attend: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    weight = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, weight)


def training_step() -> None:
    leaves = [torch.randn(1, 4, 2048, 64, requires_grad=True) for _ in range(3)]
    result = fastest(
        {
            "attention, α = 1.5": step(flash_entmax.attention, leaves),
            "PyTorch's flash attention": step(F.scaled_dot_product_attention, leaves),
            "deep-spin's entmax15 and matmuls": step(composed, leaves),
        },
        rounds=4,
    )
    ours = result["attention, α = 1.5"]
    print("forward and backward, 4 heads of 64, 2,048 queries and keys, float32")
    for name, seconds in result.items():
        print(f"{name:34s} {seconds * 1e3:8.1f} ms  {seconds / ours:8.1f} ×")


def mapping() -> None:
    scores = torch.randn(4096, 4096)
    leaf = scores.clone().requires_grad_()
    weight = torch.randn_like(scores)
    functions: dict[str, Callable[[], object]] = {}
    for name, function in (
        ("softmax", torch.nn.Softmax(-1)),
        ("α = 1.5", flash_entmax.nn.Entmax15()),
        ("α = 2", flash_entmax.nn.Sparsemax()),
        ("α = 1.25", flash_entmax.nn.Entmax(1.25)),
    ):
        functions[name] = lambda f=function: f(scores)
        functions[name + ", with gradient"] = lambda f=function: torch.autograd.grad(
            f(leaf), leaf, weight
        )
    result = fastest(functions, rounds=8)
    print("mapping of 4,096 × 4,096 float32")
    for name, seconds in result.items():
        base = "softmax, with gradient" if "gradient" in name else "softmax"
        print(f"{name:34s} {seconds * 1e3:8.1f} ms  {seconds / result[base]:8.2f} × softmax")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="PyTorch's own default if not given")
    chosen = parser.parse_args().threads
    if chosen is not None:
        torch.set_num_threads(chosen)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    overhead()
    training_step()
    mapping()
