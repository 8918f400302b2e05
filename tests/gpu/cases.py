"""Inputs of the GPU tests, and the comparison with the reference."""

import math

import pytest
import torch

import reference
from engine import Attention, EngineError

# Relative error in the Frobenius norm that rounding the result once, and the probabilities of a
# tensor-core product once, can explain.
TOLERANCE = {torch.bfloat16: 4.5e-3, torch.float16: 1e-3, torch.float32: 4e-6}
GRADIENT_TOLERANCE = {torch.bfloat16: 1.4e-2, torch.float16: 2.5e-3, torch.float32: 3e-5}
# Thresholds are fp32 sums over the support, of scores that are fp32 sums over the head.
THRESHOLD_TOLERANCE = 4e-6


def generator(seed):
    return torch.Generator(device="cuda").manual_seed(seed)


def make(batch=1, heads=2, kv_heads=None, queries=128, keys=None, size=64, value_size=None,
         dtype=torch.bfloat16, std=1.0, seed=0, layout="bhnd", **settings):
    """A call's tensors and settings. std: standard deviation of the scores at the default scale."""
    keys = queries if keys is None else keys
    kv_heads = kv_heads or heads
    value_size = value_size or size
    g = generator(seed)

    def normal(h, n, d, factor=1.0):
        t = torch.randn(batch, h, n, d, generator=g, device="cuda") * factor
        t = t.to(dtype)
        if layout == "bnhd":
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "gaps":  # neither contiguous nor aligned
            wide = torch.full((batch, h, n, d + 3), math.nan, dtype=dtype, device="cuda")
            wide[..., 1:d + 1] = t
            t = wide[..., 1:d + 1]
        return t

    call = dict(query=normal(heads, queries, size, std), key=normal(kv_heads, keys, size),
                value=normal(kv_heads, keys, value_size), output_gradient=None, **settings)
    call["output_gradient"] = normal(heads, queries, value_size)
    return call


def skip_if_absent(error):
    """The Hopper kernels are neither in every build nor for every device."""
    if "compute capability 9.0" in str(error):
        pytest.skip(str(error))


def run(library, call, engine="automatic", backward=True, **options):
    settings = {k: v for k, v in call.items() if k != "output_gradient"}
    try:
        attention = Attention(library, **settings, engine=engine, save=backward, **options)
    except EngineError as error:
        skip_if_absent(error)
        raise
    attention.forward()
    if backward:
        attention.prepare_backward(call["output_gradient"])
        attention.backward()
    torch.cuda.synchronize()
    return attention


def relative_error(got, want):
    """In the Frobenius norm; against an almost empty reference in absolute terms."""
    want = want.double()
    floor = 0.3 * want.numel() ** 0.5
    return float((got.double() - want).norm() / want.norm().clamp(min=floor))


def edge_terms(want):
    """How far rounding of scores at the threshold may move each head's gradient in alpha.

    A key of excess w counts with u = w^((2 - alpha) / (alpha - 1)), which at alpha = 2 is 1 in the
    support and 0 outside: a score within rounding of the threshold may be on either side.
    """
    order = want["alpha"] - 1
    terms = torch.zeros_like(order)
    for part in want["parts"]:
        excess = order[:, None, None] * part["s"] - part["tau"][..., None]
        near = excess.abs() <= 2 * THRESHOLD_TOLERANCE * (1 + part["tau"].abs())[..., None]
        terms += near.sum((1, 2)) * (4 * THRESHOLD_TOLERANCE) ** ((1 - order) / order)
    return terms


def compare(attention, call, backward=True, tolerance=1.0):
    """Asserts that everything agrees with the float64 reference."""
    dtype = call["query"].dtype
    want = reference.attention(call, call["output_gradient"] if backward else None)
    problems = []

    def check(name, got, expected, allowed):
        assert got.shape == expected.shape, name
        error = relative_error(got, expected)
        if not error <= allowed:
            problems.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}")

    check("output", attention.output, want["output"], tolerance * TOLERANCE[dtype])
    tau, expected = attention.threshold.double(), want["threshold"]
    empty = torch.isnan(expected)
    if not torch.equal(torch.isnan(tau), empty):
        problems.append(f"threshold: {int((torch.isnan(tau) != empty).sum())} rows are NaN or not")
    live = ~empty
    if live.any():
        size = 1 + expected[live].abs()
        error = float(((tau[live] - expected[live]).abs() / size).max())
        allowed = THRESHOLD_TOLERANCE * max(1.0, tolerance)
        if not error <= allowed:
            problems.append(f"threshold: error {error:.3g}, allowed {allowed:.3g}")
    if empty.any() and not float(attention.output[empty].abs().max()) == 0.0:
        problems.append("output: rows that see no key are not zero")
    if backward:
        allowed = tolerance * GRADIENT_TOLERANCE[dtype]
        for name, got in zip(("query", "key", "value"), attention.gradients):
            check("gradient of " + name, got, want["gradients"][name], allowed)
        for name, got in (("slopes", attention.slope_gradient),
                          ("query_scale", attention.scale_gradient)):
            if got is not None:
                check("gradient of " + name, got, want["gradients"][name], allowed)
        if attention.alpha_gradient is not None:
            gradient = want["gradients"]["alpha"]
            if call.get("alpha_per_head") is None:
                assert gradient.shape == attention.alpha_gradient.shape
            # Sums over rows of terms of either sign: compare with the size of one head's terms.
            rows = call["query"].shape[0] * call["query"].shape[2]
            error = (attention.alpha_gradient.double() - gradient).abs().reshape(-1)
            limit = allowed * (gradient.abs().max() + rows ** 0.5) + edge_terms(want)
            if not bool((error <= limit).all()):
                problems.append(f"gradient of alpha: error {error.tolist()}, "
                                f"allowed {limit.tolist()}")
    assert not problems, "; ".join(problems)
    return want
