"""Hugging Face models with random weights: softmax as they compute it, and α-entmax against a dense
attention function that is given the same masks written out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils, modeling_utils

from flash_entmax import hf
from flash_entmax.hf import _attention, _masks
from flash_entmax.schedules import AlphaSchedule
from reference import assert_close, dense_attention

DENSE = "dense_entmax_of_the_tests"


def dense_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The models' attention as one dense computation; the mask is bool and always there."""
    assert attention_mask is not None and attention_mask.dtype == torch.bool
    zero = torch.zeros((), dtype=torch.float64, device=query.device)
    output = dense_attention(
        query,
        key,
        value,
        alpha=_attention.alpha_of(module, query),
        scale=scaling,
        softcap=softcap or 0.0,
        bias=torch.where(attention_mask, zero, -torch.inf),
    )
    return output.transpose(1, 2).to(query.dtype), None


def dense_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = masking_utils.sdpa_mask(*args, **kwargs)
    return mask


def register_all() -> None:
    hf.register()
    modeling_utils.AttentionInterface.register(DENSE, dense_forward)
    masking_utils.AttentionMaskInterface.register(DENSE, dense_mask)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_all()


SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Larger than usual: so that weights are far from uniform and many are zero.
    "initializer_range": 0.3,
}


def make(name: str, **changes: Any) -> transformers.PreTrainedModel:
    t = transformers
    if name == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2, **changes))
    elif name == "mistral":
        config = t.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5, **changes)
        model = t.MistralForCausalLM(config)
    elif name == "gemma2":
        extra = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        config = t.Gemma2Config(**SIZES, num_key_value_heads=1, **extra, **changes)
        model = t.Gemma2ForCausalLM(config)
    elif name == "gemma3":
        extra = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
        config = t.Gemma3TextConfig(
            **SIZES, num_key_value_heads=2, layer_types=["sliding_attention", "full_attention"],
            **extra, **changes,
        )  # fmt: skip
        model = t.Gemma3ForCausalLM(config)
    elif name == "bert":
        changes = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0} | changes
        model = t.BertForMaskedLM(t.BertConfig(**SIZES, **changes))
    elif name == "bert decoder":
        model = t.BertLMHeadModel(t.BertConfig(**SIZES, is_decoder=True, **changes))
    else:
        raise ValueError(name)
    return model.eval()


NAMES = ["llama", "mistral", "gemma2", "gemma3", "bert", "bert decoder"]
DECODERS = ["llama", "mistral", "gemma2", "gemma3"]


def batch(padding: str) -> tuple[Tensor, Tensor]:
    """Token ids [3, 12] and their mask; row 0 has no padding."""
    ids = torch.randint(3, 60, (3, 12))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :5] = mask[2, :1] = 0
    elif padding == "right":
        mask[1, 5:] = mask[2, 9:] = 0
    return ids, mask


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_alpha_one_gives_the_models_own_logits(name: str, padding: str) -> None:
    model = make(name)
    # sdpa ignores Gemma 2's cap of the scores.
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    ids, mask = batch(padding)
    expected = model(ids, attention_mask=mask).logits
    hf.convert(model, 1.0)
    assert model.config._attn_implementation == hf.NAME
    actual = model(ids, attention_mask=mask).logits
    assert_close(actual[mask.bool()], expected[mask.bool()], 2e-5)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_sparse_attention_and_gradients(name: str, padding: str) -> None:
    model = make(name)
    ids, mask = batch(padding)
    hf.convert(model, 1.5)
    results = []
    for implementation in (hf.NAME, DENSE):
        model.set_attn_implementation(implementation)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        model.zero_grad()
        logits.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logits, grads))
    (actual, grads), (expected, others) = results
    assert_close(actual, expected, 1e-4)
    assert grads.keys() == others.keys()
    for parameter, grad in grads.items():
        print(parameter)
        assert_close(grad, others[parameter], 1e-3)
    model.set_attn_implementation("eager")
    softmax = model(ids, attention_mask=mask).logits[mask.bool()]
    assert (softmax - actual).abs().max().item() > 1e-2  # It was not softmax.


