from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flash_entmax
from flash_entmax import nn
from flash_entmax.schedules import AlphaSchedule
from reference import assert_close, dense_attention


@pytest.mark.parametrize("positions", ["none", "rope", "alibi", "nape"])
@pytest.mark.parametrize("scaling", ["none", "ssmax", "asentmax"])
@pytest.mark.parametrize("learnable", [False, True])
def test_attention_module(positions: str, scaling: str, learnable: bool) -> None:
    """Against the same projections around a dense computation."""
    if positions == "alibi" and scaling == "asentmax":
        with pytest.raises(ValueError, match="scaling: got 'asentmax'"):
            nn.EntmaxAttention(16, 4, positions=positions, scaling=scaling)
        return
    module = nn.EntmaxAttention(
        16, 4, kv_heads=2, alpha=1.4, learnable_alpha=learnable, causal=True, positions=positions,
        scaling=scaling, window=5, softcap=3.0,
    ).double()  # fmt: skip
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():  # Away from where it starts.
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    actual = module(hidden)

    def heads(tensor: torch.Tensor, count: int) -> torch.Tensor:
        return tensor.view(2, 9, count, 4).transpose(1, 2)

    query = heads(module.query(hidden), 4)
    key, value = heads(module.key(hidden), 2), heads(module.value(hidden), 2)
    if positions == "rope":
        query, key = module.rotary(query), module.rotary(key)
    slopes = {"alibi": nn.alibi_slopes(4), "nape": nn.nape_slopes(4)}.get(positions)
    log = torch.arange(2, 11, dtype=torch.float64).log()
    factor = None
    if scaling == "ssmax":
        factor = (module.scale.weight[:, None] * log)[None]
    elif scaling == "asentmax":
        beta = torch.nn.functional.softplus(module.scale.beta(hidden))
        gamma = 2 * torch.tanh(module.scale.gamma(hidden))
        factor = (1 + beta * log[:, None] ** gamma).transpose(1, 2)
        if slopes is not None:
            factor = torch.where(slopes[:, None] > 0, 1.0, factor)
    expected = dense_attention(
        query, key, value, alpha=module.alpha, causal=True, alibi_slopes=slopes,
        query_scale=factor, window_left=4, softcap=3.0,
    )  # fmt: skip
    expected = module.output(expected.transpose(1, 2).reshape(2, 9, 16))
    assert_close(actual, expected, 1e-5)
    actual.square().sum().backward()
    for name, parameter in module.named_parameters():
        print(name)
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
        assert name == "key.bias" or parameter.grad.abs().max().item() > 0


def test_attention_to_a_context() -> None:
    module = nn.EntmaxAttention(16, 4, causal=True, positions="rope")
    hidden = torch.randn(2, 9, 16)
    whole = module(hidden)
    assert_close(module(hidden[:, 6:], hidden), whole[:, 6:], 1e-5)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    assert_close(module(hidden, key_mask=mask)[0, 3:], module(hidden[:1, 3:])[0], 1e-5)


def test_learnt_alpha() -> None:
    module = nn.EntmaxAttention(16, 4, alpha=1.25, learnable_alpha=True)
    assert isinstance(module.alpha, torch.Tensor)
    assert_close(module.alpha, torch.full((4,), 1.25), 1e-6)
    with pytest.raises(ValueError, match="alpha: is learnt"):
        module.alpha = 1.5
    fixed = nn.EntmaxAttention(16, 4)
    fixed.alpha = 1.2
    assert fixed.alpha == 1.2


def test_slopes() -> None:
    assert_close(nn.alibi_slopes(8), 0.5 ** torch.arange(1.0, 9.0), 1e-7)
    assert nn.alibi_slopes(6).tolist()[:4] == nn.alibi_slopes(4).tolist()
    assert nn.alibi_slopes(6).tolist()[4:] == nn.alibi_slopes(8).tolist()[0:4:2]
    assert_close(nn.nape_slopes(6), torch.tensor([1, 1 / 2, 1 / 3, 0, 0, 0]), 1e-7)


