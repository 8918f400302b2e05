"""CUDA tensors: PyTorch's machinery (FLASH_ENTMAX_TEST_DEVICE: see cuda_cases.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import flash_entmax
from cuda_cases import DEVICE, HALF, KINDS, LENGTHS, TOLERANCE, cuda, leaves, needs_gpu, strided
from flash_entmax import _library
from reference import assert_close


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype: torch.dtype) -> None:
    tensors = leaves(torch.float32, *[(2, 4, 600, 64)] * 3)
    with torch.autocast(DEVICE, dtype=dtype):
        output = flash_entmax.attention(*tensors, causal=True)
        softmax = flash_entmax.attention(*tensors, causal=True, alpha=1.0)
    assert output.dtype == softmax.dtype == dtype
    half = [t.detach().to(dtype) for t in tensors]
    assert torch.equal(output, flash_entmax.attention(*half, causal=True))
    output.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)


@needs_gpu
def test_again_and_twice() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 600, 64)] * 3)
    output = flash_entmax.attention(*tensors)
    first = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), tensors)
    output = flash_entmax.attention(*tensors)
    gradient = torch.autograd.grad(output.sum(), tensors, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"twice|does not require grad"):
        gradient[0].sum().backward()
    with torch.inference_mode():
        assert torch.equal(flash_entmax.attention(*tensors), output)
    with torch.autograd.graph.save_on_cpu():
        output = flash_entmax.attention(*tensors)
    again = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compile(dtype: torch.dtype, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(*tensors: Tensor) -> Tensor:
        doubled = [2 * t for t in tensors]
        return flash_entmax.attention(*doubled, causal=True) + tensors[0]

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (256, 640, 300) if dynamic else (640,):
        tensors = leaves(dtype, *[(2, 4, length, 64)] * 3)
        actual, expected = compiled(*tensors), function(*tensors)
        assert_close(actual, expected, TOLERANCE[dtype])
        weight = torch.randn_like(actual)
        grads = torch.autograd.grad(actual, tensors, weight)
        others = torch.autograd.grad(expected, tensors, weight)
        for one, other in zip(grads, others, strict=True):
            assert_close(one, other, TOLERANCE[dtype])
        with torch.no_grad():
            assert_close(compiled(*tensors), expected, TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compile_with_strides(kind: str) -> None:
    torch._dynamo.reset()
    base, tensors = strided(kind, 600, torch.bfloat16)

    def function(*given: Tensor) -> Tensor:
        return flash_entmax.attention(*given, causal=True)

    actual = torch.compile(function, fullgraph=True)(*tensors)
    expected = function(*tensors)
    assert_close(actual, expected, 1e-6)
    grads = torch.autograd.grad(actual.sum(), base, retain_graph=True)
    others = torch.autograd.grad(expected.sum(), base, retain_graph=True)
    for one, other in zip(grads, others, strict=True):
        assert_close(one, other, 2e-2)


@cuda
def test_the_tracer_knows_the_size_of_what_is_kept() -> None:
    operator = _library.operators.attention_forward
    lengths = torch.tensor([3, 80], dtype=torch.int32, device="cuda")
    ends = torch.tensor([0, 40, 80], dtype=torch.int32, device="cuda")
    features: list[dict[int, Any]] = [
        {}, {14: 100}, {14: 2**40, 15: 2**40}, {16: 2.0}, {3: torch.full((4,), 1.5, device="cuda")},
        {12: -1.0}, {11: 2.0}, {6: torch.ones(4, device="cuda")},
        {7: lengths}, {7: lengths, 13: False, 14: 40, 15: 40}, {9: ends, 10: ends},
    ]  # fmt: skip
    for length, size in itertools.product((90, 140, 700), (32, 64)):
        factors = torch.ones(2, 4, length, device="cuda")
        for dtype in TOLERANCE:
            for feature in [*features, {4: factors}]:
                batch = 1 if 9 in feature else 2
                query = torch.randn(batch, 4, length, size, device="cuda").to(dtype)
                arguments: list[Any] = [query, query, query, *[None] * 8]
                arguments += [1.5, None, True, None, None, 0.0, 0, 0, True]
                for position, change in feature.items():
                    arguments[position] = change
                real = operator(*arguments)[2]
                with FakeTensorMode(shape_env=ShapeEnv()) as mode:
                    fake = operator(
                        *(
                            mode.from_tensor(a, static_shapes=True) if isinstance(a, Tensor) else a
                            for a in arguments
                        )
                    )[2]
                assert fake.shape == real.shape, (length, size, dtype, feature)


@cuda
def test_compiled_into_cuda_graphs() -> None:
    torch._dynamo.reset()
    module = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)

    def step(query: Tensor) -> Tensor:
        return flash_entmax.attention(module(query), query, query, causal=True).square().mean()

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        query = torch.randn(2, 4, 640, 64, device="cuda").bfloat16()
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = compiled(query), step(query)
        assert_close(actual, expected, 2e-2)
        (one,) = torch.autograd.grad(actual, module.weight)
        (other,) = torch.autograd.grad(expected, module.weight)
        assert_close(one, other, 2e-2)


@needs_gpu
def test_export() -> None:
    module = flash_entmax.nn.EntmaxAttention(64, 4, causal=True, positions="rope").to(DEVICE)
    hidden = torch.randn(2, 30, 64, device=DEVICE)
    program = torch.export.export(module, (hidden,))
    assert_close(program.module()(hidden), module(hidden), 1e-5)


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", LENGTHS)
def test_cuda_graph(length: int, dtype: torch.dtype) -> None:
    tensors = leaves(dtype, *[(1, 4, length, 64)] * 3)
    weight = torch.randn(1, 4, length, 64, device="cuda").to(dtype)

    def step() -> tuple[Tensor, ...]:
        output = flash_entmax.attention(*tensors, causal=True)
        return output, *torch.autograd.grad(output, tensors, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # As PyTorch's documentation asks for.
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*tensors, weight):
                tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        results = [t.clone() for t in captured]
        for one, other in zip(results, step(), strict=True):
            assert torch.equal(one, other)


@cuda
def test_streams() -> None:
    """Many calls on several streams, whose memory is given back while others run."""
    lengths = [700, 300, 1500, 90]
    inputs = [leaves(torch.bfloat16, *[(2, 4, length, 64)] * 3) for length in lengths]

    def step(tensors: list[Tensor]) -> list[Tensor]:
        output = flash_entmax.attention(*tensors, causal=True)
        return [output.detach(), *torch.autograd.grad(output.sum(), tensors)]

    expected = [step(tensors) for tensors in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        actual: list[list[Tensor]] = [[] for _ in inputs]
        for i, (stream, tensors) in enumerate(zip(streams, inputs, strict=True)):
            with torch.cuda.stream(stream):
                actual[i] = step(tensors)
        torch.cuda.synchronize()
        for ours, others in zip(actual, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, others, strict=True))


@cuda
def test_nothing_synchronises() -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 700, 64)] * 3)
    alpha = torch.full((4,), 1.5, device="cuda", requires_grad=True)
    flash_entmax.attention(*tensors).sum().backward()  # What PyTorch does once.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_entmax.attention(*tensors, causal=True).sum().backward()
        flash_entmax.attention(*tensors, alpha=alpha).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("length", LENGTHS)
def test_determinism(length: int) -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, length, 64)] * 3)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(5):
            output = flash_entmax.attention(*tensors, causal=True)
            results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    finally:
        torch.use_deterministic_algorithms(False)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@needs_gpu
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    tensors = leaves(torch.bfloat16, *[(2, 4, 640, 64)] * 3)
    plain = torch.autograd.grad(flash_entmax.attention(*tensors).square().sum(), tensors)
    output = torch.utils.checkpoint.checkpoint(
        flash_entmax.attention, *tensors, use_reentrant=reentrant
    )
    output.square().sum().backward()
    for tensor, expected in zip(tensors, plain, strict=True):
        assert tensor.grad is not None and torch.equal(tensor.grad, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batched", ["query", "parameters", "lengths"])
def test_vmap(batched: str, dtype: torch.dtype) -> None:
    query, key = (t.detach() for t in leaves(dtype, (3, 2, 4, 530, 32), (3, 2, 2, 530, 32)))
    alpha = 1.1 + 0.8 * torch.rand(3, 4, device=DEVICE)
    scale = 0.5 + torch.rand(3, 530, device=DEVICE)
    lengths = torch.tensor([[530, 3], [20, 100], [530, 530]], device=DEVICE)
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    dims: tuple[int | None, ...]
    attend = flash_entmax.attention
    function, inputs, dims = {
        "query": (lambda q, k: attend(q, k, k, causal=True), (query, key), (0, 0)),
        "parameters": (
            lambda q, k, a, s: attend(q, k, k, alpha=a, query_scale=s),
            (query[0], key[0], alpha, scale),
            (None, None, 0, 0),
        ),
        "lengths": (
            lambda q, k, n: attend(q, k, k, key_lengths=n, causal=True),
            (query, key, lengths),
            (0, 0, 0),
        ),
    }[batched]
    entries = [
        tuple(t if d is None else t[i] for t, d in zip(inputs, dims, strict=True)) for i in range(3)
    ]
    expected = torch.stack([function(*entry) for entry in entries])
    assert_close(vmap(function, in_dims=dims)(*inputs), expected, TOLERANCE[dtype])
    floating = tuple(i for i, t in enumerate(inputs) if t.is_floating_point())

    def loss(*arguments: Tensor) -> Tensor:
        return function(*arguments).float().square().sum()

    gradients = vmap(grad(loss, argnums=floating), in_dims=dims)(*inputs)
    for position in floating:
        print("argument", position)
        stacked = torch.stack([grad(loss, argnums=position)(*entry) for entry in entries])
        assert_close(gradients[position], stacked, 4 * TOLERANCE[dtype])


def operator_arguments(length: int, dtype: torch.dtype, everything: bool) -> tuple[Any, ...]:
    tensors = leaves(dtype, *[(2, 4, length, 64)] * 3)
    extra: list[Any] = [None] * 8
    if everything:
        extra[0] = torch.tensor([1.2, 1.4, 1.6, 1.8], device=DEVICE, requires_grad=True)
        extra[1] = (0.5 + torch.rand(2, 4, length, device=DEVICE)).requires_grad_()
        extra[3] = torch.rand(4, device=DEVICE, requires_grad=True)
        # A row without keys has a threshold that is not a number, which is not equal to itself.
        extra[4] = torch.tensor([length, length], device=DEVICE, dtype=torch.int32)
    return (*tensors, *extra, 1.5, None, True, None, None, 0.0, 0, 0)


@needs_gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("length", "dtype"), [(9, torch.float32), (520, torch.bfloat16)])
def test_opcheck(length: int, dtype: torch.dtype, everything: bool) -> None:
    arguments = operator_arguments(length, dtype, everything)
    bare = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    operators = _library.operators
    # Long rows keep their supports in the order in which they are found: the same numbers, in other
    # places from run to run. test_compile compares what follows from them.
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if everything or length < 512:
        utilities.append("test_aot_dispatch_dynamic")
    torch.use_deterministic_algorithms(True)  # Bytes that nothing writes have a value then.
    try:
        torch.library.opcheck(
            operators.attention.default, (*arguments, True), test_utils=tuple(utilities)
        )
        torch.library.opcheck(operators.attention_forward.default, (*bare, False))
        torch.library.opcheck(operators.attention_support.default, bare)
        output, _, saved = operators.attention_forward(*bare, True)
        wanted = 0b1101111 if everything else 0b111
        torch.library.opcheck(
            operators.attention_backward.default,
            (*bare, torch.randn_like(output), saved, wanted & ~(1 << 4)),
        )
    finally:
        torch.use_deterministic_algorithms(False)


@needs_gpu
def test_fully_sharded_data_parallel(tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if DEVICE == "cuda" and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(
        backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    try:
        model = torch.nn.Sequential(
            *(flash_entmax.nn.EntmaxAttention(64, 4, causal=True) for _ in range(2))
        ).to(DEVICE)
        hidden = torch.randn(2, 90, 64, device=DEVICE)
        expected = model(hidden)
        expected.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        mesh = distributed.init_device_mesh(DEVICE, (1,))
        for module in model:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        actual = model(hidden)
        assert_close(actual, expected, 1e-5)
        actual.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert_close(parameter.grad.full_tensor(), grads[name], 1e-4)
    finally:
        distributed.destroy_process_group()


@cuda
def test_memory_grows_with_the_length() -> None:
    tensors = leaves(torch.bfloat16, *[(1, 1, 65536, 64)] * 3)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_entmax.attention(*tensors, causal=True).sum().backward()
    # One matrix of scores in 16 bits would be 8 GiB.
    assert torch.cuda.max_memory_allocated() - before < 2**31