@pytest.mark.parametrize("name", [*DECODERS, "bert decoder"])
def test_decoders_do_not_see_the_future(name: str) -> None:
    model = hf.convert(make(name))
    ids, _ = batch("none")
    before = model(ids).logits
    ids[:, 8:] = (ids[:, 8:] + 7) % 60
    after = model(ids).logits
    assert_close(after[:, :8], before[:, :8], 1e-5)
    assert (after[:, 8:] - before[:, 8:]).abs().max().item() > 1e-3


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache(name: str, cache: str | None, padding: str) -> None:
    """Greedy decoding in steps gives what the whole sequence at once gives."""
    model = hf.convert(make(name))
    ids, mask = batch(padding)
    arguments: dict[str, Any] = {"cache_implementation": cache} if cache else {}
    if cache:
        arguments["disable_compile"] = True
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None, **arguments,
    )  # fmt: skip
    sequence = output.sequences
    longer = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    position = (longer.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(
            sequence, attention_mask=longer, position_ids=position, use_cache=False
        ).logits
    for step, logits in enumerate(output.logits):
        assert_close(logits, whole[:, 11 + step], 1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(name: str) -> None:
    """Several sequences in one row, told by their positions, do not see each other."""
    model = hf.convert(make(name))
    ids, _ = batch("none")
    position = torch.tensor([[*range(7), *range(5)]])
    packed = model(ids[:1], position_ids=position, use_cache=False).logits
    assert_close(packed[:, :7], model(ids[:1, :7]).logits, 1e-5)
    assert_close(packed[:, 7:], model(ids[:1, 7:]).logits, 1e-5)


def test_mask_of_four_dimensions() -> None:
    model = hf.convert(make("llama"))
    ids, _ = batch("none")
    triangle = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = model(ids).logits
    mask = triangle.expand(3, 1, -1, -1)
    assert_close(model(ids, attention_mask=mask).logits, expected, 1e-5)
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert_close(model(ids, attention_mask=added).logits, expected, 1e-5)


def test_encoder_and_decoder() -> None:
    model = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.3,
        )
    ).eval()
    ids, mask = batch("right")
    targets = torch.randint(3, 60, (3, 7))
    hf.convert(model)
    results = []
    for implementation in (hf.NAME, DENSE):
        model.set_attn_implementation(implementation)
        results.append(
            model(ids, attention_mask=mask, decoder_input_ids=targets, use_cache=False).logits
        )
    assert_close(results[0], results[1], 1e-4)


def test_alpha_by_layer_and_head_is_saved_with_the_model(tmp_path: Path) -> None:
    model = hf.convert(make("llama"), [1.2, [1.0, 1.4, 1.6, 2.0]])
    ids, mask = batch("left")
    actual = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(DENSE)
    for layer, module in enumerate(m for m in model.modules() if hasattr(m, "q_proj")):
        print(layer, _attention.alpha_of(module, ids))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=hf.NAME)
    assert again.config._attn_implementation == hf.NAME
    assert hf.get_alpha(again) == [1.2, [1.0, 1.4, 1.6, 2.0]]
    assert_close(again(ids, attention_mask=mask).logits, actual, 1e-6)
    hf.set_alpha(again, 1.5)
    assert (again(ids, attention_mask=mask).logits - actual).abs().max().item() > 1e-3


def test_learnt_alpha() -> None:
    model = hf.convert(make("llama"), 1.3, learnable=True)
    ids, mask = batch("left")
    fixed = hf.convert(make("llama"), 1.3)
    fixed.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "alpha" not in k}, strict=True
    )
    assert_close(
        model(ids, attention_mask=mask).logits, fixed(ids, attention_mask=mask).logits, 1e-5
    )
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    found = {n: p for n, p in model.named_parameters() if n.endswith("flash_entmax_alpha_logits")}
    assert len(found) == 2
    for parameter in found.values():
        assert parameter.shape == (4,)
        assert parameter.grad is not None and parameter.grad.abs().min().item() > 0
    alpha = hf.get_alpha(model)
    assert_close(torch.tensor(alpha), torch.full((2, 4), 1.3), 1e-6)
    with pytest.raises(ValueError, match="to be learnt"):
        hf.convert(make("llama"), 1.0, learnable=True)


