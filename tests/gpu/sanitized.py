"""Small problems that reach every kind of kernel, for compute-sanitizer (test_sanitizer.py).

    python3 tests/gpu/sanitized.py LIBRARY GROUP

Ends with 3 where the group's kernels are not in the build or not for the device. The group `faulty`
reads memory that has been given back.
"""

import sys

import pytest
import torch

from cases import make, run
from engine import Attention, Library

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def short():
    """Up to 512 keys in heads of up to 32 and 64: lists, sweeps, the backward of one block."""
    for n in (1, 90, 130, 300, 512):
        yield make(heads=2, queries=n, size=32, causal=True)
        yield make(heads=2, queries=n, size=32 if n > 200 else 64, dtype=FP16, alpha=2.0)
    lengths = torch.tensor([0, 90], dtype=torch.int32, device="cuda")
    yield make(batch=2, queries=90, size=32, key_lengths=lengths)
    yield make(queries=145, keys=333, size=24, value_size=7, layout="gaps", causal=True)
    yield make(queries=260, size=32, window=(40, 3), heads=4, kv_heads=2)
    factors = 1.0 + torch.rand(1, 2, 200, device="cuda")
    slopes = torch.tensor([1.0, 0.25], device="cuda")
    yield make(queries=200, size=32, causal=True, slopes=slopes, query_scale=factors)


def general():
    """Its tiled kernels: every type, a head of 40, an alpha between 1.5 and 1."""
    for dtype, size in ((BF16, 128), (FP16, 256), (FP32, 64), (BF16, 40)):
        yield make(queries=150, keys=210, size=size, dtype=dtype, causal=True)
    yield make(queries=610, size=64, alpha=1.3, softcap=5.0)
    slopes = torch.tensor([0.5, 0.1], device="cuda")
    yield make(queries=97, keys=700, size=32, dtype=FP32, slopes=slopes)


def screening():
    """The kernels for compute capability 9.0: rows, tiles and both."""
    for std in (1.0, 0.05, 4.0):
        yield make(queries=700, size=64, causal=True, std=std)
    yield make(queries=650, keys=900, size=128, dtype=FP16, alpha=2.0)


# And the engine that a group is for.
GROUPS = {"short": (short, "general"), "general": (general, "general"),
          "screening": (screening, "screening")}


def faulty(library):
    """What shows that the tool would notice, if PyTorch keeps no memory for later (see the test)."""
    call = make(queries=64, size=32)
    settings = {k: v for k, v in call.items() if k != "output_gradient"}
    attention = Attention(library, **settings, engine="general", save=False)
    call["value"].untyped_storage().resize_(0)
    attention.forward()
    torch.cuda.synchronize()


def main(path, group):
    library = Library(path)
    if group == "faulty":
        faulty(library)
        return 0
    calls, engine = GROUPS[group]
    count = 0
    for call in calls():
        try:
            run(library, call, engine=engine, alpha_gradient=call.get("alpha") == 1.3)
        except pytest.skip.Exception:
            return 3
        count += 1
    print(f"{count} problems of {group}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