def test_rotary_embedding_depends_on_distances_only() -> None:
    rotary = nn.RotaryEmbedding(8).double()
    query, key = torch.randn(2, 1, 8, dtype=torch.float64)
    near = (rotary(query, 5) * rotary(key, 3)).sum()
    far = (rotary(query, 105) * rotary(key, 103)).sum()
    assert_close(near, far, 1e-5)
    assert_close(rotary(query).norm(), query.norm(), 1e-9)


def test_scales_start_as_documented() -> None:
    hidden = torch.randn(2, 300, 16)
    start = nn.ASEntmaxScale(16, 4)(hidden)
    assert_close(start, torch.full((2, 4, 300), 1.05), 1e-5)
    assert_close(nn.SSMaxScale(4)(hidden)[:, :, 255], torch.ones(2, 4), 1e-6)
    assert_close(nn.SSMaxScale(4)(hidden, first=255)[:, :, 0], torch.ones(2, 4), 1e-6)


def test_mapping_modules() -> None:
    scores = torch.randn(3, 5, 4)
    pairs: list[tuple[Any, torch.Tensor]] = [
        (nn.Entmax(1.3, 1), flash_entmax.entmax(scores, 1.3, 1)),
        (nn.Entmax15(1), flash_entmax.entmax15(scores, 1)),
        (nn.Sparsemax(1), flash_entmax.sparsemax(scores, 1)),
        (nn.Normmax(3.0, 1), flash_entmax.normmax(scores, 3.0, 1)),
        (nn.Budget(2.0, 1), flash_entmax.budget(scores, 2.0, 1)),
    ]
    for module, expected in pairs:
        assert torch.equal(module(scores), expected)
        assert "dim=1" in repr(module)
    learnt = nn.Entmax(torch.nn.Parameter(torch.tensor(1.5)))
    learnt(scores).square().sum().backward()
    assert learnt.alpha.grad is not None
    assert "alpha" in nn.Entmax(torch.tensor(1.5)).state_dict()


def test_schedules() -> None:
    linear = AlphaSchedule(steps=10, begin=5)
    assert [linear(step) for step in (0, 5, 10, 15, 99)] == [1.0, 1.0, 1.25, 1.5, 1.5]
    cosine = AlphaSchedule(steps=10, start=2.0, target=1.2, shape="cosine")
    assert cosine(0) == 2.0 and cosine(10) == 1.2
    assert math.isclose(cosine(5), 1.6)
    values = [cosine(step) for step in range(11)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.EntmaxAttention(16, 4, kv_heads=3), "kv_heads: got 3"),
        (lambda: nn.EntmaxAttention(15, 4), "features: got 15"),
        (lambda: nn.EntmaxAttention(16, 4, positions="abs"), "positions: got 'abs'"),
        (lambda: nn.EntmaxAttention(16, 4, scaling="log"), "scaling: got 'log'"),
        (lambda: nn.EntmaxAttention(16, 4, window=0), "window: got 0"),
        (lambda: nn.EntmaxAttention(16, 4, softcap=-1.0), "softcap: got -1.0"),
        (lambda: nn.EntmaxAttention(16, 4)(torch.randn(2, 3, 8)), "must be .batch, length, 16."),
        (lambda: nn.EntmaxAttention(16, 4, alpha=1.0, learnable_alpha=True), "alpha: got 1.0"),
        (lambda: nn.EntmaxAttention(12, 3, positions="nape"), "heads: got 3"),
        (lambda: nn.EntmaxAttention(12, 4, positions="rope"), "size: got 3"),
        (lambda: nn.alibi_slopes(0), "heads: got 0"),
        (lambda: AlphaSchedule(steps=0), "steps: got 0"),
        (lambda: AlphaSchedule(steps=1, begin=-1), "begin: got -1"),
        (lambda: AlphaSchedule(steps=1, target=0.0), "target: got 0.0"),
        (lambda: AlphaSchedule(steps=1, shape="step"), "shape: got 'step'"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