def test_annealing_callback() -> None:
    model = hf.convert(make("llama"), 1.0)
    callback = hf.AlphaAnnealing(AlphaSchedule(steps=4))
    seen = []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, _ = batch("none")
    state = transformers.TrainerState()
    for step in range(6):
        state.global_step = step
        callback.on_step_begin(None, state, None, model=model)
        seen.append(hf.get_alpha(model))
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    assert seen == [1.0, 1.125, 1.25, 1.375, 1.5, 1.5]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "bert"])
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = hf.convert(make(name))
    ids, mask = batch("left")
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(actual, expected, 1e-5)


def test_gradient_checkpointing() -> None:
    model = hf.convert(make("llama")).train()
    ids, mask = batch("left")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_patterns_are_recognised() -> None:
    functions = masking_utils
    assert _masks.recognise(functions.causal_mask_function) == ("causal", None)
    assert _masks.recognise(functions.bidirectional_mask_function) == ("bidirectional", None)
    sliding = functions.sliding_window_causal_mask_function(5)
    assert _masks.recognise(sliding) == ("causal", 5)
    for other in (
        functions.chunked_causal_mask_function(5, torch.zeros(1).long()),
        functions.sliding_window_bidirectional_mask_function(5),
        functions.and_masks(functions.causal_mask_function, functions.causal_mask_function),
        functions.or_masks(functions.sliding_window_overlay(5), functions.causal_mask_function),
        lambda b, h, q, k: k <= q,
    ):
        assert _masks.recognise(other) is None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize(("queries", "past", "kv_offset"), [(6, 0, 0), (2, 4, 0), (1, 7, 2)])
def test_small_masks_say_what_written_out_masks_say(
    queries: int, past: int, kv_offset: int, window: int | None, padded: bool
) -> None:
    keys = past + queries - kv_offset
    padding = torch.ones(2, past + queries, dtype=torch.bool)
    if padded:
        padding[1, : kv_offset + 2] = False
    function = (
        masking_utils.causal_mask_function
        if window is None
        else masking_utils.sliding_window_causal_mask_function(window)
    )
    arguments: dict[str, Any] = {
        "batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": past,
        "kv_offset": kv_offset, "mask_function": function, "attention_mask": padding,
    }  # fmt: skip
    small = _masks.attention_mask(**arguments)
    assert small is None or small.dim() == 3
    if small is not None:
        assert small.untyped_storage().nbytes() <= padding.numel()
    query, key = torch.randn(2, 2, queries, 4), torch.randn(2, 2, keys, 4)
    actual, _ = hf.attention_forward(nn.Module(), query, key, key, small, is_causal=True)
    written = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    expected, _ = hf.attention_forward(nn.Module(), query, key, key, written)
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 2)])
@pytest.mark.parametrize("queries", [6, 3, 1])
def test_path_of_the_gpu(queries: int, causal: bool, window: int | None) -> None:
    """What CUDA tensors take instead of a mask of keys, on the CPU."""
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 6, 8)
    there = torch.ones(2, 6, dtype=torch.bool)
    there[1, :2] = False
    pattern = _attention.Pattern(causal, window, there, None)
    mask = there if not causal else there[:, :, None].expand(-1, -1, 6 if window is None else 3)
    expected, _ = hf.attention_forward(nn.Module(), query, key, key, mask)
    actual = _attention.unpadded_attention(query, key, key, pattern, alpha=1.5)
    counts = there[:, -queries:] if causal or queries == 6 else there.new_ones(2, queries)
    assert_close(actual[counts], expected[counts], 1e-5)


