from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_entmax
from reference import assert_close, dense_attention, dense_weights


def random_problem(seed: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key, value and a random choice of every option."""
    pick = random.Random(seed)
    batch, kv_heads, group = pick.randint(1, 3), pick.randint(1, 2), pick.randint(1, 3)
    heads, queries, keys = kv_heads * group, pick.randint(1, 20), pick.randint(1, 40)
    size, value_size = pick.choice([1, 4, 8, 17]), pick.choice([1, 4, 9])
    tensors = [
        torch.randn(batch, heads, queries, size, dtype=torch.float64),
        2 * torch.randn(batch, kv_heads, keys, size, dtype=torch.float64),
        torch.randn(batch, kv_heads, keys, value_size, dtype=torch.float64),
    ]
    options: dict[str, Any] = {
        "alpha": pick.choice([1.0, 1.2, 1.5, 1.8, 2.0]),
        "causal": pick.random() < 0.5,
    }
    extra: dict[str, Any] = {
        "alpha": 1.05 + 0.9 * torch.rand(heads),
        "scale": 0.7,
        "window_left": pick.randint(0, 10),
        "window_right": pick.randint(0, 10),
        "key_lengths": torch.randint(0, keys + 1, (batch,), dtype=torch.int32),
        "key_mask": torch.rand(pick.choice([1, batch]), keys) < 0.7,
        "bias": torch.randn(
            pick.choice([1, batch]), pick.choice([1, heads]), pick.choice([1, queries]), keys,
            dtype=torch.float64,
        ),
        "alibi_slopes": torch.rand(heads),
        "softcap": 2.0,
        "query_scale": 0.5 + torch.rand(batch, pick.choice([1, heads]), queries),
    }  # fmt: skip
    for name, value in extra.items():
        if pick.random() < 0.35:
            options[name] = value
    return [tensor.to(dtype) for tensor in tensors], options


GRADIENTS = ("alpha", "bias", "alibi_slopes", "query_scale")


@pytest.mark.parametrize("attempt", range(60))
def test_everything_against_the_dense_computation(attempt: int, seed: int) -> None:
    """Output and every gradient of random problems in float64."""
    (query, key, value), options = random_problem(seed, torch.float64)
    leaves = {"query": query, "key": key, "value": value}
    for name in GRADIENTS:
        if isinstance(options.get(name), Tensor):
            leaves[name] = options[name]
    for leaf in leaves.values():
        leaf.requires_grad_()
    print({name: getattr(v, "shape", v) for name, v in (leaves | options).items()})
    actual = flash_entmax.attention(query, key, value, **options)
    expected = dense_attention(query, key, value, **options)
    assert_close(actual, expected, 1e-9)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((actual * weight).sum(), list(leaves.values()))
    others = torch.autograd.grad((expected * weight).sum(), list(leaves.values()))
    for name, grad, other in zip(leaves, grads, others, strict=True):
        print(name)
        # Single numbers are float32.
        assert_close(grad, other, 1e-7 if leaves[name].dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_types(dtype: torch.dtype, causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, 40, 16).to(dtype).requires_grad_() for _ in range(3))
    actual = flash_entmax.attention(query, key, value, causal=causal)
    expected = dense_attention(query, key, value, causal=causal)
    assert actual.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert_close(actual, expected, tolerance)
    weight = torch.randn_like(actual)
    grads = torch.autograd.grad((actual * weight).sum(), (query, key, value))
    others = torch.autograd.grad((expected * weight.double()).sum(), (query, key, value))
    for grad, other in zip(grads, others, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, other, 4 * tolerance)


def test_layouts_and_strides() -> None:
    query, key, value = (torch.randn(2, 3, 11, 8) for _ in range(3))
    expected = flash_entmax.attention(query, key, value)
    swapped = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
    actual = flash_entmax.attention(*swapped, layout="bnhd")
    assert torch.equal(actual, expected.transpose(1, 2))
    assert actual.is_contiguous()  # In the memory order of its inputs.
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (query, key, value)]
    assert torch.equal(flash_entmax.attention(*strided), expected)
    expanded = key[:, :1].expand(-1, 3, -1, -1).requires_grad_()
    one = flash_entmax.attention(query, key[:, :1], value[:, :1])
    many = flash_entmax.attention(query, expanded, value[:, :1].expand(-1, 3, -1, -1))
    assert_close(many, one, 1e-6)


def test_gradients_of_expanded_and_transposed_inputs() -> None:
    key = torch.randn(2, 1, 11, 8, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 11, 3, 8, dtype=torch.float64, requires_grad=True)

    def run(attend: Any) -> tuple[Tensor, ...]:
        wide = key.expand(-1, 3, -1, -1)
        output = attend(query.transpose(1, 2), wide, wide)
        return torch.autograd.grad(output.square().sum(), (query, key))

    for grad, other in zip(run(flash_entmax.attention), run(dense_attention), strict=True):
        assert_close(grad, other, 1e-9)


@pytest.mark.parametrize("name", ["query", "key", "value", "alpha", "bias"])
def test_one_gradient_alone(name: str) -> None:
    leaves = {
        "query": torch.randn(1, 2, 7, 4, dtype=torch.float64),
        "key": torch.randn(1, 2, 9, 4, dtype=torch.float64),
        "value": torch.randn(1, 2, 9, 4, dtype=torch.float64),
        "alpha": torch.tensor([1.3, 1.6], dtype=torch.float64),
        "bias": torch.randn(2, 1, 9, dtype=torch.float64),
    }
    leaves[name].requires_grad_()

    def run(attend: Any) -> Tensor:
        q, k, v, alpha, bias = leaves.values()
        return torch.autograd.grad(
            attend(q, k, v, alpha=alpha, bias=bias).square().sum(), leaves[name]
        )[0]

    assert_close(run(flash_entmax.attention), run(dense_attention), 1e-8)


@pytest.mark.parametrize("attempt", range(10))
def test_varlen_equals_one_by_one(attempt: int, seed: int) -> None:
    pick = random.Random(seed)
    lengths = [(pick.randint(0, 9), pick.randint(0, 12)) for _ in range(pick.randint(1, 4))]
    cu = [
        torch.tensor([0, *itertools.accumulate(pair[i] for pair in lengths)], dtype=torch.int32)
        for i in (0, 1)
    ]
    query = torch.randn(int(cu[0][-1]), 4, 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(int(cu[1][-1]), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    options: dict[str, Any] = {"causal": pick.random() < 0.5, "alpha": 1.4}
    actual = flash_entmax.attention_varlen(query, key, value, *cu, **options)
    parts = []
    for b in range(len(lengths)):
        rows, columns = slice(cu[0][b], cu[0][b + 1]), slice(cu[1][b], cu[1][b + 1])
        if lengths[b][0] == 0 or lengths[b][1] == 0:
            parts.append(query[rows] * 0)
            continue
        q, k, v = (t.transpose(0, 1)[None] for t in (query[rows], key[columns], value[columns]))
        parts.append(dense_attention(q, k, v, **options)[0].transpose(0, 1))
    expected = torch.cat(parts)
    assert_close(actual, expected, 1e-9)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((actual * weight).sum(), (query, key, value))
    others = torch.autograd.grad((expected * weight).sum(), (query, key, value), allow_unused=True)
    for grad, other in zip(grads, others, strict=True):
        assert_close(grad, torch.zeros_like(grad) if other is None else other, 1e-8)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_support_and_weights(layout: str) -> None:
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 13, 8)
    expected = dense_weights(query, key, causal=True, alpha=1.6)
    if layout == "bnhd":
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    options: dict[str, Any] = {"causal": True, "alpha": 1.6, "layout": layout}
    dense = flash_entmax.attention_weights(query, key, dense=True, **options)
    assert_close(dense, expected, 1e-6)
    sparse = flash_entmax.attention_weights(query, key, **options)
    assert sparse.layout == torch.sparse_csr
    assert torch.equal(sparse.to_dense().view_as(dense), dense)
    result = flash_entmax.support(query, key, **options)
    assert result.row_offsets[-1] == result.key_index.numel() == (dense > 0).sum()


def test_empty_problems() -> None:
    for shape, keys in [((0, 2, 3, 4), 5), ((2, 2, 0, 4), 5), ((2, 2, 3, 4), 0)]:
        query = torch.randn(shape, requires_grad=True)
        key = torch.randn(shape[0], 2, keys, 4, requires_grad=True)
        output = flash_entmax.attention(query, key, key)
        assert torch.equal(output, torch.zeros(shape))
        output.sum().backward()
        assert query.grad is not None and torch.equal(query.grad, torch.zeros(shape))


def test_nan_stays_in_its_rows() -> None:
    query = torch.randn(1, 1, 8, 4)
    key, value = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    query[0, 0, 3, 0] = torch.nan
    output = flash_entmax.attention(query, key, value)
    assert bool(output[0, 0, 3].isnan().all())
    assert bool(output[0, 0, [0, 1, 2, 4, 5, 6, 7]].isfinite().all())


@pytest.mark.parametrize("threads", [1, 2])
def test_deterministic(threads: int) -> None:
    """The same bits from run to run and for any number of threads."""
    inputs = [torch.randn(2, 3, 70, 16, requires_grad=True) for _ in range(3)]
    before = torch.get_num_threads()

    def run() -> list[Tensor]:
        output = flash_entmax.attention(*inputs, causal=True)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        torch.set_num_threads(threads)
        for one, other in zip(first, run(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(False)


def test_no_gradient_where_none_is_wanted() -> None:
    query = torch.randn(1, 1, 4, 4, requires_grad=True)
    with torch.no_grad():
        assert not flash_entmax.attention(query, query, query).requires_grad
    with torch.inference_mode():
        flash_entmax.attention(query, query, query)
    assert flash_entmax.attention(query, query.detach(), query.detach()).requires_grad


def test_second_derivative_is_an_error() -> None:
    query = torch.randn(1, 1, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        flash_entmax.attention(query, query, query).sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        name: torch.randn(2, 4, 6, 8) for name in ("query", "key", "value")
    }
    return flash_entmax.attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query: got list"),
        ({"query": torch.ones(2, 4, 6, 8).long()}, TypeError, "query: got torch.int64"),
        ({"key": torch.randn(2, 4, 6, 8).half()}, TypeError, "key: got torch.float16"),
        ({"value": None}, TypeError, "value: got NoneType"),
        ({"key": torch.randn(2, 4, 6, 8, device="meta")}, ValueError, "key: got a tensor on meta"),
        ({"query": torch.randn(4, 6, 8)}, ValueError, "query: got shape"),
        ({"key": torch.randn(2, 3, 6, 8), "value": torch.randn(2, 3, 6, 8)}, ValueError,
         "key: got 3 heads"),
        ({"key": torch.randn(2, 4, 6, 7)}, ValueError, "key: got head_size 7"),
        ({"key": torch.randn(1, 4, 6, 8)}, ValueError, "key: got batch 1"),
        ({"value": torch.randn(2, 4, 5, 8)}, ValueError, "value: got shape"),
        ({"alpha": 0.0}, ValueError, "alpha: got 0;"),
        ({"alpha": -1e-9}, ValueError, "alpha: got -1e-09;"),
        ({"alpha": float("inf")}, ValueError, "alpha: got inf"),
        ({"alpha": "1.5"}, TypeError, "alpha: got str"),
        ({"alpha": torch.ones(3)}, ValueError, r"alpha: got shape \[3\]"),
        ({"alpha": torch.tensor([1.5, 1.5, 1.5, -0.9])}, ValueError, "alpha: got -0.9 for head 3"),
        ({"scale": float("nan")}, ValueError, "scale: got nan"),
        ({"causal": 1}, TypeError, "causal: got int"),
        ({"window_left": -1}, ValueError, "window_left: got -1"),
        ({"window_right": 1.5}, TypeError, "window_right: got float"),
        ({"key_lengths": torch.tensor([3, 7])}, ValueError, "key_lengths: got 7"),
        ({"key_lengths": torch.tensor([3.0, 7.0])}, TypeError, "key_lengths: got torch.float32"),
        ({"key_lengths": torch.tensor([3])}, ValueError, "key_lengths: got shape"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask: got torch.float32"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "key_mask"),
        ({"bias": torch.ones(6, 5)}, ValueError, "bias"),
        ({"bias": torch.ones(6, 6, dtype=torch.bool)}, TypeError, "bias: got torch.bool"),
        ({"alibi_slopes": -torch.ones(4)}, ValueError, "alibi_slopes: got -1"),
        ({"alibi_slopes": torch.ones(5)}, ValueError, r"alibi_slopes: got shape \[5\]"),
        ({"alibi_slopes": torch.ones(0)}, ValueError, r"alibi_slopes: got shape \[0\]"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1"),
        ({"query_scale": torch.ones(5)}, ValueError, "query_scale"),
        ({"layout": "nhd"}, ValueError, "layout: got 'nhd'"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call()
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale_heads", [0, 1, 4])
def test_slopes_of_the_first_heads(scale_heads: int, kv_heads: int, layout: str) -> None:
    """The others have none, also where the two kinds of heads are computed in a call each."""
    tensors = [torch.randn(2, heads, 30, 8) for heads in (4, kv_heads, kv_heads)]
    if layout == "bnhd":
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    alpha, slopes = torch.tensor([1.2, 1.5, 1.7, 2.0]), torch.rand(2)
    scale = 0.5 + torch.rand(2, scale_heads, 30) if scale_heads else None
    leaves = [t.requires_grad_() for t in [*tensors, alpha, slopes, scale] if t is not None]

    def results(output: Tensor) -> list[Tensor]:
        return [output, *torch.autograd.grad(output.sin().sum(), leaves)]

    options: dict[str, Any] = {"alpha": alpha, "causal": True, "query_scale": scale}
    padded = torch.cat([slopes, torch.zeros(2)])
    want = results(flash_entmax.attention(*tensors, alibi_slopes=padded, **options))
    got = results(flash_entmax.attention(*tensors, alibi_slopes=slopes, **options))
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, 1e-6)
    if kv_heads == 1:
        return  # Two of the four heads share a key head with the others.
    arguments = flash_entmax._attention._arguments(
        *tensors, alpha, True, None, None, None, None, None, None, slopes, 0.0,
        None if scale is None else scale.expand(2, 4, 30),
    )  # fmt: skip
    in_parts = flash_entmax._attention._run_in_parts(arguments)
    assert in_parts.stride() == got[0].stride()
    for x, y in zip(results(in_parts), want, strict=True):
        assert_close(x, y, 1e-6)


def test_bad_packed_sequences() -> None:
    query = torch.randn(5, 2, 4)
    good = torch.tensor([0, 2, 5])
    flash_entmax.attention_varlen(query, query, query, good, good)
    for bad, error, message in [
        (torch.tensor([0, 2, 4]), ValueError, "cu_query: got last offset 4"),
        (torch.tensor([0, 6, 5]), ValueError, "cu_query: got 6"),
        (torch.tensor([0.0, 2.0, 5.0]), TypeError, "cu_query: got torch.float32"),
        (torch.tensor([0, 5]), ValueError, "cu_key"),
    ]:
        with pytest.raises(error, match=message):
            flash_entmax.attention_varlen(query, query, query, bad, good)
    with pytest.raises(ValueError, match="query: got shape"):
        flash_entmax.attention_varlen(query[0], query, query, good, good)
    with pytest.raises(ValueError, match="max_key_length: got -1"):
        flash_entmax.attention_varlen(query, query, query, good, good, max_key_length=-1)
