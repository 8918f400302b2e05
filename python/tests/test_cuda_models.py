"""CUDA tensors: modules, adasplash, HF models (FLASH_ENTMAX_TEST_DEVICE: see cuda_cases.py)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_entmax
from cuda_cases import DEVICE, cuda, leaves, needs_gpu
from reference import assert_close


@needs_gpu
@pytest.mark.parametrize("positions", ["none", "alibi", "nape", "rope"])
@pytest.mark.parametrize("scaling", ["none", "ssmax", "asentmax"])
def test_module(scaling: str, positions: str) -> None:
    if scaling == "asentmax" and positions == "alibi":
        pytest.skip("not a combination")
    module = flash_entmax.nn.EntmaxAttention(
        64, 4, kv_heads=2, causal=True, learnable_alpha=True, positions=positions, scaling=scaling,
        window=50,
    )  # fmt: skip
    hidden = torch.randn(2, 90, 64)
    expected = module(hidden)
    names, parameters = zip(*module.named_parameters(), strict=True)
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
    module = module.to(DEVICE)
    actual = module(hidden.to(DEVICE))
    assert_close(actual.cpu(), expected, 1e-4)
    grads = torch.autograd.grad(actual.square().sum(), list(module.parameters()), allow_unused=True)
    for name, one, other in zip(names, grads, expected_grads, strict=True):
        print(name)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_close(one.cpu(), other, 1e-3)


ADASPLASH_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("adasplash", {}),
    ("adasplash", {"alpha": 1.333}),
    ("adasplash", {"is_causal": False}),
    ("adasplash_v1", {"niter": 20}),
    ("adasplash_v1", {"is_causal": True, "niter": 20}),
    ("adasplash_no_block_mask", {"is_causal": True, "niter": 20}),
    ("adasplash_v2", {"niter": 10}),
]


@cuda
@pytest.mark.skipif(importlib.util.find_spec("adasplash") is None, reason="needs adasplash")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "arguments"), ADASPLASH_CALLS)
def test_adasplash(name: str, arguments: dict[str, Any], packed: bool) -> None:
    """Beside the original, with more of its iterations where it has them."""
    os.environ.setdefault("ADASPLASH_TEST_FAST_AUTOTUNE", "1")  # Read when its kernels are made.
    import adasplash as original

    from flash_entmax.compat import adasplash as ours

    tensors = leaves(torch.bfloat16, *[(2, 4, 1024, 64)] * 3)
    if packed:
        arguments = arguments | {
            "varlen": torch.tensor([1024, 640], device="cuda", dtype=torch.int32)
        }
    try:
        expected = getattr(original, name)(*tensors, **arguments)
        weight = torch.randn_like(expected)
        if packed:  # What the original leaves in rows after the end is its own affair.
            weight[1, :, 640:] = 0
        others = torch.autograd.grad(expected, tensors, weight)
    except Exception as error:  # It compiles its kernels for the machine, which may fail.
        pytest.skip(f"the original cannot run this: {type(error).__name__}: {error}"[:200])
    actual = getattr(ours, name)(*tensors, **arguments)
    grads = torch.autograd.grad(actual, tensors, weight)
    if packed:
        assert bool((actual[1, :, 640:] == 0).all())
        actual, expected = (torch.cat([t[0], t[1, :, :640]], dim=1) for t in (actual, expected))
        others = tuple(t.clone() for t in others)
        for one, other in zip(grads, others, strict=True):
            assert bool((one[1, :, 640:] == 0).all())
            other[1, :, 640:] = 0
    assert_close(actual, expected, 3e-2)
    for one, other in zip(grads, others, strict=True):
        assert_close(one, other, 6e-2)


def needs_transformers(function: Any) -> Any:
    missing = importlib.util.find_spec("transformers") is None
    return needs_gpu(pytest.mark.skipif(missing, reason="needs transformers")(function))


MODELS = ["llama", "mistral", "gemma2", "gemma3", "bert", "bert decoder"]


def model_and_batch(name: str, padding: str) -> tuple[Any, Tensor, Tensor]:
    import test_hf

    test_hf.register_all()
    ids, mask = test_hf.batch(padding)
    return test_hf.make(name).to(DEVICE), ids.to(DEVICE), mask.to(DEVICE)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_models_with_alpha_one(name: str, padding: str) -> None:
    """The model's own logits."""
    from flash_entmax import hf

    model, ids, mask = model_and_batch(name, padding)
    # sdpa ignores Gemma 2's cap of the scores.
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    hf.convert(model, 1.0)
    actual = model(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(actual, expected, 1e-4)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, padding: str) -> None:
    import test_hf
    from flash_entmax import hf

    model, ids, mask = model_and_batch(name, padding)
    hf.convert(model, 1.5)
    results = []
    for implementation in (hf.NAME, test_hf.DENSE):
        model.set_attn_implementation(implementation)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        model.zero_grad()
        logits.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits, grads))
    (actual, grads), (expected, others) = results
    assert_close(actual, expected, 1e-3)
    for parameter, gradient in grads.items():
        print(parameter)
        assert_close(gradient, others[parameter], 5e-3)


@needs_transformers
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_generation(name: str, padding: str) -> None:
    from flash_entmax import hf

    model, ids, mask = model_and_batch(name, padding)
    hf.convert(model)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    longer = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    position = (longer.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(
            output.sequences, attention_mask=longer, position_ids=position, use_cache=False
        ).logits
    for step, logits in enumerate(output.logits):
        assert_close(logits, whole[:, 11 + step], 1e-3)


@needs_transformers
def test_learnt_alpha_and_alpha_by_head() -> None:
    from flash_entmax import hf

    model, ids, mask = model_and_batch("llama", "left")
    hf.convert(model, 1.3, learnable=True)
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    found = [p for n, p in model.named_parameters() if n.endswith("flash_entmax_alpha_logits")]
    assert len(found) == 2
    assert all(p.grad is not None and bool(p.grad.abs().min() > 0) for p in found)
    other, *_ = model_and_batch("llama", "none")
    hf.convert(other, [1.0, [1.2, 1.4, 1.6, 2.0]])
    assert bool(other(ids).logits.isfinite().all())
    if DEVICE == "cuda":
        hf.set_alpha(other, [1.5, [1.0, 1.4, 1.6, 2.0]])
        with pytest.raises(NotImplementedError, match="flash_entmax_alpha"):
            other(ids)


@needs_transformers
def test_a_model_in_bfloat16_compiled() -> None:
    from flash_entmax import hf

    torch._dynamo.reset()
    model, *_ = model_and_batch("llama", "none")
    hf.convert(model.bfloat16(), 1.5)
    ids = torch.randint(3, 60, (2, 60), device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids).logits, model(ids).logits, 5e-2)
    # Without a cache transformers writes a mask out, for sequences that might be packed.
    if DEVICE == "cuda":
        with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match="use_cache"):
            compiled(ids, use_cache=False)