def test_packed_lengths_as_vision_models_give_them() -> None:
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    actual, _ = hf.attention_forward(
        nn.Module(), query, key, key, None, is_causal=False, cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets, max_length_q=5, max_length_k=5,
    )  # fmt: skip
    for part in (slice(0, 4), slice(4, 9)):
        expected = dense_attention(query[:, :, part], key[:, :, part], key[:, :, part])
        assert_close(actual[:, part], expected.transpose(1, 2), 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"s_aux": torch.zeros(4)}, "s_aux: got a value"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_does_not_exist_is_an_error(arguments: dict[str, Any], message: str) -> None:
    query = torch.randn(1, 4, 5, 8)
    with pytest.raises(NotImplementedError, match=message):
        hf.attention_forward(nn.Module(), query, query, query, None, **arguments)


def test_bad_alphas() -> None:
    model = hf.convert(make("llama"))
    for alpha, error in [
        (0.0, ValueError),
        ("1", TypeError),
        (True, TypeError),
        ([1.0, None], TypeError),
        # Two layers of four heads.
        ([], ValueError),
        ([1.5], ValueError),
        ([1.5] * 3, ValueError),
        ([1.5, [1.5] * 3], ValueError),
        ([[1.5] * 5, 2.0], ValueError),
    ]:
        with pytest.raises(error, match="alpha: got"):
            hf.set_alpha(model, alpha)
        assert hf.get_alpha(model) == 1.5
    # From elsewhere, a configuration may say anything.
    model.config.flash_entmax_alpha = [1.5]
    with pytest.raises(ValueError, match="flash_entmax_alpha: got 1 values"):
        model(torch.ones(1, 3).long())


def test_only_models_that_use_it_have_an_alpha() -> None:
    plain = make("llama")
    plain.set_attn_implementation("sdpa")
    for call in (lambda m: hf.set_alpha(m, 2.0), hf.get_alpha):
        with pytest.raises(ValueError, match="model: got one with attention 'sdpa'"):
            call(plain)
        with pytest.raises(TypeError, match="model: got Linear"):
            call(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model: got Linear"):
        hf.convert(nn.Linear(2, 2))  # type: ignore[arg-type]
    # A wrapper is looked through.
    wrapper = nn.Sequential(hf.convert(plain))
    hf.set_alpha(wrapper, 2.0)
    assert hf.get_alpha(wrapper) == 2.0
    assert hf.get_alpha(plain) == 2.0


def test_a_learnt_alpha_is_not_set() -> None:
    model = hf.convert(make("llama"), 1.5, learnable=True)
    with pytest.raises(ValueError, match="alpha: is learnt"):
        hf.set_alpha(model, 2.0)
    # What a refused call would have overwritten is still there.
    for alpha, learnable in [([1.5], False), ("1", False), (1.0, True), ([1.5, 2.5], True)]:
        with pytest.raises((TypeError, ValueError), match="alpha: got"):
            hf.convert(model, alpha, learnable=learnable)  # type: ignore[arg-type]
        assert_close(torch.tensor(hf.get_alpha(model)), torch.full((2, 4), 1.5), 1e-6)
    ids, mask = batch("left")
    softmax = make("llama")
    softmax.set_attn_implementation("sdpa")
    softmax.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "alpha" not in k}, strict=True
    )
    hf.convert(model, 1.75, learnable=True)
    assert_close(torch.tensor(hf.get_alpha(model)), torch.full((2, 4), 1.75), 1e-6)
    # A number again: nothing learnt is left behind.
    hf.convert(model, 1.0)
    assert hf.get_alpha(model) == 1.0
    assert not any("alpha" in name for name, _ in model.named_parameters())
    assert_close(
        model(ids, attention_mask=mask).logits, softmax(ids, attention_mask=mask).logits, 1e-5
    )


def test_is_imported_when_it_is_first_used() -> None:
    program = """
import sys, flash_entmax
assert "transformers" not in sys.modules
flash_entmax.hf.register()
assert not hasattr(flash_entmax, "nothing")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_register_again_changes_nothing() -> None:
    check = modeling_utils.is_flash_attention_requested
    hf.register()
    assert modeling_utils.is_flash_attention_requested is check
    assert check(requested_attention_implementation="flash_attention_2")
    assert not check(requested_attention_implementation=hf.NAME)
